"""Pictures of every view of the page with the bundled model: `python -m tests.page.screenshots --out FOLDER`.

Three widths in light, and one in dark, of each state. `--docs` writes those that stand in the documentation, to docs/.
"""

import shutil
import tempfile
from pathlib import Path

import click
from playwright.sync_api import Browser, sync_playwright

from tests.page.conftest import ARGUMENTS
from tests.page.states import STATES, send_traffic
from tests.service.serving import PROJECT_ROOT, serving

WIDTHS = (390, 900, 1440)
HEIGHT = 900
DOCS = ("explain", "methods", "class", "layers", "attack", "traffic")
DOCS_WIDTH, DOCS_HEIGHT = 1440, 1850
MOST_HEIGHT = 8000  # what is lower is cut off
IMAGES_SENT = 360  # for the Traffic view: the last third of them dark


def shoot(browser: Browser, url: str, name: str, width: int, theme: str, most: int, file: Path) -> None:
    context = browser.new_context(viewport={"width": width, "height": HEIGHT}, color_scheme=theme)  # type: ignore[arg-type]
    page = context.new_page()
    STATES[name](page, url)
    page.evaluate("scrollTo(0, 0)")
    # In a window as high as the page: pictures are drawn when they come into view.
    height = min(page.evaluate("document.documentElement.scrollHeight"), most)
    page.set_viewport_size({"width": width, "height": height})
    page.wait_for_timeout(500)
    page.screenshot(path=file)
    context.close()


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/screenshots"), show_default=True)
@click.option("--only", type=click.Choice(list(STATES)), multiple=True, help="These states alone.")
@click.option("--docs", is_flag=True, help="Write the documentation's pictures instead.")
def main(out: Path, only: tuple[str, ...], docs: bool) -> None:
    """Serve the bundled model, bring each view to what it is for, and photograph it."""
    chromium = shutil.which("chromium")
    if chromium is None:
        raise click.ClickException("chromium is not here; install it (Debian: apt-get install chromium).")
    settings = {"watch_rate": 1, "attacks": "true", "drain_ms": 0}
    out = PROJECT_ROOT / "docs" if docs else out
    out.mkdir(parents=True, exist_ok=True)
    names = only or (DOCS if docs else tuple(STATES))
    with tempfile.TemporaryDirectory() as home, serving(Path(home), settings=settings) as server:
        if "traffic" in names:
            send_traffic(server, IMAGES_SENT)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
            for name in names:
                views = [(width, "light") for width in WIDTHS] + [(WIDTHS[-1], "dark")]
                for width, theme in [(DOCS_WIDTH, "light")] if docs else views:
                    file = out / (f"page_{name}.png" if docs else f"{name}-{width}-{theme}.png")
                    shoot(browser, server.url, name, width, theme, DOCS_HEIGHT if docs else MOST_HEIGHT, file)
                    click.echo(file)
            browser.close()


if __name__ == "__main__":
    main()
