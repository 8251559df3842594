"""The service's client: images in, results out, over HTTP. Needs httpx, and neither torch nor a model.

`Client` waits, `AsyncClient` is awaited. What is not waiting is common to both: `uploads` makes what is sent,
`_exchange` decides what is sent again and when, `answers` reads what came.
"""

from __future__ import annotations

import asyncio
import email.utils
import os
import random
import re
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar, overload
from urllib.parse import quote

from parchgrad import __version__
from parchgrad.answers import AnswerError, Result, failed, read_answer
from parchgrad.errors import OptionError, ParchGradError
from parchgrad.uploads import Batch, Batches, ImageLike, batch_of_one, check_several, is_one

try:
    import httpx
except ImportError as error:
    raise ImportError(
        "parchgrad.Client needs httpx, which is not installed: pip install 'parchgrad[client]'"
    ) from error

Progress = Callable[[int, int | None], None]
T = TypeVar("T")

RETRY_STATUSES = (429, 503)
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 8.0  # seconds

# No answer came. Both verbs only compute, so the same request may be sent again.
_NO_ANSWER = (httpx.ConnectError, httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError)


class ClientError(ParchGradError):
    """A request did not come to a result."""


class RequestRefusedError(ClientError):
    """The service refused the request. `code` is of its closed list; empty where it is not the service that spoke."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"The service answered {status} {code}: {message}" if code else f"{status}: {message}")
        self.status = status
        self.code = code
        self.message = message


class UnavailableError(ClientError):
    """No answer within the tries and the time there were; the message says what stood in the way."""


class ApiKeyError(OptionError):
    """The API key is none that a header can carry. Neither the message nor `value` holds it."""

    def __init__(self, *_: object) -> None:  # pickled as an OptionError is, with its three values
        super().__init__("api_key", "not shown", "one token of visible ASCII characters")
        self.args = ("The API key is not one token of visible ASCII characters (it is not shown here).",)


# --- one request and its answer ----------------------------------------------------------------------------

# What is to be done next, the same for those that wait and those that are awaited: send this, or pause for so many
# seconds. An answer, or why there is none, comes back for the first, None for the second.
_Steps = Generator[httpx.Request | float, httpx.Response | httpx.TransportError | None, T]


def _exchange(build: Callable[[float], httpx.Request], retries: int, timeout: float) -> _Steps[httpx.Response]:
    """The answer to the request that `build` makes for the seconds left; its status is none of RETRY_STATUSES.

    Raises UnavailableError.
    """
    deadline = time.monotonic() + timeout
    tried = 0
    while True:
        request = build(max(deadline - time.monotonic(), 0.001))
        outcome = yield request
        tried += 1
        if isinstance(outcome, httpx.Response) and outcome.status_code not in RETRY_STATUSES:
            return outcome
        pause = _pause(tried, outcome)
        again = isinstance(outcome, (httpx.Response, *_NO_ANSWER)) and tried <= retries
        if not again or time.monotonic() + pause > deadline:
            tries = "1 try" if tried == 1 else f"{tried} tries"
            cause = outcome if isinstance(outcome, Exception) else None
            late = f", the {timeout:g} s are too short for another" if again else ""
            raise UnavailableError(_unavailable(_address(request.url), outcome, timeout, f"{tries}{late}")) from cause
        yield pause


def _pause(tried: int, outcome: httpx.Response | httpx.TransportError | None) -> float:
    """Seconds: what the service asks for, and a random part that doubles, so that callers do not return together."""
    asked = _retry_after(outcome.headers.get("retry-after", "")) if isinstance(outcome, httpx.Response) else 0.0
    longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (tried - 1))
    return asked + random.uniform(longest / 2, longest)


def _retry_after(text: str) -> float:
    """The header's seconds, or the seconds until its date (RFC 9110, 10.2.3); 0 where it is neither."""
    if text.isascii() and text.isdigit():
        return float(text)
    with suppress(ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0


def _unavailable(
    address: str, outcome: httpx.Response | httpx.TransportError | None, timeout: float, tries: str
) -> str:  # fmt: skip
    """One sentence on what stood in the way."""
    if isinstance(outcome, httpx.Response):
        return f"{address} is not available ({tries}): {_refused(outcome)}"
    if isinstance(outcome, httpx.ConnectTimeout):
        return f"{address} cannot be reached: no connection within {timeout:g} s ({tries})."
    if isinstance(outcome, httpx.TimeoutException):
        return f"{address} did not answer within {timeout:g} s ({tries})."
    if isinstance(outcome, _NO_ANSWER) and not isinstance(outcome, httpx.ConnectError):
        return f"{address} broke the connection before its answer was there: {_why(outcome)} ({tries})."
    return f"{address} cannot be reached: {_why(outcome)} ({tries})."


def _address(url: httpx.URL) -> str:
    """Without a user's name and password."""
    return f"{url.scheme}://{url.netloc.decode('ascii')}{url.path}"


def _why(error: BaseException | None) -> str:
    """The system's words for what httpx wraps; else httpx's own."""
    inner = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.errno is not None:
            own_numbers = isinstance(inner, ssl.SSLError | socket.gaierror)
            return _lower_first(str(inner.strerror) if own_numbers else os.strerror(inner.errno))
        inner = inner.exceptions[0] if isinstance(inner, BaseExceptionGroup) else inner.__cause__ or inner.__context__
    return _lower_first(str(error).rstrip(".")) or type(error).__name__


def _lower_first(text: str) -> str:
    return text if text[:2].isupper() else text[:1].lower() + text[1:]


def _refused(response: httpx.Response) -> RequestRefusedError:
    try:
        error = response.json()["error"]
        code, said = (_without_key(str(error[name]), response.request) for name in ("code", "message"))
    except (ValueError, LookupError, TypeError):  # a proxy's page, or another server altogether
        page = " ".join(_without_key(response.text, response.request).split())
        code, said = "", page[:200] or response.reason_phrase
    return RequestRefusedError(response.status_code, code, said)


def _without_key(text: str, request: httpx.Request) -> str:
    """Pages that quote a request's headers are not to bring the API key into a log."""
    key = request.headers.get("authorization", "").removeprefix("Bearer ")
    return text.replace(key, "(the API key)") if key else text


def _json(response: httpx.Response) -> Any:
    """The answer's JSON. Raises RequestRefusedError, AnswerError."""
    if response.status_code != 200:
        raise _refused(response)
    try:
        return response.json()
    except ValueError as error:
        raise AnswerError(f"{_address(response.url)} did not answer JSON: {error}.") from error


# --- clients -----------------------------------------------------------------------------------------------


class _Session:
    """What both clients are made of but for the waiting: each method gives the steps of one exchange."""

    def __init__(
        self, http: httpx.Client | httpx.AsyncClient, model: str | None, version: str | None, retries: int,
        timeout: float,
    ) -> None:  # fmt: skip
        self._http = http
        self._model, self._version = model, version
        self._retries, self._timeout = retries, timeout
        self._limits: Mapping[str, int] | None = None

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return {"model": self._model, "version": self._version, **given}

    def ready(self) -> _Steps[bool]:
        outcome = yield self._http.build_request("GET", "/readyz", timeout=self._timeout)
        return isinstance(outcome, httpx.Response) and outcome.status_code == 200

    def models(self) -> _Steps[dict[str, Any]]:
        listing: dict[str, Any] = _json((yield from self._get("/models")))
        return listing

    def model(self, name: str | None) -> _Steps[dict[str, Any]]:
        if name is None:
            name = self._model or (yield from self.models())["default"]
        described: dict[str, Any] = _json((yield from self._get(f"/models/{quote(str(name), safe='')}")))
        return described

    def limits(self) -> _Steps[Mapping[str, int]]:
        """The service's limits, asked once; they are the same for all its models."""
        if self._limits is None:
            self._limits = (yield from self.model(None))["limits"]
        return self._limits

    def one(self, path: str, batch: Batch) -> _Steps[Result]:
        (result,) = batch.results(read_answer(_json((yield from self._post(path, batch)))))
        return result

    def several(self, path: str, batch: Batch) -> _Steps[list[Result]]:
        """Results of one request of many: what an image is to blame for stands in its place."""
        if not batch.files:
            return batch.results([])
        try:
            answered = read_answer(_json((yield from self._post(path, batch))))
        except RequestRefusedError as error:
            if not (error.code.startswith("image_") or error.code == "deadline_exceeded"):
                raise
            answered = [failed(error.code, error.message)] * len(batch.files)
        return batch.results(answered)

    def _get(self, path: str) -> _Steps[httpx.Response]:
        return _exchange(lambda left: self._http.build_request("GET", path, timeout=left), self._retries, self._timeout)

    def _post(self, path: str, batch: Batch) -> _Steps[httpx.Response]:
        def build(left: float) -> httpx.Request:
            return self._http.build_request("POST", path, data=batch.fields, files=batch.files, timeout=left)

        return _exchange(build, self._retries, self._timeout)


def _http_settings(
    url: str, api_key: str | None, retries: int, timeout: float, concurrency: int, transport: T | None
) -> dict[str, Any]:
    """What httpx's two clients are made with. Raises OptionError."""
    if not url.startswith(("http://", "https://")):
        raise OptionError("url", url, "an address such as http://127.0.0.1:3000")
    if retries < 0:
        raise OptionError("retries", retries, "an integer >= 0")
    if not timeout > 0:
        raise OptionError("timeout", timeout, "seconds > 0")
    if concurrency < 1:
        raise OptionError("concurrency", concurrency, "an integer >= 1")
    headers = {"Accept": "application/json", "User-Agent": f"parchgrad/{__version__}"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {_token(api_key)}"
    return {"base_url": url, "headers": headers, "transport": transport}


def _token(api_key: object) -> str:
    """The key without the blanks around it. Raises ApiKeyError: what a header cannot carry, httpx would quote."""
    token = api_key.strip() if isinstance(api_key, str) else ""
    if not re.fullmatch(r"[!-~]+", token):
        raise ApiKeyError
    return token


@contextmanager
def _reports(progress: Progress | None, show_progress: bool) -> Iterator[Progress]:
    """What is told how many images of how many are done: the caller's function, and a bar on standard error."""
    calls = [] if progress is None else [progress]
    with ExitStack() as stack:
        if show_progress:
            from rich.console import Console
            from rich.progress import Progress as Bar

            bar = stack.enter_context(Bar(console=Console(stderr=True)))
            task = bar.add_task("images", total=None)
            calls.append(lambda done, total: bar.update(task, completed=done, total=total))

        def report(done: int, total: int | None) -> None:
            for call in calls:
                call(done, total)

        yield report


class Client:
    """A service's /predict and /explain, as calls that wait. Thread safe; close it, or use it in `with`.

    Args:
        url: the service's address, such as `http://127.0.0.1:3000`.
        api_key: sent as a bearer token; blanks around it are not. Anything else that is no token is an ApiKeyError.
        model, version: the model to ask; by default the service's, and its newest version.
        retries: how often a request is sent again after 429 or 503, or where the connection was refused or broke
            before the answer was there. Nothing else is. What `Retry-After` says is waited, and a random pause that
            doubles from a tenth of a second to eight.
        timeout: seconds that a request has for its answer, its retries included.
        concurrency: how many requests of a call with many images are under way at a time.
        transport: httpx's, where it is not to be the network.

    `images` is one image, and then there is one result, or an iterable of them, and then there is a list of results in
    its order. An image is a path, the bytes of a file, a PIL image or a uint8 array `(h, w)`, `(h, w, 3 or 4)`; the
    latter two are sent as PNG, or TIFF. Many images go in requests of as many as the service takes;
    `progress(done, total)` is called after each, `total` None where `images` has no length.

    Options are those of the service (GET /models/NAME lists them), one value or one for each image, such as
    `target=["tench", 217]`; None leaves the choice to the service.

    Raises, of one image, RequestRefusedError, UnavailableError, AnswerError, and DataError for a file that cannot be
    read.
    Of many images, one that cannot be read or that the service refuses has a result of status `error`, with code
    `image_unreadable` or the service's, and the others go on; a wrong option, or a service that cannot be reached,
    is raised. `predict_each` and `explain_each` give each result as it comes: then those before an error are not lost,
    and maps need not all be held.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, model: str | None = None, version: str | None = None,
        retries: int = 4, timeout: float = 120.0, concurrency: int = 4, transport: httpx.BaseTransport | None = None,
    ) -> None:  # fmt: skip
        self._http = httpx.Client(**_http_settings(url, api_key, retries, timeout, concurrency, transport))
        self._concurrency = concurrency
        self._session = _Session(self._http, model, version, retries, timeout)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    @overload
    def predict(self, images: ImageLike, **options: Any) -> Result: ...
    @overload
    def predict(
        self, images: Iterable[ImageLike], *, progress: Progress | None = ..., show_progress: bool = ...,
        **options: Any,
    ) -> list[Result]: ...  # fmt: skip
    def predict(
        self, images: ImageLike | Iterable[ImageLike], *, progress: Progress | None = None,
        show_progress: bool = False, **options: Any,
    ) -> Result | list[Result]:  # fmt: skip
        """The most probable classes of each image."""
        if is_one(images):
            return self._one("/predict", images, options)
        return list(self._each("/predict", images, options, progress, show_progress))

    @overload
    def explain(self, images: ImageLike, target: Any = ..., *, saliency: str = ..., **options: Any) -> Result: ...
    @overload
    def explain(
        self, images: Iterable[ImageLike], target: Any = ..., *, saliency: str = ...,
        progress: Progress | None = ..., show_progress: bool = ..., **options: Any,
    ) -> list[Result]: ...  # fmt: skip
    def explain(
        self, images: ImageLike | Iterable[ImageLike], target: Any = None, *, saliency: str = "float32",
        progress: Progress | None = None, show_progress: bool = False, **options: Any,
    ) -> Result | list[Result]:  # fmt: skip
        """Predictions and the map of each image's `target`: a class index or name, `top:k`, or the predicted class."""
        options |= {"target": target, "saliency": saliency}
        if is_one(images):
            return self._one("/explain", images, options)
        return list(self._each("/explain", images, options, progress, show_progress))

    def predict_each(
        self, images: Iterable[ImageLike], *, progress: Progress | None = None,
        show_progress: bool = False, **options: Any,
    ) -> Iterator[Result]:  # fmt: skip
        """The results of `predict`, in order, as they come."""
        return self._each("/predict", images, options, progress, show_progress)

    def explain_each(
        self, images: Iterable[ImageLike], target: Any = None, *, saliency: str = "float32",
        progress: Progress | None = None, show_progress: bool = False, **options: Any,
    ) -> Iterator[Result]:  # fmt: skip
        """The results of `explain`, in order, as they come."""
        options |= {"target": target, "saliency": saliency}
        return self._each("/explain", images, options, progress, show_progress)

    def models(self) -> dict[str, Any]:
        """GET /models: the models there are, and which is the default."""
        return self._run(self._session.models())

    def model(self, name: str | None = None) -> dict[str, Any]:
        """GET /models/NAME, by default of this client's model: labels, input, option defaults and bounds, limits."""
        return self._run(self._session.model(name))

    def ready(self) -> bool:
        """Whether the service is there and takes requests; asked once."""
        return self._run(self._session.ready())

    def _one(self, path: str, image: Any, options: Mapping[str, Any]) -> Result:
        return self._run(self._session.one(path, batch_of_one(image, self._session.options(options))))

    def _each(
        self, path: str, images: Any, options: Mapping[str, Any], progress: Progress | None, show_progress: bool
    ) -> Iterator[Result]:  # fmt: skip
        check_several(images)
        batches = Batches(images, self._session.options(options), self._run(self._session.limits()))
        stop, done = threading.Event(), 0
        asked: deque[Future[list[Result]]] = deque()
        with ThreadPoolExecutor(self._concurrency) as pool, _reports(progress, show_progress) as report:
            try:
                while True:
                    while len(asked) < self._concurrency and (batch := next(batches, None)) is not None:
                        asked.append(pool.submit(self._run, self._session.several(path, batch), stop))
                    if not asked:
                        return
                    results = asked.popleft().result()
                    done += len(results)
                    report(done, batches.total)
                    yield from results
            finally:
                stop.set()  # what waits to be sent again need not be any more
                for future in asked:
                    future.cancel()

    def _run(self, steps: _Steps[T], stop: threading.Event | None = None) -> T:
        stop = stop or threading.Event()
        outcome: httpx.Response | httpx.TransportError | None = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                result: T = end.value
                return result
            outcome = None
            if isinstance(step, httpx.Request):
                try:
                    outcome = self._http.send(step)
                except httpx.TransportError as error:
                    outcome = error
            elif stop.wait(step):
                raise CancelledError


class AsyncClient:
    """`Client`, awaited: the same arguments and methods; close it with `aclose`, or use it in `async with`.

    Files are read in threads. `predict_each` and `explain_each` are asynchronous iterators.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, model: str | None = None, version: str | None = None,
        retries: int = 4, timeout: float = 120.0, concurrency: int = 4,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:  # fmt: skip
        self._http = httpx.AsyncClient(**_http_settings(url, api_key, retries, timeout, concurrency, transport))
        self._concurrency = concurrency
        self._session = _Session(self._http, model, version, retries, timeout)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    @overload
    async def predict(self, images: ImageLike, **options: Any) -> Result: ...
    @overload
    async def predict(
        self, images: Iterable[ImageLike], *, progress: Progress | None = ..., show_progress: bool = ...,
        **options: Any,
    ) -> list[Result]: ...  # fmt: skip
    async def predict(
        self, images: ImageLike | Iterable[ImageLike], *, progress: Progress | None = None,
        show_progress: bool = False, **options: Any,
    ) -> Result | list[Result]:  # fmt: skip
        """The most probable classes of each image."""
        if is_one(images):
            return await self._one("/predict", images, options)
        each = self._each("/predict", images, options, progress, show_progress)
        return [result async for result in each]

    @overload
    async def explain(self, images: ImageLike, target: Any = ..., *, saliency: str = ..., **options: Any) -> Result: ...
    @overload
    async def explain(
        self, images: Iterable[ImageLike], target: Any = ..., *, saliency: str = ...,
        progress: Progress | None = ..., show_progress: bool = ..., **options: Any,
    ) -> list[Result]: ...  # fmt: skip
    async def explain(
        self, images: ImageLike | Iterable[ImageLike], target: Any = None, *, saliency: str = "float32",
        progress: Progress | None = None, show_progress: bool = False, **options: Any,
    ) -> Result | list[Result]:  # fmt: skip
        """Predictions and the map of each image's `target`: a class index or name, `top:k`, or the predicted class."""
        options |= {"target": target, "saliency": saliency}
        if is_one(images):
            return await self._one("/explain", images, options)
        each = self._each("/explain", images, options, progress, show_progress)
        return [result async for result in each]

    def predict_each(
        self, images: Iterable[ImageLike], *, progress: Progress | None = None,
        show_progress: bool = False, **options: Any,
    ) -> AsyncIterator[Result]:  # fmt: skip
        """The results of `predict`, in order, as they come."""
        return self._each("/predict", images, options, progress, show_progress)

    def explain_each(
        self, images: Iterable[ImageLike], target: Any = None, *, saliency: str = "float32",
        progress: Progress | None = None, show_progress: bool = False, **options: Any,
    ) -> AsyncIterator[Result]:  # fmt: skip
        """The results of `explain`, in order, as they come."""
        options |= {"target": target, "saliency": saliency}
        return self._each("/explain", images, options, progress, show_progress)

    async def models(self) -> dict[str, Any]:
        """GET /models: the models there are, and which is the default."""
        return await self._run(self._session.models())

    async def model(self, name: str | None = None) -> dict[str, Any]:
        """GET /models/NAME, by default of this client's model: labels, input, option defaults and bounds, limits."""
        return await self._run(self._session.model(name))

    async def ready(self) -> bool:
        """Whether the service is there and takes requests; asked once."""
        return await self._run(self._session.ready())

    async def _one(self, path: str, image: Any, options: Mapping[str, Any]) -> Result:
        batch = await asyncio.to_thread(batch_of_one, image, self._session.options(options))
        return await self._run(self._session.one(path, batch))

    async def _each(
        self, path: str, images: Any, options: Mapping[str, Any], progress: Progress | None, show_progress: bool
    ) -> AsyncIterator[Result]:  # fmt: skip
        check_several(images)
        batches = Batches(images, self._session.options(options), await self._run(self._session.limits()))
        done = 0
        asked: deque[asyncio.Task[list[Result]]] = deque()
        with _reports(progress, show_progress) as report:
            try:
                while True:
                    while len(asked) < self._concurrency and (batch := await asyncio.to_thread(next, batches, None)):
                        asked.append(asyncio.create_task(self._run(self._session.several(path, batch))))
                    if not asked:
                        return
                    results = await asked.popleft()
                    done += len(results)
                    report(done, batches.total)
                    for result in results:
                        yield result
            finally:
                for task in asked:
                    task.cancel()
                await asyncio.gather(*asked, return_exceptions=True)

    async def _run(self, steps: _Steps[T]) -> T:
        outcome: httpx.Response | httpx.TransportError | None = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                result: T = end.value
                return result
            outcome = None
            if isinstance(step, httpx.Request):
                try:
                    outcome = await self._http.send(step)
                except httpx.TransportError as error:
                    outcome = error
            else:
                await asyncio.sleep(step)
