"""The models this worker serves, each with its versions: loaded, found, replaced and given back while requests run.

A version serves from the moment its golden image matched until its last request after retirement is answered, so
that a reload drops nothing. Loading has a thread of its own; predictions and maps have one device thread each, so
that no prediction waits behind an explanation of many passes.
"""

import asyncio
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from parchgrad.errors import ParchGradError
from service import memory, metrics, versions
from service.batching import Batcher
from service.cost import Cost
from service.engine import DeviceMemoryError, Engine, Job, Result, Wanted
from service.errors import ServiceError
from service.settings import NAME, Settings, SettingsError

log = logging.getLogger(__name__)

Work = TypeVar("Work")

FORESEEN = (ParchGradError, ServiceError, SettingsError)  # their messages say all there is to say

READY, LOADING, UNAVAILABLE = "READY", "LOADING", "UNAVAILABLE"  # as Triton's repository index has them
STILL_LOADING = "The model is still loading."


@dataclass(frozen=True)
class ModelState:
    """One line of the index; `version` is empty where none was found, `reason` says why one does not serve."""

    name: str
    version: str
    state: str
    reason: str = ""


class Served:
    """One version of a model at work, with its queues. Leases keep it until the requests that began with it end."""

    def __init__(
        self, engine: Engine, predictions: Batcher[Job, Result], maps: Batcher[Job, Result], map_lane: Executor
    ) -> None:
        self.engine = engine
        self._predictions, self._maps = predictions, maps
        self._map_lane = map_lane
        self._leases = 0
        self._retired: asyncio.Event | None = None  # set once it is retired and the last lease has ended

    @property
    def name(self) -> str:
        return self.engine.model.name

    @property
    def version(self) -> str:
        return self.engine.model.version

    @property
    def waiting(self) -> int:
        """Images and maps that the device has not begun."""
        return self._predictions.waiting + self._maps.waiting

    async def on_map_lane(self, work: Callable[[], Work]) -> Work:
        """`work()` in the device thread of maps, after what has been given to it before."""
        return await asyncio.get_running_loop().run_in_executor(self._map_lane, work)

    async def submit(self, job: Job, deadline: float) -> Result:
        """The job's result; see Batcher.submit. Predictions and maps queue apart."""
        return await (self._predictions if job.explained is None else self._maps).submit(job, deadline)

    @contextmanager
    def lease(self) -> Iterator["Served"]:
        self._leases += 1
        try:
            yield self
        finally:
            self._leases -= 1
            if self._retired is not None and not self._leases:
                self._retired.set()

    async def retire(self) -> None:
        """Wait until nobody uses it, then stop its queues. Whoever calls this has made it unfindable before."""
        self._retired = asyncio.Event()
        if self._leases:
            await self._retired.wait()
        await self._predictions.close()
        await self._maps.close()


class Repository:
    """Which versions serve, by name. Lives on the event loop; only reading and proving a version is a thread's work."""

    def __init__(self, settings: Settings, wishes: Mapping[str, bool], on_change: Callable[[], None]) -> None:
        """`wishes`: models loaded (True) or unloaded since the service started, over what the settings name."""
        self._settings, self._on_change = settings, on_change
        self._entries = dict(settings.entries)  # versions pinned by the settings
        for name, served in wishes.items():
            if served:
                self._entries.setdefault(name, None)
            else:
                self._entries.pop(name, None)
        self.default = settings.entries[0][0]
        self._unloaded = {name for name, served in wishes.items() if not served}
        self._served: dict[str, dict[str, Served]] = {}
        self._states: dict[str, list[ModelState]] = {name: [ModelState(name, "", LOADING)] for name in self._entries}
        self._loader = ThreadPoolExecutor(1, "load")
        self._predict_lane = ThreadPoolExecutor(1, "predict")
        self._map_lane = ThreadPoolExecutor(1, "maps")
        for lane in (self._predict_lane, self._map_lane):
            lane.submit(int).result()  # its thread begins now: where memory is out there may be none for its stack
        self._changing = asyncio.Lock()  # one load or unload at a time: memory for one more version is enough
        self._retiring: set[asyncio.Task[None]] = set()
        self._first: asyncio.Task[None] | None = None

    # --- asking ---------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether every model that was to be served from the start is, or has been unloaded on purpose."""
        return all(state.state == READY for states in self._states.values() for state in states)

    @property
    def loading(self) -> bool:
        """Whether a model that was to be served from the start is still being loaded."""
        return any(state.state == LOADING for states in self._states.values() for state in states)

    @property
    def failure(self) -> str | None:
        """Why it is not ready, where a model failed."""
        return next((s.reason for states in self._states.values() for s in states if s.state == UNAVAILABLE), None)

    def states(self) -> list[ModelState]:
        return [state for name in sorted(self._states) for state in self._states[name]]

    def listing(self) -> list[Served]:
        """All that serve, by name, newest version first."""
        return [self._served[name][v] for name in sorted(self._served) for v in _newest_first(self._served[name])]

    def versions(self, name: str) -> list[str]:
        """The versions of a model that serve, newest first."""
        return _newest_first(self._served.get(name, {}))

    def require_any(self) -> None:
        """Raises ServiceError(not_ready) before any model serves. Why one failed, `use` says to whoever names it."""
        if not self._served and self.loading:
            raise ServiceError("not_ready", STILL_LOADING)

    @contextmanager
    def use(self, name: str | None = None, version: str | None = None) -> Iterator[Served]:
        """The version to answer a request with, kept until the request ends; None: the default, the newest.

        Raises ServiceError: unknown_model, unknown_version, not_ready.
        """
        with self._find(name or self.default, version).lease() as served:
            metrics.found(served.name, served.version)
            yield served

    def _find(self, name: str, version: str | None) -> Served:
        loaded = self._served.get(name)
        if not loaded:
            for state in self._states.get(name, ()):
                raise ServiceError("not_ready", state.reason or f"Model '{name}' is still loading.")
            if name in self._unloaded:
                raise ServiceError("unknown_model", f"Model '{name}' was unloaded.")
            there = ", ".join(f"'{one}'" for one in sorted(self._served)) or "none"
            raise ServiceError("unknown_model", f"There is no model {name[:64]!r}; there is {there}.")
        if version is None:
            return loaded[_newest_first(loaded)[0]]
        if version not in loaded:
            there = ", ".join(f"'{one}'" for one in _newest_first(loaded))
            raise ServiceError("unknown_version", f"Model '{name}' has no version {version[:64]!r}; it has {there}.")
        return loaded[version]

    # --- changing -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to load what the settings name; called on the event loop."""
        self._first = asyncio.get_running_loop().create_task(self._load_first())

    async def _load_first(self) -> None:
        async with self._changing:
            for name, version in self._entries.items():
                try:
                    served = await asyncio.get_running_loop().run_in_executor(self._loader, self._loaded, name)
                except Exception as error:  # the worker stays alive to say on /readyz and in its log what is wrong
                    self._states[name] = [ModelState(name, version or "", UNAVAILABLE, self._told(name, error))]
                else:
                    self._serve(name, served)
            self._on_change()

    async def load(self, name: str) -> None:
        """Load a model's versions from the disk, or load them again; what served goes on until they are proven.

        Raises ServiceError: unknown_model, load_failed. After a failure everything is as before.
        """
        async with self._changing:
            self._folder_versions(name)
            try:
                served = await asyncio.get_running_loop().run_in_executor(self._loader, self._loaded, name)
            except ServiceError:
                raise
            except Exception as error:
                raise ServiceError("load_failed", self._told(name, error)) from None
            before = self._served.get(name, {})
            self._serve(name, served)
            self._on_change()
            self._retire(before)

    async def unload(self, name: str) -> None:
        """Stop serving a model; requests that began before are answered. Raises ServiceError(unknown_model)."""
        async with self._changing:
            if name not in self._states:
                raise ServiceError("unknown_model", f"There is no model {name[:64]!r} to unload.")
            del self._states[name]
            self._unloaded.add(name)
            self._on_change()
            self._retire(self._served.pop(name, {}))

    async def close(self) -> None:
        """Stop all queues; what waits in them is cancelled."""
        if self._first is not None:
            self._first.cancel()
        all_served = [served for name in self._served for served in self._served[name].values()]
        self._served.clear()
        self._states.clear()
        await asyncio.gather(*(served.retire() for served in all_served), *self._retiring, return_exceptions=True)
        for lane in (self._predict_lane, self._map_lane, self._loader):
            lane.shutdown(wait=False, cancel_futures=True)

    def _told(self, name: str, error: Exception) -> str:
        """Log why a model was not loaded; what callers may know of it.

        Where our folders are is nobody's business, nor what an unforeseen error says.
        """
        start = f"Model '{name}' was not loaded:"
        if not isinstance(error, FORESEEN):
            log.error("%s", start, exc_info=error)
            return f"{start} {type(error).__name__}; the log says more."
        text = " ".join(str(error).split()).removeprefix(f"Model '{name}': ")
        if text.startswith(f"Model '{name}' "):
            text = "it" + text.removeprefix(f"Model '{name}'")
        log.error("%s %s", start, text)
        settings = self._settings
        return f"{start} {without_folders(text, (settings.models_dir, settings.tables_dir, settings.graphs_dir))}"

    def _serve(self, name: str, served: dict[str, Served]) -> None:
        self._served[name] = served
        self._unloaded.discard(name)
        self._states[name] = [ModelState(name, version, READY) for version in _newest_first(served)]
        for one in served.values():
            metrics.begin_version(one.name, one.version)
            metrics.model_info.labels(*_identity(one)).set(1)

    def _retire(self, replaced: dict[str, Served]) -> None:
        for served in replaced.values():
            if not any(_identity(served) == _identity(other) for other in self.listing()):
                metrics.model_info.labels(*_identity(served)).set(0)
            task = asyncio.get_running_loop().create_task(self._give_back(served))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    async def _give_back(self, served: Served) -> None:
        """Let the last requests end, then drop everything and return the memory."""
        await served.retire()
        if served.version not in self._served.get(served.name, {}):
            metrics.end_version(served.name, served.version)
        del served
        await asyncio.to_thread(memory.give_back)

    def _loaded(self, name: str) -> dict[str, Served]:
        """The versions of a model that the settings ask for, each loaded and proven. Raises what goes wrong."""
        return {version: self._made(name, version) for version in self._chosen_versions(name)}

    def _made(self, name: str, version: str) -> Served:
        settings = self._settings
        engine = versions.load(settings, name, version)
        log.info("Model %s/%s runs on %s, %s.", name, version, engine.runtime, engine.device)
        if settings.self_test:
            engine.self_test()

        cost = Cost(name, version)

        def run(jobs: Sequence[Job], wanted: Wanted) -> list[Result | None]:
            start = time.perf_counter()
            results = engine.run(jobs, wanted)
            if all(result is not None for result in results):  # what was given up costs less than a map
                cost.add(jobs, time.perf_counter() - start)
            return results

        def batcher(lane: ThreadPoolExecutor) -> Batcher[Job, Result]:
            return Batcher(
                run,
                lambda job: job.group,
                lane,
                capacity=engine.capacity,
                max_queue=settings.max_queue,
                max_delay=settings.max_delay_ms / 1000,
                out_of_memory=DeviceMemoryError,
                model=name,
                version=version,
            )

        return Served(engine, batcher(self._predict_lane), batcher(self._map_lane), self._map_lane)

    def _chosen_versions(self, name: str) -> list[str]:
        there, pinned = self._folder_versions(name), self._entries.get(name)
        if pinned and pinned not in there:
            known = ", ".join(there)
            raise ServiceError("unknown_version", f"Model '{name}' has no version {pinned} on disk; there is {known}.")
        return versions.chosen(self._settings, pinned, there)

    def _folder_versions(self, name: str) -> list[str]:
        """Versions of a model on the disk, newest first. Raises ServiceError(unknown_model) where there is none."""
        if not re.fullmatch(NAME, name):
            raise ServiceError("unknown_model", f"There is no model {name[:64]!r} in the repository.")
        found = self._settings.versions_there(name)
        if not found:
            raise ServiceError("unknown_model", f"There is no model '{name}' in the repository.")
        return found


def without_folders(text: str, folders: Iterable[Path]) -> str:
    """No absolute path: what lies in one of `folders` begins with the folder's name, of others the last part stays."""
    for folder in sorted(folders, key=lambda one: len(str(one)), reverse=True):
        text = re.sub(rf"(?<![\w./]){re.escape(str(folder))}(?![\w.-])", folder.name, text)
    return re.sub(r"(?<![\w./])/(?:[^\s/'\"]+/)+", "", text)


def _newest_first(served: dict[str, Served]) -> list[str]:
    return sorted(served, key=int, reverse=True)


def _identity(served: Served) -> tuple[str, ...]:
    """As model_info has it."""
    engine = served.engine
    digests = engine.model.weights_sha256, engine.table.table_sha256
    return served.name, served.version, *digests, engine.runtime, engine.device
