"""`parchgrad table build|extend|merge`: tables from images, and from other tables."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from parchgrad.cli.shared import (
    DEVICE,
    IMAGE_COLUMN,
    LABEL_COLUMN,
    MODELS_DIR,
    TABLES_DIR,
    ListParameter,
    interruptible,
    keeps,
    load_named_model,
    named,
    show_table,
    table_and_model,
)

if TYPE_CHECKING:
    from parchgrad.build import Engine, Progress, Work
    from parchgrad.evidence import Evidence
    from parchgrad.models import Model
    from parchgrad.sources import Source
    from parchgrad.tables import SelectionTable

PURPOSE = "building a table"
# Seconds between two lines of progress where there is no terminal to draw on.
LOG_EVERY = 30.0


class Number(click.FloatRange):
    """A number in a range; NaN, which is in no range, is refused too."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a number", param, ctx)
        return number


def options(*given: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several click options as one decorator, in the order they are listed in the help."""

    def decorate(command: Any) -> Any:
        for option in reversed(given):
            command = option(command)
        return command

    return decorate


READING = options(
    IMAGE_COLUMN,
    LABEL_COLUMN,
    click.option("--hold-out", type=Number(0, 1, max_open=True), default=0.0, show_default=True,
                 help="Share of the images to leave for evaluation, drawn by --seed and name."),
    click.option("--max-bad", type=Number(0, 1), default=0.01, show_default=True,
                 help="Share of unreadable images that stops the build."),
)  # fmt: skip
RUNNING = options(
    click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True,
                 help="This machine, or Ray (pip install parchgrad[ray])."),
    click.option("--ray-address", help="Cluster to join, such as auto or ray://host:10001.  [default: a local one]"),
    click.option("--workers", type=click.IntRange(0),
                 help="Processes that decode; with ray, actors.  [default: by the number of cores]"),
    click.option("--gpus-per-worker", type=Number(0), default=0.0, show_default=True,
                 help="With ray: GPUs an actor takes; it then runs there."),
    click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto: cuda where there is one."),
    click.option("--checkpoint-every", type=Number(min=0), default=60.0, show_default=True,
                 help="Seconds of work an interruption may cost."),
    click.option("--restart", is_flag=True, help="Begin anew where an unfinished build was left."),
)  # fmt: skip
KEEPING = options(
    click.option("--evidence/--no-evidence", "keep_evidence", default=True, show_default=True,
                 help="Keep what the table was computed from, so that it can be merged and extended."),
)  # fmt: skip
FORCE = click.option("--force", is_flag=True, help="Replace the table if the model version has one already.")


@click.command("build")
@click.argument("model")
@click.option(
    "--data", required=True,
    help="Images: a folder with one folder a class, named by class name, id or index; or a Parquet or Arrow file, a "
    "folder of them, or a URI such as s3://bucket/train.",
)  # fmt: skip
@FORCE
@click.option("--quantile", type=Number(0, 1, min_open=True), default=0.1, show_default=True,
              help="Default share of a layer's channels to select.")  # fmt: skip
@click.option("--gamma", type=float, default="inf", show_default=True, help="A number in [0, 1e6], or inf.")
@click.option("--layers", type=ListParameter(str), default="*", show_default=True,
              help="Glob patterns of the convolutions an explanation acts on by default.")  # fmt: skip
@click.option("--table-layers", type=ListParameter(str), default="*", show_default=True,
              help="Glob patterns of the convolutions that get into the table; '!pattern' leaves out.")  # fmt: skip
@click.option("--statistics-point", type=click.Choice(["convolution", "activation"]), default="convolution",
              show_default=True, help="Where features are taken: the paper's, or after activation.")  # fmt: skip
@click.option("--control", type=click.Choice(["none", "benjamini_hochberg"]), default="none", show_default=True,
              help="Adjust the p-values for the number of channels in a layer.")  # fmt: skip
@click.option("--normality/--no-normality", default=True, show_default=True, help="Run the Shapiro-Wilk test.")
@click.option("--normality-filter/--no-normality-filter", default=False, show_default=True,
              help="Leave normal channels out by default.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Draws the normality test's images and --hold-out.",
)
@READING
@RUNNING
@KEEPING
@MODELS_DIR
@TABLES_DIR
def table_build(
    model: str, data: str, force: bool, quantile: float, gamma: float, layers: tuple[str, ...],
    table_layers: tuple[str, ...], statistics_point: str, control: str, normality: bool, normality_filter: bool,
    batch_size: int, seed: int, image_column: str | None, label_column: str | None, hold_out: float, max_bad: float,
    engine: str, ray_address: str | None, workers: int | None, gpus_per_worker: float, device: str,
    checkpoint_every: float, restart: bool, keep_evidence: bool, models_dir: Path, tables_dir: Path,
) -> None:  # fmt: skip
    """Build the selection table of MODEL from images, with its golden record.

    An interrupted build goes on where it was when the same command is given again.
    """
    from parchgrad.build import Reader, Work, subject_of
    from parchgrad.defaults import Defaults
    from parchgrad.files import claimed, remove
    from parchgrad.sources import open_source
    from parchgrad.tables import check_defaults

    loaded = load_named_model(model, models_dir)
    folder = _place(loaded, tables_dir, force)
    defaults = Defaults(quantile=quantile, gamma=gamma, layers=layers, normality_filter=normality_filter)
    subject = subject_of(loaded, layers=table_layers, statistics_point=statistics_point, normality=normality, seed=seed)
    check_defaults(loaded.name, defaults, subject.layers, tested=normality)
    runs_on = _engine(engine, ray_address, workers, gpus_per_worker, device)
    with _interruptible(_unfinished(folder)), claimed(folder.parent, PURPOSE):
        source, note = _held_out(
            open_source(data, loaded, image_column=image_column, label_column=label_column), hold_out, seed
        )
        work = Work(loaded, subject, Reader(source, loaded.preprocessing, batch_size), note)
        evidence = _gathered(work, folder, runs_on, max_bad, checkpoint_every, restart)
        _write(evidence.table(defaults, control), folder, loaded, evidence, keep_evidence, device)
        remove(_unfinished(folder))


@click.command("extend")
@click.argument("table")
@click.option("--data", required=True, help="More images, of the table's classes or of new ones; see `table build`.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Draws --hold-out.")
@READING
@RUNNING
@KEEPING
@MODELS_DIR
@TABLES_DIR
def table_extend(
    table: str, data: str, seed: int, image_column: str | None, label_column: str | None, hold_out: float,
    max_bad: float, engine: str, ray_address: str | None, workers: int | None, gpus_per_worker: float, device: str,
    checkpoint_every: float, restart: bool, keep_evidence: bool, models_dir: Path, tables_dir: Path,
) -> None:  # fmt: skip
    """Add images to TABLE, as if it had been built from all of them; images it has already are left out.

    Layers, statistics and batch size are the table's own.
    """
    from parchgrad.build import Reader, Work
    from parchgrad.files import claimed, remove
    from parchgrad.sources import open_source
    from parchgrad.store import read_evidence
    from parchgrad.tables import load_table

    runs_on = _engine(engine, ray_address, workers, gpus_per_worker, device)
    folder = load_table(named(table, tables_dir)).in_folder
    # Opened again once nobody else is at work on it.
    with _interruptible(_unfinished(folder)), claimed(folder.parent, PURPOSE):
        opened, loaded = table_and_model(table, tables_dir, models_dir)
        before = read_evidence(opened)
        source, note = _held_out(
            open_source(
                data, loaded, image_column=image_column, label_column=label_column, least_images=1, least_classes=1
            ),
            hold_out, seed,
        )  # fmt: skip
        reader = Reader(source, loaded.preprocessing, before.subject.batch_size, frozenset(before.keys()))
        work = Work(loaded, before.subject, reader, note)
        more = _gathered(work, folder, runs_on, max_bad, checkpoint_every, restart)
        evidence = before.merge(more).in_order()
        grown = _with_record(evidence.table(opened.defaults, opened.built["control"]), opened)
        _write(grown, folder, loaded, evidence, keep_evidence, device)
        remove(_unfinished(folder))
    click.echo(f"{more.images:,} images added, {more.known:,} were in the table already", err=True)


@click.command("merge")
@click.argument("tables", nargs=-1, required=True)
@FORCE
@KEEPING
@DEVICE
@MODELS_DIR
@TABLES_DIR
def table_merge(
    tables: tuple[str, ...], force: bool, keep_evidence: bool, device: str, models_dir: Path, tables_dir: Path
) -> None:
    """Make one table of TABLES of one model built from different images, as if built from all of them.

    TABLES are folders, or names in --tables-dir, each with its evidence. Defaults are the first one's.
    """
    from parchgrad.files import claimed
    from parchgrad.store import read_evidence
    from parchgrad.tables import load_table

    if len(tables) < 2:
        raise click.UsageError("TABLES is one table; give at least two to merge.")
    first = load_table(named(tables[0], tables_dir))
    loaded = load_named_model(f"{first.model_name}/{first.version}", models_dir)
    folder = _place(loaded, tables_dir, force)
    with _interruptible(_unfinished(folder)), claimed(folder.parent, PURPOSE):
        opened = [load_table(named(table, tables_dir)) for table in tables]
        controls = {table.built.get("control", "none") for table in opened}
        if len(controls) > 1:
            raise click.ClickException(f"The tables differ in control ({', '.join(sorted(controls))}).")
        evidence = read_evidence(opened[0])
        for other in opened[1:]:
            evidence = evidence.merge(read_evidence(other))
        evidence = evidence.in_order()
        merged = _with_record(evidence.table(opened[0].defaults, controls.pop()), opened[0])
        _write(merged, folder, loaded, evidence, keep_evidence, device)


def _with_record(grown: SelectionTable, before: SelectionTable) -> SelectionTable:
    """The table with the record of how its defaults were chosen, which was on the one `before`."""
    if "tuned" not in before.built:
        return grown
    record = {"table_sha256": before.table_sha256, **before.built["tuned"]}
    return dataclasses.replace(grown, built={**grown.built, "tuned": record})


def _place(model: Model, tables_dir: Path, force: bool) -> Path:
    folder = tables_dir / model.name / model.version
    if folder.exists() and not force:
        raise click.ClickException(f"'{folder}' exists already; --force replaces it.")
    return folder


def _unfinished(folder: Path) -> Path:
    """Where a build of this folder's table is kept while it is unfinished."""
    return folder.with_name(f".{folder.name}.unfinished.safetensors")


def _held_out(source: Source, share: float, seed: int) -> tuple[Source, dict[str, Any]]:
    """The source without its held-out images, and what the manifest says of it."""
    from parchgrad.build import hold_out, note_of

    if not share:
        return source, note_of(source)
    kept = hold_out(source, share, seed)
    left = len(source) - len(kept)
    return kept, note_of(source, held_out={"share": share, "seed": seed, "images": left})


def _engine(name: str, ray_address: str | None, workers: int | None, gpus_per_worker: float, device: str) -> Engine:
    if name == "ray":
        from parchgrad.cluster import Ray

        return Ray(workers, gpus_per_worker, ray_address)
    if ray_address is not None or gpus_per_worker:
        raise click.UsageError("--ray-address and --gpus-per-worker are for --engine ray.")
    from parchgrad.build import Local, best_device, default_workers
    from parchgrad.explainer import checked_device

    chosen = best_device() if device == "auto" else device
    checked_device(chosen)
    return Local(default_workers(chosen) if workers is None else workers, chosen)


def _gathered(
    work: Work, folder: Path, engine: Engine, max_bad: float, checkpoint_every: float, restart: bool
) -> Evidence:
    from parchgrad.build import gather
    from parchgrad.checkpoint import Checkpoint

    checkpoint = Checkpoint(_unfinished(folder), work.key(), checkpoint_every)
    if restart:
        checkpoint.clear()
    begun = time.monotonic()
    with _pass_bar() as progress:
        evidence = gather(work, engine, max_bad=max_bad, checkpoint=checkpoint, progress=progress)
    seconds = time.monotonic() - begun
    click.echo(f"{evidence.images:,} images in {seconds:.0f} s, {len(evidence.bad):,} unreadable", err=True)
    return evidence


@contextmanager
def _interruptible(checkpoint: Path) -> Iterator[None]:
    with interruptible(lambda: keeps(checkpoint) if checkpoint.is_file() else "there is nothing to go on from"):
        yield


@contextmanager
def _pass_bar() -> Iterator[Callable[[Progress], None]]:
    """Images, images a second, time left, classes covered; a line now and then where standard error is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    bar = Bar(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("images"),
        TextColumn("{task.fields[speed]}"), TimeRemainingColumn(), TextColumn("{task.fields[found]}"), console=console,
        disable=not console.is_terminal,
    )  # fmt: skip
    begun = logged = time.monotonic()
    at_start: int | None = None

    def update(now: Progress) -> None:
        nonlocal logged, at_start
        if at_start is None:
            at_start = now.done
            bar.start()
            bar.add_task("Building", total=now.total, completed=now.done, speed="", found="")
            if now.done:
                click.echo(f"Going on after {now.done:,} of {now.total:,} images.", err=True)
        rate = (now.done - at_start) / max(time.monotonic() - begun, 1e-9)
        found = f"{now.classes} classes" + (f", {now.bad} unreadable" if now.bad else "")
        bar.update(bar.task_ids[0], completed=now.done, speed=f"{rate:.1f}/s", found=found)
        if not console.is_terminal and time.monotonic() - logged >= LOG_EVERY:
            logged = time.monotonic()
            left = f"{(now.total - now.done) / rate:.0f} s left, " if rate else ""
            click.echo(f"{now.done:,}/{now.total:,} images, {rate:.1f}/s, {left}{found}", err=True)

    try:
        yield update
    finally:
        bar.stop()


def _write(
    table: SelectionTable, folder: Path, model: Model, evidence: Evidence, keep_evidence: bool, device: str
) -> None:
    from parchgrad.build import best_device
    from parchgrad.store import write_table

    saved = write_table(
        table, folder, model, evidence, keep_evidence=keep_evidence,
        device=best_device() if device == "auto" else device,
    )  # fmt: skip
    show_table(saved)
    click.echo(f"Wrote {folder}")
