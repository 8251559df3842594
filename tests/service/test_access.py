"""Who may call: keys, their rates, the admin's routes, and what an address other than loopback takes."""

import asyncio
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from parchgrad.cli.key import key_group
from service import access
from service.access import Access, Gate, Key, check_bind, is_loopback
from service.errors import ServiceError
from service.settings import Settings, SettingsError
from tests.service.conftest import Home, files, picture, png
from tests.service.serving import Server, serving

SHOP, LAB, ADMIN = "shop-token", "lab-token", "admin-token"
LOAD = "/v2/repository/models/tiny/load"


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def keys(**settings: Any) -> Access:
    return Access.from_settings(Settings(**settings))


KEYS = {"api_keys": f"shop:{digest(SHOP)},lab:{digest(LAB)}:3", "admin_keys": f"ops:{digest(ADMIN)}"}


def caller(granted: Access, token: str | None, admin: bool = False) -> str | None:
    """The caller's name, or the error's code in brackets."""
    try:
        return asyncio.run(granted.caller_of(token, admin=admin))
    except ServiceError as error:
        return f"[{error.code}]"


@pytest.mark.parametrize(
    ("settings", "token", "usual", "admin"),
    [
        ({}, None, None, "[forbidden]"),
        ({}, "anything", None, "[forbidden]"),
        (KEYS, None, "[unauthorized]", "[unauthorized]"),
        (KEYS, "", "[unauthorized]", "[unauthorized]"),
        (KEYS, SHOP, "shop", "[forbidden]"),
        (KEYS, SHOP[:-1], "[unauthorized]", "[unauthorized]"),
        (KEYS, digest(SHOP), "[unauthorized]", "[unauthorized]"),
        (KEYS, "täken", "[unauthorized]", "[unauthorized]"),
        (KEYS, ADMIN, "ops", "ops"),
        ({"admin_keys": KEYS["admin_keys"]}, None, None, "[unauthorized]"),
        ({"admin_keys": KEYS["admin_keys"]}, ADMIN, "ops", "ops"),
        ({"api_keys": KEYS["api_keys"]}, SHOP, "shop", "[forbidden]"),
    ],
)
def test_callers(settings: dict[str, str], token: str | None, usual: str | None, admin: str | None) -> None:
    assert caller(keys(**settings), token) == usual
    assert caller(keys(**settings), token, admin=True) == admin


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append(a.hex())
        return a == b

    monkeypatch.setattr(access.hmac, "compare_digest", compare)
    assert caller(keys(**KEYS), SHOP) == "shop"
    assert compared == [digest(SHOP), digest(LAB), digest(ADMIN)]


def test_no_token_is_no_key() -> None:
    nothing = Key("open", hashlib.sha256(b"").digest(), admin=True, rate=None)
    for token in (None, ""):
        assert caller(Access([nothing]), token, admin=True) == "[unauthorized]"


def test_a_key_s_rate() -> None:
    async def calls(granted: Access) -> list[str | int]:
        answers: list[str | int] = []
        for token in (LAB, LAB, SHOP, LAB, LAB, SHOP):
            try:
                answers.append(str(await granted.caller_of(token)))
            except ServiceError as error:
                answers.append(int(error.headers["Retry-After"]) if error.status == 429 else error.code)
        return answers

    *first, refused, last = asyncio.run(calls(keys(**KEYS)))
    assert first == ["lab", "lab", "shop", "lab"]
    assert isinstance(refused, int)
    assert 55 <= refused <= 60
    assert last == "shop"


def test_workers_share_a_rate() -> None:
    text = f"lab:{digest(LAB)}:7"
    granted = keys(api_keys=text, workers=3)
    assert [caller(granted, LAB) for _ in range(3)] == ["lab", "lab", "[rate_limited]"]
    assert [caller(keys(api_keys=f"lab:{digest(LAB)}:1", workers=3), LAB)] == ["lab"]


def test_a_file_of_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# callers\n\nshop:{digest(SHOP)}\n  lab:{digest(LAB)}:60 \n")
    granted = keys(api_keys_file=str(file), api_keys=f"other:{digest('other')}")
    assert [caller(granted, token) for token in (SHOP, LAB, "other", "no")] == [
        "shop",
        "lab",
        "other",
        "[unauthorized]",
    ]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"api_keys": "shop:secret-token"}, r"PARCHGRAD_API_KEYS='shop:\.\.\.': expected NAME:SHA256"),
        ({"api_keys": "a-token-pasted-whole"}, r"PARCHGRAD_API_KEYS='\.\.\.'"),
        ({"admin_keys": f"ops:{digest(ADMIN)}:0"}, r"PARCHGRAD_ADMIN_KEYS='ops:\.\.\.'"),
        ({"api_keys": f"shop:{digest(SHOP).upper()}"}, "PARCHGRAD_API_KEYS='shop:"),
        ({"api_keys": f"a b:{digest(SHOP)}"}, "PARCHGRAD_API_KEYS='a b:"),
        (
            {"api_keys": f"ops:{digest(SHOP)}", "admin_keys": f"ops:{digest(ADMIN)}"},
            "'ops': expected a name of its own",
        ),
        ({"admin_keys": f"ops:{digest('')}"}, r"PARCHGRAD_ADMIN_KEYS='ops:\.\.\.': expected the SHA-256 of a token"),
        ({"api_keys": f"shop:{digest(SHOP)},lab:{digest('')}:3"}, r"PARCHGRAD_API_KEYS='lab:\.\.\.'"),
        ({"api_keys_file": "/nowhere/keys"}, "PARCHGRAD_API_KEYS_FILE='/nowhere/keys': expected a text file"),
    ],
)
def test_keys_that_are_none(settings: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError, match=said) as error:
        keys(**settings)
    assert "secret" not in str(error.value)
    assert "pasted" not in str(error.value)


def test_new_keys_work(tmp_path: Path) -> None:
    first, second = (CliRunner().invoke(key_group, ["new", "lab", "--rate", "2"]).output.splitlines() for _ in range(2))
    assert first[1] != second[1]
    assert len(first[1]) == 43  # 32 bytes as base64
    granted = keys(api_keys=first[3])
    assert [caller(granted, token) for token in (first[1], second[1], first[1], first[1])] == [
        "lab", "[unauthorized]", "lab", "[rate_limited]"
    ]  # fmt: skip
    wrong = CliRunner().invoke(key_group, ["new", "a:b"])
    assert wrong.exit_code == 1
    assert "NAME is 'a:b'" in wrong.output


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("localhost", True), ("::ffff:127.0.0.1", True),
     ("0.0.0.0", False), ("::", False), ("192.168.1.7", False), ("::ffff:10.0.0.1", False), ("myhost", False),
     ("/run/parchgrad.sock", False), ("", False)],
)  # fmt: skip
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_other_addresses_need_keys_or_the_plain_setting() -> None:
    with pytest.raises(SettingsError, match=r"true to serve everybody who reaches 0\.0\.0\.0, or keys"):
        check_bind(Settings(), "0.0.0.0")
    with pytest.raises(SettingsError, match="ALLOW_ANONYMOUS"):  # an admin's key keeps nobody out of /explain
        check_bind(Settings(admin_keys=KEYS["admin_keys"]), "0.0.0.0")
    check_bind(Settings(), "127.0.0.1")
    check_bind(Settings(), None)
    check_bind(Settings(allow_anonymous=True), "0.0.0.0")
    check_bind(Settings(api_keys=KEYS["api_keys"]), "0.0.0.0")


def through(granted: Access, path: str, address: str = "127.0.0.1", **headers: str) -> tuple[int, dict[str, str], str]:
    """Status, headers and body of a request through the gate; behind it stands an app that answers the caller."""

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        content = repr(scope["state"].get("caller", "unasked")).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": content})

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.lower().replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    scope = {"type": "http", "path": path, "headers": raw, "server": (address, 3000), "state": {}}
    asyncio.run(Gate(behind, granted)(scope, None, send))  # type: ignore[arg-type]
    received = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], received, sent[1]["body"].decode()


def test_the_gate() -> None:
    granted = keys(**KEYS)
    status, headers, body = through(granted, "/explain")
    assert (status, headers["www-authenticate"]) == (401, 'Bearer realm="parchgrad"')
    assert '"code": "unauthorized"' in body
    assert through(granted, "/v2/models/tiny/infer")[2].startswith('{"error": "A key is needed')
    assert through(granted, "/explain", Authorization=f"Bearer {SHOP}")[::2] == (200, "'shop'")
    assert through(granted, "/explain", Authorization=f"bearer  {SHOP} ")[::2] == (200, "'shop'")
    assert through(granted, "/explain", X_API_Key=SHOP)[::2] == (200, "'shop'")
    assert through(granted, "/explain", Authorization=f"Basic {SHOP}")[0] == 401
    assert through(granted, "/explain", Authorization=f"Basic {SHOP}", X_API_Key=SHOP)[0] == 200
    assert through(granted, "/explain", Authorization=f"Bearer {SHOP}\xff")[0] == 401
    assert through(granted, LOAD, X_API_Key=SHOP)[0] == 403
    assert through(granted, LOAD, X_API_Key=ADMIN)[::2] == (200, "'ops'")
    assert through(granted, "/v2/repository/index", X_API_Key=SHOP)[0] == 200
    assert through(keys(), "/v2/repository/index")[::2] == (200, "None")
    assert through(keys(), LOAD)[0] == 403
    *_, limited = (through(granted, "/explain", X_API_Key=LAB) for _ in range(4))
    assert limited[0] == 429
    assert 1 <= int(limited[1]["retry-after"]) <= 60


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/healthz", "/v2/health/live", "/v2/health/ready"])
def test_probes_need_no_key(path: str) -> None:
    assert through(keys(**KEYS, guard_metrics=True), path, "10.0.0.1")[::2] == (200, "'unasked'")


@pytest.mark.parametrize("path", ["/metrics", "/docs.json"])
def test_descriptions_need_one_where_the_settings_say_so(path: str) -> None:
    assert through(keys(**KEYS), path)[0] == 200
    assert through(keys(**KEYS, guard_metrics=True), path)[0] == 401
    assert through(keys(**KEYS, guard_metrics=True), path, X_API_Key=SHOP)[0] == 200


@pytest.mark.parametrize("path", ["/", "/page/main.js", "/page/state.json"])
def test_the_page_needs_no_key_as_it_says_nothing_of_models(path: str) -> None:
    assert through(keys(**KEYS, guard_metrics=True), path, "10.0.0.1")[::2] == (200, "'unasked'")


@pytest.mark.parametrize(
    "path",
    ["/page", "/pages/", "//page/main.js", "/schema.json", "/livez/", "/readyz/x", "/metrics/", "//livez", "/v2"],
)
def test_everything_else_needs_one(path: str) -> None:
    assert through(keys(**KEYS), path)[0] == 401


def test_a_request_that_came_in_by_another_address_needs_one() -> None:
    assert through(keys(), "/explain", "10.0.0.1")[0] == 403
    assert through(keys(allow_anonymous=True), "/explain", "10.0.0.1")[0] == 200
    assert through(keys(**KEYS), "/explain", "10.0.0.1", X_API_Key=SHOP)[0] == 200
    assert through(keys(admin_keys=KEYS["admin_keys"]), "/explain", "10.0.0.1", X_API_Key=ADMIN)[0] == 200


@pytest.fixture(scope="module")
def guarded(home: Home) -> Iterator[Server]:
    """Bound to every address, as a container is; the tests come by loopback."""
    settings = home.settings | KEYS
    with serving(home.root / "bentoml-guarded", settings=settings, arguments=("--host", "0.0.0.0")) as running:
        yield running


def test_the_service_asks_for_keys(guarded: Server) -> None:
    def post(**headers: str) -> httpx.Response:
        return guarded.client.post("/explain", files=files(png(picture())), headers=headers)

    nobody = post()
    assert nobody.status_code == 401
    assert nobody.json()["error"]["code"] == "unauthorized"
    assert nobody.headers["WWW-Authenticate"] == 'Bearer realm="parchgrad"'
    assert nobody.headers["X-Request-Id"]
    assert post(**{"X-API-Key": SHOP}).status_code == 200
    assert post(Authorization=f"Bearer {ADMIN}").status_code == 200
    assert guarded.client.get("/schema.json").status_code == 401
    assert guarded.client.get("/models").status_code == 401
    assert [guarded.client.get(path).status_code for path in ("/livez", "/readyz", "/metrics")] == [200, 200, 200]
    assert guarded.client.post(LOAD, headers={"X-API-Key": SHOP}).status_code == 403
    assert guarded.client.post(LOAD, headers={"X-API-Key": ADMIN}).status_code == 200
    assert guarded.metric("parchgrad_rejects_total", reason="unauthorized") == 3
    log = guarded.log.read_text()
    assert not any(token in log for token in (SHOP, ADMIN))


def test_the_service_does_not_start_open_on_every_address(home: Home) -> None:
    with (
        pytest.raises(RuntimeError, match=r"true to serve everybody who reaches 0\.0\.0\.0"),
        serving(home.root / "bentoml-open", settings=home.settings, arguments=("--host", "0.0.0.0")),
    ):
        pass
