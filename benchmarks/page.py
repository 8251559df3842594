"""The page in a real browser at a running service: how soon it can be used, and how soon a slider's move is drawn.

`python -m benchmarks.page http://localhost:3000`. Needs playwright and Debian's chromium, as tests/page does. First
view: from the address to the first sample that can be clicked, in a fresh browser window without a cache. Redraw: from
a move of the slider to the first frame that shows its map, every move to a value that was not shown before.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "models" / "scenes" / "1" / "samples" / "scene_13.png"

# In the page, for what asks from outside adds its own delay: resolves to ms once the stage shows the value.
MOVE = """([name, value, attribute]) => new Promise((done) => {
  const slider = [...document.querySelectorAll("input[type=range]")].find((one) => one.labels[0].textContent === name);
  const stage = document.querySelector(".one-map .stage");
  const start = performance.now();
  const before = stage.dataset.drawn;
  const watch = new MutationObserver(() => {
    if (attribute ? stage.dataset[attribute] !== String(value) : stage.dataset.drawn === before) return;
    watch.disconnect();
    requestAnimationFrame(() => done(performance.now() - start));
  });
  watch.observe(stage, { attributes: true });
  slider.value = value;
  slider.dispatchEvent(new Event("input"));
})"""


def first_views(browser: Browser, url: str, times: int) -> list[float]:
    """Milliseconds to the first sample that can be clicked, by the page's own clock."""
    found = []
    for _ in range(times):
        context = browser.new_context()
        page = context.new_page()
        page.goto(url, wait_until="commit")
        page.locator(".sample img").first.wait_for()
        found.append(float(page.evaluate("performance.now()")))
        context.close()
    return found


def moves(page: Page, name: str, values: list[float], attribute: str) -> list[float]:
    return [float(page.evaluate(MOVE, [name, value, attribute])) for value in values]


def row(name: str, found: list[float]) -> str:
    deciles = statistics.quantiles(found, n=10, method="inclusive")
    return f"| {name} | {len(found)} | {statistics.median(found):.0f} | {deciles[-1]:.0f} | {max(found):.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--image", type=Path, default=SAMPLE)
    parser.add_argument("--times", type=int, default=10, help="of the first view")
    given = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        print("| ms | times | median | 90 % | longest |\n| --- | ---: | ---: | ---: | ---: |")
        print(row("first view usable", first_views(browser, given.url, given.times)))
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.goto(given.url)
        page.get_by_label("Image files").first.set_input_files(given.image)
        page.locator(".one-map .stage[data-drawn]").wait_for()
        quantiles = [round(0.02 + 0.03 * i, 2) for i in range(30)]
        print(row("quantile moved, a new map", moves(page, "Channels kept", quantiles, "quantile")))
        print(
            row(
                "quantile moved back, a map that was kept",
                moves(page, "Channels kept", quantiles[::-1][1:], "quantile"),
            )
        )
        print(row("opacity moved, the same map", moves(page, "Opacity", [0.05 * i for i in range(20)], "")))
        browser.close()


if __name__ == "__main__":
    main()
