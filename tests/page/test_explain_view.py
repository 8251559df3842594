"""The Explain view in a real browser: a map and its controls, methods and classes side by side, many images, files."""

import base64
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, Route, expect

from tests.page.conftest import SAMPLES
from tests.service.serving import Server

SCENE, MOSAIC = SAMPLES / "scene_13.png", SAMPLES / "mosaic_3.png"
MAP = ".one-map .stage"
# Chromium says this for every refused request; the tests look at what the page says instead.
REFUSED = "Failed to load resource"

# Levels of 255 between the view and the service's picture, at the mean. Where the map is as fine as the picture, as
# here, 0.04 was the most; a map of 224 x 224 over a larger photograph was 0.6 to 1.5, as the two smooth it at different
# resolutions.
CLOSE = 0.5

Visit = Callable[..., Page]


def drawn(page: Page, quantile: str = "0.1") -> Locator:
    """The picture, once the map of that quantile lies on it."""
    stage = page.locator(f'{MAP}[data-quantile="{quantile}"][data-drawn]')
    stage.wait_for()
    return stage


def pixels(canvas: Locator) -> np.ndarray:
    """What a canvas shows, or the one on a stage."""
    address = canvas.evaluate("canvas => canvas.toDataURL()")
    return opened(base64.b64decode(address.partition(",")[2]))


def opened(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.float64)


def slide(page: Page, label: str, *values: float) -> None:
    """Move a slider over these values, faster than any service answers."""
    move = "(input, values) => values.forEach(one => (input.value = one, input.dispatchEvent(new Event('input'))))"
    page.get_by_label(label, exact=True).evaluate(move, list(values))


def in_address(page: Page, text: str) -> None:
    expect(page).to_have_url(re.compile(re.escape(text)))


def test_a_sample_its_classes_and_its_sliders(visit: Visit) -> None:
    page = visit("explain")
    expect(page.get_by_role("heading", name="See what the network looks at")).to_be_visible()
    page.get_by_role("button", name="Sample 3").click()
    drawn(page)
    canvas = page.locator(f"{MAP} canvas")
    expect(page.locator(".says")).to_contain_text("It says house")
    assert page.locator(".bars li").count() == 5
    first = pixels(canvas)

    page.locator(".bars").get_by_role("button", name="star").click()
    expect(page.locator(".says")).to_contain_text("what would speak for star")
    in_address(page, "target=8")
    second = pixels(canvas)
    assert np.abs(first - second).mean() > 1

    slide(page, "Channels kept", 0.3)
    drawn(page, "0.3")
    in_address(page, "quantile=0.3")
    assert np.abs(pixels(canvas) - second).mean() > 0.5
    slide(page, "Gamma", 50)
    expect(page.get_by_label("Gamma", exact=True)).to_have_attribute("aria-valuetext", "100")
    in_address(page, "gamma=100")
    page.get_by_role("button", name="Table's defaults").click()
    drawn(page, "0.1")
    expect(page).not_to_have_url(re.compile("quantile|gamma"))
    np.testing.assert_array_equal(pixels(canvas), second)  # kept, and the same

    page.get_by_label("Any other class", exact=True).fill("umb")
    page.locator(".found").get_by_role("button", name="umbrella").click()
    in_address(page, "target=9")
    page.get_by_role("button", name="More classes").click()
    expect(page.locator(".bars li")).to_have_count(10)
    page.get_by_label("ParchGrad's rule").uncheck()
    expect(page.get_by_label("Channels kept", exact=True)).to_be_disabled()
    expect(page.locator(".under")).to_contain_text("Gradient alone")


def test_the_sweep_plays_pauses_and_steps(visit: Visit) -> None:
    page = visit("explain", SCENE)
    drawn(page)
    # A frame that is under way is given up for what is chosen by hand.
    page.route("**/explain", lambda route: None, times=1)
    with page.expect_request("**/explain"):
        page.get_by_role("button", name="Play through all quantiles").click()
    with page.expect_event("requestfailed"):
        slide(page, "Channels kept", 0.5)
    drawn(page, "0.5")
    page.get_by_role("button", name="Table's defaults").click()
    drawn(page)
    page.get_by_role("button", name="Play through all quantiles").click()
    drawn(page, "0.18")
    page.get_by_role("button", name="Pause").click()
    in_address(page, "quantile=")
    page.get_by_role("button", name="Table's defaults").click()
    drawn(page)
    page.emulate_media(reduced_motion="reduce")
    page.get_by_role("button", name="Next quantile").click()
    drawn(page, "0.12")
    in_address(page, "quantile=0.12")


def test_the_crosshair_reads_the_map(visit: Visit) -> None:
    page = visit("explain", SCENE)
    stage = drawn(page)
    stage.focus()
    page.keyboard.press("ArrowRight")
    readout = page.locator(".readout")
    expect(readout.locator("[aria-live=polite]")).to_have_count(1)
    expect(readout).to_contain_text("column 64, row 64")
    page.keyboard.press("Control+ArrowLeft")  # the browser's own
    page.keyboard.press("Shift+ArrowLeft")
    expect(readout).to_contain_text("column 54, row 64")
    expect(readout).to_contain_text(re.compile(r"stronger than \d+\.\d %"))
    page.keyboard.press("Escape")
    expect(readout).to_contain_text("Point at the picture")


def test_what_is_shown_is_what_the_service_draws(visit: Visit, bundled: Server, tmp_path: Path) -> None:
    """A turned photograph: the browser turns and scales it, lays the map on it, and the service does the same."""
    photograph = turned(tmp_path)
    page = visit("explain", photograph)
    drawn(page)
    for options in (
        "",
        "overlay=grayscale&colormap=viridis&clip_lower=30&clip_upper=95",
        "overlay=mask_black&opacity=0.5",
        "overlay=none&polarity=positive",
        "outline=true&opacity=0.8",
    ):
        if options:
            before = page.locator(MAP).get_attribute("data-drawn")
            page.evaluate("options => { location.hash = `#/explain?model=scenes&${options}`; }", options)
            page.locator(f'{MAP}:not([data-drawn="{before}"])').wait_for()
        shown = pixels(page.locator(f"{MAP} canvas"))
        assert shown.shape[0] > shown.shape[1]
        fields = dict(part.split("=") for part in options.split("&")) if options else {}
        answer = bundled.client.post(
            "/explain", files={"image": photograph.read_bytes()}, data=fields, headers={"Accept": "image/png"}
        )
        theirs = opened(answer.content)
        difference = np.abs(resized(shown, theirs.shape) - theirs).mean()
        print(f"{options or 'as it comes'}: {difference:.2f} of 255 levels")
        assert difference < CLOSE, options


def turned(folder: Path) -> Path:
    """A scene twice as large, stored on its side: 320 x 512 upright."""
    upright = Image.open(MOSAIC).convert("RGB").resize((512, 512), Image.Resampling.BICUBIC).crop((0, 0, 320, 512))
    exif = Image.Exif()
    exif[0x0112] = 6
    path = folder / "turned.jpg"
    upright.transpose(Image.Transpose.ROTATE_90).save(path, quality=95, exif=exif)
    return path


def resized(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    size = (shape[1], shape[0])
    return np.asarray(Image.fromarray(image.astype(np.uint8)).resize(size, Image.Resampling.BOX), dtype=np.float64)


def test_methods_and_classes_side_by_side(visit: Visit) -> None:
    page = visit("explain", MOSAIC, "show=methods")
    tiles = page.locator(".tile")
    expect(tiles.locator(".figures")).to_have_text([re.compile(r"gini 0\.\d+ · \d+ ms")] * 4)
    tiles.first.locator("canvas").click(position={"x": 30, "y": 40})
    expect(tiles.locator(".at")).to_have_text([re.compile(r".+, above \d+\.\d %")] * 4)
    assert page.locator(".tile .stage.pointed").count() == 4
    kept = tiles.locator(".at").all_inner_texts()
    tiles.nth(1).locator("canvas").hover()
    expect(tiles.locator(".at")).not_to_have_text(kept)
    page.mouse.move(5, 5)
    expect(tiles.locator(".at")).to_have_text(kept)
    page.get_by_role("button", name="Integrated gradients", exact=True).click()
    expect(page.locator(".under")).to_contain_text("Integrated gradients alone")
    in_address(page, "method=integrated_gradients&rule=false")

    page.get_by_role("button", name="Table's defaults").click()
    page.get_by_role("button", name="Two classes").click()
    expect(tiles).to_have_count(3)
    page.locator(".rivals").get_by_role("button", name="sailboat").click()
    expect(tiles.nth(1)).to_contain_text("sailboat")
    in_address(page, "rival=7")
    # The key lies below on the left, the sailboat above it: A is orange there, B blue.
    difference = pixels(tiles.nth(2).locator("canvas"))
    redder = difference[..., 0] - difference[..., 2]
    half = len(redder) // 2
    assert redder[half:, :half].mean() > 2
    assert redder[:half, :half].mean() < -2


def test_hostile_files_and_files_no_browser_shows(visit: Visit, page: Page, tmp_path: Path) -> None:
    page.forgiven.append(REFUSED)  # type: ignore[attr-defined]
    cut, other, tiff = tmp_path / "cut.png", tmp_path / "page.png", tmp_path / "scene.tif"
    cut.write_bytes(SCENE.read_bytes()[:5000])
    other.write_text("<svg onload='alert(1)'></svg>")
    Image.open(SCENE).save(tiff)
    visit("explain", cut)
    problem = page.locator(".main .problem")
    expect(problem).to_contain_text("ends too early")
    expect(problem.get_by_role("button")).to_have_count(0)  # asking again would change nothing
    page.locator(".another summary").click()
    files = page.get_by_label("Image files").first
    files.set_input_files(other)
    expect(problem).to_contain_text("not an image of a known format")
    files.set_input_files(tiff)
    stage = drawn(page)
    expect(page.locator(".under")).to_contain_text("The browser cannot show this kind of file.")
    expect(problem).to_have_count(0)
    assert pixels(stage.locator("canvas")).std() > 20
    Image.open(SCENE).resize((3000, 20)).save(other)
    files.set_input_files(other)
    expect(page.locator(".chip canvas")).to_have_attribute("width", "40")
    assert page.locator(".chip canvas").bounding_box()["width"] < 50  # type: ignore[index]


def test_a_slow_and_a_failing_service(visit: Visit, page: Page) -> None:
    page.forgiven.append(REFUSED)  # type: ignore[attr-defined]
    busy = {
        "status": 503,
        "headers": {"Retry-After": "2"},
        "json": {"error": {"code": "queue_full", "message": "256 wait."}},
    }
    page.route("**/explain", lambda route: route.fulfill(**busy), times=1)
    visit("explain", SCENE)
    problem = page.locator(".main .problem")
    expect(problem).to_contain_text("256 wait. The service is busy. Try again in 2 s.")
    page.get_by_role("button", name="Try again").click()
    drawn(page)
    expect(problem).to_have_count(0)

    # Held: an answer that never comes is given up for the newest question, and its connection closed.
    ended: list[str] = []
    page.on("requestfailed", lambda request: ended.append(request.url))
    held: list[Route] = []
    page.route("**/explain", lambda route: held.append(route))
    with page.expect_event("requestfailed"):
        slide(page, "Channels kept", 0.2, 0.25, 0.3)
    expect(page.locator(".main.busy")).to_have_count(1)
    while len(held) < 2:
        page.wait_for_timeout(20)
    held[1].continue_()
    page.unroute("**/explain")
    drawn(page, "0.3")
    # One was under way, then the newest; the one between was never asked.
    assert (len(held), len(ended)) == (2, 1)

    page.route("**/explain", lambda route: route.abort())
    slide(page, "Channels kept", 0.4)
    expect(problem).to_contain_text("The service does not answer.")
    page.unroute("**/explain")
    page.get_by_role("button", name="Try again").click()
    drawn(page, "0.4")

    # What is no answer is said in words that are ours; the fault's own go to the console.
    page.forgiven.append("is not iterable")  # type: ignore[attr-defined]
    page.route("**/explain", lambda route: route.fulfill(json={}), times=1)
    slide(page, "Channels kept", 0.45)
    expect(problem).to_have_text("The answer is not what this page understands. Try again")
    # And what the service refuses is not asked for again.
    page.evaluate("location.hash = '#/explain?quantile=abc&target=99'")
    expect(problem).to_contain_text("abc")
    expect(problem.get_by_role("button")).to_have_text(["Back to the defaults"])
    problem.get_by_role("button").click()
    drawn(page)


def test_a_prediction_without_a_map(visit: Visit, page: Page, bundled: Server) -> None:
    real = bundled.client.post("/explain", files={"image": SCENE.read_bytes()}, data={"saliency": "none"}).json()

    def without(explanation: Mapping[str, object]) -> Callable[[Route], None]:
        answer = real | {"results": [real["results"][0] | {"explanation": explanation}]}
        return lambda route: route.fulfill(json=answer)

    page.route("**/explain", without({"status": "shed", "reason": "128 images wait."}), times=1)
    visit("explain", SCENE)
    problem = page.locator(".main .problem")
    expect(problem).to_contain_text("The service has too much to do and left the map out. The prediction stands.")
    expect(page.locator(".says")).to_contain_text("It says house")
    assert page.locator(".bars li").count() == 5
    no_row = {"status": "error", "error": {"code": "target_not_in_table", "message": "No row for class 3 (house)."}}
    page.route("**/explain", without(no_row))
    page.get_by_role("button", name="Try again").click()
    expect(problem).to_contain_text("No row for class 3 (house).")
    page.get_by_role("button", name="Two classes").click()
    expect(page.locator(".tile figcaption").first).to_contain_text("A house")
    expect(page.locator(".rivals button")).to_have_count(4)
    expect(page.locator(".rivals").get_by_role("button", name="house")).to_have_count(0)
    with page.expect_response("**/explain"):
        page.get_by_role("button", name="Map", exact=True).click()
    page.unroute("**/explain")
    page.get_by_role("button", name="Choose channels by this picture").click()
    drawn(page)
    in_address(page, "selection=instance")


def test_many_pictures(visit: Visit, page: Page, tmp_path: Path) -> None:
    page.forgiven.append(REFUSED)  # type: ignore[attr-defined]
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"nothing")
    visit("explain")
    page.get_by_label("Image files").first.set_input_files([SCENE, bad, MOSAIC, SAMPLES / "scene_9.png"])
    expect(page.locator(".summary")).to_have_text("4 of 4 done, 1 failed")
    words = page.locator(".grid .what")
    expect(words).to_have_text(
        [re.compile("house"), re.compile("✕ The bytes are not an image"), re.compile("key"), re.compile("umbrella")]
    )
    with page.expect_download() as download:
        page.get_by_role("button", name="All answers (JSON)").click()
    found = json.loads(download.value.path().read_text())["files"]
    assert [one["file"] for one in found] == ["scene_13.png", "bad.png", "mosaic_3.png", "scene_9.png"]
    assert [one.get("error", {}).get("code") for one in found] == [None, "image_unsupported", None, None]
    page.locator(".grid button").nth(3).click()
    expect(page.locator(".says")).to_contain_text("umbrella")
    drawn(page)
    page.get_by_role("button", name="All pictures (4)").click()
    expect(page.locator(".summary")).to_have_text("4 of 4 done, 1 failed")
    # Each photograph is decoded once, however often it is drawn.
    tile = page.locator(".grid canvas").nth(2)
    before = tile.evaluate("canvas => canvas.toDataURL()")
    page.evaluate("void (createImageBitmap = () => { throw new Error('decoded again'); })")
    slide(page, "Opacity", 0.8, 0.6, 0.4)
    page.wait_for_function("([tile, before]) => tile.toDataURL() !== before", arg=[tile.element_handle(), before])


def test_the_address_restores_the_view(visit: Visit) -> None:
    query = "target=5&show=classes&rival=2&quantile=0.25&gamma=3&colormap=cividis&opacity=0.5&outline=false"
    page = visit("explain", MOSAIC, query)
    expect(page.locator(".tile figcaption")).to_have_text(
        [re.compile("^A leaf"), re.compile("^B fish"), re.compile("^A − B")]
    )
    assert page.get_by_label("Channels kept", exact=True).input_value() == "0.25"
    expect(page.get_by_label("Gamma", exact=True)).to_have_attribute("aria-valuetext", "3")
    assert page.get_by_label("Colours", exact=True).input_value() == "cividis"
    assert page.get_by_label("Opacity", exact=True).input_value() == "0.5"
    expect(page.get_by_role("button", name="Two classes")).to_have_attribute("aria-pressed", "true")

    # A dark page prints dark on white; and a sentence is read whole in the smallest window.
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    page.emulate_media(media="print")
    assert page.locator(".panel h2").first.evaluate("node => getComputedStyle(node).color") == "rgb(31, 26, 19)"
    page.emulate_media(media="screen")
    page.set_viewport_size({"width": 360, "height": 700})
    page.get_by_role("button", name="What is Gamma?").click()
    place = "node => { const { top, bottom } = node.getBoundingClientRect(); return [top, bottom]; }"
    sentence = page.locator(".sentence:popover-open")
    top, bottom = sentence.evaluate(place)
    assert top >= 0
    assert bottom <= 700
    page.evaluate("scrollBy({ top: -20, behavior: 'instant' })")
    assert sentence.evaluate(place) == [top + 20, bottom + 20]


def test_files_and_the_curl_line(visit: Visit, tmp_path: Path) -> None:
    """Each file that the page fetches is what its curl line fetches, for a file that no shell should see unquoted."""
    if (curl := shutil.which("curl")) is None:
        pytest.skip("curl is not here")
    name = '-it\'s; "a, $(touch x)" `y` @.png'
    (tmp_path / name).write_bytes(SCENE.read_bytes())
    page = visit(
        "explain", tmp_path / name, "target=8&quantile=0.2&gamma=5&opacity=0.7&overlay=grayscale&polarity=positive"
    )
    drawn(page, "0.2")
    got: dict[str, bytes] = {}
    for form, button in {"png": "picture (PNG)", "json": "answer (JSON)", "npz": "numbers (npz)"}.items():
        with page.expect_download() as download:
            page.get_by_role("button", name=f"Service's {button}").click()
        got[form] = download.value.path().read_bytes()
        page.get_by_label("that fetches the").select_option(form)
        line = page.locator(".curl code").inner_text()
        assert "-F gamma=5" in line
        assert "-F opacity=0.7" in line
        before = set(tmp_path.iterdir())
        done = subprocess.run(
            ["sh", "-c", line.replace("curl", curl, 1)], cwd=tmp_path, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
        (made,) = set(tmp_path.iterdir()) - before
        there = made.read_bytes()
        if form == "png":
            assert there == got[form]
        elif form == "json":
            mine, theirs = json.loads(got[form]), json.loads(there)
            assert mine.pop("request_id") != theirs.pop("request_id")
            assert mine == theirs
            assert mine["results"][0]["explanation"]["target"]["index"] == 8
        else:
            with np.load(io.BytesIO(got[form])) as mine_npz, np.load(io.BytesIO(there)) as their_npz:
                np.testing.assert_array_equal(mine_npz["saliency_0"], their_npz["saliency_0"])
    with page.expect_download() as download:
        page.get_by_role("button", name="This view").click()
    assert opened(download.value.path().read_bytes()).shape == (512, 512, 3)
