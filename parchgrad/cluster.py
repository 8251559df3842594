"""The Ray engine: a pass over images on many processes or machines, the same to the last bit as on one.

A unit is a few neighbouring batches. Workers (actors, with or without a GPU) turn units into evidence, tasks add up
the evidence of several units, and the caller adds up what they made. Units are pure: one whose worker dies is run
again elsewhere, and nothing is kept in a worker that a second run could count twice.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from parchgrad.build import Found, Reader, Work, network_of, observed
from parchgrad.errors import ClusterError, OptionError, ParchGradError
from parchgrad.evidence import Evidence
from parchgrad.explainer import checked_device

if TYPE_CHECKING:
    import pyarrow
    from ray import ObjectRef
    from ray.data import Dataset

# Batches in a unit: many units a worker, so that none waits long for the last, but not so few images in each that
# their evidence, which is as large for one image of a class as for a thousand, outweighs them.
UNITS_PER_WORKER = 32
UNIT_BATCHES = 16
MAX_UNIT_BATCHES = 64  # where units are cut only between row groups

# The caller is handed about so many pieces, each of at most so many units.
PIECES = 256
MAX_FAN_IN = 32
WORKERS_PER_TASK = 8  # adding up takes a small part of the time the network does

# Threads of a worker with a GPU, each on a unit of its own: they read and decode while the network runs.
MAX_THREADS = 16

# Of a local cluster; what does not fit goes to disk.
OBJECT_STORE_BYTES = 2 << 30

# For a host to answer, and for the cluster behind it to take us in.
KNOCK_SECONDS = 10.0
JOIN_SECONDS = 60.0
_JOIN = "import sys, ray; ray.init(sys.argv[1], logging_level='ERROR', log_to_driver=False)"


@dataclasses.dataclass(frozen=True)
class Ray:
    """`workers` actors on a Ray cluster, each with `gpus_per_worker` GPUs (a share, or one) or one CPU.

    `workers` None: as many as there is room for. `address` of a cluster ('auto', 'host:6379', 'ray://host:10001');
    None: one on this machine for the time of the pass. Where the process is connected to Ray already, that is used.
    """

    workers: int | None = None
    gpus_per_worker: float = 0.0
    address: str | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise OptionError("workers", self.workers, "an integer >= 1 on Ray")
        if not 0 <= self.gpus_per_worker <= 1:
            raise OptionError("gpus_per_worker", self.gpus_per_worker, "a number in [0, 1]")

    @property
    def place(self) -> str:
        """See `Engine`."""
        return "cuda" if self.gpus_per_worker else "cpu"

    def observe(self, work: Work, batches: NDArray[np.int64]) -> Generator[tuple[list[int], Found], None, None]:
        """See `Engine`. Raises ClusterError, and what a worker raised."""
        if not len(batches):
            return
        ray = _ray()
        with _connected(self.address, self.workers):
            room = self._room()
            units = units_of(work.reader, batches, room.workers * room.threads)
            pieces = _pieces(units, ray.put(work), len(work.reader.source.classes), room, self.gpus_per_worker)
            for row in _rows(pieces):
                yield row["numbers"], _unpacked(row["evidence"])

    def _room(self) -> _Room:
        """How the workers fit in the cluster. Raises ClusterError where none does."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        cpus = [int(node.get("CPU", 0)) for node in nodes]
        if not self.gpus_per_worker:
            if not max(cpus, default=0):
                raise ClusterError("The cluster has no CPU for a worker, expected at least 1.")
            return _Room(self.workers or sum(cpus), 1)
        places = [int(node.get("GPU", 0) / self.gpus_per_worker) for node in nodes]
        threads = [min(cpu // place, MAX_THREADS) for cpu, place in zip(cpus, places, strict=True) if place]
        if not max(threads, default=0):
            found = sum(node.get("GPU", 0) for node in nodes)
            raise ClusterError(
                f"The cluster has {found:g} GPUs, expected {self.gpus_per_worker:g} for a worker, "
                "on a machine with a CPU for each."
            )
        return _Room(self.workers or sum(places), min(count for count in threads if count))


@dataclasses.dataclass(frozen=True)
class _Room:
    workers: int
    threads: int  # of each, and the CPUs it takes


def units_of(reader: Reader, batches: NDArray[np.int64], takers: int) -> list[list[int]]:
    """The batches in runs of neighbours, enough for `takers` at a time; cut where the source is good to cut."""
    size = min(max(1, len(batches) // (takers * UNITS_PER_WORKER)), UNIT_BATCHES)
    starts = batches * reader.batch_size
    run_starts = reader.source.run_starts
    good = np.searchsorted(run_starts, starts) < np.searchsorted(run_starts, starts + reader.batch_size)
    units: list[list[int]] = [[]]
    for number, may_begin in zip(batches.tolist(), good.tolist(), strict=True):
        length = len(units[-1])
        if (length >= size and may_begin) or length >= MAX_UNIT_BATCHES:
            units.append([])
        units[-1].append(number)
    return units


def fan_in(units: int) -> int:
    """Units whose evidence is added up before it goes to the caller."""
    return min(-(-units // PIECES), MAX_FAN_IN)


def _ray() -> Any:
    try:
        import ray.data
    except ImportError as error:
        raise ClusterError(
            f"The Ray engine needs Ray Data, which cannot be imported ({error}); pip install parchgrad[ray]."
        ) from error
    return ray


@contextmanager
def _connected(address: str | None, workers: int | None) -> Iterator[None]:
    """A connection to the cluster at `address`, or a cluster on this machine; what was there before stays."""
    import ray

    if ray.is_initialized():
        yield
        return
    if address is not None:
        _require_reachable(address)
    try:
        with _own_signals():
            _init(address, workers)
    except Exception as error:
        where = "A cluster on this machine" if address is None else f"The cluster at '{address}'"
        raise ClusterError(f"{where} cannot be used: {_one_line(error)}.") from error
    try:
        with _quiet():
            yield
    finally:
        ray.shutdown()


def _init(address: str | None, workers: int | None) -> None:
    import ray

    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is not None:
        ray.init(address, **quiet)
        return
    # 'local', or Ray would go by the environment variable RAY_ADDRESS. A cluster that ray.init starts reports no
    # usage statistics and answers nobody without its token.
    ray.init("local", num_cpus=workers, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)


def _require_reachable(address: str) -> None:
    """Join the cluster in a process of its own first: Ray itself waits without end where something else answers."""
    if address != "auto":
        _knock(address)
    try:
        done = subprocess.run(
            [sys.executable, "-c", _JOIN, address], capture_output=True, text=True, timeout=JOIN_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise ClusterError(
            f"The cluster at '{address}' cannot be reached: no answer within {JOIN_SECONDS:g} s."
        ) from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise ClusterError(f"The cluster at '{address}' cannot be used: {said[-1].strip().rstrip('.')}.")


def _knock(address: str) -> None:
    host, _, port = address.rpartition("://")[2].rstrip("/").rpartition(":")
    if not host or not port.isdecimal():
        raise ClusterError(f"Cluster address is '{address}', expected 'auto', 'host:port' or 'ray://host:port'.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(f"The cluster at '{address}' cannot be reached: {_one_line(error)}.") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray Data says only what may matter; the caller reports progress."""
    levels = {"ray.data": logging.WARNING, "ray.data._internal.progress": logging.ERROR}
    before = {name: logging.getLogger(name).level for name in levels}
    try:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _own_signals() -> Iterator[None]:
    """ray.init takes SIGTERM for itself; the caller's handler is put back."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _pieces(units: list[list[int]], work: ObjectRef[Work], sample_classes: int, room: _Room, gpus: float) -> Dataset:
    """The evidence of all units, as rows of `_row`."""
    from ray.data import ActorPoolStrategy, TaskPoolStrategy, from_items

    # A block a unit: what is run again when a worker dies.
    dataset: Dataset = from_items([{"numbers": unit} for unit in units], override_num_blocks=len(units))
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    dataset = dataset.map_batches(
        _Worker, fn_constructor_args=([work], sample_classes, "cuda" if gpus else "cpu", room.threads),
        batch_size=1, batch_format="pyarrow", num_cpus=room.threads, num_gpus=gpus or None,
        compute=ActorPoolStrategy(
            size=room.workers, max_concurrent_calls_per_actor=room.threads, enable_true_multi_threading=True
        ),
    )  # fmt: skip
    together = fan_in(len(units))
    if together > 1:
        # No CPU of its own: the workers may have taken them all.
        dataset = dataset.map_batches(
            _merged, batch_size=together, batch_format="pyarrow", num_cpus=0,
            compute=TaskPoolStrategy(size=-(-room.workers // WORKERS_PER_TASK)),
        )  # fmt: skip
    return dataset


def _rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """The rows of a data set as they come. Raises ClusterError, and what a worker raised."""
    from ray.data.exceptions import ExecutionTimeoutError
    from ray.exceptions import RayError

    blocks: Iterable[Any] = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    try:
        for block in blocks:
            for row in block.to_pylist():
                if row["error"] is not None:
                    raise pickle.loads(row["error"])
                yield row
    except (RayError, ExecutionTimeoutError) as error:
        raise ClusterError(f"The cluster failed: {_one_line(error)}.") from error


class _Worker:
    """Turns units into evidence; an actor. Threads take units at the same time, one at a time the network."""

    def __init__(self, work: list[ObjectRef[Work]], sample_classes: int, device: str, threads: int) -> None:
        import ray
        from ray.exceptions import RayError

        # Workers share a machine; in one thread each they do not take turns on its cores.
        torch.set_num_threads(1)
        self._sample_classes = sample_classes
        self._one_at_a_time = threading.Lock()
        self._error: bytes | None = None
        try:
            self._work: Work = ray.get(work[0])
            self._network = network_of(self._work, checked_device(device))
        except RayError as error:
            self._error = _portable(ClusterError(f"A worker cannot load the model or the images: {_one_line(error)}."))
        except Exception as error:
            self._error = _portable(error)

    def __call__(self, units: pyarrow.Table) -> pyarrow.Table:
        (numbers,) = units["numbers"].to_pylist()
        if self._error is not None:
            return _row(numbers, error=self._error)
        try:
            return _row(numbers, _packed(self._evidence(numbers)))
        except Exception as error:
            return _row(numbers, error=_portable(error))

    def _evidence(self, numbers: list[int]) -> Evidence:
        # A source serves one thread.
        reader = dataclasses.replace(self._work.reader, source=copy.copy(self._work.reader.source))
        indices = np.concatenate([reader.indices(number) for number in numbers])
        classes = np.unique(reader.source.targets[indices]).tolist()
        evidence = Evidence(self._work.subject, classes, self._sample_classes)
        for number in numbers:
            batch = reader[number]
            with self._one_at_a_time:
                seen = observed(self._network, batch)
            evidence.observe(seen)
        return evidence


def _merged(rows: pyarrow.Table) -> pyarrow.Table:
    """The evidence of several rows in one; a task."""
    found = rows.to_pylist()
    numbers = [number for row in found for number in row["numbers"]]
    for row in found:
        if row["error"] is not None:
            return _row(numbers, error=row["error"])
    try:
        return _row(numbers, _packed(_sum_of([_unpacked(row["evidence"]) for row in found])))
    except Exception as error:
        return _row(numbers, error=_portable(error))


def _sum_of(parts: list[Evidence]) -> Evidence:
    classes = {index for part in parts for index in part.classes}
    total = Evidence(parts[0].subject, classes, parts[0].sample.classes)
    for part in parts:
        total.add(part)
    return total


def _row(numbers: Iterable[int], evidence: bytes | None = None, error: bytes | None = None) -> pyarrow.Table:
    """Numbers of batches and what they gave: evidence, or what was raised."""
    import pyarrow

    return pyarrow.table(
        {
            "numbers": pyarrow.array([list(numbers)], pyarrow.list_(pyarrow.int64())),
            "evidence": pyarrow.array([evidence], pyarrow.large_binary()),
            "error": pyarrow.array([error], pyarrow.binary()),
        }
    )


def _packed(evidence: Evidence) -> bytes:
    """Evidence as the bytes of its file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "evidence.safetensors")
        evidence.save(path)
        return path.read_bytes()


def _unpacked(data: bytes) -> Evidence:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "evidence.safetensors")
        path.write_bytes(data)
        return Evidence.load(path)[0]


def _portable(error: Exception) -> bytes:
    """An error as bytes that give it back where the caller is, with the place it was raised at as a note."""
    try:
        if not isinstance(error, ParchGradError):
            error.add_note("".join(traceback.format_exception(error)))
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:
        said = str(error) if isinstance(error, ParchGradError) else f"A worker failed: {_one_line(error)}."
        return pickle.dumps(ClusterError(said))
    return data


def _one_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind, without a full stop."""
    lines = str(error).strip().splitlines()
    return (lines[0].strip() if lines else type(error).__name__).rstrip(".")
