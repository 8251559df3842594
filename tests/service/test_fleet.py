"""service/fleet.py: wishes of several workers are followed in their order, whatever runs meanwhile."""

import asyncio
import json
from pathlib import Path

import pytest

from service.fleet import WANTED_FILE, Fleet
from service.settings import Settings


class Slow:
    """A repository whose loads take until `gate` opens, and which writes down what it was told."""

    ready = True

    def __init__(self) -> None:
        self.told: list[str] = []
        self.gate = asyncio.Event()

    async def load(self, name: str) -> None:
        self.told.append("load")
        await self.gate.wait()

    async def unload(self, name: str) -> None:
        self.told.append("unload")


@pytest.fixture
def settings() -> Settings:
    return Settings()


def test_a_wish_of_before_is_not_followed_after_a_later_one(settings: Settings, tmp_path: Path) -> None:
    """Another worker unloads while this one loads: the load is the later wish, and the unload stays undone."""

    async def scenario() -> None:
        fleet = Fleet(settings, tmp_path, lambda: None)
        slow = Slow()
        fleet.repository = slow  # type: ignore[assignment]
        fleet.start()
        loading = asyncio.ensure_future(fleet.load("m"))
        while not slow.told:
            await asyncio.sleep(0.01)
        (tmp_path / WANTED_FILE).write_text(json.dumps({"m": {"number": 1, "served": False}}))
        await asyncio.sleep(0.5)  # more than twice as long as the others are looked at
        slow.gate.set()
        await loading
        await asyncio.sleep(0.5)
        assert slow.told == ["load"]
        assert json.loads((tmp_path / WANTED_FILE).read_text())["m"] == {"number": 2, "served": True}
        (tmp_path / WANTED_FILE).write_text(json.dumps({"m": {"number": 3, "served": False}}))
        while slow.told[-1] != "unload":
            await asyncio.sleep(0.01)
        await fleet.close()

    asyncio.run(scenario())
