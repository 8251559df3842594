"""The Class view in a browser: choose a class, look at a channel, compare; by keyboard; and where there is no graph."""

import json
import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, Route, expect

from tests.service.serving import Server

UMBRELLA, MUSHROOM = 9, 6
GRAPH = re.compile(r"/models/scenes/class-graph(\?|$)")


@pytest.fixture
def shown(visit: Callable[..., Page]) -> Page:
    page = visit("class", query=f"model=scenes&class={UMBRELLA}")
    expect(page.locator(".class-drawing .node").first).to_be_attached()
    return page


def about(page: Page) -> str:
    return page.locator(".about-class").inner_text()


def test_a_class_its_channels_and_another_class(visit: Callable[..., Page]) -> None:
    page = visit("class", query="model=scenes")
    field = page.get_by_role("combobox", name="Class", exact=True)
    expect(field).to_have_value("butterfly")
    field.fill("umb")
    field.press("Enter")
    expect(page).to_have_url(re.compile(f"class={UMBRELLA}"))
    expect(page.locator(".about-class")).to_contain_text("umbrella selects")

    node = page.locator(".class-drawing .node").last
    node.click()
    panel = page.get_by_role("region", name="Channel", exact=True)
    expect(panel.locator(".crops canvas")).to_have_count(3)
    expect(panel.get_by_role("heading", name=re.compile("Serves"))).to_be_visible()
    expect(panel.locator(".serves [aria-current]")).to_contain_text("umbrella")
    expect(page.locator(".class-drawing.lit .node.here")).to_have_count(1)

    other = page.get_by_role("combobox", name="Compared with")
    other.fill("mushroom")
    other.press("Enter")
    expect(page).to_have_url(re.compile(f"against={MUSHROOM}"))
    expect(page.locator(".class-legend")).to_contain_text("only mushroom")
    names = [one.get_attribute("aria-label") or "" for one in page.locator(".class-drawing .node").all()]
    assert (
        {"only of umbrella" in name for name in names}
        == {"only of mushroom" in name for name in names}
        == {True, False}
    )
    page.get_by_text("The drawing as a table").click()
    expect(page.locator(".as-table tbody tr")).to_have_count(len(names))
    expect(page.get_by_role("columnheader", name="Strength for mushroom")).to_be_visible()

    page.get_by_role("button", name="Compare with none").click()
    expect(other).to_be_focused()
    expect(page.locator(".class-drawing .node.one").first).to_be_attached()


def test_what_is_drawn_is_what_the_service_would_choose(shown: Page, bundled: Server) -> None:
    asked = bundled.client.get("/models/scenes/class-graph/classes/9?nodes=31").json()
    whole = bundled.client.get("/models/scenes/class-graph/classes/9?nodes=500&edges=2000").json()
    layers = bundled.client.get("/models/scenes/class-graph").json()["layers"]
    drawn = shown.evaluate(
        """async ([layers, whole]) => {
            const { picture } = await import("./page/views/class/order.js");
            const { nodes, rows } = picture(layers, whole, null, null, 31, 40, [800, 600]);
            return { nodes: nodes.map((n) => n.key), rows: rows.map((r) => r.name) };
        }""",
        [layers, whole],
    )
    assert set(drawn["nodes"]) == {f"{node['layer']}/{node['channel']}" for node in asked["nodes"]}
    assert drawn["rows"] == [layer["name"] for layer in layers]
    assert f"Drawn: {shown.locator('.class-drawing .node').count()} channels" in about(shown)
    slider = shown.get_by_role("slider", name="Channels")
    slider.fill("20")
    expect(shown.locator(".class-drawing .node")).to_have_count(20)


def test_by_keyboard(shown: Page) -> None:
    node = shown.locator(".class-drawing .node[tabindex='0']")
    node.focus()
    here = shown.locator(".class-drawing .node:focus")
    first = here.get_attribute("data-key") or ""
    shown.keyboard.press("Alt+ArrowDown")  # the browser's own
    assert here.get_attribute("data-key") == first
    shown.keyboard.press("ArrowDown")
    below = here.get_attribute("data-key") or ""
    assert first.split("/")[0] != below.split("/")[0]
    shown.keyboard.press("Enter")
    panel = shown.get_by_role("region", name="Channel", exact=True)
    expect(panel.get_by_role("heading", level=2)).to_contain_text(f"Channel {below.split('/')[1]}")
    expect(shown.locator(".node.picked")).to_have_attribute("data-key", below)
    linked = panel.locator(".influences li button").first
    name = linked.inner_text()
    linked.press("Enter")
    expect(panel.get_by_role("heading", level=2)).to_have_text(f"Channel {name}")
    expect(panel.get_by_role("heading", level=2)).to_be_focused()
    node.focus()
    shown.keyboard.press("Escape")
    expect(shown.locator(".node.picked")).to_have_count(0)

    canvas = shown.get_by_role("application")
    canvas.focus()
    canvas.press("Alt+ArrowDown")
    expect(shown.locator(".place-tip")).to_be_hidden()
    canvas.press("ArrowDown")
    expect(shown.locator(".place-tip")).to_be_visible()
    chosen = (shown.locator(".place-tip").inner_text()).split()[0]
    canvas.press("c")
    expect(shown.get_by_role("combobox", name="Compared with")).to_have_value(chosen)
    canvas.press("Enter")
    expect(shown.get_by_role("combobox", name="Class", exact=True)).to_have_value(chosen)
    expect(shown.get_by_role("combobox", name="Compared with")).to_have_value("")


def test_without_a_graph_the_command_is_there(page: Page, visit: Callable[..., Page]) -> None:
    page.forgiven = ["404"]  # type: ignore[attr-defined]
    error = {"code": "no_class_graph", "message": "Model 'scenes' version 1 has no class graph; build one: …"}
    page.route(GRAPH, lambda route: route.fulfill(status=404, json={"error": error}))
    visit("class", query="model=scenes")
    expect(page.get_by_role("heading", name="No class graph yet")).to_be_visible()
    expect(page.get_by_text("parchgrad class-graph build scenes --data IMAGES")).to_be_visible()
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name=re.compile("Copied|Marked"))).to_be_visible()
    page.unroute(GRAPH)
    page.get_by_role("button", name="Look again").click()
    expect(page.locator(".class-drawing .node").first).to_be_attached()


def test_without_crops_it_says_how_to_keep_them_and_a_failure_is_said(page: Page, visit: Callable[..., Page]) -> None:
    page.forgiven = ["500"]  # type: ignore[attr-defined]

    def without_crops(route: Route) -> None:
        answer = route.fetch()
        told = {key: value for key, value in answer.json().items() if key != "exemplars"}
        route.fulfill(json={**told, "exemplars": 0} if "channels" in route.request.url else told)

    page.route(GRAPH, without_crops)
    page.route(re.compile("/class-graph/channels/"), without_crops)
    failing = re.compile("/class-graph/classes/")
    page.route(
        failing,
        lambda route: route.fulfill(
            status=500, body=json.dumps({"error": {"code": "internal", "message": "It broke."}})
        ),
    )
    visit("class", query="model=scenes")
    expect(page.get_by_role("alert")).to_contain_text("It broke.")
    page.unroute(failing)
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_label("Crops in the drawing")).to_have_count(0)
    page.locator(".class-drawing .node").first.click()
    panel = page.get_by_role("region", name="Channel", exact=True)
    expect(panel).to_contain_text("Exemplars are pieces of the images")
    expect(panel).to_contain_text("--exemplars 9")
