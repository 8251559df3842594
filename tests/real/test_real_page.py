"""The page over real weights and photographs: every view's main path on SqueezeNet and MobileNetV2."""

import re

import pytest
from playwright.sync_api import Page, expect

from tests.page.conftest import browser, page  # noqa: F401  # fixtures
from tests.real.conftest import DATA, run
from tests.service.serving import serving

SPRINGER = 217
PHOTOGRAPH = DATA / "imagenette" / "val" / "n02102040" / "ILSVRC2012_val_00025442.JPEG"  # both models say so


@pytest.fixture(scope="module")
def served(repository, real_model, tmp_path_factory):
    """The model with a class graph of a few photographs a class, all that the page can show switched on."""
    data = ["--data", str(DATA / "imagenette" / "train"), "--images-per-class", "3"]
    run(["class-graph", "build", real_model, *data, *repository.arguments])
    settings = {
        "models_dir": repository.models, "tables_dir": repository.tables, "model": real_model, "watch_rate": 1,
        "attacks": "true", "drain_ms": 0,
    }  # fmt: skip
    with serving(tmp_path_factory.mktemp("page"), settings=settings) as running:
        yield running


def test_every_view_shows_a_real_photograph(page: Page, served, real_model) -> None:  # noqa: F811
    page.goto(f"{served.url}/#/explain")
    page.get_by_label("Image files").first.set_input_files(PHOTOGRAPH)
    seen = page.get_by_role("region", name="Picture and map")
    expect(seen).to_contain_text("English springer", timeout=30_000)
    expect(seen).to_contain_text("gini")

    page.get_by_role("link", name="Layers").click()
    expect(page.locator(".flow .card").nth(5)).to_be_visible(timeout=60_000)
    expect(page.locator(".flow")).to_contain_text("selected")

    page.get_by_role("link", name="Attack").click()
    expect(page.locator(".verdict")).to_contain_text("English springer", timeout=120_000)

    page.goto(f"{served.url}/#/class?class={SPRINGER}")
    expect(page.get_by_role("region", name="Channels and influences")).to_contain_text(
        re.compile(r"English springer.* selects \d+ channels"), timeout=30_000
    )
    expect(page.get_by_role("region", name="All classes")).to_contain_text("All 10 classes")

    page.get_by_role("link", name="Traffic").click()
    expect(page.locator("main")).to_contain_text(re.compile(r"\d+ images? looked at"), timeout=30_000)
