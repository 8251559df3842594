"""Each view of the page brought to what it is for, as a person would: what is looked at, and checked, in every one."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from playwright.sync_api import Page, expect

from parchgrad.render import png
from scenes.generator import sample
from tests.service.serving import PROJECT_ROOT, Server

SAMPLES = PROJECT_ROOT / "models" / "scenes" / "1" / "samples"
SCENE, MOSAIC = SAMPLES / "scene_9.png", SAMPLES / "mosaic_3.png"
FISH = 2  # a class in a quarter of the mosaic, not the one predicted
DARK = 0.4


def choose(page: Page, picture: Path) -> None:
    page.get_by_label("Image files").first.set_input_files(picture)


def start(page: Page, url: str) -> None:
    page.goto(f"{url}/#/explain")
    expect(page.locator(".sample img").first).to_be_visible()


def explain(page: Page, url: str) -> None:
    page.goto(f"{url}/#/explain?target={FISH}")
    choose(page, MOSAIC)
    settled(page)


def methods(page: Page, url: str) -> None:
    explain(page, url)
    page.get_by_role("button", name="Methods side by side").click()
    expect(page.locator(".tile .figures", has_text="gini")).to_have_count(4)
    settled(page)


def two_classes(page: Page, url: str) -> None:
    explain(page, url)
    page.get_by_role("button", name="Two classes").click()
    settled(page)


def classes(page: Page, url: str) -> None:
    page.goto(f"{url}/#/class?class={FISH}")
    page.locator(".class-drawing .node").last.focus()
    expect(page.get_by_role("region", name="Channel", exact=True).locator(".crops canvas")).to_have_count(3)
    settled(page)


def layers(page: Page, url: str) -> None:
    page.goto(f"{url}/#/layers")
    choose(page, SCENE)
    expect(page.locator(".flow .card").nth(3)).to_be_visible()
    page.get_by_role("button", name="Gradient after the rule").click()
    settled(page)


def attack(page: Page, url: str) -> None:
    page.goto(f"{url}/#/attack")
    choose(page, SCENE)
    expect(page.locator(".verdict")).to_contain_text("umbrella →")


def traffic(page: Page, url: str) -> None:
    page.goto(f"{url}/#/traffic")
    expect(page.locator(".chosen h2")).to_be_visible()


STATES: dict[str, Callable[[Page, str], None]] = {
    "start": start, "explain": explain, "methods": methods, "two_classes": two_classes, "class": classes,
    "layers": layers, "attack": attack, "traffic": traffic,
}  # fmt: skip


def settled(page: Page) -> None:
    """Nothing in the page is being worked on."""
    expect(page.locator("[aria-busy=true]")).to_have_count(0)


def send_traffic(server: Server, images: int = 60) -> None:
    """Scenes for the Traffic view to look at, as many of them as it finds the time for; the last third are dark."""
    for i in range(images):
        scene = sample("test", i).image
        dark = (scene * DARK).astype(np.uint8) if i >= 2 * images / 3 else scene
        server.client.post("/explain", files={"image": png(dark)}, data={"saliency": "none"})
