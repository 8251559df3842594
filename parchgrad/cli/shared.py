"""What several commands share: their options, finding models and tables by name, what they print."""

from __future__ import annotations

import signal
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from parchgrad.models import Model
    from parchgrad.tables import SelectionTable

# As shells have it for a process that Control-C ended.
EXIT_INTERRUPTED = 130

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
# Of the commands that measure on held-out images.
HELD_OUT = click.option(
    "--data", required=True, help="Images the table was not built from: a folder of one folder a class, or Parquet."
)
IMAGE_COLUMN = click.option("--image-column", help="Column of the encoded images.  [default: the usual names]")
LABEL_COLUMN = click.option("--label-column", help="Column of the labels.  [default: the usual names]")
MOSAICS = click.option(
    "--mosaics", type=click.IntRange(4), default=100, show_default=True, help="Pictures of four images."
)
SEED = click.IntRange(0)
ALLOW_USED = click.option(
    "--allow-used", is_flag=True, help="Also take images that the table was built from: figures then flatter it."
)


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


class QuantileParameter(click.ParamType):  # type: ignore[type-arg]  # generic only from click 8.5 on
    """Comma-separated quantiles; LOWER/UPPER is one for each half of the layers."""

    name = "quantiles"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        try:
            parts = [tuple(float(number) for number in item.split("/")) for item in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a comma-separated list of numbers or LOWER/UPPER pairs", param, ctx)
        # One number is itself; a wrong number of them is refused by the grid.
        return tuple(part[0] if len(part) == 1 else part for part in parts)


def load_named_model(name: str, models_dir: Path) -> Model:
    from parchgrad.models import load_model

    return load_model(named(name, models_dir))


def named(name: str, folder: Path) -> Path:
    """`name` inside `folder`, with a version if it says one (`resnet/2`); a path that exists is taken as it is."""
    inside = folder / name
    return inside if inside.exists() or not Path(name).exists() else Path(name)


@contextmanager
def progress_bar(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, with speed and time left; plain silence where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
        TextColumn("{task.fields[speed]}"), TimeRemainingColumn(), console=console, disable=not console.is_terminal,
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


def table_and_model(table: str, tables_dir: Path, models_dir: Path) -> tuple[SelectionTable, Model]:
    """The table of that name and the model package it belongs to."""
    from parchgrad.tables import load_table

    opened = load_table(named(table, tables_dir))
    return opened, load_named_model(f"{opened.model_name}/{opened.version}", models_dir)


def images_to_avoid(table: SelectionTable, allow_used: bool) -> frozenset[str]:
    """Digests of the images the table was built from; none where they are allowed, or with a word on it unknown."""
    from parchgrad.evidence import used_digests

    if allow_used:
        return frozenset()
    used = used_digests(table.folder)
    if used is None:
        click.echo(no_record_line(table), err=True)
        return frozenset()
    return used


def no_record_line(table: SelectionTable) -> str:
    return f"Table '{table.name}' has no record of the images it was built from; they may be among these."


@contextmanager
def interruptible(left: Callable[[], str]) -> Iterator[None]:
    """Control-C and SIGTERM end the work in order: no scraps are left; `left()` says what there is to go on from."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"Interrupted; {left()}.", err=True)
        sys.exit(EXIT_INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, before)


def keeps(place: Path) -> str:
    """Of `interruptible`: where what is done is kept."""
    return f"'{place}' keeps what is done, the same command goes on from there"


def show_table(table: SelectionTable) -> None:
    """What a table is, on standard output."""
    channels = sum(layer.channels for layer in table.layers.values())
    images, built = table.images_per_class, table.built
    bad = built.get("bad_images", [])
    normality = built.get("normality")
    lines = {
        "table": f"{table.name}, version {table.version}, of model {table.model_name}",
        "classes": f"{len(table.classes)} of the model's {len(table.labels)}",
        "images": f"{sum(images):,}; {min(images)} to {max(images)} a class; {len(bad)} unreadable left out",
        "layers": f"{len(table.layers)}, {channels:,} channels; {len(table.left_out)} left out, "
        f"{len(table.idle_layers)} idle in prediction",
        "data": "; ".join(_sources(built.get("data", ""))),
        "feature": built.get("feature", "") + _points(built.get("points", {})),
        "test": f"{built.get('test', '')}; control: {built.get('control', 'none')}",
        "normality": f"tested on {normality['images']:,} images" if normality else "not tested",
        "defaults": ", ".join(f"{name} {value}" for name, value in table.defaults.to_json().items()),
        "tuned": str(built["tuned"].get("reason", "yes")) if "tuned" in built else "no",
        "built by": built.get("by", ""),
        "table_sha256": table.table_sha256,
    }
    for name, value in lines.items():
        click.echo(f"{name:12}  {value}")
    for name, reason in bad[:SHOWN_BAD]:
        click.echo(f"unreadable    {name}: {reason}")
    if len(bad) > SHOWN_BAD:
        click.echo(f"unreadable    {len(bad) - SHOWN_BAD} more in {table.folder}/manifest.json")


SHOWN_BAD = 5


def _points(points: Mapping[str, str]) -> str:
    """How many layers have their feature at which point, where they differ by layer."""
    counts = ", ".join(f"{point} {count}" for point, count in sorted(Counter(points.values()).items()))
    return f"; layers by point: {counts}" if counts else ""


def _sources(data: object) -> list[str]:
    """Where the images came from, a line each; a table not built from files says it in its own words."""
    if not isinstance(data, list):
        return [str(data)]
    lines = []
    for source in data:
        held = source.get("held_out")
        left = f" ({held['images']:,} held out by seed {held['seed']})" if held else ""
        lines.append(f"{source['root']}: {source['images']:,} images{left}")
    return lines
