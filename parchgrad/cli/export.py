"""`parchgrad export`: a model and its table as one graph for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from parchgrad.cli.shared import MODELS_DIR, TABLES_DIR, load_named_model, named, progress_bar

if TYPE_CHECKING:
    from parchgrad.export import Exported

FORMATS = ("onnx", "triton", "openvino")
# Where each goes that is not told. The service looks for graphs where triton's go.
OUT = {"onnx": "{name}.onnx", "triton": "onnx_graphs", "openvino": "openvino_graphs"}
IMAGES = click.Path(exists=True, path_type=Path)
# What only some formats know.
ONLY = {
    "external_data": ("onnx", "triton"),
    "max_batch_size": ("triton",),
    "queue_microseconds": ("triton",),
    "threads": ("triton",),
}


@click.command("export")
@click.argument("model")
@click.option("--format", "kind", type=click.Choice(FORMATS), default="triton", show_default=True,
              help="One ONNX file; an entry of a Triton model repository; or OpenVINO's IR.")  # fmt: skip
@click.option("--version", type=click.IntRange(1), help="Version of the model.  [default: the highest]")
@click.option("--table", help="Selection table.  [default: the one of the model's name and version]")
@click.option("--out", type=click.Path(path_type=Path),
              help="File (onnx), or folder of the entries.  [default: NAME.onnx; onnx_graphs; "
              "openvino_graphs]")  # fmt: skip
@click.option("--backward", type=click.Choice(["pruned", "dense"]),
              help="pruned computes only what an infinite gamma keeps, dense everything; the maps are the same.  "
              "[default: pruned; dense with openvino]")  # fmt: skip
@click.option("--conserve", type=click.Choice(["independent", "exact", "none"]),
              help="The rule's conservation, which is fixed in a graph.  [default: the table's]")  # fmt: skip
@click.option("--images", type=IMAGES, multiple=True,
              help="Image file, or folder of them, to check the graph on, up to 8.  "
              "[default: synthetic ones]")  # fmt: skip
@click.option("--external-data", is_flag=True, help="Weights in a file of their own, beside the graph's.")
@click.option("--max-batch-size", type=click.IntRange(1), default=8, show_default=True,
              help="Most images Triton gives the graph together.")  # fmt: skip
@click.option("--queue-microseconds", type=click.IntRange(0), default=2000, show_default=True,
              help="How long Triton lets an image wait for others.")  # fmt: skip
@click.option("--threads", type=click.IntRange(0), default=0, show_default=True,
              help="Of ONNX Runtime in Triton; 0: as many as there are cores.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace what is there already.")
@MODELS_DIR
@TABLES_DIR
@click.pass_context
def export(
    context: click.Context, model: str, kind: str, version: int | None, table: str | None, out: Path | None,
    backward: str | None, conserve: str | None, images: tuple[Path, ...], external_data: bool, max_batch_size: int,
    queue_microseconds: int, threads: int, force: bool, models_dir: Path, tables_dir: Path,
) -> None:  # fmt: skip
    """Export MODEL with its selection table as one graph: predictions and maps, without PyTorch.

    The graph is first run on images of mixed targets and options, and compared with PyTorch in float32 and float64;
    the report lies beside it. Where they differ nothing is written.
    """
    from parchgrad import export as exports
    from parchgrad.errors import ExportError
    from parchgrad.tables import load_table

    _refuse_others(context, kind)
    if version is not None and "/" in model:
        raise click.UsageError(f"'{model}' says a version already; --version says another.")
    loaded = load_named_model(model if version is None else f"{model}/{version}", models_dir)
    opened = load_table(named(table or f"{loaded.name}/{loaded.version}", tables_dir), loaded)
    where = out or Path(OUT[kind].format(name=loaded.name))
    if kind == "onnx" and where.exists() and not where.is_file():
        raise ExportError(f"--out is '{where}', which is no file; --format onnx writes one file.")
    files = _files(images)
    with progress_bar("Exporting", "steps") as progress:
        if kind == "onnx":
            done = exports.export_onnx(
                loaded, opened, where, backward=backward or "pruned", conserve=conserve, external_data=external_data,
                images=files, force=force, progress=progress,
            )  # fmt: skip
        elif kind == "triton":
            done = exports.export_triton(
                loaded, opened, where, backward=backward or "pruned", conserve=conserve, external_data=external_data,
                images=files, max_batch_size=max_batch_size, queue_microseconds=queue_microseconds, threads=threads,
                force=force, progress=progress,
            )  # fmt: skip
        else:
            done = exports.export_openvino(
                loaded, opened, where, backward=backward or "dense", conserve=conserve, images=files, force=force,
                progress=progress,
            )  # fmt: skip
    _show(done)


def _refuse_others(context: click.Context, kind: str) -> None:
    """Usage error for an option that the format has no use for."""
    for parameter in context.command.params:
        name = parameter.name or ""
        given = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if given and kind not in ONLY.get(name, FORMATS):
            raise click.UsageError(f"{parameter.opts[0]} does not go with --format {kind}.")


def _files(given: tuple[Path, ...]) -> list[Path]:
    """The image files, and those in the folders, by name."""
    from parchgrad.errors import DataError
    from parchgrad.sources.folder import IMAGE_SUFFIXES

    found: list[Path] = []
    for path in given:
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES) if path.is_dir() else [path]
        if not inside:
            raise DataError(f"Folder '{path}' holds no images.")
        found += inside
    return found


def _show(done: Exported) -> None:
    report = done.report
    lines = {
        "written": f"{done.path}, {done.path.stat().st_size:,} bytes",
        "checked": f"{report['checks']} images in batches of {', '.join(map(str, report['batches']))} "
        f"on {report['runtime']}",
        "logits": f"off by at most {report['largest_logits_error']:.1e} of their range",
        "maps": f"{report['same']} the same; {report['ties']} that float32 decides otherwise, "
        f"{report['undecided']} that it cannot decide; off by at most "
        f"{report['largest_map_error']:.1e}, rank correlation {report['lowest_rank_correlation']:.4f} and above",
    }
    for name, value in lines.items():
        click.echo(f"{name:12}  {value}")
