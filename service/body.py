"""An HTTP request's body -> encoded images and option fields, read within limits. Knows no option and no codec."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from tempfile import SpooledTemporaryFile
from typing import IO

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from service.errors import ServiceError

MAX_FIELDS = 2000
MAX_FIELD_BYTES = 4096
SPOOL_BYTES = 1_048_576  # larger images wait on disk, not in memory, for their turn to be decoded
RAW_TYPES = ("image/", "application/octet-stream")

Fields = dict[str, list[str]]


@dataclass(frozen=True)
class Upload:
    """What a request brought: `images` are open files at position 0; the caller closes them."""

    images: list[IO[bytes]]
    fields: Fields

    def close(self) -> None:
        for image in self.images:
            image.close()


async def read_upload(request: Request, max_images: int, max_body_bytes: int) -> Upload:
    """Read a multipart body, or one raw image; query parameters become fields. Raises ServiceError."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    encodings = ",".join(request.headers.getlist("content-encoding")) or "identity"
    if encodings.lower() != "identity":
        raise ServiceError("content_type_unsupported", "Content-Encoding is not supported; send the image as it is.")
    body = _limited(request, max_body_bytes)
    if content_type == "multipart/form-data":
        images, fields = await _multipart(request, body, max_images)
    elif content_type.startswith(RAW_TYPES):
        images, fields = [await _raw(body)], {}
    else:
        raise ServiceError(
            "content_type_unsupported",
            f"Content-Type is {content_type!r}; expected multipart/form-data with 'image' files, or image/*.",
        )
    upload = Upload(images, _merged(request, fields))
    if not images:
        raise ServiceError("no_image", "The request carries no file part named 'image'.")
    return upload


async def _limited(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """The body's chunks; stops the caller as soon as they, or the length declared for them, pass `limit` bytes."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise ServiceError("body_too_large", f"The body has {declared} bytes; at most {limit} are accepted.")
    received = 0
    try:
        async for chunk in request.stream():
            received += len(chunk)
            if received > limit:
                raise ServiceError("body_too_large", f"The body passes {limit} bytes, the most that are accepted.")
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


async def _multipart(
    request: Request, body: AsyncGenerator[bytes, None], max_images: int
) -> tuple[list[IO[bytes]], Fields]:
    parser = _Parser(request.headers, body, max_files=max_images, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES)
    try:
        form = await parser.parse()
    except (UnicodeError, LookupError):  # of the charset that the content type names
        raise ServiceError("malformed_request", "The multipart body is not text in its declared charset.") from None
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
                expected = "a field, not a file" if isinstance(value, UploadFile) else "a file part with a filename"
                code = "malformed_request" if name == "image" else "unknown_field"
                raise ServiceError(code, f"Part {name[:64]!r} must be {expected}; only 'image' parts are files.")
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
