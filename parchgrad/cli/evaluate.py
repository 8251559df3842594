"""`parchgrad evaluate`: every method measured on the user's own model and images."""

from __future__ import annotations

import fnmatch
import multiprocessing
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from parchgrad.cli.shared import (
    ALLOW_USED,
    DEVICE,
    HELD_OUT,
    IMAGE_COLUMN,
    LABEL_COLUMN,
    MODELS_DIR,
    SEED,
    TABLES_DIR,
    ListParameter,
    QuantileParameter,
    interruptible,
    keeps,
    load_named_model,
    named,
    no_record_line,
    progress_bar,
)

if TYPE_CHECKING:
    from parchgrad.defaults import Defaults
    from parchgrad.evaluation.images import Mosaics
    from parchgrad.evaluation.methods import Method, Unavailable
    from parchgrad.evaluation.photographs import Photographs, Places
    from parchgrad.evaluation.results import Results
    from parchgrad.evaluation.study import Effort, Subject
    from parchgrad.explainer import Explainer
    from parchgrad.models import Model
    from parchgrad.sources import Source
    from parchgrad.tables import SelectionTable

FILE = click.Path(dir_okay=False, path_type=Path)
EXISTING = click.Path(exists=True, path_type=Path)
COUNT = click.IntRange(1)
GRAD_CAM = "Grad-CAM"
IMAGES = MOSAICS = 100
# Of --quick: enough to see that all is well, not to compare.
QUICK_IMAGES, QUICK_MOSAICS, QUICK_POINTS = 10, 8, 4
# Processes, where it is not said.
MOST_WORKERS = 8
# Of integrated gradients, and copies of SmoothGrad.
POINTS = 25


@click.command("evaluate")
@click.argument("model")
@HELD_OUT
@IMAGE_COLUMN
@LABEL_COLUMN
@click.option("--labels", type=EXISTING, help="Labels of images in no class folders: a CSV file of image,label.")
@click.option("--boxes", type=EXISTING, help="Where objects are: a CSV file, or PASCAL VOC's XML, a file or a folder.")
@click.option("--masks", type=EXISTING, help="Where objects are: a folder of PNG files, named as the images.")
@click.option("--mask-value", type=click.IntRange(0), help="What a mask has at the object.  [default: anything but 0]")
@click.option("--table", help="Selection table.  [default: the one of the model's name and version]")
@click.option("--images", type=COUNT, help=f"Photographs to measure on, at most.  [default: {IMAGES}]")
@click.option("--mosaics", type=click.IntRange(0), help=f"Pictures of four photographs.  [default: {MOSAICS}]")
@click.option("--curves", type=click.IntRange(0), help="Photographs that pixels are taken from.  [default: 12]")
@click.option("--checks", type=click.IntRange(0), help="Photographs of the sanity checks.  [default: 10]")
@click.option("--step", type=COUNT, help="Pixels at a time of insertion and deletion.  [default: 224]")
@click.option("--quick", is_flag=True, help="A look in under a minute: few pictures, coarse steps, no grid.")
@click.option("--quantiles", type=QuantileParameter(), help="Grid of ParchGrad; LOWER/UPPER is one for each half of "
              "the layers.  [default: a step from the table's own in each direction]")  # fmt: skip
@click.option("--gammas", type=ListParameter(float), help="Grid of ParchGrad.")
@click.option("--layers", multiple=True, help="Grid of ParchGrad: all, upper-half or glob patterns; several times for "
              "several.")  # fmt: skip
@click.option(
    "--conserve", type=ListParameter(str), metavar="WAYS", help="Grid of ParchGrad: independent, exact, none."
)
@click.option("--selections", type=ListParameter(str), default="class,instance", show_default=True,
              metavar="WAYS", help="Grid of ParchGrad: class, instance.")  # fmt: skip
@click.option("--cam-layer", help="Module for Grad-CAM, such as layer4.  [default: the last with a map]")
@click.option(
    "--method", "only", multiple=True, help="Only this row, or rows by a glob pattern; may come several times."
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Draws pictures and everything random.")
@click.option("--batch-size", type=COUNT, default=8, show_default=True, help="Photographs together.")
@click.option("--workers", type=COUNT, help="Processes, of about 1 GB each.  [default: the processors, at most 8]")
@click.option("--report", type=FILE, help="Write a page to look at: one HTML file.")
@click.option("--json", "json_file", type=FILE, help="Write everything as JSON.")
@click.option("--parquet", type=FILE, help="Write every single value as Parquet.")
@click.option("--restart", is_flag=True, help="Forget what an interrupted run has found.")
@ALLOW_USED
@DEVICE
@MODELS_DIR
@TABLES_DIR
def evaluate(
    model: str, data: str, image_column: str | None, label_column: str | None, labels: Path | None, boxes: Path | None,
    masks: Path | None, mask_value: int | None, table: str | None, images: int | None, mosaics: int | None,
    curves: int | None, checks: int | None, step: int | None, quick: bool,
    quantiles: tuple[float | tuple[float, float], ...] | None, gammas: tuple[float, ...] | None,
    layers: tuple[str, ...], conserve: tuple[str, ...] | None, selections: tuple[str, ...],
    cam_layer: str | None, only: tuple[str, ...],
    seed: int, batch_size: int, workers: int | None, report: Path | None, json_file: Path | None,
    parquet: Path | None, restart: bool, allow_used: bool, device: str, models_dir: Path, tables_dir: Path,
) -> None:  # fmt: skip
    """Compare ParchGrad with other methods on images the table was not built from.

    Every method's maps are measured on mosaics of four photographs of different classes, on the photographs' own
    boxes or masks where they are given, by taking pixels away, and by checks that no explanation may survive.
    Intervals are 95 %, bootstrapped over photographs. With an output file an interrupted run goes on where it was
    when the same command is given again.

    \b
    parchgrad evaluate resnet50 --data val --quick
    parchgrad evaluate resnet50 --data val --boxes annotations --images 500 --report out.html
    """
    if boxes is not None and masks is not None:
        raise click.UsageError("--boxes and --masks are given, expected one of them.")
    if mask_value is not None and masks is None:
        raise click.UsageError("--mask-value is for --masks.")
    if labels is not None and (image_column is not None or label_column is not None):
        raise click.UsageError("--image-column and --label-column are for Parquet, --labels for images in a folder.")
    if cam_layer is not None and only and not any(fnmatch.fnmatchcase(GRAD_CAM, pattern) for pattern in only):
        raise click.UsageError(f"--cam-layer is for {GRAD_CAM}, which --method leaves out.")
    outputs = _outputs(report, json_file, parquet)
    if restart and not outputs:
        raise click.UsageError("--restart is for an output file: without one nothing is kept.")
    import torch
    from rich.console import Console

    from parchgrad.evaluation.record import settings_of
    from parchgrad.evaluation.report import natural_width, results_table
    from parchgrad.evaluation.study import Subject, key_of, study
    from parchgrad.evidence import used_digests
    from parchgrad.explainer import Explainer
    from parchgrad.tables import load_table

    loaded = load_named_model(model, models_dir)
    rows = load_table(named(table or f"{loaded.name}/{loaded.version}", tables_dir), loaded)
    source = _source(data, loaded, image_column, label_column, labels, boxes)
    processes = _workers(workers, device, source)
    if processes > 1:
        torch.set_num_threads(1)  # before anything is computed: a pool of threads does not survive a fork
    explainer = Explainer(loaded, rows, device)
    places = _places(boxes, masks, mask_value, source, loaded)
    effort = _effort(quick, {"curves": curves, "checks": checks, "step": step, "seed": seed})
    methods, unavailable = _methods(
        explainer, quick, quantiles, gammas, layers, conserve, selections, cam_layer, only, seed
    )
    used = used_digests(rows.folder)
    photographs, drawn, notes = _pictures(
        source, loaded, explainer, places, images or (QUICK_IMAGES if quick else IMAGES),
        (QUICK_MOSAICS if quick else MOSAICS) if mosaics is None else mosaics, seed,
        frozenset() if allow_used or used is None else used,
    )  # fmt: skip
    notes += _notes(source, rows, photographs, drawn, allow_used, used is not None)
    for line in notes:
        click.echo(line, err=True)
    for missing in unavailable:
        click.echo(f"{missing.name}: left out. {missing.reason}", err=True)
    subject = Subject(
        explainer, methods, () if drawn is None else drawn.pictures, photographs.pictures, loaded.labels,
        loaded.preprocessing, batch_size, processes,
    )  # fmt: skip
    settings = settings_of(
        loaded, rows, source, methods, effort, places=_record(boxes or masks, mask_value, places, source, photographs),
        photographs=photographs.indices, mosaics=None if drawn is None else drawn.indices,
        allow_used=allow_used, used_known=used is not None, seed=seed, batch_size=batch_size,
        device=device, command=shlex.join(["parchgrad", *sys.argv[1:]]),
    )  # fmt: skip
    with _journal(outputs[0] if outputs else None, key_of(settings), restart) as journal:
        with progress_bar("Evaluating", "forward passes") as progress:
            results = study(
                subject, effort, settings, unavailable=unavailable, notes=notes, journal=journal, progress=progress
            )
        results = replace(results, settings=settings | {"finished": datetime.now(UTC).isoformat(timespec="seconds")})
        if json_file is not None:
            results.write_json(json_file)
        if parquet is not None:
            results.write_parquet(parquet)
        if report is not None:
            _write_report(subject, results, report, each=1 if quick else 2)
    console = Console()
    view = results_table(results, console.width if console.is_terminal else None)
    Console(width=max(console.width if console.is_terminal else 0, natural_width(view))).print(view)
    for written in outputs:
        click.echo(f"Wrote {written}")


def _outputs(report: Path | None, json_file: Path | None, parquet: Path | None) -> list[Path]:
    """The files to write, refused here, before the work, where they cannot be written."""
    outputs = [path for path in (report, json_file, parquet) if path is not None]
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise click.UsageError("--report, --json and --parquet name the same file, expected different ones.")
    for path in outputs:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise click.UsageError(f"'{path.parent}' cannot be written to, expected a folder for '{path.name}'.")
    if parquet is not None:
        _require_parquet()
    return outputs


def _notes(
    source: Source,
    table: SelectionTable,
    photographs: Photographs,
    drawn: Mosaics | None,
    allow_used: bool,
    used_known: bool,
) -> list[str]:
    """What has to be said with the figures."""
    from parchgrad.evaluation.report import classes_line, left_out_line, uncovered_line
    from parchgrad.sources import ListedImages

    notes = []
    if allow_used:
        notes.append("Images that the table was built from were allowed: the figures may flatter it.")
    elif not used_known:
        notes.append(no_record_line(table))
    if line := left_out_line(photographs.left_out):
        notes.append(line)
    if drawn is not None:
        if line := left_out_line(drawn.left_out):
            notes.append(f"Of mosaics: {line}")
        notes.append(classes_line(len(source.classes), table))
    if line := uncovered_line(source.targets[photographs.indices].tolist(), table):
        notes.append(line)
    if isinstance(source, ListedImages) and source.unlabelled:
        notes.append(f"{len(source.unlabelled):,} images have no label and are left out.")
    return notes


def _source(
    data: str, model: Model, image_column: str | None, label_column: str | None, labels: Path | None, boxes: Path | None
) -> Source:
    """Class folders or Parquet; images in no class folders where there are labels of them, or boxes with labels."""
    from parchgrad.sources import open_source
    from parchgrad.sources.listed import open_listed

    if labels is not None:
        return open_listed(data, model, labels)
    if boxes is not None and _is_flat(Path(data)):
        return open_listed(data, model, boxes)
    return open_source(
        data, model, image_column=image_column, label_column=label_column, least_classes=1, least_images=1
    )


def _workers(asked: int | None, device: str, source: Source) -> int:
    """Processes are forked; where that cannot be done it is this one alone."""
    from parchgrad.build import cores

    can_fork = (
        "fork" in multiprocessing.get_all_start_methods() and _is_cpu(device) and source.start_method in (None, "fork")
    )
    if asked is not None and asked > 1 and not can_fork:
        raise click.UsageError(
            f"--workers is {asked}; expected 1: processes are forked, which this system, device or data does not allow."
        )
    return asked or (min(MOST_WORKERS, cores()) if can_fork else 1)


def _is_cpu(device: str) -> bool:
    return device.partition(":")[0] == "cpu"


def _is_flat(root: Path) -> bool:
    """Whether images lie at the top of a folder, and no folders beside them."""
    from parchgrad.sources import IMAGE_SUFFIXES

    if not root.is_dir():
        return False
    entries = [path for path in root.iterdir() if not path.name.startswith(".")]
    return not any(path.is_dir() for path in entries) and any(p.suffix.lower() in IMAGE_SUFFIXES for p in entries)


def _places(boxes: Path | None, masks: Path | None, value: int | None, source: Source, model: Model) -> Places | None:
    from parchgrad.evaluation.photographs import places_of_boxes, places_of_masks

    if boxes is not None:
        return places_of_boxes(boxes, source, model)
    return places_of_masks(masks, source, value) if masks is not None else None


def _effort(quick: bool, given: Mapping[str, int | None]) -> Effort:
    from parchgrad.evaluation.study import QUICK, Effort

    said: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return replace(QUICK if quick else Effort(), **said)


def _methods(
    explainer: Explainer,
    quick: bool,
    quantiles: Sequence[float | tuple[float, float]] | None,
    gammas: Sequence[float] | None,
    layers: Sequence[str],
    conserve: Sequence[str] | None,
    selections: Sequence[str],
    cam_layer: str | None,
    only: Sequence[str],
    seed: int,
) -> tuple[list[Method], list[Unavailable]]:
    from parchgrad.evaluation.methods import all_methods
    from parchgrad.evaluation.tune import ALL, UPPER_HALF, Grid

    grid: list[Defaults] | None = [] if quick else None
    if quantiles or gammas or layers or conserve:
        base = explainer.table.defaults
        if not quantiles and isinstance(base.quantile, Mapping):
            raise click.UsageError("--quantiles is needed: the table's own differ by layer.")
        grid = Grid(
            quantiles=tuple(quantiles or (cast(float, base.quantile),)), gammas=tuple(gammas or (base.gamma,)),
            layers=tuple(item if item in (ALL, UPPER_HALF) else tuple(item.split(",")) for item in layers)
            or (base.layers,),
            conserve=tuple(conserve or ()),
        ).settings(explainer.table)  # fmt: skip
        grid = [replace(setting, selection=selection) for selection in selections for setting in grid]
    points = QUICK_POINTS if quick else POINTS
    methods, unavailable = all_methods(
        explainer, grid=grid, cam_layer=cam_layer, seed=seed, steps=points, samples=points
    )
    if not only:
        return methods, unavailable
    names = [method.name for method in methods]
    for missing in unavailable:
        if missing.name in only:
            raise click.UsageError(f"--method is {missing.name!r}, which cannot be had here: {missing.reason}")
    if unknown := [pattern for pattern in only if not fnmatch.filter(names, pattern)]:
        raise click.UsageError(f"--method is {unknown[0]!r}; the rows are {', '.join(names)}.")
    return [method for method in methods if any(fnmatch.fnmatchcase(method.name, pattern) for pattern in only)], []


def _pictures(
    source: Source,
    model: Model,
    explainer: Explainer,
    places: Places | None,
    images: int,
    mosaics: int,
    seed: int,
    used: frozenset[str],
) -> tuple[Photographs, Mosaics | None, list[str]]:
    """Photographs, mosaics where there are classes enough for them, and what has to be said of both."""
    from parchgrad.errors import DataError
    from parchgrad.evaluation.images import mosaics_of
    from parchgrad.evaluation.photographs import photographs_of

    preprocessing, notes = model.preprocessing, []
    if preprocessing.rule == "native":
        preprocessing = replace(preprocessing, rule="stretch")
        notes.append("The model takes any size; photographs are scaled to its nominal one, to be measured alike.")
    with progress_bar("Reading", "images") as progress:
        photographs = photographs_of(source, preprocessing, images, seed, places=places, used=used, progress=progress)
    if (there := len(photographs.pictures)) < images:
        notes.append(f"{images:,} photographs were asked for; {there:,} can be had.")
    if mosaics == 0:
        return photographs, None, notes
    if len(source.classes) < 4:
        notes.append(f"No mosaics: they need images of 4 classes, these are of {len(source.classes)}.")
        return photographs, None, notes
    try:
        with progress_bar("Reading", "images of mosaics") as progress:
            drawn = mosaics_of(source, preprocessing, mosaics, seed, spread=True, used=used, progress=progress)
    except DataError as error:
        return photographs, None, [*notes, f"No mosaics: {error}"]
    try:
        explainer.predict(drawn.pictures[0].image[None])
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        return photographs, None, [*notes, f"No mosaics: the network takes no picture of twice its size ({reason})."]
    return photographs, drawn, notes


def _record(
    origin: Path | None, value: int | None, places: Places | None, source: Source, photographs: Photographs
) -> dict[str, Any]:
    """Where places came from and what became of them."""
    if origin is None or places is None or photographs.placed is None:
        return {}
    record: dict[str, Any] = {
        "from": str(origin),
        "sha256": places.digest(source.name(index) for index in photographs.indices.tolist()),
        **asdict(photographs.placed),
    }
    return record if value is None else record | {"mask_value": value}


@contextmanager
def _journal(output: Path | None, key: str, restart: bool) -> Iterator[Any]:
    """Where findings are kept until `output` is written; Control-C and SIGTERM end the work in order."""
    from parchgrad.evaluation.journal import Journal, journal_in

    folder = None if output is None else output.with_name(f".{output.name}.unfinished")
    with (
        interruptible(
            lambda: "there is nothing to go on from: no output file was named" if folder is None else keeps(folder)
        ),
        nullcontext(Journal()) if folder is None else journal_in(folder, key, restart=restart) as journal,
    ):
        if journal.found:
            click.echo(f"Going on: {len(journal.found)} pieces of work are done.", err=True)
        yield journal


def _write_report(subject: Subject, results: Results, path: Path, each: int) -> None:
    from parchgrad.evaluation.study import cases_of
    from parchgrad.evaluation_page import write_page

    with progress_bar("Drawing", "pictures") as progress:
        write_page(results, cases_of(subject, results, each=each, progress=progress), path)


def _require_parquet() -> None:
    """Refused before the work, not after it."""
    try:
        import pyarrow  # noqa: F401
    except ModuleNotFoundError as error:
        from parchgrad.errors import missing_package

        raise missing_package("--parquet", error) or error from error
