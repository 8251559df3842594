"""A real browser at a real server: Debian's chromium, driven by playwright, and the bundled model."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.service.serving import PROJECT_ROOT, Server, serving

SAMPLES = PROJECT_ROOT / "models" / "scenes" / "1" / "samples"
CHROMIUM = shutil.which("chromium")
# Where the tests run as root, as in a container, the browser's own sandbox cannot be had.
ARGUMENTS = ["--no-sandbox", "--force-color-profile=srgb"]


# For a module and not for the session: playwright's event loop seems to run for as long as it lives, and other tests of
# the same process bring loops of their own.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("chromium is not here")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture(scope="session")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The bundled model, with all that the page can show switched on."""
    settings = {"watch_rate": 1, "attacks": "true", "threads": 1, "drain_ms": 0}
    with serving(tmp_path_factory.mktemp("bundled"), settings=settings) as running:
        yield running


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page in a window of its own. Whatever it logs as an error, or throws, fails the test; `page.forgiven` holds
    what a test expects of that, as parts of the text."""
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    opened = context.new_page()
    wrong: list[str] = []
    opened.forgiven = []  # type: ignore[attr-defined]
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    yield opened
    context.close()
    forgiven = opened.forgiven  # type: ignore[attr-defined]
    assert not [text for text in wrong if not any(part in text for part in forgiven)]


@pytest.fixture
def visit(page: Page, bundled: Server) -> Callable[..., Page]:
    """Open a view of the bundled model, with a picture chosen where one is named: `visit("layers", SAMPLES / "…")`."""

    def open_view(view: str, picture: Path | None = None, query: str = "") -> Page:
        page.goto(f"{bundled.url}/#/{view}{f'?{query}' if query else ''}")
        if picture is not None:
            page.get_by_label("Image files").first.set_input_files(picture)
        return page

    return open_view
