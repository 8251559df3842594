"""Who may call: API keys and their rates, and which addresses may be served without any. `Gate` holds it to HTTP.

A key is a random token; the settings hold its SHA-256, so that whoever reads them cannot call. Tokens are long and
random (`parchgrad key new`), which is why a plain digest does.
"""

import hashlib
import hmac
import ipaddress
import json
import math
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import click
from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import MovingWindowRateLimiter
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service import app, metrics
from service.errors import ServiceError
from service.settings import PREFIX, PROJECT_ROOT, Settings, SettingsError

HEALTH = ("/livez", "/readyz", "/healthz", "/v2/health/live", "/v2/health/ready")  # a prober has no key
DESCRIPTIONS = ("/metrics", "/docs.json")
PAGE, PAGE_PREFIX = "/", "/page/"  # the page says nothing of models; what it asks for with a key, it asks elsewhere
ADMIN_PREFIX = "/v2/repository/models/"  # load and unload; /v2/repository/index only lists

KEY = re.compile(r"(?P<name>[A-Za-z0-9_.-]{1,64}):(?P<digest>[0-9a-f]{64})(:(?P<rate>[1-9][0-9]{0,8}))?")
NO_TOKEN = hashlib.sha256(b"").digest()  # what an unset variable gives when it is piped into sha256sum
ALLOWED = "NAME:SHA256[:REQUESTS_PER_MINUTE] as `parchgrad key new NAME` prints it, comma-separated or one a line"


@dataclass(frozen=True)
class Key:
    """One caller: `digest` is the token's SHA-256; `rate` its requests a minute in this process, None = any number."""

    name: str
    digest: bytes = field(repr=False)
    admin: bool
    rate: RateLimitItemPerMinute | None


class Access:
    """The keys of this process. Without any that may call, everybody may; without any that may load, nobody may."""

    def __init__(self, keys: Iterable[Key], *, anonymous_anywhere: bool = False, guards_metrics: bool = False) -> None:
        self._keys = tuple(keys)
        self.open = all(key.admin for key in self._keys)
        self.anonymous_anywhere = anonymous_anywhere
        self.guards_metrics = guards_metrics
        self._rates = MovingWindowRateLimiter(MemoryStorage())

    @classmethod
    def from_settings(cls, settings: Settings) -> "Access":
        """Raises SettingsError naming the variable, and the key's name at most: what is no digest may be a token."""
        keys = [
            key
            for variable, text, file, admin in (
                ("API_KEYS", settings.api_keys, settings.api_keys_file, False),
                ("ADMIN_KEYS", settings.admin_keys, settings.admin_keys_file, True),
            )
            for source, entries in ((variable, text.split(",")), (f"{variable}_FILE", _lines(f"{variable}_FILE", file)))
            for key in _keys(source, entries, admin, settings.workers)
        ]
        names = [key.name for key in keys]
        if twice := {name for name in names if names.count(name) > 1}:
            raise SettingsError(f"{PREFIX}API_KEYS", ", ".join(sorted(twice)), "a name of its own for every key")
        return cls(keys, anonymous_anywhere=settings.allow_anonymous, guards_metrics=settings.guard_metrics)

    async def caller_of(self, token: str | None, *, admin: bool = False) -> str | None:
        """The name of the key that `token` is; None for a caller without one, where none is needed.

        Counts the call against the key's rate. Raises ServiceError: unauthorized, forbidden, rate_limited.
        """
        key = self._key(token)
        if admin and not any(one.admin for one in self._keys):
            raise ServiceError(
                "forbidden", f"Loading and unloading is switched off; a key in {PREFIX}ADMIN_KEYS switches it on."
            )
        if key is None:
            if self.open and not admin:
                return None
            raise ServiceError(
                "unauthorized",
                "The key is not known here."
                if token is not None
                else "A key is needed: 'Authorization: Bearer TOKEN' or 'X-API-Key: TOKEN'.",
            )
        if admin and not key.admin:
            raise ServiceError("forbidden", f"Key '{key.name}' may not load or unload models.")
        await self._count(key)
        return key.name

    def _key(self, token: str | None) -> Key | None:
        """Compares with every key, each in constant time: how long it takes tells nothing about any of them."""
        if not token:
            return None
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    async def _count(self, key: Key) -> None:
        if key.rate is None or await self._rates.hit(key.rate, key.name):
            return
        window = await self._rates.get_window_stats(key.rate, key.name)
        raise ServiceError(
            "rate_limited",
            f"Key '{key.name}' has used its {key.rate.amount} requests a minute.",
            retry_after=max(1, math.ceil(window.reset_time - time.time())),
        )


def _lines(variable: str, file: str) -> list[str]:
    """The entries of a key file, one a line; lines that begin with # are comments."""
    if not file:
        return []
    try:
        lines = (PROJECT_ROOT / file).read_text("utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise SettingsError(PREFIX + variable, file, f"a text file that can be read ({error})") from None
    return [line for line in lines if not line.lstrip().startswith("#")]


def _keys(variable: str, entries: Iterable[str], admin: bool, workers: int) -> Iterable[Key]:
    for entry in filter(None, map(str.strip, entries)):
        match = KEY.fullmatch(entry)
        if match is None:
            shown = entry.partition(":")[0][:16] + ":..." if ":" in entry else "..."
            raise SettingsError(PREFIX + variable, shown, ALLOWED)
        digest = bytes.fromhex(match["digest"])
        if digest == NO_TOKEN:
            raise SettingsError(
                PREFIX + variable, match["name"] + ":...", "the SHA-256 of a token; this is that of an empty text"
            )
        # Workers share nothing: each allows its part, so that together they never allow more than was said.
        rate = RateLimitItemPerMinute(max(1, int(match["rate"]) // workers)) if match["rate"] else None
        yield Key(match["name"], digest, admin, rate)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`; a name other than localhost, or a socket's path, counts as no."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def check_bind(settings: Settings, host: str | None) -> None:
    """Raises SettingsError where `host` is more than loopback and neither keys nor the settings allow for it."""
    access = Access.from_settings(settings)
    if host is not None and access.open and not access.anonymous_anywhere and not is_loopback(host):
        raise SettingsError(
            f"{PREFIX}ALLOW_ANONYMOUS",
            "false",
            f"true to serve everybody who reaches {host}, or keys in {PREFIX}API_KEYS (`parchgrad key new NAME`), "
            "or --host 127.0.0.1",
        )


def bind_host() -> str | None:
    """The address this process is told to bind by `bentoml serve`; None in its workers and everywhere else.

    BentoML gives the service no word of it. Its command line is click's, and its default is every address.
    """
    context = click.get_current_context(silent=True)
    if context is None or "host" not in context.params:
        return None
    return str(context.params["host"] or "0.0.0.0")


class Gate:
    """ASGI middleware: lets a request through with its caller's name in `scope["state"]["caller"]`, or answers it."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_open(scope["path"]):
            try:
                caller = await self._caller(scope)
            except ServiceError as error:
                return await _refuse(scope["path"], error, send)
            scope.setdefault("state", {})["caller"] = caller
        return await self._app(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        if path == PAGE or path.startswith(PAGE_PREFIX):
            return True
        return path in HEALTH or (path in DESCRIPTIONS and not self._access.guards_metrics)

    async def _caller(self, scope: Scope) -> str | None:
        path, access = scope["path"], self._access
        caller = await access.caller_of(bearer(Headers(scope=scope)), admin=path.startswith(ADMIN_PREFIX))
        # What `check_bind` could not know: the address this request came in by.
        address = (scope.get("server") or ("",))[0]
        if caller is None and not access.anonymous_anywhere and not is_loopback(address):
            raise ServiceError(
                "forbidden", f"Without keys only loopback is answered; see {PREFIX}API_KEYS, {PREFIX}ALLOW_ANONYMOUS."
            )
        return caller


def bearer(headers: Headers) -> str | None:
    """The token of `Authorization: Bearer`, else of `X-API-Key`; other schemes are none of ours."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    return headers.get("x-api-key")


async def _refuse(path: str, error: ServiceError, send: Send) -> None:
    metrics.refused(error.code)
    content = json.dumps(app.error_body(path, error)).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **error.headers}
    if error.status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="parchgrad"'
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": content})
