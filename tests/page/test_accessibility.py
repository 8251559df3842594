"""No view has a serious fault of accessibility by axe-core, in light or dark, and none overflows a phone."""

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

from tests.page.states import STATES, send_traffic
from tests.service.serving import Server

SERIOUS = ("serious", "critical")
PHONE = {"width": 390, "height": 844}


def faults(page: Page, *rules: str) -> list[str]:
    """By these of axe's rules, or all."""
    found = Axe().run(page, options={"runOnly": list(rules)} if rules else None)
    return [
        f"{one['id']}: {one['help']} at {[node['target'] for node in one['nodes'][:3]]}"
        for one in found.response["violations"]
        if one["impact"] in SERIOUS
    ]


@pytest.mark.parametrize("name", STATES)
def test_no_view_has_a_serious_fault(name: str, browser: Browser, bundled: Server) -> None:
    """One page for each view: looked at wide and light, then dark on a phone."""
    if name == "traffic":
        send_traffic(bundled)
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    page = context.new_page()
    STATES[name](page, bundled.url)
    assert faults(page) == []
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size(PHONE)
    assert faults(page, "color-contrast", "target-size") == []
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    context.close()
