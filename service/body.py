"""An HTTP request's body -> encoded images and option fields, read within limits. Knows no option and no codec.

Limits of bytes hold before anything is kept, and one of time: a body that trickles in is given up.
"""

import asyncio
import errno
import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from tempfile import SpooledTemporaryFile
from typing import IO, Any

from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from service.errors import ServiceError
from service.settings import Settings

MAX_FIELDS = 2000
MAX_FIELD_BYTES = 4096
SLACK_BYTES = 65_536
SPOOL_BYTES = 1_048_576  # larger images wait on disk, not in memory, for their turn to be decoded
RAW_TYPES = ("image/", "application/octet-stream")
# Python keeps every name of a codec that it was ever asked for, and some codecs take seconds: callers choose among few.
CHARSETS = (b"utf-8", b"us-ascii", b"iso-8859-1", b"latin-1")

Fields = dict[str, list[str]]


@dataclass(frozen=True)
class Upload:
    """What a request brought: `images` are open files at position 0; the caller closes them."""

    images: list[IO[bytes]]
    fields: Fields

    def close(self) -> None:
        for image in self.images:
            image.close()


async def read_upload(request: Request, settings: Settings, share: "BodyShare | None" = None) -> Upload:
    """Read a multipart body, or one raw image; query parameters become fields. Raises ServiceError.

    Its bytes are counted in `share`, which the caller keeps until the files are closed.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    _check_encoding(request)
    async with _deadline(settings), _on_disk():
        if content_type == "multipart/form-data":
            body = _limited(request, settings.max_body_bytes, share)
            images, fields = await _multipart(request, body, settings.max_images)
        elif content_type.startswith(RAW_TYPES):
            # A little more than one image, so that one just too large is told its limit by name.
            limit = min(settings.max_image_bytes + SLACK_BYTES, settings.max_body_bytes)
            images, fields = [await _raw(_limited(request, limit, share))], {}
        else:
            raise ServiceError(
                "content_type_unsupported",
                f"Content-Type is {content_type[:64]!r}; expected multipart/form-data with 'image' files, or image/*.",
            )
    upload = Upload(images, {})
    try:
        upload = Upload(images, _merged(request, fields))
        if not images:
            raise ServiceError("no_image", "The request carries no file part named 'image'.")
    except ServiceError:
        upload.close()
        raise
    return upload


class BodyMemory:
    """The bytes of bodies that one worker keeps at once, of all requests together, in memory or in files on disk."""

    def __init__(self, limit: int) -> None:
        self._free = self._limit = limit

    @contextmanager
    def share(self) -> Iterator["BodyShare"]:
        """One request's part of it, given back at the end."""
        share = BodyShare(self)
        try:
            yield share
        finally:
            self._free += share.held

    def take(self, size: int) -> None:
        """Raises ServiceError(queue_full)."""
        if size > self._free:
            raise ServiceError("queue_full", f"Other requests fill the {self._limit} bytes there are for bodies.")
        self._free -= size


class BodyShare:
    """What one request holds of a BodyMemory."""

    def __init__(self, memory: BodyMemory) -> None:
        self._memory = memory
        self.held = 0

    def take(self, size: int) -> None:
        self._memory.take(size)
        self.held += size


async def read_bytes(request: Request, limit: int, settings: Settings, share: BodyShare | None = None) -> bytearray:
    """The whole body, of at most `limit` bytes, each of them counted in `share`. Raises ServiceError."""
    _check_encoding(request)
    content = bytearray()
    async with _deadline(settings):
        async for chunk in _limited(request, limit, share):
            content += chunk
    return content


async def read_json(request: Request, limit: int, settings: Settings) -> Any:
    """The body as JSON, of at most `limit` bytes; no body at all is an empty object. Raises ServiceError."""
    content = await read_bytes(request, limit, settings)
    try:
        return json.loads(content) if content else {}
    except (ValueError, RecursionError) as error:  # also of bytes that are not UTF-8, and of numbers of 5000 digits
        raise ServiceError("malformed_request", f"The body is not JSON: {error}.") from None


def _check_encoding(request: Request) -> None:
    """Compressed bodies are refused: they can be small and hold anything, and images are compressed as they are."""
    encodings = ",".join(request.headers.getlist("content-encoding")) or "identity"
    if encodings.lower() != "identity":
        raise ServiceError("content_type_unsupported", "Content-Encoding is not supported; send the body as it is.")


@asynccontextmanager
async def _deadline(settings: Settings) -> AsyncGenerator[None, None]:
    milliseconds = settings.body_timeout_ms
    try:
        async with asyncio.timeout(milliseconds / 1000):
            yield
    except TimeoutError:
        raise ServiceError("deadline_exceeded", f"The body did not arrive in {milliseconds} ms.") from None


@asynccontextmanager
async def _on_disk() -> AsyncGenerator[None, None]:
    """A full disk, on which larger images wait, has an error of its own."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ServiceError("storage_full", "The service's disk has no room for the images of this request.") from None


async def _limited(request: Request, limit: int, share: BodyShare | None) -> AsyncGenerator[bytes, None]:
    """The body's chunks; stops the caller as soon as they, or the length declared for them, pass `limit` bytes.

    Each chunk is counted in `share` before it is handed on, and so before it is kept.
    """
    declared = request.headers.get("content-length", "")
    # More digits than any limit has: int() refuses thousands of them.
    if declared.isdecimal() and (len(declared) > 19 or int(declared) > limit):
        raise ServiceError("body_too_large", f"The body has {declared[:20]} bytes; at most {limit} are accepted.")
    received = 0
    try:
        async for chunk in request.stream():
            received += len(chunk)
            if received > limit:
                raise ServiceError("body_too_large", f"The body passes {limit} bytes, the most that are accepted.")
            if share is not None:
                share.take(len(chunk))
            yield chunk
    except ClientDisconnect:
        raise ServiceError("client_closed_request", "The client went away before the body was complete.") from None


async def _raw(body: AsyncGenerator[bytes, None]) -> IO[bytes]:
    file = SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115 - the caller closes it
    try:
        async for chunk in body:
            file.write(chunk)
    except BaseException:
        file.close()
        raise
    file.seek(0)
    return file


class _Parser(MultiPartParser):
    """Starlette's, which is silent about a body cut off before its last boundary."""

    complete = False

    def on_end(self) -> None:
        self.complete = True


def _check_charset(request: Request) -> None:
    """Before the parser looks for the codec of that name."""
    charset = parse_options_header(request.headers["content-type"])[1].get(b"charset", b"utf-8")
    if charset.lower() not in CHARSETS:
        named, known = charset[:64].decode("latin-1"), b", ".join(CHARSETS).decode()
        raise ServiceError("malformed_request", f"The multipart charset is {named!r}; expected one of {known}.")


async def _multipart(
    request: Request, body: AsyncGenerator[bytes, None], max_images: int
) -> tuple[list[IO[bytes]], Fields]:
    _check_charset(request)
    parser = _Parser(request.headers, body, max_files=max_images, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if "Too many files" in error.message:  # the parser has no exception of its own for it
            raise ServiceError("too_many_images", f"A request may carry at most {max_images} images.") from None
        raise ServiceError("malformed_request", f"The multipart body is malformed: {error.message}") from None
    images: list[IO[bytes]] = []
    fields: Fields = {}
    try:
        if not parser.complete:
            raise ServiceError("malformed_request", "The multipart body ends before its last boundary.")
        for name, value in form.multi_items():
            if isinstance(value, UploadFile) != (name == "image"):
                if name == "image":
                    raise ServiceError(
                        "malformed_request", "Part 'image' is text; send a file with a name (curl: -F image=@FILE)."
                    )
                raise ServiceError("unknown_field", f"Files go in parts named 'image'; this one is {name[:64]!r}.")
            if isinstance(value, UploadFile):
                images.append(value.file)
            else:
                fields.setdefault(name, []).append(value)
    except ServiceError:
        await form.close()
        raise
    return images, fields


def _merged(request: Request, fields: Fields) -> Fields:
    """Form fields and query parameters together; a name may stand in one of the two places."""
    merged = dict(fields)
    for name, value in request.query_params.multi_items():
        if name in fields:
            raise ServiceError("option_invalid", f"Option {name[:64]!r} is given in the query and in the form.")
        merged.setdefault(name, []).append(value)
    return merged
