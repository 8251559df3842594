"""What the page at `/` is made of: its files, what it asks of the service once, and a model's sample pictures."""

import asyncio
import base64
import gzip
from functools import lru_cache
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.staticfiles import StaticFiles

from parchgrad import __version__, render
from service.native import version_of
from service.pipeline import Pipeline
from service.schemas import PageState, SampleListing

STATIC = Path(__file__).with_name("static")
PICTURES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}

# Nothing but what this service sends is loaded, run or asked; what a caller drops stays in the page (blob:, data:).
POLICY = "; ".join(
    (
        "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' blob: data:",
        "media-src 'self' blob:", "connect-src 'self'", "base-uri 'none'", "form-action 'none'",
        "frame-ancestors 'none'",
    )
)  # fmt: skip
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Vary": "Accept-Encoding",
    # Asked again each time, by ETag: a page of yesterday must not ask a service of today.
    "Cache-Control": "no-cache",
}

_files = StaticFiles(directory=STATIC)


async def page(request: Request) -> Response:
    return await _file(request, "index.html")


async def file(request: Request) -> Response:
    return await _file(request, request.path_params["path"])


async def _file(request: Request, path: str) -> Response:
    # A name that no file can have is one that is not there.
    if "\0" in path:
        raise HTTPException(404)
    response = await _files.get_response(path, request.scope)
    if isinstance(response, FileResponse) and "gzip" in request.headers.get("accept-encoding", ""):
        found = Path(response.path)
        content = await asyncio.to_thread(_compressed, found, found.stat().st_mtime_ns)
        tags = {name: response.headers[name] for name in ("content-type", "etag", "last-modified")}
        response = Response(content, headers={**tags, "Content-Encoding": "gzip"})
    response.headers.update(HEADERS)
    return response


@lru_cache(maxsize=256)
def _compressed(path: Path, modified: int) -> bytes:
    """Kept, so that no visit costs it again; `modified` tells a file from what it was before."""
    return gzip.compress(path.read_bytes(), mtime=0)


async def state(request: Request) -> Response:
    """What the page has to know before it asks for anything else; open, as the page is."""
    told = request.app.state
    answer = PageState(parchgrad=__version__, keys=told.needs_key, attacks=told.pipeline.settings.attacks)
    return Response(answer.model_dump_json(), media_type="application/json", headers={"Cache-Control": "no-cache"})


async def palettes(request: Request) -> Response:
    """The colour maps that pictures are drawn in: by name, 256 x 3 bytes in base64."""
    found = {name: base64.b64encode(colours.tobytes()).decode() for name, colours in render.palettes().items()}
    return JSONResponse(found, headers={"Cache-Control": "max-age=3600"})


async def samples(request: Request) -> Response:
    """The pictures that come with a model's package, to try it with."""
    names = [path.name for path in await asyncio.to_thread(_samples, request)]
    return Response(SampleListing(samples=names).model_dump_json(), media_type="application/json")


async def sample(request: Request) -> Response:
    for path in await asyncio.to_thread(_samples, request):
        if path.name == request.path_params["file"]:
            headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
            return FileResponse(path, media_type=PICTURES[path.suffix.lower()], headers=headers)
    raise HTTPException(404)


def _samples(request: Request) -> list[Path]:
    """Raises ServiceError where there is no such model."""
    pipeline: Pipeline = request.app.state.pipeline
    with pipeline.repository.use(request.path_params["name"], version_of(request)) as served:
        folder = pipeline.settings.models_dir / served.name / served.version / "samples"
        found = folder.iterdir() if folder.is_dir() else ()
        return sorted(path for path in found if path.suffix.lower() in PICTURES and path.is_file())


ROUTES = [
    Route("/", page, methods=["GET"]),
    Route("/page/state.json", state, methods=["GET"]),
    Route("/page/palettes.json", palettes, methods=["GET"]),
    Route("/page/{path:path}", file, methods=["GET"]),
    Route("/models/{name}/samples", samples, methods=["GET"]),
    Route("/models/{name}/samples/{file}", sample, methods=["GET"]),
]
