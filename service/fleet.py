"""Loads and unloads that every worker follows: what one worker was told, the others read from a folder they share.

The worker that is asked does it first, so that a model that does not load is refused before anybody else tries. Then
it writes down what is wanted, and answers once every worker alive has done the same. A worker that is started later,
in the place of one that died, begins with what is written.
"""

import asyncio
import json
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from service.errors import ServiceError
from service.repository import Repository
from service.settings import Settings
from service.shared_files import locked, write

log = logging.getLogger(__name__)

WANTED_FILE, LOCK_FILE = "repository.json", "repository.lock"
POLL_SECONDS = 0.2
FOLLOW_SECONDS = 120.0  # how long an answer waits for the other workers


@dataclass(frozen=True)
class Wish:
    """The last thing asked about a model: `number` counts all wishes, so that a later one is seen to be later."""

    number: int
    served: bool


@dataclass(frozen=True)
class Report:
    """What a worker has followed, by model: the wish's number, and why it could not; and whether it is ready."""

    done: dict[str, int]
    failures: dict[str, str]
    ready: bool


class Fleet:
    """This worker among its like. `folder` is the workers' own and empty when the service starts; None: it is alone."""

    def __init__(self, settings: Settings, folder: Path | None, on_change: Callable[[], None]) -> None:
        """`on_change` is called whenever what this worker serves has changed."""
        self._folder = folder
        self._done = self._wishes() if folder else {}  # by model, what this worker has followed
        self.repository = Repository(settings, {name: wish.served for name, wish in self._done.items()}, on_change)
        self._changing = asyncio.Lock()  # one wish at a time: an older one must not be followed after a newer one
        self._failures: dict[str, str] = {}
        self._reported: Report | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Follow the others from now on; called on the event loop."""
        if self._folder is not None:
            self._report()
            self._task = asyncio.get_running_loop().create_task(self._follow())

    async def wait_behind_others(self) -> None:
        """Where another worker is ready, until this one has loaded: it takes no call that the other can answer."""
        while (
            self._folder
            and self.repository.loading
            and any(report.ready for pid, report in self._reports().items() if pid != str(os.getpid()))
        ):
            await asyncio.sleep(POLL_SECONDS)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._folder is not None:
            self._own_report.unlink(missing_ok=True)

    async def load(self, name: str) -> None:
        """As Repository.load, in every worker. Raises ServiceError also where another worker failed to follow."""
        await self._change(name, served=True)

    async def unload(self, name: str) -> None:
        """As Repository.unload, in every worker."""
        await self._change(name, served=False)

    async def _change(self, name: str, *, served: bool) -> None:
        async with self._changing:
            await (self.repository.load(name) if served else self.repository.unload(name))
            if self._folder is None:
                return
            with locked(self._folder / LOCK_FILE):
                wishes = self._wishes()
                wish = Wish(1 + max((w.number for w in wishes.values()), default=0), served)
                write(self._folder / WANTED_FILE, {n: asdict(w) for n, w in {**wishes, name: wish}.items()})
            self._done[name] = wish
            self._failures.pop(name, None)
            self._report()
        await self._wait_for_all(name, wish)

    async def _wait_for_all(self, name: str, wish: Wish) -> None:
        """Until every worker alive has followed. Raises ServiceError(load_failed) naming what one of them said."""
        behind: list[str] = []
        for _ in range(round(FOLLOW_SECONDS / POLL_SECONDS)):
            reports = self._reports()
            behind = [pid for pid, report in reports.items() if report.done.get(name, 0) < wish.number]
            for pid in reports.keys() - behind:
                if reason := reports[pid].failures.get(name):
                    raise ServiceError("load_failed", f"Model '{name}' is not the same in worker {pid}: {reason}")
            if not behind:
                return
            await asyncio.sleep(POLL_SECONDS)
        raise ServiceError("load_failed", f"Model '{name}' is still changing in worker {', '.join(behind)}.")

    async def _follow(self) -> None:
        while True:
            try:
                self._report()
                for name in sorted(self._wishes()):
                    async with self._changing:
                        wish = self._wishes()[name]  # of now: it may have changed while this one waited
                        if wish.number > self._done.get(name, Wish(0, False)).number:
                            await self._apply(name, wish)
            except OSError:
                log.exception("The workers' folder cannot be read.")
            await asyncio.sleep(POLL_SECONDS)

    async def _apply(self, name: str, wish: Wish) -> None:
        try:
            await (self.repository.load(name) if wish.served else self.repository.unload(name))
            self._failures.pop(name, None)
        except ServiceError as error:
            if wish.served or error.code != "unknown_model":  # a worker that never had it need not unload it
                log.error("Model '%s' could not be changed as another worker did: %s", name, error.message)
                self._failures[name] = error.message
        self._done[name] = wish
        self._report()

    def _wishes(self) -> dict[str, Wish]:
        assert self._folder is not None
        try:
            text = (self._folder / WANTED_FILE).read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        return {name: Wish(**wish) for name, wish in json.loads(text).items()}

    @property
    def _own_report(self) -> Path:
        assert self._folder is not None
        return self._folder / f"repository-{os.getpid()}.json"

    def _report(self) -> None:
        """Write down what has changed since the last time."""
        done = {name: wish.number for name, wish in self._done.items()}
        report = Report(done, dict(self._failures), self.repository.ready)
        if report != self._reported:
            write(self._own_report, asdict(report))
            self._reported = report

    def _reports(self) -> dict[str, Report]:
        """What each worker alive has done, by process id."""
        assert self._folder is not None
        reports = {}
        for file in self._folder.glob("repository-*.json"):
            pid = file.stem.removeprefix("repository-")
            with suppress(FileNotFoundError):  # it has just ended
                if Path("/proc", pid).exists():
                    reports[pid] = Report(**json.loads(file.read_text(encoding="utf-8")))
        return reports
