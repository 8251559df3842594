"""Images -> evidence -> a selection table: one pass, on this machine or on a cluster."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from parchgrad.checkpoint import Checkpoint
from parchgrad.defaults import Defaults
from parchgrad.errors import DataError, EvidenceError, UnsupportedModelError, WorkerError
from parchgrad.evidence import (
    DIGEST_BYTES,
    NORMALITY_IMAGES,
    Evidence,
    Observation,
    Subject,
    digest_of,
    key_of,
    printable,
    require_same,
)
from parchgrad.explainer import checked_device
from parchgrad.features import GapNetwork, points_reached, running_layers
from parchgrad.layers import convolutions
from parchgrad.models import Model
from parchgrad.patterns import match
from parchgrad.preprocessing import Preprocessing, decode_image
from parchgrad.sources import Source, open_source
from parchgrad.tables import SelectionTable, check_defaults

# Consecutive batches that one worker reads, at most, where neighbours share a row group of a Parquet file.
MAX_RUN = 64
ROW_GROUPS_IN_A_RUN = 8


@dataclass(frozen=True)
class Progress:
    """How far a pass over the images is."""

    done: int  # images looked at, good or bad, those of an earlier, interrupted pass among them
    total: int
    classes: int  # classes of which at least one image was good
    bad: int  # images that cannot be read
    known: int  # images left out because the evidence has them already


@dataclass(frozen=True)
class Batch:
    """Decoded images of one batch, in groups of one size: each a full device batch, zero images at its end."""

    number: int
    groups: list[tuple[NDArray[np.int64], Tensor]]  # places among the good ones (n,), images (>= n, 3, h, w)
    targets: NDArray[np.int64]  # (b,) of the good ones, as names and digests
    names: list[str]
    digests: NDArray[np.uint8]
    bad: list[tuple[str, str]]
    known: int
    failure: str = ""  # why the source could not be read at all


@dataclass(frozen=True)
class Reader(Dataset[Batch]):
    """Reads and decodes batches, ranges of a source's order; what a worker process is given."""

    source: Source
    preprocessing: Preprocessing
    batch_size: int
    known: frozenset[bytes] = frozenset()  # `key_of` images to leave out

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def indices(self, number: int) -> NDArray[np.int64]:
        """The images of a batch."""
        return np.arange(number * self.batch_size, min((number + 1) * self.batch_size, len(self.source)))

    def __getitem__(self, number: int) -> Batch:
        indices = self.indices(number)
        images: list[Tensor] = []
        good: list[int] = []
        digests: list[bytes] = []
        bad: list[tuple[str, str]] = []
        known = 0
        try:
            read = self.source.read(indices)
        except DataError as error:
            # Raised in a worker process it would arrive wrapped in that process's traceback.
            nothing = np.empty((0, DIGEST_BYTES), np.uint8)
            return Batch(number, [], self.source.targets[:0], [], nothing, [], 0, str(error))
        for index, data in zip(indices.tolist(), read, strict=True):
            name = self.source.name(index)
            digest = b"" if isinstance(data, DataError) else digest_of(data)
            if key_of(digest, self.source.targets[index]) in self.known:
                known += 1
                continue
            try:
                if isinstance(data, DataError):
                    raise data
                images.append(self.preprocessing.apply(decode_image(data, name))[0])
            except DataError as error:
                bad.append((name, str(error)))
            else:
                good.append(index)
                digests.append(digest)
        return Batch(
            number=number,
            groups=self._grouped(images),
            targets=self.source.targets[good],
            names=[self.source.name(index) for index in good],
            digests=np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_BYTES),
            bad=bad,
            known=known,
        )

    def _grouped(self, images: list[Tensor]) -> list[tuple[NDArray[np.int64], Tensor]]:
        """Filled up to the batch size, where all images have one size.

        Kernels are chosen by a batch's shape and sum in another order for another one: in a batch that is always
        full, an image's features are the same to the last bit whatever lies beside it.
        """
        by_size: dict[torch.Size, list[int]] = {}
        for place, image in enumerate(images):
            by_size.setdefault(image.shape, []).append(place)
        groups = []
        for size, places in by_size.items():
            count = len(places) if self.preprocessing.rule == "native" else self.batch_size
            group = torch.zeros(count, *size)
            for row, place in enumerate(places):
                group[row] = images[place]
            groups.append((np.array(places), group))
        return groups


@dataclass(frozen=True)
class Work:
    """A pass over images: all that decides its result."""

    model: Model
    about: Subject  # but for the batch size, which is the reader's
    reader: Reader
    note: Mapping[str, Any] = field(default_factory=dict)  # what the manifest says of the source

    @property
    def subject(self) -> Subject:
        """What the evidence is about."""
        return replace(self.about, batch_size=self.reader.batch_size)

    def key(self) -> str:
        """Digest of all that decides the result: an interrupted pass goes on only with the same."""
        reader = self.reader
        known = sorted(digest.hex() for digest in reader.known)
        what = [asdict(self.subject), reader.source.fingerprint(), known]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()


Found = Observation | Evidence


class Engine(Protocol):
    """Where the network runs."""

    @property
    def place(self) -> str:
        """Kind of device, for the manifest: features differ in their last digits between kinds."""

    def observe(self, work: Work, batches: NDArray[np.int64]) -> Generator[tuple[list[int], Found], None, None]:
        """What the images of these batches say: numbers of some batches and what they gave, in any order."""


@dataclass(frozen=True)
class Local:
    """On this machine: `workers` processes read and decode (0: this one does), the network runs here."""

    workers: int = 0
    device: str | torch.device = "cpu"

    @property
    def place(self) -> str:
        return torch.device(self.device).type

    def observe(self, work: Work, batches: NDArray[np.int64]) -> Generator[tuple[list[int], Found], None, None]:
        network = network_of(work, checked_device(self.device))
        try:
            for batch in loader(work.reader, batches, self.workers):
                yield [batch.number], observed(network, batch)
        except torch.OutOfMemoryError as error:
            raise WorkerError(f"The device has no memory for {work.reader.batch_size} images at once.") from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise WorkerError("A decoding process was killed; usually memory, or /dev/shm, was too small.") from error


def best_device() -> str:
    """The device a build runs on where none is named."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_workers(device: str) -> int:
    """Processes that decode: the network needs cores of its own where it runs on the processor."""
    return max(1, cores() // 2 if device == "cpu" else cores() - 1)


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def network_of(work: Work, device: torch.device | None) -> GapNetwork:
    """The network that an engine runs, once a device."""
    subject = work.subject
    points = None if subject.statistics_point == "convolution" else subject.points
    return GapNetwork(work.model.module, tuple(subject.layers), device, subject.statistics_point, points)


def loader(reader: Reader, batches: NDArray[np.int64], workers: int) -> DataLoader[Batch]:
    """These batches of a reader, read by `workers` processes."""
    return DataLoader(
        reader,
        batch_size=None,
        sampler=_in_runs(batches, workers, reader),
        num_workers=workers,
        multiprocessing_context=reader.source.start_method if workers else None,
        worker_init_fn=_leave_interrupts_to_the_parent,
    )


def observed(network: GapNetwork, batch: Batch) -> Observation:
    """What one batch says. Raises DataError where its source failed."""
    if batch.failure:
        raise DataError(batch.failure)
    features: NDArray[np.floating[Any]] = np.empty((0, 0), np.float32)
    for places, images in batch.groups:
        gap = network.features(images)[: len(places)].numpy()
        if not features.size:
            features = np.empty((len(batch.names), gap.shape[1]), gap.dtype)
        features[places] = gap
    if not np.isfinite(features).all():
        name = batch.names[int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])]
        raise UnsupportedModelError(f"The network answers image '{name}' with features that are not finite.")
    return Observation(features, batch.targets, batch.names, batch.digests, batch.bad, batch.known)


def subject_of(
    model: Model,
    *,
    layers: Sequence[str] = ("*",),
    statistics_point: str = "convolution",
    normality: bool = True,
    seed: int = 0,
) -> Subject:
    """What evidence about `model` is about; one pass of an empty image finds the layers that run.

    `layers` are glob patterns of the convolutions that get into the table. Raises UnsupportedModelError, OptionError
    (also where `statistics_point` is `activation` and no layer reaches one).
    """
    widths = convolutions(model.module)
    empty = torch.zeros(1, 3, *model.preprocessing.size)
    running = running_layers(model.module, empty)
    chosen = match(running, layers)
    points = {} if statistics_point == "convolution" else points_reached(model.module, chosen, empty)
    return Subject(
        **_identity(model),
        layers={name: widths[name] for name in chosen},
        idle_layers=tuple(name for name in widths if name not in running),
        left_out=tuple(name for name in running if name not in chosen),
        layer_patterns=tuple(layers),
        statistics_point=statistics_point,
        sample_images=NORMALITY_IMAGES if normality else 0,
        seed=seed,
        points=points,
    )


def _identity(model: Model) -> dict[str, Any]:
    """The part of a subject that a model is."""
    return {
        "model_name": model.name,
        "model_version": model.version,
        "weights_sha256": model.weights_sha256,
        "labels": model.labels,
        "preprocessing": json.dumps(asdict(model.preprocessing), sort_keys=True),
    }


def hold_out(source: Source, share: float, seed: int) -> Source:
    """The source without a `share` of its images, drawn by a hash of `seed` and name; two of each class stay.

    Each image is drawn by itself, so that images added later change nothing for those that were there.
    """
    hashed = (hashlib.blake2b(source.name(i).encode("utf-8", "surrogateescape"), digest_size=8, key=str(seed).encode())
              for i in range(len(source)))  # fmt: skip
    place = np.array([int.from_bytes(one.digest(), "big") / 2.0**64 for one in hashed])
    kept = place >= share
    for target in source.classes:
        mine = np.flatnonzero(source.targets == target)
        kept[mine[np.argsort(place[mine])[-2:]]] = True
    return source.take(np.flatnonzero(kept))


def note_of(source: Source, **more: Any) -> dict[str, Any]:
    """What a manifest says of a source: a local one by the last part of its path."""
    root = source.root if "://" in source.root else Path(source.root).resolve().name
    return {"root": printable(root), "fingerprint": source.fingerprint(), **more}


def build_table(
    model: Model,
    data: str | os.PathLike[str] | Source,
    *,
    defaults: Defaults | None = None,
    layers: Sequence[str] = ("*",),
    statistics_point: str = "convolution",
    control: str = "none",
    normality: bool = True,
    seed: int = 0,
    batch_size: int = 32,
    workers: int = 0,
    device: str | torch.device = "cpu",
    max_bad: float = 0.01,
    progress: Callable[[Progress], None] | None = None,
) -> SelectionTable:
    """One pass over the images of `data`, a source or what `open_source` takes, on this machine.

    Memory does not grow with the number of images, but for their names. `layers` are glob patterns of the
    convolutions that get into the table; `statistics_point` and `control` are as in `SelectionTable` and
    `Evidence.table`; `seed` draws the class-balanced sample of at most 5000 images for the normality test,
    `normality=False` leaves that test out. The table has the model's name and version. Raises DataError (also
    when more than the share `max_bad` of the images cannot be read) and UnsupportedModelError, and TableError for
    defaults that do not fit, before any work where it can.
    """
    source = open_source(data, model) if isinstance(data, str | os.PathLike) else data
    subject = subject_of(model, layers=layers, statistics_point=statistics_point, normality=normality, seed=seed)
    check_defaults(model.name, defaults or Defaults(), subject.layers, tested=normality)
    work = Work(model, subject, Reader(source, model.preprocessing, batch_size), note_of(source))
    evidence = gather(work, Local(workers, device), max_bad=max_bad, progress=progress)
    return evidence.table(defaults or Defaults(), control)


def gather(
    work: Work,
    engine: Engine,
    *,
    max_bad: float = 0.01,
    checkpoint: Checkpoint | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Evidence:
    """The evidence of all of the work's images, each counted exactly once, going on from `checkpoint` if there is one.

    Raises DataError when more than the share `max_bad` of the images cannot be read. Before any error or interruption
    (KeyboardInterrupt) passes on, the checkpoint is written. Raises EvidenceError, before any work, for a model
    that is not the subject's.
    """
    _require_subject(work)
    reader = work.reader
    sizes = np.array([len(reader.indices(number)) for number in range(len(reader))])
    resumed = checkpoint.restore() if checkpoint else None
    evidence, done = resumed or (Evidence(work.subject, reader.source.classes), np.zeros(len(reader), bool))
    covered = np.zeros(len(work.subject.labels), bool)
    covered[evidence.targets] = True

    def report() -> None:
        if progress is not None:
            looked_at, classes = int(sizes[done].sum()), int(covered.sum())
            progress(Progress(looked_at, len(reader.source), classes, len(evidence.bad), evidence.known))

    report()
    _require_readable(evidence, len(reader.source), max_bad)
    whole = True  # the evidence is that of `done`, no more and no less
    try:
        # Closed at once after an error: it may hold worker processes, or a cluster.
        with closing(engine.observe(work, np.flatnonzero(~done))) as pieces:
            for numbers, found in pieces:
                if done[numbers].any():
                    raise EvidenceError(f"Batches {numbers} came back twice; their images would count twice.")
                with _signals_held():
                    whole = False
                    if isinstance(found, Evidence):
                        evidence.add(found)
                    else:
                        evidence.observe(found)
                    covered[found.targets] = True
                    done[numbers] = True
                    whole = True
                report()
                _require_readable(evidence, len(reader.source), max_bad)
                if checkpoint:
                    checkpoint.save_if_due(evidence, done)
    except BaseException:
        if checkpoint and whole and done.any():
            with _signals_held() as waiting:
                checkpoint.save(evidence, done)
                waiting.clear()  # this is the end already
        raise
    if checkpoint:
        checkpoint.save(evidence, done)  # the statistics and the writing of the table may fail too
    evidence.sources = [{**work.note, "images": evidence.images, "torch": torch.__version__, "ran_on": engine.place}]
    return evidence.in_order()


def _require_subject(work: Work) -> None:
    """A table's evidence grows only by what this very model says. Raises EvidenceError."""
    require_same(work.subject, replace(work.subject, **_identity(work.model)))


@contextmanager
def _signals_held() -> Iterator[list[int]]:
    """Signals that may raise wait for the block's end: half of a batch must not get into a checkpoint.

    SIGINT, SIGTERM, and SIGCHLD, at which a DataLoader raises where a worker has died. Yields those that wait.
    """
    waiting: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield waiting  # signals are the main thread's
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
    # None: set by no Python code, so not ours to put back.
    before = {number: handler for number in numbers if (handler := signal.getsignal(number)) is not None}
    try:
        for number in before:
            signal.signal(number, lambda held, frame: waiting.append(held))
        yield waiting
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for held in waiting:
            signal.raise_signal(held)


def _require_readable(evidence: Evidence, total: int, max_bad: float) -> None:
    if len(evidence.bad) > max_bad * total:
        first = " ".join(reason for _, reason in sorted(evidence.bad)[:3])
        raise DataError(
            f"{len(evidence.bad)} of {total} images cannot be read, more than the {max_bad:.2%} allowed. {first}"
        )


def _in_runs(batches: NDArray[np.int64], workers: int, reader: Reader) -> list[int]:
    """The batches in an order in which each of `workers`, who take turns, gets neighbours one after the other.

    As many neighbours as fill several row groups of a Parquet file, so that few groups are read twice.
    """
    together = reader.source.run_length
    run = min(MAX_RUN, ROW_GROUPS_IN_A_RUN * -(-together // reader.batch_size)) if together > 1 else 1
    whole = len(batches) // (max(1, workers) * run) * max(1, workers) * run
    in_runs = batches[:whole].reshape(-1, max(1, workers), run).swapaxes(1, 2).ravel()
    return [int(number) for number in (*in_runs, *batches[whole:])]


def _leave_interrupts_to_the_parent(worker: int) -> None:
    # Control-C reaches every process of the terminal; the parent ends its workers in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
