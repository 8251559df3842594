"""A request's head and body -> service/body.py and the option parser: files and options, or a `ServiceError`.

A case is text that can be read and edited: the first line is `ROUTE CHUNK QUERY` (chunk: how many bytes arrive at a
time), then header lines as in HTTP, an empty line, and the body.
"""

import asyncio
import atexit
import json
from collections.abc import Iterator
from random import Random
from typing import Any

from starlette.requests import Request
from starlette.types import Message

from fuzz.target import FindingError, Mutate, Target
from service.body import MAX_FIELD_BYTES, Fields, read_json, read_upload
from service.errors import ServiceError
from service.schemas import OPTIONS, REQUEST_OPTIONS, parse_options, take_model
from service.settings import Settings

MAX_BYTES = 8192  # less than every limit: only a Content-Length that lies can pass one
SETTINGS = Settings(max_images=3, max_image_bytes=MAX_BYTES)
ROUTES = ("explain", "predict")
JSON = "json"  # the route of bodies that are read as JSON

_loop = asyncio.new_event_loop()  # one for all cases: a new one costs more than a case
atexit.register(_loop.close)
_Outcome = tuple[list[bytes], Fields] | str  # the images and fields, or the error's code, or the JSON's text


def check(case: bytes) -> None:
    head, _, body = case.partition(b"\n\n")
    first, *lines = head.split(b"\n")
    words = [*first.split(b" ", 2), b"", b""]
    route, chunk, query = words[0].decode("latin-1"), words[1], words[2]
    scope: dict[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": "/",
        "headers": [
            (name.strip().lower(), value.strip()) for name, _, value in (line.partition(b":") for line in lines)
        ],
        "query_string": query,
    }
    whole = _loop.run_until_complete(_read(scope, body, len(body), route))
    size = int(chunk) if chunk.isdigit() and len(chunk) < 5 else 0
    if size and whole != (parts := _loop.run_until_complete(_read(scope, body, size, route))):
        raise FindingError(f"In one piece: {whole!r}; in pieces of {size}: {parts!r}.")
    if isinstance(whole, str):
        return
    images, fields = whole
    if not 1 <= len(images) <= SETTINGS.max_images or sum(map(len, images)) > len(body):
        raise FindingError(f"{len(images)} images of {sum(map(len, images))} bytes came out of {len(body)}.")
    longest = max((len(text) for texts in fields.values() for text in texts), default=0)
    if longest > max(MAX_FIELD_BYTES, len(query)):
        raise FindingError(f"A field of {longest} characters passed a limit of {MAX_FIELD_BYTES} bytes.")
    _options(fields, len(images), route if route in ROUTES else ROUTES[0])


def _options(fields: Fields, images: int, route: str) -> None:
    try:
        take_model(fields)
        asked = parse_options(fields, images, route)
    except ServiceError as error:
        _sentence(error)
        return
    if len(asked) != images or fields.keys() & REQUEST_OPTIONS.keys():
        raise FindingError(f"{len(asked)} options for {images} images, fields {list(fields)}.")


def _sentence(error: ServiceError) -> None:
    """What is told to the caller is short, can be sent as JSON, and is the caller's fault."""
    if error.status >= 500 or len(error.message) > 1000:
        raise FindingError(f"{error.status} {error.message!r}") from error
    json.dumps(error.message).encode()


async def _read(scope: dict[str, Any], body: bytes, chunk: int, route: str) -> _Outcome:
    messages = iter([*(body[at : at + chunk] for at in range(0, len(body), chunk or 1)), b""])

    async def receive() -> Message:
        piece = next(messages)
        return {"type": "http.request", "body": piece, "more_body": piece != b""}

    request = Request(scope, receive)
    try:
        if route == JSON:
            return repr(await read_json(request, MAX_BYTES, SETTINGS))
        upload = await read_upload(request, SETTINGS)
    except ServiceError as error:
        _sentence(error)
        return error.code
    try:
        return [image.read() for image in upload.images], upload.fields
    finally:
        upload.close()


# --- cases that are almost right ---------------------------------------------------------------------------


_VALUES = (
    "", "0", "1", "-1", "20", "21", "999999999999999999999", "1e400", "nan", "-inf", "inf", "0.1", "true", "top:1",
    "top:20", "top:", "top:1_0", "predicted", "\u0661", "\x00", "a,b", ",", "*", "none", "confidence<0.6",
    "sample:0.05", "class:1|2", "class:", "always", "class:a;sample:2", "uint8", "png", "{}",
)  # fmt: skip


def mutate(plain: Mutate) -> Mutate:
    """Half of the cases are written anew as whole requests of known options; the rest are changed plainly."""

    def mutated(case: bytes, most: int, random: Random) -> bytes:
        if random.random() < 0.5:
            return plain(case, most, random)
        return _request(random, plain)[:most]

    return mutated


def _request(random: Random, plain: Mutate) -> bytes:
    parts = [(f'name="image"; filename="{i}"', b"GIF89a") for i in range(random.randrange(SETTINGS.max_images + 2))]
    names = [*OPTIONS, *REQUEST_OPTIONS, "image", "?"]
    for _ in range(random.randrange(6)):
        value = random.choice(_VALUES).encode()
        if random.random() < 0.3:
            value = plain(value or b"0", 40, random)
        parts.append((f'name="{random.choice(names)}"', value))
    random.shuffle(parts)
    boundary = random.choice((b"b", b"--", b"x" * 70))
    body = b"".join(
        b"--"
        + boundary
        + b"\r\nContent-Disposition: form-data; "
        + disposition.encode()
        + b"\r\n\r\n"
        + value
        + b"\r\n"
        for disposition, value in parts
    )
    query = "&".join(f"{random.choice(names)}={random.choice(_VALUES)}" for _ in range(random.randrange(3)))
    head = f"{random.choice(ROUTES)} {random.randrange(20)} {query}\ncontent-type: multipart/form-data; boundary="
    return head.encode() + boundary + b"\n\n" + body + b"--" + boundary + b"--\r\n"


# --- the start corpus --------------------------------------------------------------------------------------


_FORM = b"content-type: multipart/form-data; boundary=b\n\n"
_IMAGE = (
    b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.gif"\r\nContent-Type: image/gif\r\n\r\nGIF89a'
)


def _field(name: str, value: str) -> bytes:
    return f'\r\n--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}'.encode()


def seeds() -> Iterator[tuple[str, bytes]]:
    end = b"\r\n--b--\r\n"
    for name, option in OPTIONS.items():
        enum = option.kind.schema.get("enum", ["1"])
        yield f"field_{name}", b"explain 5 \n" + _FORM + _IMAGE + _field(name, enum[-1]) + end
        yield f"query_{name}", f"explain 0 {name}=1\ncontent-type: image/gif\n\nGIF89a".encode()
    for i, when in enumerate(("confidence<0.6", "class:1|a", "sample:0.05", "sample:0.5;class:1", "always")):
        yield f"when_{i}", b"explain 5 explain_when=" + when.encode() + b"\ncontent-type: image/gif\n\nGIF89a"
    yield "raw", b"predict 3 \ncontent-type: image/png\n\nnot an image"
    yield "raw_octets", b"explain 1 top_k=1\ncontent-type: application/octet-stream\n\nx"
    yield "two_images", b"explain 7 \n" + _FORM + _IMAGE + b"\r\n" + _IMAGE + _field("target", "a") + end
    yield "too_many_images", b"explain 9 \n" + _FORM + b"\r\n".join([_IMAGE] * (SETTINGS.max_images + 1)) + end
    yield "cut_short", b"explain 2 \n" + _FORM + _IMAGE
    yield "no_boundary", b"explain 2 \ncontent-type: multipart/form-data\n\n" + _IMAGE + end
    yield "charset", b"explain 2 \ncontent-type: multipart/form-data; boundary=b; charset=utf-16\n\n" + _IMAGE + end
    yield "no_charset", b"explain 2 \ncontent-type: multipart/form-data; boundary=b; charset=none\n\n" + _IMAGE + end
    yield "both_places", b"explain 2 seed=logit\n" + _FORM + _IMAGE + _field("seed", "logit") + end
    yield "image_as_field", b"explain 2 \n" + _FORM + _field("image", "text")[2:] + end
    yield "long_field", b"explain 900 \n" + _FORM + _IMAGE + _field("target", "x" * (MAX_FIELD_BYTES + 1)) + end
    yield "length_lies", b"explain 2 \ncontent-length: 99999999999999999999\n" + _FORM + _IMAGE + end
    yield "encoded", b"explain 2 \ncontent-encoding: gzip\ncontent-type: image/png\n\n\x1f\x8b"
    yield "length_of_many_digits", b"explain 2 \ncontent-length: " + b"9" * 5000 + b"\n" + _FORM + _IMAGE + end
    yield "json", b'json 3 \n\n{"unload_dependents": [1.5, null, "\\u00e9"]}'
    yield "json_deep", b"json 500 \n\n" + b"[" * 3000
    yield "json_number", b"json 0 \n\n" + b"1" * 5000
    yield "not_a_form", b"explain 2 \ncontent-type: application/json\n\n{}"


TARGET = Target(check, seeds, max_bytes=MAX_BYTES, mutate=mutate)
