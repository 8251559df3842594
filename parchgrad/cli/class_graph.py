"""`parchgrad class-graph`: what a model's classes are made of, built once beside its table, and looked at."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from parchgrad.cli.shared import (
    IMAGE_COLUMN,
    LABEL_COLUMN,
    MODELS_DIR,
    TABLES_DIR,
    interruptible,
    keeps,
    load_named_model,
    named,
    progress_bar,
    table_and_model,
)

if TYPE_CHECKING:
    from rich.table import Table

    from parchgrad.class_graph import ClassGraph
    from parchgrad.class_graph.build import Progress

PURPOSE = "building a class graph"
# Classes looked at before it is said how long all of them will take, and from how many seconds on.
CLASSES_BEFORE_ESTIMATE = 1
SECONDS_WORTH_SAYING = 60.0


@click.group("class-graph")
def class_graph_group() -> None:
    """Class graphs: what the classes are made of, after Summit (Hohman et al. 2019).

    Exit codes: 0 done; 1 an error; 2 wrong usage; 3 the images or their labels do not do; 130 interrupted (the
    same command goes on where a build was left).
    """


@class_graph_group.command("build")
@click.argument("name")
@click.option("--data", required=True, help="Images of the table's classes, such as those it was built from.")
@click.option("--images-per-class", type=click.IntRange(1), default=50, show_default=True,
              help="At most so many, evenly spread over the class's images.")  # fmt: skip
@click.option("--edges-per-channel", type=click.IntRange(1), default=2, show_default=True,
              help="Influences kept into a layer, for each of its selected channels.")  # fmt: skip
@click.option("--exemplars", type=click.IntRange(0, 100), default=0, show_default=True, metavar="K",
              help="Also keep, for each channel, the K pieces of images that excite it most. They ARE pieces of "
              "these images, for everybody who can reach the service.")  # fmt: skip
@click.option("--crop-pixels", type=click.IntRange(16, 512), default=64, show_default=True,
              help="Side of an exemplar.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True)
@click.option("--max-bad", type=click.FloatRange(0, 1), default=0.01, show_default=True,
              help="Share of unreadable images that stops the build.")  # fmt: skip
@click.option("--workers", type=click.IntRange(0),
              help="Processes that decode.  [default: by the number of cores]")  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto: cuda where there is one.")
@click.option("--restart", is_flag=True, help="Begin anew where an unfinished build was left.")
@IMAGE_COLUMN
@LABEL_COLUMN
@MODELS_DIR
@TABLES_DIR
def class_graph_build(
    name: str, data: str, images_per_class: int, edges_per_channel: int, exemplars: int, crop_pixels: int,
    batch_size: int, max_bad: float, workers: int | None, device: str, restart: bool, image_column: str | None,
    label_column: str | None, models_dir: Path, tables_dir: Path,
) -> None:  # fmt: skip
    """Build the class graph of table NAME from images, into the table's folder.

    An interrupted build goes on where it was when the same command is given again. A class graph that is there is
    replaced.
    """
    from parchgrad.build import best_device, default_workers
    from parchgrad.class_graph.build import Options, build, unfinished
    from parchgrad.explainer import checked_device
    from parchgrad.files import claimed
    from parchgrad.sources import open_source

    table, model = table_and_model(name, tables_dir, models_dir)
    chosen = best_device() if device == "auto" else device
    checked_device(chosen)
    options = Options(images_per_class, edges_per_channel, exemplars, crop_pixels, batch_size)
    scratch = unfinished(table.in_folder)

    def left() -> str:
        return keeps(scratch) if any(scratch.glob("*.safetensors")) else "there is nothing to go on from"

    begun = time.monotonic()
    with interruptible(left), claimed(table.in_folder.parent, PURPOSE):
        source = open_source(
            data, model, image_column=image_column, label_column=label_column, least_classes=1, least_images=1
        )
        with _bars() as progress:
            graph = build(
                model, table, source, options, workers=default_workers(chosen) if workers is None else workers,
                device=chosen, max_bad=max_bad, restart=restart, progress=progress,
            )  # fmt: skip
    _say(graph, time.monotonic() - begun)


@contextmanager
def _bars() -> Iterator[Callable[[Progress], None]]:
    """A bar for the images looked at, one for those cut again, and once how long it will take."""
    with progress_bar("Looking", "images") as looking, progress_bar("Cutting", "images") as cutting:
        begun = time.monotonic()
        at_start: Progress | None = None
        told = False

        def update(now: Progress) -> None:
            nonlocal at_start, begun, told
            if now.what == "Cutting":
                cutting(now.done, now.total)
                return
            if at_start is None:
                at_start, begun = now, time.monotonic()
                if now.classes:
                    click.echo(f"Going on after {now.classes} of {now.of_classes} classes.", err=True)
            looking(now.done, now.total)
            if not told and now.classes - at_start.classes >= CLASSES_BEFORE_ESTIMATE and now.done > at_start.done:
                told = True
                each = (time.monotonic() - begun) / (now.done - at_start.done)
                left = each * (now.total - now.done)
                if left > SECONDS_WORTH_SAYING:
                    click.echo(
                        f"About {each * 1000:.0f} ms an image, {left / 60:.0f} min for the other "
                        f"{now.of_classes - now.classes} classes.",
                        err=True,
                    )

        yield update


def _say(graph: ClassGraph, seconds: float) -> None:
    """What was built, how large it is and how long it took."""
    from parchgrad.class_graph.graph import EXEMPLARS_FOLDER, STRIPS_FILE, TENSORS_FILE

    summary = graph.summary()
    images = sum(one["images"] for one in summary["classes"])
    bad = len(summary["built"]["bad_images"])
    click.echo(f"{len(graph.classes)} classes, {images:,} images, {bad} unreadable; {len(graph.layers)} layers")
    click.echo(f"{seconds:.0f} s, {seconds / images * 1000:.0f} ms an image")
    _wrote(graph.folder / TENSORS_FILE)
    if summary["exemplars"] is not None:
        _wrote(graph.folder / EXEMPLARS_FOLDER / STRIPS_FILE)
        click.echo(
            f"The latter holds pieces of {summary['built']['data']['root']}'s images: up to "
            f"{summary['exemplars']['crops']} of each of {summary['exemplars']['channels']:,} channels."
        )


def _wrote(path: Path) -> None:
    click.echo(f"Wrote {path} ({path.stat().st_size / 1e6:.2f} MB)")


@class_graph_group.command("show")
@click.argument("name")
@click.argument("class_name", metavar="[CLASS]", required=False)
@click.option("--against", metavar="CLASS", help="Compare with this class: channels of both, and of one alone.")
@click.option("--channels", type=click.IntRange(1), default=5, show_default=True, help="Channels a layer.")
@click.option("--edges", type=click.IntRange(0), default=10, show_default=True, help="Strongest influences to list.")
@MODELS_DIR
@TABLES_DIR
def class_graph_show(
    name: str, class_name: str | None, against: str | None, channels: int, edges: int, models_dir: Path,
    tables_dir: Path,
) -> None:  # fmt: skip
    """The class graph of table NAME: all classes, or one CLASS, given by name, index or id, and what it is made of."""
    from parchgrad.class_graph import load
    from parchgrad.tables import load_table

    if against is not None and class_name is None:
        raise click.UsageError("--against compares with a class; name one before it.")
    table = load_table(named(name, tables_dir))
    graph = load(table.in_folder, table)
    if class_name is None:
        _print(_classes(graph))
        return
    model = load_named_model(f"{table.model_name}/{table.version}", models_dir)
    index = model.class_index(class_name)
    if against is None:
        for shown in _one_class(graph, index, channels, edges):
            _print(shown)
    else:
        _print(_compared(graph, index, model.class_index(against)))


def _print(table: Table) -> None:
    from rich.console import Console

    Console().print(table)


def _classes(graph: ClassGraph) -> Table:
    from rich.table import Table

    summary = graph.summary()
    built = summary["built"]
    shown = Table(title=f"{graph.table_name}: {len(graph.classes)} classes, {len(graph.layers)} layers, quantile "
                  f"{built['quantile']}, images of {built['data']['root']}")  # fmt: skip
    for column, side in (("class", "right"), ("name", "left"), ("images", "right"), ("x", "right"), ("y", "right")):
        shown.add_column(column, justify=side)  # type: ignore[arg-type]
    for one in summary["classes"]:
        shown.add_row(
            str(one["index"]), one["label"], str(one["images"]), f"{one['x']:.2f}", f"{one['y']:.2f}"
        )  # fmt: skip
    return shown


def _one_class(graph: ClassGraph, index: int, channels: int, edges: int) -> Iterator[Table]:
    from rich.table import Table

    view = graph.class_view(index)
    title = f"{view.index} {view.label}: {len(view.nodes)} channels, {len(view.edges)} influences, {view.images} images"
    layers = Table("layer", "channels, the strongest first (strength)", title=title)
    for layer in graph.layers:
        best = [node for node in view.nodes if node.layer == layer][:channels]
        layers.add_row(layer, "  ".join(f"{node.channel} ({node.strength:.2f})" for node in best))
    yield layers
    if edges:
        shown = Table("from", "to", "share", title="Strongest influences")
        for edge in view.edges[:edges]:
            (first, channel), (second, target) = edge.source, edge.target
            shown.add_row(f"{first} {channel}", f"{second} {target}", f"{edge.weight:.2f}")
        yield shown


def _compared(graph: ClassGraph, a: int, b: int) -> Table:
    from rich.table import Table

    one, other = graph.labels[a], graph.labels[b]
    shown = Table("layer", "shared", f"only {one}", f"only {other}", title=f"{one} and {other}: channels by layer")
    found = graph.compare(a, b)
    for layer in found:
        shown.add_row(layer.layer, *(str(len(part)) for part in (layer.shared, layer.only_a, layer.only_b)))
    parts = ([getattr(layer, part) for layer in found] for part in ("shared", "only_a", "only_b"))
    shown.add_section()
    shown.add_row("all", *(str(sum(map(len, part))) for part in parts))
    return shown
