"""The Attack view: a picture attacked, looked at and taken back; and what it says where attacks are off."""

import json
import re
from collections.abc import Callable

from playwright.sync_api import Page, expect

from tests.page.conftest import SAMPLES
from tests.service.serving import Server

PICTURE = SAMPLES / "scene_9.png"  # an umbrella


def test_an_attack_turns_the_prediction_and_shows_what_it_did(visit: Callable[..., Page]) -> None:
    page = visit("attack", PICTURE)
    verdict = page.locator(".verdict")
    expect(verdict).to_contain_text("umbrella →")
    expect(verdict).to_contain_text("PGD, 2 of 255 levels")
    region = page.get_by_role("region", name="Predictions")
    expect(region.get_by_role("row")).not_to_have_count(1)
    expect(page.get_by_text("at most 2,")).to_be_visible()

    page.get_by_role("button", name="What is Order of the pixels?").first.click()
    expect(page.get_by_text("Spearman").first).to_be_visible()
    page.keyboard.press("Escape")

    after = page.get_by_role("application", name=re.compile("The picture after"))
    after.focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_text("Here: before")).to_contain_text("of the pixels")

    channels = page.get_by_role("region", name="Channels")
    expect(channels.get_by_role("list", name="Most excited")).to_have_count(8)
    channels.get_by_role("button", name="All, in order").click()
    expect(channels.get_by_role("list", name="Most excited")).to_have_count(15)
    first = channels.get_by_role("list", name="Most excited").last.get_by_role("listitem").first
    expect(first).to_contain_text(re.compile(r"channel \d+, \+.* standard deviations, selected for"))

    # Nothing done, nothing changed; and another kind has other controls.
    page.get_by_role("slider", name="Strength").fill("0")
    expect(verdict).to_contain_text("umbrella stays")
    page.get_by_role("button", name="Watermark").click()
    expect(page.get_by_role("combobox", name="Goal")).to_have_count(0)
    page.get_by_label("Text of the watermark").fill("OURS")
    page.keyboard.press("Enter")
    expect(verdict).to_contain_text("Watermark, strength 0.50")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_goal_is_sought_and_a_failure_is_said(page: Page, visit: Callable[..., Page]) -> None:
    page.forgiven = ["429"]  # type: ignore[attr-defined]
    visit("attack", PICTURE)
    page.get_by_role("slider", name="Strength").fill("8")
    page.get_by_role("combobox", name="Goal").select_option("key")
    expect(page.locator(".verdict")).to_contain_text("umbrella → key")
    expect(page.locator(".verdict")).to_contain_text("as was sought")
    busy = {"error": {"code": "queue_full", "message": "256 images or maps are waiting."}}
    page.route("**/attack", lambda route: route.fulfill(status=429, json=busy, headers={"Retry-After": "1"}))
    page.get_by_role("slider", name="Strength").fill("4")
    expect(page.get_by_role("alert")).to_contain_text("256 images or maps are waiting.")
    page.unroute("**/attack")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".verdict")).to_contain_text("4 of 255")
    expect(page.get_by_role("alert")).to_have_count(0)
    page.forgiven.append("422")  # type: ignore[attr-defined]
    page.evaluate("location.hash = '#/attack?quantile=abc'")
    expect(page.get_by_role("alert").get_by_role("button")).to_have_text(["Back to the defaults"])
    page.get_by_role("button", name="Back to the defaults").click()
    expect(page.get_by_role("alert")).to_have_count(0)


def test_where_attacks_are_off_it_says_how_to_turn_them_on(page: Page, bundled: Server) -> None:
    state = json.dumps({"parchgrad": "0", "keys": False, "attacks": False})
    page.route("**/page/state.json", lambda route: route.fulfill(body=state, content_type="application/json"))
    page.goto(f"{bundled.url}/#/attack")
    expect(page.get_by_role("heading", name="Attacks are switched off here")).to_be_visible()
    expect(page.get_by_text("PARCHGRAD_ATTACKS=true")).to_be_visible()
    expect(page.get_by_role("button", name="Choose images")).to_have_count(0)
