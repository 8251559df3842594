"""The Traffic view in a real browser: what it shows of images that were sent, and when it asks."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

from parchgrad.activation_histograms import FEWEST_IMAGES
from tests.page.conftest import SAMPLES
from tests.service.serving import Server

Json = dict[str, Any]
TRAFFIC = "**/traffic?*"


@pytest.fixture(scope="module")
def seen(bundled: Server) -> Json:
    """The answer once enough images of one class were looked at; where others waited some are sent again."""
    picture = next(iter(sorted(SAMPLES.glob("*.png")))).read_bytes()
    for _ in range(20 * FEWEST_IMAGES):
        answer: Json = bundled.client.get("/traffic").json()
        if max((one["images"] for one in answer["classes"][1:]), default=0) >= FEWEST_IMAGES:
            return answer
        bundled.client.post("/explain", files={"image": picture})
    raise AssertionError("The images that were sent are not looked at.")


def test_a_layer_and_class_are_chosen_and_compared(visit: Callable[..., Page], seen: Json) -> None:
    page = visit("traffic")
    most = max(seen["classes"][1:], key=lambda one: one["images"])
    layer = seen["layers"][2]
    cell = page.get_by_role("button", name=f"{layer}, {most['label']}: ").first
    cell.click()
    expect(cell).to_have_attribute("aria-pressed", "true")
    expect(page.locator(".chosen h2")).to_have_text(f"{layer} · {most['label']}")
    expect(page.locator(".chosen .plot svg").first).to_have_attribute("aria-label", re.compile(f"{re.escape(layer)}, "))
    for path in ("path.live", "path.known"):
        assert len(page.locator(f".chosen .plot {path}").get_attribute("d") or "") > 100
    expect(page.locator(".traffic .one")).to_have_count(len(seen["layers"]))
    expect(page.locator(".strip")).to_have_count(len(seen["figures"]))

    cell.press("Alt+ArrowDown")  # the browser's own
    expect(cell).to_be_focused()
    cell.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator(".chosen h2")).to_have_text(f"{seen['layers'][3]} · {most['label']}")
    page.get_by_text("As a table").click()
    shares = page.locator(".numbers table").first.locator("tbody tr, tr").all_inner_texts()
    assert len(shares) > 5
    page.get_by_role("button", name="Last day").click()
    expect(page.locator(".status")).to_contain_text("looked at by one worker")
    expect(page.locator(".chosen h2")).to_have_text(f"{seen['layers'][3]} · {most['label']}")


def answering(page: Page, change: Callable[[Json], None], seen: Json) -> list[str]:
    """Answer the page's questions with a changed answer; what was asked."""
    asked: list[str] = []

    def answer(route: Route) -> None:
        asked.append(route.request.url)
        changed = json.loads(json.dumps(seen))
        change(changed)
        route.fulfill(json=changed)

    page.route(TRAFFIC, answer)
    return asked


def of_a_normal(answer: Json) -> None:
    """As without a class graph: all is far away, and that says nothing."""
    of_the_tables_images(answer)
    for one in (*answer["classes"], answer["chosen"]):
        one["reference"] = "normal"


def of_the_tables_images(answer: Json) -> None:
    """As with a class graph: one layer beyond chance, the others within."""
    for one in (*answer["classes"], answer["chosen"]):
        layers = len(one["divergence"])
        one["reference"] = "table's images"
        one.update(divergence=[0.02] * layers, expected=[0.01] * layers, bound=[0.05] * layers)
        one["divergence"][1] = 0.3


def test_what_is_beyond_chance_is_marked_only_beside_the_tables_own_images(
    page: Page, visit: Callable[..., Page], seen: Json
) -> None:
    answering(page, of_a_normal, seen)
    visit("traffic")
    expect(page.locator(".note").first).to_contain_text("parchgrad class-graph build scenes")
    expect(page.locator(".chosen strong")).to_have_text("0.300 bits")
    expect(page.locator(".beyond:not(.key)")).to_have_count(0)
    page.unroute(TRAFFIC)
    answering(page, of_the_tables_images, seen)
    page.get_by_role("button", name="Last day").click()
    beyond = page.get_by_role("button", name=f"{seen['layers'][1]}, all classes: 0.300 bits, beyond chance")
    expect(beyond.first).to_have_class("cell beyond")
    beyond.first.click()
    expect(page.locator(".chosen strong.beyond")).to_have_text("▲ 0.300 bits")
    page.get_by_role("button", name=f"{seen['layers'][0]}, all classes: 0.020 bits, within chance").first.click()
    expect(page.locator(".chosen > p")).to_contain_text("within what chance makes")


def empty(answer: Json) -> None:
    answer.update(
        images=0, watch_rate=0, note="PARCHGRAD_WATCH_RATE is 0.", distributions=[], classes=answer["classes"][:1]
    )
    for figure in answer["figures"]:
        figure.update(maps=0, quantiles=[], history=[])


def test_where_nothing_was_seen_it_says_how_to_begin_and_a_failure_is_got_over(
    page: Page, visit: Callable[..., Page], seen: Json
) -> None:
    waiting: list[Route] = []
    page.route(TRAFFIC, lambda route: waiting.append(route))
    visit("traffic")
    expect(page.locator(".traffic [aria-busy=true]")).to_have_text("Reading what was seen …")
    nothing = json.loads(json.dumps(seen))
    empty(nothing)
    waiting[0].fulfill(json=nothing)
    expect(page.locator(".empty")).to_contain_text("PARCHGRAD_WATCH_RATE is 0.")
    page.unroute(TRAFFIC)
    page.forgiven.append("503")  # type: ignore[attr-defined]
    error = {"error": {"code": "not_ready", "message": "The service is stopping."}}
    page.route(TRAFFIC, lambda route: route.fulfill(status=503, json=error))
    page.get_by_role("button", name="Last day").click()
    expect(page.get_by_role("alert")).to_contain_text("The service is stopping.")
    page.unroute(TRAFFIC)
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".heat")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)


def test_it_asks_while_it_is_seen_and_not_paused(page: Page, visit: Callable[..., Page], seen: Json) -> None:
    page.clock.install()
    asked = answering(page, lambda _: None, seen)
    visit("traffic")
    expect(page.locator(".heat")).to_be_visible()

    def asks(visibility: str | None = None) -> int:
        """How often within half a minute, of which each answer's timer is let run out."""
        if visibility:
            page.evaluate(
                "state => { Object.defineProperty(document, 'visibilityState', { value: state, configurable: true });"
                " document.dispatchEvent(new Event('visibilitychange')); }",
                visibility,
            )
        before = len(asked)
        for _ in range(3):
            page.clock.run_for(10_000)
            page.evaluate("() => fetch('page/state.json')")  # what was asked before it is answered by now
        return len(asked) - before

    page.get_by_role("button", name="What is chance?").click()
    assert asks() >= 2
    expect(page.locator(":popover-open")).to_be_visible()
    assert asks("hidden") == 0
    page.get_by_role("button", name="What is Concentration?").click()
    assert asks("visible") >= 2
    expect(page.locator(":popover-open")).to_be_visible()
    expect(page.get_by_role("button", name="What is Concentration?")).to_be_focused()
    page.get_by_role("button", name="Pause").click()
    assert asks() == 0
    page.get_by_role("button", name="Go on").click()
    assert asks() >= 2

    page.forgiven.append("503")  # type: ignore[attr-defined]
    error = {"error": {"code": "not_ready", "message": "The service is stopping."}}

    def refuse(route: Route) -> None:
        asked.append(route.request.url)
        route.fulfill(status=503, json=error, headers={"Retry-After": "60"})

    page.unroute(TRAFFIC)
    page.route(TRAFFIC, refuse)
    assert asks() == 1
    retry = page.get_by_role("button", name="Try again")
    retry.focus()
    assert [asks(), asks()] == [0, 1]
    expect(retry).to_be_focused()
