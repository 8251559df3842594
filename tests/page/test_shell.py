"""What stands around every view: navigation, address, keys, themes, and a service that does not answer."""

import json
from urllib.parse import urlsplit

from playwright.sync_api import Page, expect

from tests.page.conftest import SAMPLES
from tests.service.serving import Server

VIEWS = ["Explain", "Class", "Layers", "Attack", "Traffic"]
MODELS = json.dumps({"error": {"code": "unauthorized", "message": "A key is needed."}})


def test_every_view_is_reached_and_nobody_else_is_asked(page: Page, bundled: Server) -> None:
    asked: set[str] = set()
    page.on("request", lambda request: asked.add(urlsplit(request.url).netloc))
    page.goto(bundled.url)
    navigation = page.get_by_role("navigation", name="Views")
    expect(navigation.get_by_role("link")).to_have_text(VIEWS)
    for name in VIEWS:
        navigation.get_by_role("link", name=name).click()
        expect(navigation.locator("[aria-current=page]")).to_have_text(name)
        expect(page).to_have_title(f"{name} · ParchGrad")
        expect(page.locator("main")).not_to_be_empty()
    page.go_back()
    expect(navigation.locator("[aria-current=page]")).to_have_text("Attack")
    assert {host for host in asked if host} == {urlsplit(bundled.url).netloc}


def test_an_image_stays_from_view_to_view_and_its_options_in_the_address(page: Page, bundled: Server) -> None:
    page.goto(f"{bundled.url}/#/explain?quantile=0.3&gamma=inf")
    page.get_by_label("Image files").first.set_input_files(SAMPLES / "scene_9.png")
    expect(page.locator(".bars").first).to_be_visible()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(urlsplit(request.url).path) if request.method == "POST" else None)
    link = page.get_by_role("link", name="Layers")
    link.focus()
    page.keyboard.press("Enter")
    expect(page).to_have_url(f"{bundled.url}/#/layers?model=scenes&quantile=0.3&gamma=inf")
    expect(page.locator(".flow .card").nth(3)).to_be_visible()
    expect(link).to_be_focused()
    assert asked == ["/layers"]


def test_a_key_is_asked_for_kept_out_of_the_address_and_sent(page: Page, bundled: Server) -> None:
    page.forgiven = ["401"]  # type: ignore[attr-defined]
    state = json.dumps({"parchgrad": "0", "keys": True, "attacks": False})
    page.route("**/page/state.json", lambda route: route.fulfill(body=state, content_type="application/json"))

    def models(route) -> None:
        if route.request.headers.get("authorization") == "Bearer secret":
            return route.fallback()
        return route.fulfill(status=401, body=MODELS, content_type="application/json")

    page.route("**/models", models)
    page.goto(bundled.url)
    expect(page.get_by_role("alert")).to_contain_text("A key is needed. Enter a key with the button at the top.")
    page.get_by_role("button", name="Enter key").click()
    page.get_by_label("Key", exact=True).last.fill("secret")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Choose images")).to_be_visible()
    expect(page.get_by_role("dialog")).to_have_count(0)
    assert "secret" not in page.url
    page.get_by_role("button", name="Change key").click()
    page.get_by_label("Key", exact=True).last.fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("A key is needed.")


def test_a_service_that_does_not_answer_is_asked_again(page: Page, bundled: Server) -> None:
    page.forgiven = ["ERR_FAILED"]  # type: ignore[attr-defined]
    page.route("**/models", lambda route: route.abort())
    page.goto(bundled.url)
    expect(page.get_by_role("alert")).to_contain_text("The service does not answer.")
    page.unroute("**/models")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("button", name="Choose images")).to_be_visible()


def test_a_model_that_does_not_serve_is_named_and_another_can_be_taken(page: Page, bundled: Server) -> None:
    page.goto(f"{bundled.url}/#/explain?model=nothing")
    expect(page.get_by_role("alert")).to_contain_text("No model 'nothing' serves here.")
    page.get_by_role("link", name="Use scenes instead").click()
    expect(page.get_by_role("button", name="Choose images")).to_be_visible()


def test_light_and_dark_are_chosen_and_remembered(page: Page, bundled: Server) -> None:
    page.goto(bundled.url)
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.get_by_role("button", name="Light or dark").click()
    assert page.evaluate(ground) != light
    page.reload()
    expect(page.get_by_role("button", name="Choose images")).to_be_visible()
    assert page.evaluate(ground) != light


def test_the_keyboard_skips_to_the_content(page: Page, bundled: Server) -> None:
    page.goto(bundled.url)
    expect(page.get_by_role("button", name="Choose images")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    expect(page).to_have_title("Explain · ParchGrad")
