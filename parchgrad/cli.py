"""The `parchgrad` command: arguments in, one library call, text out."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from parchgrad import __version__
from parchgrad.errors import ParchGradError

if TYPE_CHECKING:
    from collections.abc import Callable

    from parchgrad.models import Model
    from parchgrad.tables import SelectionTable

# torch is imported inside the commands: `parchgrad --help` stays instant.
FOLDER = click.Path(file_okay=False, path_type=Path)
MODELS_DIR = click.option(
    "--models-dir", type=FOLDER, default=Path("models"), show_default=True,
    help="Model repository.",
)  # fmt: skip
TABLES_DIR = click.option(
    "--tables-dir", type=FOLDER, default=Path("selection_tables"), show_default=True,
    help="Folder of the selection tables.",
)  # fmt: skip
DEVICE = click.option("--device", default="cpu", show_default=True, help="Torch device, such as cpu or cuda.")


class ListParameter(click.ParamType):  # type: ignore[type-arg]  # generic only from click 8.5 on
    """Comma-separated text to a tuple: of numbers, or of names."""

    def __init__(self, kind: type, length: int | None = None) -> None:
        self.kind, self.length = kind, length
        self.name = "numbers" if kind is not str else "patterns"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        try:
            items = tuple(self.kind(item) for item in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a comma-separated list of {self.kind.__name__}", param, ctx)
        if self.length is not None and len(items) != self.length:
            self.fail(f"{value!r} has {len(items)} entries, expected {self.length}", param, ctx)
        return items


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="parchgrad")
def cli() -> None:
    """Predictions with ParchGrad saliency maps: model packages, selection tables, explanations."""
    # 'module:factory' architectures are looked up where the command is run, as with `python -m`.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def main() -> None:
    """Entry point: a library error is one line on standard error and exit code 1."""
    try:
        cli(standalone_mode=True)
    except ParchGradError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)


@cli.group("model")
def model_group() -> None:
    """Model packages: architecture, weights, labels and preprocessing."""


@model_group.command("add")
@click.argument("name")
@click.option("--arch", required=True, help="torchvision model name, or module:factory of your own.")
@click.option("--weights", required=True, type=click.Path(exists=True, dir_okay=False), help=".safetensors or .pth.")
@click.option(
    "--labels", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text file, one class a line in index order: a name, id<tab>name, or ImageNet's 'n01440764 tench'.",
)  # fmt: skip
@click.option("--size", default=224, show_default=True, help="Side of the square input, pixels.")
@click.option("--rule", type=click.Choice(["shorter_side", "stretch", "native"]), default="shorter_side",
              show_default=True, help="How an image is brought to size; native keeps its own.")  # fmt: skip
@click.option("--resize", type=int, help="Shorter side before the centre crop.  [default: size * 256 / 224]")
@click.option("--mean", type=ListParameter(float, 3), default="0.485,0.456,0.406", show_default=True)
@click.option("--std", type=ListParameter(float, 3), default="0.229,0.224,0.225", show_default=True)
@click.option("--interpolation", type=click.Choice(["bilinear", "bicubic"]), default="bilinear", show_default=True)
@click.option("--argument", "arguments", multiple=True, metavar="KEY=JSON", help="Extra argument of the architecture.")
@click.option("--version", type=int, help="Version number.  [default: the next]")
@MODELS_DIR
def model_add(
    name: str, arch: str, weights: str, labels: Path, size: int, rule: str, resize: int | None,
    mean: tuple[float, float, float], std: tuple[float, float, float], interpolation: str,
    arguments: tuple[str, ...], version: int | None, models_dir: Path,
) -> None:  # fmt: skip
    """Import a model as package NAME; weights are checked against the architecture first."""
    from parchgrad.models import add_model, read_lines
    from parchgrad.preprocessing import Preprocessing

    if resize is None and rule == "shorter_side":
        resize = round(size * 256 / 224)
    folder = add_model(
        name,
        architecture=arch,
        weights=weights,
        labels=read_lines(labels),
        preprocessing=Preprocessing((size, size), rule, resize, mean, std, interpolation),
        arguments=dict(_key_value(text) for text in arguments),
        models_dir=models_dir,
        version=version,
    )
    click.echo(f"Added {folder}")


@model_group.command("list")
@MODELS_DIR
def model_list(models_dir: Path) -> None:
    """Names and versions of the packages in the model repository."""
    from parchgrad.versions import is_version

    folders = [path.parent for path in models_dir.glob("*/*/model.yaml")]
    found = sorted((f.parent.name, int(f.name)) for f in folders if is_version(f.name))
    for name, version in found:
        click.echo(f"{name} {version}")
    if not found:
        click.echo(f"No model packages in '{models_dir}'.", err=True)


@model_group.command("show")
@click.argument("model")
@MODELS_DIR
def model_show(model: str, models_dir: Path) -> None:
    """What package MODEL holds, after checking it."""
    from parchgrad.layers import convolutions

    loaded = _load_model(model, models_dir)
    convs = convolutions(loaded.module)
    click.echo(f"name            {loaded.name}, version {loaded.version}")
    click.echo(f"architecture    {loaded.architecture}")
    click.echo(f"parameters      {sum(p.numel() for p in loaded.module.parameters()):,}")
    click.echo(f"convolutions    {len(convs)}, {sum(convs.values()):,} channels")
    click.echo(f"classes         {len(loaded.labels)}: {', '.join(loaded.labels[:4])} ...")
    click.echo(f"preprocessing   {loaded.preprocessing}")
    click.echo(f"weights_sha256  {loaded.weights_sha256}")


@cli.group("table")
def table_group() -> None:
    """Selection tables: which channels belong to which class."""


@table_group.command("build")
@click.argument("model")
@click.option(
    "--data", required=True, type=FOLDER, help="Images: one folder a class, named by class name, id or index."
)
@click.option("--force", is_flag=True, help="Replace the table if the model version has one already.")
@click.option("--quantile", type=click.FloatRange(0, 1, min_open=True), default=0.1, show_default=True,
              help="Default share of a layer's channels to select.")  # fmt: skip
@click.option("--gamma", type=float, default="inf", show_default=True, help="A number in [0, 1e6], or inf.")
@click.option("--layers", type=ListParameter(str), default="*", show_default=True, help="Default glob patterns.")
@click.option("--normality/--no-normality", default=True, show_default=True, help="Run the Shapiro-Wilk test.")
@click.option("--normality-filter/--no-normality-filter", default=False, show_default=True,
              help="Leave normal channels out by default.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@click.option("--workers", type=click.IntRange(0), default=0, show_default=True, help="Decoding processes.")
@click.option("--seed", type=int, default=0, show_default=True, help="Draws the normality test's images.")
@DEVICE
@MODELS_DIR
@TABLES_DIR
def table_build(
    model: str, data: Path, force: bool, quantile: float, gamma: float,
    layers: tuple[str, ...], normality: bool, normality_filter: bool, batch_size: int, workers: int, seed: int,
    device: str, models_dir: Path, tables_dir: Path,
) -> None:  # fmt: skip
    """Build the selection table of MODEL from images, with its golden record."""
    from parchgrad import golden
    from parchgrad.build import build_table
    from parchgrad.explainer import Explainer
    from parchgrad.tables import Defaults

    loaded = _load_model(model, models_dir)
    folder = tables_dir / loaded.name / loaded.version
    if folder.exists() and not force:
        raise click.ClickException(f"'{folder}' exists already; --force replaces it.")
    with _progress("Building", "images") as progress:
        table = build_table(
            loaded, data,
            defaults=Defaults(quantile=quantile, gamma=gamma, layers=layers, normality_filter=normality_filter),
            normality=normality, seed=seed, batch_size=batch_size, workers=workers, device=device,
            progress=progress,
        )  # fmt: skip
    table = table.save(folder)
    golden.record(Explainer(loaded, table, device), folder)
    _show_table(table)
    click.echo(f"Wrote {folder}")


@table_group.command("show")
@click.argument("table")
@TABLES_DIR
def table_show(table: str, tables_dir: Path) -> None:
    """Summary of TABLE, after checking it."""
    from parchgrad.tables import load_table

    _show_table(load_table(_named(table, tables_dir)))


@cli.command("explain")
@click.argument("model")
@click.argument("images", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--table", help="Selection table.  [default: the one of the model's name and version]")
@click.option("--target", multiple=True, help="Class index, name or id; once, or once an image.  [default: predicted]")
@click.option(
    "--method", default="gradient", show_default=True,
    help="gradient, input_x_gradient, integrated_gradients, smoothgrad or guided_backprop.",
)  # fmt: skip
@click.option("--quantile", type=float, help="[default: the table's]")
@click.option("--alpha", type=float, help="Select by p-value instead.")
@click.option("--gamma", type=float, help="[default: the table's]")
@click.option("--conserve", help="independent, exact or none.  [default: the table's]")
@click.option("--selection", help="class or instance.  [default: the table's]")
@click.option("--layers", type=ListParameter(str), help="Glob patterns.  [default: the table's]")
@click.option("--plain", is_flag=True, help="Without the rule: the plain method.")
@click.option("--out", type=FOLDER, default=Path("out"), show_default=True, help="Where the overlays go.")
@click.option("--colormap", default="inferno", show_default=True, help="As matplotlib calls it: viridis, turbo, ...")
@click.option(
    "--smooth", type=click.FloatRange(min=0), default=1.0, show_default=True, help="Blur of the drawn map, pixels."
)
@click.option("--overlay", "mode", default="original", show_default=True, help="none, original, grayscale, mask_black.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object an image instead of the table.")
@DEVICE
@MODELS_DIR
@TABLES_DIR
def explain(
    model: str, images: tuple[Path, ...], table: str | None, target: tuple[str, ...], method: str,
    quantile: float | None, alpha: float | None, gamma: float | None, conserve: str | None,
    selection: str | None, layers: tuple[str, ...] | None, plain: bool, out: Path, colormap: str, smooth: float,
    mode: str, as_json: bool, device: str, models_dir: Path, tables_dir: Path,
) -> None:  # fmt: skip
    """Predict and explain IMAGES; writes an overlay PNG for each.

    An unreadable image is reported and the others are explained; the exit code is then 1.
    """
    from parchgrad.errors import DataError
    from parchgrad.evaluation.maps import gini
    from parchgrad.explainer import Explainer
    from parchgrad.preprocessing import read_image
    from parchgrad.render import overlay, png
    from parchgrad.tables import load_table

    if target and len(target) not in (1, len(images)):
        raise click.UsageError(f"--target is given {len(target)} times; expected once, or once for each image.")
    loaded = _load_model(model, models_dir)
    explainer = Explainer(
        loaded, load_table(_named(table or f"{loaded.name}/{loaded.version}", tables_dir), loaded), device
    )
    out.mkdir(parents=True, exist_ok=True)
    names = _distinct([path.stem for path in images])
    targets = [None if t == "predicted" else loaded.class_index(t) for t in target] or [None]
    unreadable = 0
    for number, path in enumerate(images):
        try:
            pixels, placement = loaded.preprocessing.apply(read_image(path))
        except DataError as error:
            unreadable += 1
            click.echo(f"Error: {error}", err=True)
            continue
        e = explainer.explain(
            pixels[None], targets[number % len(targets)], method=method, rule=not plain, quantile=quantile,
            alpha=alpha, gamma=gamma, conserve=conserve, selection=selection,
            layers=None if layers is None else list(layers),
        )  # fmt: skip
        saliency = e.saliency()[0].cpu().numpy()
        written = out / f"{names[number]}.overlay.png"
        drawn = overlay(loaded.preprocessing.restore(pixels), saliency, colormap=colormap, mode=mode, smooth=smooth)
        written.write_bytes(png(drawn))
        index, probabilities = int(e.targets[0]), e.probabilities()[0]
        best = int(probabilities.argmax())
        result = {
            "image": str(path),
            "prediction": {"index": best, "label": loaded.labels[best], "probability": float(probabilities[best])},
            "target": {"index": index, "label": loaded.labels[index], "probability": float(probabilities[index])},
            "identity_layers": int(e.identity_layers[0]),
            "gini": gini(saliency),
            "crop_box": list(placement.crop_box),
            "overlay": str(written),
        }
        click.echo(json.dumps(result, ensure_ascii=False) if as_json else _explained_line(result))
    if unreadable:
        sys.exit(1)


@cli.command("evaluate")
@click.argument("model")
@click.option("--data", required=True, type=FOLDER, help="Images the table has not seen, one folder a class.")
@click.option("--table", help="Selection table.  [default: the one of the model's name and version]")
@click.option("--mosaics", type=click.IntRange(4), default=100, show_default=True, help="Pictures of four images.")
@click.option("--quantile", type=float, help="[default: the table's]")
@click.option("--gamma", type=float, help="[default: the table's]")
@click.option("--layers", type=ListParameter(str), help="[default: the table's]")
@click.option("--cam-layer", help="Module for Grad-CAM, such as layer4; left out without it.")
@click.option("--method", "only", multiple=True, help="Only this row of the table; may come several times.")
@click.option("--seed", type=int, default=0, show_default=True, help="Draws the mosaics and the random channels.")
@click.option("--batch-size", type=click.IntRange(1), default=4, show_default=True)
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Also write the scores here."
)
@DEVICE
@MODELS_DIR
@TABLES_DIR
def evaluate(
    model: str, data: Path, table: str | None, mosaics: int, quantile: float | None, gamma: float | None,
    layers: tuple[str, ...] | None, cam_layer: str | None, only: tuple[str, ...], seed: int, batch_size: int,
    json_file: Path | None, device: str, models_dir: Path, tables_dir: Path,
) -> None:  # fmt: skip
    """Compare methods on mosaics of four images of different classes (chance: mass and hits 0.25)."""
    from rich.console import Console

    from parchgrad.build import ImageFolder
    from parchgrad.evaluation.compare import compare, mosaics_of, standard_methods
    from parchgrad.evaluation.report import score_table
    from parchgrad.explainer import Explainer
    from parchgrad.tables import load_table

    loaded = _load_model(model, models_dir)
    explainer = Explainer(
        loaded, load_table(_named(table or f"{loaded.name}/{loaded.version}", tables_dir), loaded), device
    )
    methods = standard_methods(
        explainer, cam_layer=cam_layer, seed=seed, quantile=quantile, gamma=gamma,
        layers=None if layers is None else list(layers),
    )  # fmt: skip
    if unknown := [name for name in only if name not in methods]:
        raise click.UsageError(f"--method is {unknown[0]!r}; the rows are {', '.join(methods)}.")
    methods = {name: maps for name, maps in methods.items() if not only or name in only}
    pictures = mosaics_of(ImageFolder.scan(data, loaded), loaded.preprocessing, mosaics, seed)
    with _progress("Evaluating", "maps") as progress:
        scores = compare(methods, pictures, batch_size=batch_size, progress=progress)
    Console().print(score_table(scores, f"{len(pictures)} mosaics; chance 0.25"))
    if json_file is not None:
        json_file.write_text(json.dumps([dataclasses.asdict(s) for s in scores], indent=1) + "\n", encoding="utf-8")


@cli.command("serve", context_settings={"ignore_unknown_options": True})
@click.option("--port", type=int, default=3000, show_default=True)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.argument("bentoml_arguments", nargs=-1, type=click.UNPROCESSED)
def serve(port: int, host: str, bentoml_arguments: tuple[str, ...]) -> None:
    """Serve over HTTP from the checkout (`bentoml serve`); further arguments go to bentoml."""
    command = ["bentoml", "serve", SERVICE, "--host", host, "--port", str(port), *bentoml_arguments]
    executable = Path(sys.executable).with_name("bentoml")
    if not executable.is_file():
        raise click.ClickException("bentoml is not installed here; install parchgrad[service].")
    if not Path("service/service.py").is_file():
        raise click.ClickException("No folder 'service' here; run this from the project's checkout.")
    # bentoml would otherwise report its use to its makers.
    os.execve(executable, command, {"BENTOML_DO_NOT_TRACK": "true", **os.environ})


SERVICE = "service.service:ParchGradService"


def _load_model(name: str, models_dir: Path) -> Model:
    from parchgrad.models import load_model

    return load_model(_named(name, models_dir))


def _named(name: str, folder: Path) -> Path:
    """`name` inside `folder`, with a version if it says one (`resnet/2`); a path that exists is taken as it is."""
    inside = folder / name
    return inside if inside.exists() or not Path(name).exists() else Path(name)


def _distinct(names: list[str]) -> list[str]:
    """The names, numbered where one comes twice."""
    return [name if names.count(name) == 1 else f"{name}_{number}" for number, name in enumerate(names)]


def _key_value(text: str) -> tuple[str, Any]:
    match = re.fullmatch(r"(\w+)=(.+)", text)
    try:
        if match:
            return match.group(1), json.loads(match.group(2))
    except ValueError:
        pass
    raise click.UsageError(f"--argument is {text!r}; expected KEY=JSON, such as transform_input=false.")


@contextmanager
def _progress(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, with speed and time left; plain silence where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
        TextColumn("{task.fields[speed]}"), TimeRemainingColumn(), console=Console(stderr=True),
    )  # fmt: skip

    def update(done: int, total: int) -> None:
        # Begun with the first step: an error before any work prints no empty bar.
        if not bar.tasks:
            bar.start()
            bar.add_task(what, speed="")
        task = bar.tasks[0]
        speed = task.finished_speed or task.speed
        bar.update(task.id, completed=done, total=total, speed=f"{speed:.1f}/s" if speed else "")

    try:
        yield update
    finally:
        if bar.tasks:
            bar.stop()


def _show_table(table: SelectionTable) -> None:
    channels = sum(layer.channels for layer in table.layers.values())
    images = table.images_per_class
    click.echo(f"table         {table.name}, version {table.version}, of model {table.model_name}")
    click.echo(f"classes       {len(table.classes)} of the model's {len(table.labels)}")
    click.echo(f"images        {sum(images):,}; {min(images)} to {max(images)} a class")
    click.echo(f"layers        {len(table.layers)}, {channels:,} channels; {len(table.idle_layers)} idle left out")
    click.echo(f"defaults      {table.defaults}")
    click.echo(f"built         {json.dumps(table.built, ensure_ascii=False)}")
    click.echo(f"table_sha256  {table.table_sha256}")


def _explained_line(result: dict[str, Any]) -> str:
    prediction, target = result["prediction"], result["target"]
    return (
        f"{result['image']}: {prediction['label']} ({prediction['probability']:.3f}); "
        f"explained {target['label']} ({target['probability']:.3f}) in {result['overlay']}"
    )
