"""The client against a made-up service: what it sends, sends again and makes of the answers; the real one's map."""

import asyncio
import base64
import email
import hashlib
import io
import json
import pickle
import socket
import subprocess
import sys
import threading
import time
from email.utils import formatdate

import httpx
import numpy as np
import pytest
from PIL import Image

from parchgrad import client as client_module
from parchgrad import uploads
from parchgrad.answers import AnswerError, read_answer, read_map
from parchgrad.client import AsyncClient, Client, ClientError, RequestRefusedError, UnavailableError
from parchgrad.errors import DataError, OptionError

URL = "http://service.test:3000"
MODEL = {"name": "tiny", "version": "2", "weights_sha256": "aa", "table_sha256": "bb"}
MAP = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)


def explanation(values=MAP):
    data = base64.b64encode(values.astype("<f4").tobytes()).decode()
    return {
        "status": "ok",
        "target": {"index": 3, "label": "thing 3", "probability": 0.5},
        "method": "gradient",
        "rule": True,
        "quantile": 0.1,
        "gamma": "inf",
        "layers": ["*"],
        "saliency": {"shape": list(values.shape), "dtype": "float32", "scale": 1.0, "encoding": "base64", "data": data},
        "transform": {"original_size": [9, 8], "exif_orientation": 6, "crop_box": [0.5, 0.0, 8.5, 8.0]},
        "quality": {"gini": 0.4, "identity_layers": 1},
    }


class Service(httpx.MockTransport):
    """Answers each image with its mean colour as the predicted class; `refusals` are answered first.

    `requests`: what came, as (path, fields, image files).
    """

    def __init__(self, *refusals, images=3, image_bytes=1000, delay=None):
        super().__init__(self.answer)
        self.refusals, self.limits = list(refusals), {"images": images, "image_bytes": image_bytes}
        self.requests, self.delay, self.now, self.most = [], delay, 0, 0
        self.lock = threading.Lock()

    async def handle_async_request(self, request):
        await request.aread()
        return await asyncio.to_thread(self.answer, request)

    def answer(self, request):
        request.read()
        with self.lock:
            self.headers = request.headers
            refusal = self.refusals.pop(0) if self.refusals and request.method == "POST" else None
        if refusal is not None:
            with self.lock:
                self.requests.append((request.url.path, None, None))
            if isinstance(refusal, Exception):
                raise refusal
            return httpx.Response(refusal.status_code, headers=refusal.headers, content=refusal.content)
        if request.url.path == "/readyz":
            return httpx.Response(200)
        if request.url.path == "/models":
            return httpx.Response(200, json={"default": "tiny", "models": [MODEL]})
        if request.url.path.startswith("/models/"):
            return httpx.Response(200, json={**MODEL, "limits": self.limits, "asked": request.url.path[8:]})
        fields, files = parts(request)
        with self.lock:
            self.requests.append((request.url.path, fields, files))
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            if self.delay:
                time.sleep(self.delay(files))
            return self.computed(request.url.path, fields, files)
        finally:
            with self.lock:
                self.now -= 1

    def computed(self, path, fields, files):
        results = []
        for data in files:
            try:
                with Image.open(io.BytesIO(data)) as image:
                    mean = int(np.asarray(image.convert("RGB")).mean())
            except OSError:
                results.append({"status": "error", "error": {"code": "image_unsupported", "message": "No image."}})
                continue
            prediction = {"index": mean, "label": f"grey {mean}", "probability": 0.75}
            result = {"status": "ok", "image_sha256": "cc", "predictions": [prediction]}
            results.append(result | ({"explanation": explanation()} if path == "/explain" else {}))
        if len(files) == 1 and results[0]["status"] == "error":
            return httpx.Response(415, json={"error": results[0]["error"]})
        return httpx.Response(200, json={"model": MODEL, "results": results})


def parts(request):
    """Fields and files of a multipart request, as the standard library reads them."""
    head = b"Content-Type: " + request.headers["content-type"].encode() + b"\r\n\r\n"
    fields, files = {}, []
    for part in email.message_from_bytes(head + request.content).get_payload():
        name = part.get_param("name", header="content-disposition")
        content = part.get_payload(decode=True)
        if part.get_filename() is None:
            fields.setdefault(name, []).append(content.decode())
        else:
            assert name == "image"
            files.append(content)
    return fields, files


def refused(status, code="queue_full", **headers):
    return httpx.Response(status, json={"error": {"code": code, "message": "Because."}}, headers=headers)


def grey(level, size=(4, 3)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (level,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


class Waiting:
    """The waiting client and the awaited one behind the same calls."""

    def __init__(self, kind, service, **settings):
        self.kind, self.service, self.settings = kind, service, settings

    def __getattr__(self, method):
        def call(*args, **kwargs):
            if self.kind == "sync":
                with Client(URL, transport=self.service, **self.settings) as one:
                    result = getattr(one, method)(*args, **kwargs)
                    return list(result) if method.endswith("_each") else result

            async def awaited():
                async with AsyncClient(URL, transport=self.service, **self.settings) as one:
                    result = getattr(one, method)(*args, **kwargs)
                    return [r async for r in result] if method.endswith("_each") else await result

            return asyncio.run(awaited())

        return call


@pytest.fixture(params=["sync", "async"])
def ask(request):
    return lambda service, **settings: Waiting(request.param, service, **settings)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 0.001)


# --- one and many ------------------------------------------------------------------------------------------


def test_one_image_gives_one_result_and_many_a_list_in_order(ask):
    service = Service()
    assert ask(service).predict(grey(7)).predictions[0].index == 7
    results = ask(service).predict(grey(level) for level in range(10))
    assert [r.predictions[0].index for r in results] == list(range(10))
    assert [r.predictions[0].index for r in ask(service).predict_each([grey(1), grey(2)])] == [1, 2]
    assert ask(service).predict([]) == []


def test_many_images_go_in_requests_of_the_service_s_limit(ask):
    service = Service(images=4)
    ask(service).predict([grey(level) for level in range(10)])
    assert sorted(len(files) for _, _, files in service.requests) == [2, 4, 4]


def test_requests_are_bounded_in_bytes(ask, monkeypatch):
    size = len(grey(1))
    monkeypatch.setattr(uploads, "REQUEST_BYTES", 2 * size)
    service = Service(images=100)
    results = ask(service, concurrency=1).predict([grey(1)] * 5)
    assert [len(files) for _, _, files in service.requests] == [2, 2, 1]
    assert len(results) == 5


def test_a_stream_is_not_read_ahead_of_what_is_under_way(ask):
    taken = []

    def stream():
        for level in range(100):
            taken.append(level)
            yield grey(level)

    client = ask(Service(images=2), concurrency=3)
    if client.kind == "async":

        async def first():
            async with AsyncClient(URL, transport=client.service, concurrency=3) as one:
                each = one.predict_each(stream())
                result = await anext(each)
                await each.aclose()
                return result

        result = asyncio.run(first())
    else:
        with Client(URL, transport=client.service, concurrency=3) as one:
            each = one.predict_each(stream())
            result = next(each)
            each.close()
    assert result.predictions[0].index == 0
    assert len(taken) == 6  # three requests of two


def test_requests_run_side_by_side_and_their_results_stay_in_order(ask):
    service = Service(images=1, delay=lambda files: 0.15 if files == [grey(0)] else 0.05)
    results = ask(service, concurrency=4).predict([grey(level) for level in range(8)])
    assert [r.predictions[0].index for r in results] == list(range(8))
    assert 2 <= service.most <= 4


def test_progress_counts_images(ask):
    calls = []
    images = [grey(level) for level in range(7)]
    ask(Service()).predict(images, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(3, 7), (6, 7), (7, 7)]
    calls.clear()
    ask(Service()).predict(iter(images), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(3, None), (6, None), (7, None)]


def test_show_progress_draws_on_standard_error(ask, capsys):
    ask(Service()).predict([grey(1)] * 4, show_progress=True)
    shown = capsys.readouterr()
    assert "100%" in shown.err
    assert shown.out == ""


# --- images ------------------------------------------------------------------------------------------------


def sent_pixels(image):
    service = Service(image_bytes=10**6)
    Client(URL, transport=service).predict(image)
    ((_, _, (data,)),) = service.requests
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()
        return opened


def test_a_path_and_bytes_are_sent_as_they_are(tmp_path):
    (tmp_path / "a.png").write_bytes(grey(9))
    service = Service()
    with Client(URL, transport=service) as client:
        for image in (tmp_path / "a.png", str(tmp_path / "a.png"), grey(9), bytearray(grey(9)), memoryview(grey(9))):
            client.predict(image)
    assert [files for _, _, files in service.requests] == [[grey(9)]] * 5


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (5, 7, 4)])
def test_an_array_is_sent_without_loss(shape):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(np.asarray(sent_pixels(array)), array)


def test_an_array_of_four_dimensions_is_many_images(ask):
    arrays = np.stack([np.full((4, 4, 3), level, np.uint8) for level in (3, 8)])
    assert [r.predictions[0].index for r in ask(Service()).predict(arrays)] == [3, 8]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "F"])
def test_a_picture_is_sent_without_loss(mode):
    values = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(values).convert(mode)
    sent = sent_pixels(image)
    assert sent.mode == mode
    assert np.array_equal(np.asarray(sent), np.asarray(image))


def test_a_picture_keeps_the_orientation_of_its_file():
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4)).save(buffer, "JPEG", exif=exif)
    assert sent_pixels(Image.open(buffer)).getexif()[0x0112] == 6
    cmyk = Image.new("CMYK", (6, 4))
    cmyk.getexif()[0x0112] = 3
    assert sent_pixels(cmyk).getexif().get(0x0112, 3) == 3


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), r"float32 \(4, 4, 3\)"),
        (np.zeros((2, 4, 5), np.uint8), r"uint8 \(2, 4, 5\)"),
        (np.zeros((0, 4, 3), np.uint8), r"uint8 \(0, 4, 3\)"),
        ([7], "'int'; allowed: a path, bytes"),
        ([io.BytesIO(b"x")], "'BytesIO'"),
        (None, "Option 'images' is 'NoneType'; allowed: a path, bytes"),
        (7, "Option 'images' is 'int'; allowed: a path, bytes"),
        (io.BytesIO(b"x\ny"), "Option 'images' is 'BytesIO'; allowed: a path, bytes"),
    ],
    ids=["float", "no-colours", "empty", "number", "file", "none", "no-list", "open-file"],
)
def test_what_is_no_image_is_refused(ask, image, message):
    with pytest.raises(OptionError, match=message):
        ask(Service()).predict(image)


@pytest.mark.parametrize("image", ["a.png", b"abc", Image.new("L", (2, 2)), np.zeros((2, 2), np.uint8)])
def test_one_image_is_not_taken_for_many(ask, image):
    service = Service()
    with pytest.raises(OptionError, match="allowed: an iterable of images"):
        ask(service).predict_each(image)
    assert service.requests == []


@pytest.mark.parametrize("address", ["http://x/y.png", "https://x/y.png"])
def test_addresses_are_not_fetched(ask, address):
    with pytest.raises(DataError, match=f"Image '{address}' is an address, which is not fetched"):
        ask(Service()).explain(address)
    (result,) = ask(Service()).explain([address])
    assert (result.error.code, "not fetched" in result.error.message) == ("image_unreadable", True)


# --- bad images --------------------------------------------------------------------------------------------


def test_one_image_that_cannot_be_read_is_raised(ask, tmp_path):
    with pytest.raises(DataError, match=r"absent\.png' cannot be read"):
        ask(Service()).predict(tmp_path / "absent.png")
    with pytest.raises(RequestRefusedError, match="415 image_unsupported: No image") as caught:
        ask(Service()).explain(b"no image")
    assert (caught.value.status, caught.value.code) == (415, "image_unsupported")


def test_of_many_images_a_bad_one_keeps_its_place(ask, tmp_path):
    images = [grey(0), tmp_path / "absent.png", grey(2), b"no image", grey(4), bytes(2000), grey(6), b"last, alone"]
    results = ask(Service(images=7)).predict(images, top_k=list(range(1, 9)))
    assert [r.predictions[0].index if r.status == "ok" else r.error.code for r in results] == [
        0, "image_unreadable", 2, "image_unsupported", 4, "image_too_many_bytes", 6, "image_unsupported",
    ]  # fmt: skip
    assert "absent.png" in results[1].error.message
    assert "2000 bytes; at most 1000" in results[5].error.message


def test_an_option_of_each_image_stays_with_its_image(ask, tmp_path):
    images = [grey(0), tmp_path / "absent.png", grey(2), grey(3), grey(4)]
    service = Service(images=3)
    ask(service, concurrency=1).explain(images, target=[10, 11, "tench", None, 14], quantile=0.25)
    assert [fields["target"] for _, fields, _ in service.requests] == [["10", "tench"], ["predicted", "14"]]
    assert [fields["quantile"] for _, fields, _ in service.requests] == [["0.25"], ["0.25"]]


def test_images_of_which_none_can_be_read_need_no_request(ask, tmp_path):
    service = Service()
    results = ask(service).predict([tmp_path / "a.png", tmp_path / "b.png"])
    assert [r.error.code for r in results] == ["image_unreadable"] * 2
    assert service.requests == []


def test_a_deadline_missed_by_a_request_of_many_is_each_of_its_images_own(ask):
    service = Service(refused(504, "deadline_exceeded"), images=2)
    results = ask(service, concurrency=1).predict([grey(level) for level in range(3)])
    assert [r.error and r.error.code for r in results] == ["deadline_exceeded", "deadline_exceeded", None]


# --- options -----------------------------------------------------------------------------------------------


def test_options_are_sent_as_the_service_spells_them(ask):
    service = Service()
    ask(service, model="tiny", version="2").explain(
        grey(1), target=np.int64(217), quantile=np.float32(0.5), gamma=np.inf, rule=False, layers=["a.*", "b"],
        alpha=1e-7, conserve=None,
    )  # fmt: skip
    (path, fields, _) = service.requests[0]
    assert path == "/explain"
    assert fields == {
        "model": ["tiny"], "version": ["2"], "target": ["217"], "saliency": ["float32"], "quantile": ["0.5"],
        "gamma": ["inf"], "rule": ["false"], "layers": ["a.*,b"], "alpha": ["1e-07"],
    }  # fmt: skip


def test_layers_are_one_set_or_one_for_each_image(ask):
    service = Service()
    ask(service).explain([grey(1), grey(2)], layers=["a", "b"])
    ask(service).explain([grey(1), grey(2)], layers=[["a", "b"], "c*"])
    assert [fields["layers"] for _, fields, _ in service.requests] == [["a,b"], ["a,b", "c*"]]


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (2, {"target": [1, 2, 3]}, "one for each of the 2 images"),
        (2, {"method": {"a": 1}}, "allowed: text, a number"),
        (None, {"target": [1, 2]}, "allowed: one value for one image"),
        ("stream", {"target": [1, 2]}, "of which there are more"),
        ("stream", {"target": list(range(9))}, "one for each of the 5 images"),
    ],
    ids=["too-many", "no-text", "one-image", "stream-runs-over", "stream-falls-short"],
)
def test_options_that_do_not_fit_are_refused(ask, images, options, message):
    many = (grey(1) for _ in range(5)) if images == "stream" else grey(1) if images is None else [grey(1)] * images
    with pytest.raises(OptionError, match=message):
        ask(Service()).explain(many, **options)


def test_a_wrong_option_is_raised_even_of_many(ask):
    with pytest.raises(RequestRefusedError, match="422 option_invalid") as caught:
        ask(Service(refused(422, "option_invalid"))).explain([grey(1)], quantile=7)
    assert caught.value.status == 422


# --- trying again ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "refusal",
    [
        refused(429),
        refused(503, "not_ready", **{"Retry-After": "0"}),
        httpx.Response(503, text="Service Unavailable"),
        httpx.ConnectError("refused"),
        httpx.ReadError("reset"),
        httpx.RemoteProtocolError("no answer"),
    ],
    ids=lambda r: type(r).__name__ if isinstance(r, Exception) else str(r.status_code),
)
def test_what_may_pass_is_tried_again(ask, refusal):
    service = Service(refusal, refusal)
    assert ask(service).predict(grey(5)).predictions[0].index == 5
    assert len(service.requests) == 3


@pytest.mark.parametrize("status", [400, 404, 413, 422, 499, 500, 502, 504, 401, 302])
def test_nothing_else_is_tried_again(ask, status):
    service = Service(refused(status, "some_code"))
    with pytest.raises(RequestRefusedError, match=f"{status} some_code: Because"):
        ask(service).predict(grey(5))
    assert len(service.requests) == 1


def test_a_service_that_does_not_answer_in_time_is_not_tried_again(ask):
    service = Service(httpx.ReadTimeout("timed out"))
    with pytest.raises(UnavailableError, match=rf"^{URL}/predict did not answer within 120 s \(1 try\)\.$"):
        ask(service).predict(grey(5))
    assert len(service.requests) == 1


def test_tries_are_counted_and_the_last_reason_is_named(ask):
    service = Service(*[refused(429)] * 9)
    said = r"is not available \(3 tries\): The service answered 429 queue_full: Because\.$"
    with pytest.raises(UnavailableError, match=said):
        ask(service, retries=2).predict(grey(5))
    assert len(service.requests) == 3
    service = Service(*[refused(429)] * 9)
    with pytest.raises(UnavailableError, match=r"is not available \(1 try\)"):
        ask(service, retries=0).predict(grey(5))


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (httpx.ConnectError("All connection attempts failed"), "cannot be reached: all connection attempts failed"),
        (
            caused(httpx.ConnectError("x"), caused(OSError("y"), ConnectionRefusedError(111, "Connect call failed"))),
            "cannot be reached: connection refused",
        ),
        (
            caused(httpx.ConnectError("x"), ExceptionGroup("all", [ConnectionRefusedError(111, "y")])),
            "cannot be reached: connection refused",
        ),
        (
            caused(httpx.ConnectError("x"), socket.gaierror(-2, "Name or service not known")),
            "cannot be reached: name or service not known",
        ),
        (httpx.ReadError(""), "broke the connection before its answer was there: ReadError"),
        (
            caused(httpx.ReadError(""), ConnectionResetError(104, "x")),
            "broke the connection before its answer was there: connection reset by peer",
        ),
        (
            httpx.RemoteProtocolError("Server disconnected without sending a response."),
            "broke the connection before its answer was there: server disconnected without sending a response",
        ),
    ],
    ids=["connect", "refused", "several", "name", "read", "reset", "disconnected"],
)
def test_what_stood_in_the_way_is_said_plainly(ask, error, said):
    with pytest.raises(UnavailableError) as caught:
        ask(Service(error, error), retries=1).predict(grey(5))
    assert str(caught.value) == f"{URL}/predict {said} (2 tries)."


def test_a_timeout_of_connecting_says_so(ask):
    with pytest.raises(UnavailableError, match=r"cannot be reached: no connection within 3 s \(1 try\)\.$"):
        ask(Service(httpx.ConnectTimeout("timed out")), timeout=3).predict(grey(5))


def test_a_port_where_nobody_listens_is_refused():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"  # bound, and not listening
        said = f"{url}/models/m cannot be reached: connection refused (2 tries)."
        with Client(url, retries=1) as client, pytest.raises(UnavailableError) as caught:
            client.model("m")
        assert str(caught.value) == said

        async def awaited():
            async with AsyncClient(url, retries=1) as client:
                await client.model("m")

        with pytest.raises(UnavailableError) as caught:
            asyncio.run(awaited())
        assert str(caught.value) == said


def test_a_password_in_the_address_is_not_shown():
    transport = httpx.MockTransport(lambda request: httpx.Response(200, text="<html>"))
    client = Client("http://user:sesame@service.test", transport=transport)
    with pytest.raises(AnswerError, match=r"http://service\.test/models did not answer JSON"):
        client.models()
    client = Client("http://user:sesame@service.test", transport=Service(refused(429)), retries=0)
    with pytest.raises(UnavailableError, match=r"^http://service\.test/predict is not available"):
        client.predict(grey(1))


def test_what_the_service_asks_to_be_waited_is_waited(ask):
    start = time.monotonic()
    ask(Service(refused(429, **{"Retry-After": "1"}))).predict(grey(5))
    assert time.monotonic() - start >= 1


def test_a_wait_beyond_the_deadline_is_not_begun(ask):
    with pytest.raises(UnavailableError, match=r"\(1 try, the 20 s are too short for another\): .*429"):
        ask(Service(refused(429, **{"Retry-After": "60"})), timeout=20).predict(grey(5))


def test_retry_after_is_seconds_or_a_date():
    assert client_module._retry_after("17") == 17.0
    assert 27 < client_module._retry_after(formatdate(time.time() + 30, usegmt=True)) <= 30
    assert client_module._retry_after(formatdate(time.time() - 30, usegmt=True)) == 0
    assert client_module._retry_after("soon") == 0


def test_pauses_double_up_to_the_longest(monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 0.1)
    for tried, longest in ((1, 0.1), (2, 0.2), (5, 1.6), (8, 8.0), (60, 8.0)):
        pauses = [client_module._pause(tried, None) for _ in range(200)]
        assert longest / 2 <= min(pauses) < max(pauses) <= longest
        assert len(set(pauses)) > 1


class Failing(Service):
    """Refuses the first image for good, and every other for a minute."""

    def computed(self, path, fields, files):
        return refused(422, "option_invalid") if files == [grey(0)] else refused(429, **{"Retry-After": "60"})


def test_an_error_ends_what_waits_to_be_tried_again(ask):
    service = Failing(images=1)
    with pytest.raises(RequestRefusedError, match="option_invalid"):
        ask(service, concurrency=3).predict([grey(0), grey(1), grey(2)])
    assert len(service.requests) <= 3


# --- answers -----------------------------------------------------------------------------------------------


def test_an_explanation_is_read_whole(ask):
    result = ask(Service()).explain(grey(5))
    made = result.explanation
    assert result.status == made.status == "ok"
    assert result.image_sha256 == "cc"
    assert result.explanations == (made,)
    assert (made.target.index, made.target.label, made.target.probability) == (3, "thing 3", 0.5)
    assert made.saliency.dtype == np.float32
    assert np.array_equal(made.saliency, MAP)
    assert made.options == {"method": "gradient", "rule": True, "quantile": 0.1, "gamma": np.inf, "layers": ["*"]}
    assert made.transform.crop_box == (0.5, 0.0, 8.5, 8.0)
    assert (made.transform.original_size, made.transform.exif_orientation) == ((9, 8), 6)
    assert (made.quality.gini, made.quality.identity_layers) == (0.4, 1)
    assert made.reason is made.error is result.error is None


def test_a_result_s_answer_is_the_service_s_for_that_image_alone(ask):
    results = ask(Service()).explain([grey(1), grey(2)])
    answer = json.loads(json.dumps(results[1].answer))
    assert answer["model"] == MODEL
    (again,) = read_answer(answer)
    assert again.predictions[0].index == 2
    assert np.array_equal(again.explanation.saliency, MAP)


def test_maps_that_are_missing_say_why():
    entry = {"status": "ok", "predictions": [], "explanations": [
        {"status": "shed", "reason": "The queue is long."},
        {"status": "error", "error": {"code": "target_not_in_table", "message": "No row."}},
    ]}  # fmt: skip
    (result,) = read_answer({"model": MODEL, "results": [entry]})
    shed, uncovered = result.explanations
    assert (shed.status, shed.reason, shed.saliency, shed.target) == ("shed", "The queue is long.", None, None)
    assert (uncovered.status, uncovered.error.code) == ("error", "target_not_in_table")


def test_every_encoding_of_a_map_is_read():
    def base(values, dtype, scale):
        data = base64.b64encode(values.tobytes()).decode()
        return {"shape": [3, 4], "dtype": dtype, "scale": scale, "encoding": "base64", "data": data}

    steps = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert np.array_equal(read_map(base(steps, "uint8", 0.25)), steps * np.float32(0.25))
    assert np.array_equal(read_map(base(MAP.astype("<f2"), "float16", 2.0)), MAP.astype("<f2").astype(np.float32) * 2)
    assert np.array_equal(read_map(base(MAP.astype("<f4"), "float32", 1.0)), MAP)
    listed = {"shape": [3, 4], "dtype": "float32", "scale": 1.0, "encoding": "list", "data": MAP.tolist()}
    assert np.array_equal(read_map(listed), MAP)
    assert read_map(base(np.arange(5, dtype=np.uint8), "png", 1.0)) == bytes(range(5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [3, 5]}, "a map of shape 3 x 5 has 12 values"),
        ({"dtype": "int9"}, r"unknown dtype 'int9'; known are uint8, float16, float32, png\."),
        ({"encoding": "hex"}, "unknown encoding 'hex'; known are base64, list"),
        ({"encoding": "list", "dtype": "uint8"}, "unknown dtype 'uint8'; known are float32"),
        ({"data": "%%"}, "not base64"),
        ({"data": None}, "None is not text"),
        ({"shape": None}, "not iterable"),
    ],
    ids=["shape", "dtype", "encoding", "listed-dtype", "base64", "no-data", "no-shape"],
)
def test_a_map_that_is_none_is_refused(change, message):
    entry = explanation()["saliency"] | change
    with pytest.raises(AnswerError, match=message):
        read_map(entry)


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, text="<html>"),
        httpx.Response(200, json=[]),
        httpx.Response(200, json={"results": [{}]}),
        httpx.Response(200, json={"results": []}),
    ],
    ids=["html", "list", "empty-result", "no-result"],
)
def test_what_is_no_answer_is_said_to_be_none(ask, answer):
    with pytest.raises(AnswerError, match="answer"):
        ask(Service(answer)).predict(grey(5))


def test_a_proxy_s_page_is_quoted(ask):
    with pytest.raises(RequestRefusedError, match="502: Bad Gateway page") as caught:
        ask(Service(httpx.Response(502, text="Bad  Gateway\npage"))).predict(grey(5))
    assert caught.value.code == ""


# --- the rest ----------------------------------------------------------------------------------------------


def test_models_model_and_ready(ask):
    service = Service()
    assert ask(service).models()["default"] == "tiny"
    assert ask(service).model()["asked"] == "tiny"
    assert ask(service).model("other")["asked"] == "other"
    assert ask(service, model="mine").model()["asked"] == "mine"
    assert ask(service).ready() is True


def test_a_service_that_is_not_there_is_not_ready(ask):
    def nobody(request):
        raise httpx.ConnectError("refused")

    assert ask(httpx.MockTransport(nobody)).ready() is False
    assert ask(httpx.MockTransport(lambda request: httpx.Response(503))).ready() is False


def test_the_key_is_sent_as_a_bearer_token_and_shown_nowhere(ask):
    service = Service()
    client = ask(service, api_key=" open-sesame\n")
    client.predict(grey(1))
    assert service.headers["authorization"] == "Bearer open-sesame"
    with Client(URL, api_key="open-sesame", transport=service) as one:
        assert "sesame" not in repr(one) + repr(vars(one))


@pytest.mark.parametrize("key", ["open\nsesame", "open sesame", "sesame\x00", "s\u00e9same", "", "\n", b"sesame", 7])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_key_that_is_no_token_is_refused_and_not_shown(kind, key):
    with pytest.raises(OptionError) as caught:
        kind(URL, api_key=key)
    again = pickle.loads(pickle.dumps(caught.value))
    for error in (caught.value, again):
        assert str(error) == "The API key is not one token of visible ASCII characters (it is not shown here)."
        assert "same" not in repr(error) + repr(vars(error))


@pytest.mark.parametrize("page", [True, False])
@pytest.mark.parametrize("status", [401, 429])
def test_a_page_that_quotes_the_key_does_not_bring_it_into_an_error(ask, page, status):
    quoted = "x" * 190 + "Bearer open-sesame is wrong"
    body = {"text": quoted} if page else {"json": {"error": {"code": "unauthorized", "message": quoted}}}
    service = Service(httpx.Response(status, **body))
    with pytest.raises(ClientError, match="xxx") as caught:
        ask(service, api_key="open-sesame", retries=0).predict(grey(1))
    assert "ope" not in str(caught.value)


# --- the command's side ------------------------------------------------------------------------------------


def explained_by(url, tmp_path, *arguments):
    (tmp_path / "a.png").write_bytes(grey(1))
    command = [sys.executable, "-m", "parchgrad", "explain", "tiny", tmp_path / "a.png", "--url", url, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("open sesame", "holds more than one word; it must hold the token alone."),
        ("the token:\nsesame\n", "holds more than one word; it must hold the token alone."),
        ("\n", "holds nothing; it must hold the token alone."),
        ("s\u00e9same", "The API key is not one token of visible ASCII characters (it is not shown here)."),
    ],
    ids=["words", "lines", "empty", "no-ascii"],
)
def test_a_key_file_that_holds_no_token_is_refused_and_not_shown(tmp_path, content, said):
    (tmp_path / "k1").write_text(content, encoding="utf-8")
    ran = explained_by("http://127.0.0.1:9", tmp_path, "--api-key-file", tmp_path / "k1")
    assert ran.returncode == 1
    prefix = f"API key file '{tmp_path / 'k1'}' " if said.startswith("holds") else ""
    assert ran.stderr == f"Error: {prefix}{said}\n"


def test_a_new_key_sent_to_a_file_is_what_the_client_takes(tmp_path):
    made = subprocess.run(
        [sys.executable, "-m", "parchgrad", "key", "new", "lab"], capture_output=True, text=True, check=True
    )
    token = made.stdout.removesuffix("\n")
    assert len(token) == 43
    assert token not in made.stderr
    assert made.stderr.splitlines()[-1] == f"lab:{hashlib.sha256(token.encode()).hexdigest()}"
    service = Service()
    with Client(URL, api_key=made.stdout, transport=service) as client:
        client.predict(grey(1))
    assert service.headers["authorization"] == f"Bearer {token}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "service:3000"}, "Option 'url'"),
        ({"retries": -1}, "Option 'retries'"),
        ({"timeout": 0}, "Option 'timeout'"),
        ({"concurrency": 0}, "Option 'concurrency'"),
    ],
)
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_wrong_settings_are_refused(kind, settings, message):
    with pytest.raises(OptionError, match=message):
        kind(**{"url": URL, **settings})


def test_the_client_loads_no_torch():
    code = "import sys, parchgrad; parchgrad.Client, parchgrad.AsyncClient; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def test_without_httpx_the_extra_is_named():
    code = "import sys; sys.modules['httpx'] = None; import parchgrad; parchgrad.Client"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'parchgrad[client]'" in found.stderr
