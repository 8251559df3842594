"""Bodies within limits: what is refused before it is read, while it comes, and how long it may take to come."""

import asyncio
import gc
import itertools
import time
import tracemalloc
import warnings
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest
from starlette.requests import Request

from service.body import CHARSETS, SLACK_BYTES, BodyMemory, Upload, read_bytes, read_json, read_upload
from service.errors import ServiceError
from service.settings import Settings

SETTINGS = Settings(max_image_bytes=100_000, max_images=4, body_timeout_ms=200)
MULTIPART = "multipart/form-data; boundary=b"
LONG = 2_000_000


def request(chunks: Iterable[bytes], content_type: str = MULTIPART, pause: float = 0.0, **headers: str) -> Request:
    """A request whose body comes in these chunks, `pause` seconds apart; `taken` counts those the reader took."""

    async def body() -> AsyncIterator[bytes]:
        for chunk in chunks:
            await asyncio.sleep(pause)
            scope["taken"] += 1
            yield chunk
        yield b""

    stream = body()

    async def receive() -> dict[str, Any]:
        chunk = await anext(stream)
        return {"type": "http.request", "body": chunk, "more_body": bool(chunk)}

    raw = [(name.lower().replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    raw.append((b"content-type", content_type.encode()))
    scope: dict[str, Any] = {"type": "http", "method": "POST", "query_string": b"", "headers": raw, "taken": 0}
    return Request(scope, receive)


def upload(asked: Request) -> Upload:
    return asyncio.run(read_upload(asked, SETTINGS))


def refusal(asked: Request) -> ServiceError:
    """Also holds that nothing stays open: a temporary file that is not closed warns when it is collected."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ServiceError) as error:
            upload(asked)
        gc.collect()
    return error.value


def part(name: str, content: bytes = b"x", extra: str = "") -> bytes:
    return b'--b\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n' % (
        name.encode(), extra.encode(), content
    )  # fmt: skip


IMAGE = part("image", b"picture", '; filename="a"')
END = b"--b--\r\n"


def test_what_comes_is_what_was_sent() -> None:
    sent = IMAGE + part("target", b"3") + IMAGE + part("target", b"4") + END
    for size in (1, 7, len(sent)):
        got = upload(request(sent[i : i + size] for i in range(0, len(sent), size)))
        assert [image.read() for image in got.images] == [b"picture", b"picture"]
        assert got.fields == {"target": ["3", "4"]}
        got.close()
        assert all(image.closed for image in got.images)


@pytest.mark.parametrize("declares", [True, False])
def test_a_raw_body_is_one_image_long_at_most(declares: bool) -> None:
    size = SETTINGS.max_image_bytes + SLACK_BYTES
    whole = upload(request([bytes(size)], "image/png"))
    assert len(whole.images[0].read()) == size
    whole.close()
    headers = {"content_length": str(size + 1)} if declares else {}
    asked = request((bytes(1000) for _ in range(10_000)), "image/png", **headers)
    error = refusal(asked)
    assert (error.code, error.headers) == ("body_too_large", {"Connection": "close"})
    assert asked.scope["taken"] <= (0 if declares else size // 1000 + 1)


def test_a_multipart_body_without_end_is_left_off() -> None:
    for chunk in (IMAGE, b"preamble", part("a", bytes(4000)), b"--b\r\nX: " + bytes(1000)):
        asked = request(chunk for _ in range(LONG // len(chunk)))
        assert refusal(asked).status in (400, 413)
        assert asked.scope["taken"] * len(chunk) <= SETTINGS.max_body_bytes + len(chunk)


@pytest.mark.parametrize("length", ["9" * 19, "9" * 5000, "99999999999"])
def test_declared_lengths_beyond_any(length: str) -> None:
    assert refusal(request([], content_length=length)).code == "body_too_large"


@pytest.mark.parametrize("content_type", [MULTIPART, "image/png"])
def test_a_body_that_trickles_in_is_given_up(content_type: str) -> None:
    start = time.monotonic()
    error = refusal(request(itertools.chain([part("a")], itertools.repeat(b"\r\n")), content_type, pause=0.01))
    assert error.code == "deadline_exceeded"
    assert error.message == "The body did not arrive in 200 ms."
    assert time.monotonic() - start >= 0.2


@pytest.mark.parametrize(
    ("parts", "code"),
    [(part("a") * 10_000, "malformed_request"), (part("image") * 10_000, "malformed_request"),
     (IMAGE * 10_000, "too_many_images"), (part("image", b"", '; filename=""') * 10_000, "too_many_images")],
    ids=["fields", "images that are fields", "files", "files without a name"],
)  # fmt: skip
def test_ten_thousand_parts(parts: bytes, code: str) -> None:
    settings = Settings()
    asked = request([*(parts[i : i + 65536] for i in range(0, len(parts), 65536)), END])
    with pytest.raises(ServiceError) as error:
        asyncio.run(read_upload(asked, settings))
    assert error.value.code == code
    assert asked.scope["taken"] <= 3


@pytest.mark.parametrize(
    "headers",
    [
        b"X-Long: " + b"v" * 3_000_000,
        b"X" * 3_000_000 + b": v",
        b"X-Many: v\r\n" * 100_000,
        b'Content-Disposition: form-data; name="' + b"n" * 3_000_000 + b'"',
        b'Content-Disposition: form-data; name="image"; filename="' + b"n" * 3_000_000 + b'"',
    ],
    ids=["value", "name", "many", "field", "filename"],
)
def test_headers_of_a_part_are_bounded(headers: bytes) -> None:
    settings = Settings(max_image_bytes=10_000_000)
    sent = b"--b\r\n" + headers + b"\r\n\r\nx\r\n" + END
    asked = request(sent[i : i + 65536] for i in range(0, len(sent), 65536))
    tracemalloc.start()
    with pytest.raises(ServiceError, match="multipart body is malformed"):
        asyncio.run(read_upload(asked, settings))
    grown = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert grown < 1_500_000
    assert asked.scope["taken"] <= 2


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "identity, gzip", "GZIP"])
@pytest.mark.parametrize("content_type", [MULTIPART, "image/png"])
def test_compressed_bodies_are_refused_unread(encoding: str, content_type: str) -> None:
    asked = request([b"x"] * 10, content_type, content_encoding=encoding)
    assert refusal(asked).code == "content_type_unsupported"
    assert asked.scope["taken"] == 0
    with pytest.raises(ServiceError, match="Content-Encoding"):
        asyncio.run(read_json(request([b"{}"], content_encoding=encoding), 100, SETTINGS))


def test_json_bodies() -> None:
    def read(*chunks: bytes, limit: int = 100) -> Any:
        return asyncio.run(read_json(request(chunks, "application/json"), limit, SETTINGS))

    assert read(b'{"a": ', b"[1]}") == {"a": [1]}
    assert read() == {}
    assert read(b'"12345678"', limit=10) == "12345678"
    with pytest.raises(ServiceError, match="passes 9 bytes") as error:
        read(b'"12345678"', limit=9)
    assert error.value.code == "body_too_large"
    for damaged in (b"{", b"\xff", b"[" * 100_000, b"1" * 10_000):
        with pytest.raises(ServiceError, match="The body is not JSON") as error:
            read(damaged, limit=200_000)
        assert error.value.code == "malformed_request"


def test_bodies_in_memory_are_bounded_together_and_given_back() -> None:
    memory = BodyMemory(1000)

    async def read(chunks: int) -> int:
        with memory.share() as share:
            return len(await read_bytes(request([bytes(100)] * chunks), LONG, SETTINGS, share))

    async def scenario() -> None:
        assert await read(10) == 1000
        with pytest.raises(ServiceError) as error:
            await read(11)
        assert (error.value.code, error.value.status) == ("queue_full", 429)
        assert await read(10) == 1000  # what was refused has given back what it held
        with memory.share() as other:
            other.take(500)
            with pytest.raises(ServiceError):
                await read(6)
            assert await read(5) == 500

    asyncio.run(scenario())


def encodings_known() -> int:
    """Python keeps one entry for each name of a codec that was ever looked up."""
    import encodings

    return len(encodings._cache)


@pytest.mark.parametrize("charset", ["punycode", "undefined", "utf-16", "none-%d", '"none-%d"', "utf-8-%d"])
def test_a_charset_of_the_callers_is_never_looked_up(charset: str) -> None:
    before = encodings_known()
    for number in range(3):
        asked = request([IMAGE, END], f"{MULTIPART}; charset={charset.replace('%d', str(number))}")
        error = refusal(asked)
        assert error.code == "malformed_request"
        assert error.message.endswith("expected one of utf-8, us-ascii, iso-8859-1, latin-1.")
        assert asked.scope["taken"] == 0
    assert encodings_known() == before


@pytest.mark.parametrize("charset", [*(known.decode() for known in CHARSETS), "UTF-8", '"Latin-1"'])
def test_charsets_that_are_known(charset: str) -> None:
    got = upload(request([IMAGE, part("target", b"3"), END], f"{MULTIPART}; charset={charset}"))
    assert ([image.read() for image in got.images], got.fields) == ([b"picture"], {"target": ["3"]})
    got.close()


@pytest.mark.parametrize("content_type", [MULTIPART, "image/png"])
def test_uploads_are_bounded_together_chunk_by_chunk(content_type: str) -> None:
    """Whatever is kept of them, in memory or on disk; what is refused is closed and gives back what it held."""
    settings = Settings(max_image_bytes=3_000_000, max_images=1)
    memory = BodyMemory(5_000_000)
    sent = [part("image", bytes(2_000_000), '; filename="a"'), END] if content_type == MULTIPART else [bytes(2_000_000)]

    async def read() -> int:
        with memory.share() as share:
            (await read_upload(request(sent, content_type), settings, share)).close()
            return share.held

    async def scenario() -> None:
        length = sum(len(chunk) for chunk in sent)
        for _ in range(5):
            assert await read() == length
        with memory.share() as other:
            other.take(5_000_000 - length)
            assert await read() == length
            other.take(1)
            with pytest.raises(ServiceError) as error:
                await read()
            assert (error.value.code, error.value.headers) == ("queue_full", {"Retry-After": "1"})
        assert await read() == length

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asyncio.run(scenario())
        gc.collect()


def test_no_body_may_be_longer_than_all_together() -> None:
    """It would be asked for ever to come again later."""
    settings = Settings(max_bodies_bytes=10_000)
    assert settings.max_body_bytes == 10_000
    for content_type in (MULTIPART, "image/png"):
        with pytest.raises(ServiceError) as error:
            asyncio.run(read_upload(request([], content_type, content_length="10001"), settings))
        assert error.value.code == "body_too_large"
