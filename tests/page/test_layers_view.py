"""The Layers view: a real image, its layers and their numbers, the keyboard, and a service that fails."""

import json
from collections.abc import Callable

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.page.conftest import SAMPLES

Visit = Callable[..., Page]
SCENE = SAMPLES / "scene_9.png"
LAYERS = 15


@pytest.fixture
def layers(visit: Visit) -> Page:
    opened = visit("layers", SCENE)
    expect(opened.locator(".flow .card:not(.end)")).to_have_count(LAYERS)
    return opened


def painted(page: Page, thumb: str) -> int:
    """How many pixels of a thumbnail are not the paper."""
    script = """node => { const {width, height} = node; return node.getContext('2d').getImageData(0, 0, width, height)
        .data.filter((value, i) => i % 4 === 3 && value > 0).length; }"""
    found: int = page.locator(f"{thumb} canvas").evaluate(script)
    return found


def test_what_the_rule_keeps_and_drops_is_seen(layers: Page) -> None:
    first = layers.locator(".flow .card").nth(1)
    expect(first).to_contain_text("features.0.0")
    expect(first).to_contain_text("✓ 2 selected")
    expect(first).to_contain_text("22 others")
    chosen, other = '[data-at="1,0"]', '[data-at="1,7"]'
    for mode, name, kept, dropped in (
        ("activation", "Activation", True, True),
        ("after", "Gradient after the rule", True, False),
    ):
        layers.get_by_role("button", name=name, exact=True).click()
        expect(layers.locator('.card[data-layer="1"]')).to_have_attribute("data-drawn", mode)
        assert (painted(layers, chosen) > 0) is kept
        assert (painted(layers, other) > 0) is dropped
    layers.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert layers.locator(".card[data-drawn=after]").count() == LAYERS
    chart = layers.get_by_role("img", name="Share of the gradient energy")
    assert "100 % after the rule" in (chart.get_attribute("aria-label") or "")


def test_a_layer_unfolds_its_rule_and_explains_its_numbers(layers: Page) -> None:
    layers.locator('[data-at="5,-1"]').click()
    aside = layers.get_by_role("complementary", name="The layer in full")
    expect(aside).to_contain_text("3 × 3 convolution")
    expect(aside).to_contain_text("b = √((M + N) / M) = √((")
    expect(aside).to_contain_text("The others × 0, as γ = ∞")
    aside.get_by_role("button", name="What is Selected, summed?").click()
    expect(layers.get_by_text("S_H: the arriving gradients of all selected channels")).to_be_visible()
    layers.keyboard.press("Escape")
    for thumb, held in (("5,0", 1), ("6,1", 1), ("6,1", 0)):
        layers.locator(f'[data-at="{thumb}"]').click()
        expect(layers.locator(".inspector.pinned")).to_have_count(held)


def test_the_keyboard_goes_through_layers_and_channels(layers: Page) -> None:
    aside = layers.get_by_role("complementary", name="The layer in full")
    layers.locator('[data-at="0,-1"]').focus()
    layers.keyboard.press("ArrowRight")
    expect(aside.get_by_role("heading", level=2)).to_have_text("features.2.first.0")
    layers.keyboard.press("Alt+ArrowDown")  # the browser's own
    expect(layers.locator('[data-at="1,-1"]')).to_be_focused()
    layers.keyboard.press("ArrowDown")
    expect(layers.locator('[data-at="1,0"]')).to_be_focused()
    expect(aside).to_contain_text("✓ selected")
    layers.keyboard.press("End")
    expect(aside.get_by_role("heading", level=2)).to_have_text("features.7.0")
    assert layers.locator('.flow [tabindex="0"]').count() == 1


def test_another_class_and_another_share_are_asked_for(layers: Page) -> None:
    with layers.expect_response("**/layers") as answered:
        layers.locator(".bars button").nth(1).press("Enter")
    asked = answered.value.json()
    expect(layers.locator(".card.end .target")).to_have_text(asked["target"]["label"])
    expect(layers.locator('.bars [aria-pressed="true"]')).to_be_focused()
    with layers.expect_response("**/layers"):
        layers.get_by_role("slider", name="Share of channels selected").fill("0.5")
    expect(layers.locator(".flow .card").nth(1)).to_contain_text("✓ 12 selected")


def test_a_refusal_is_shown_with_a_way_on(visit: Visit, page: Page) -> None:
    page.forgiven = ["429", "422"]  # type: ignore[attr-defined]
    full = json.dumps({"error": {"code": "queue_full", "message": "3 images or maps are waiting, the most is 3."}})
    page.route("**/layers", lambda route: route.fulfill(status=429, body=full, content_type="application/json"))
    visit("layers", SCENE)
    expect(page.get_by_role("alert")).to_contain_text("3 images or maps are waiting")
    expect(page.locator(".network")).to_be_empty()
    page.unroute("**/layers")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".flow .card:not(.end)")).to_have_count(LAYERS)
    expect(page.get_by_role("alert")).to_have_count(0)

    visit("layers", query="quantile=abc")
    expect(page.get_by_role("alert")).to_contain_text("quantile")
    expect(page.get_by_role("button", name="Try again")).to_have_count(0)
    page.get_by_role("button", name="Back to the defaults").click()
    expect(page.get_by_role("alert")).to_have_count(0)

    no_row = json.dumps({"error": {"code": "target_not_in_table", "message": "Table 'scenes' has no row for it."}})
    page.route("**/layers", lambda route: route.fulfill(status=422, body=no_row, content_type="application/json"))
    visit("layers", query="target=2&quantile=0.5")
    expect(page.get_by_role("alert")).to_contain_text("no row")
    expect(page.get_by_role("slider", name="Share of channels selected")).to_have_value("0.5")
    page.unroute("**/layers")
    page.get_by_role("button", name="Choose channels by this picture").click()
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(page.locator(".controls")).to_contain_text("by instance")


def test_nothing_of_it_is_a_serious_fault_to_axe(layers: Page) -> None:
    found = Axe().run(layers, options={"runOnly": ["wcag2a", "wcag2aa"]}).response["violations"]
    assert [
        (one["id"], one["nodes"][0]["html"][:120]) for one in found if one["impact"] in ("serious", "critical")
    ] == []
