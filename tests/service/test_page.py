"""What the page at `/` is made of, without a browser: its files, headers, samples, and who may have them."""

import gzip
import hashlib
import re
from types import SimpleNamespace

import pytest
from starlette.testclient import TestClient

from parchgrad import render
from service.access import Access, Gate, Key
from service.app import create_app
from service.page.routes import POLICY, STATIC
from service.settings import Settings
from tests.service.serving import PROJECT_ROOT, Server

FILES = sorted(path for path in STATIC.rglob("*") if path.is_file())
OWN = [path for path in FILES if "vendor" not in path.parts]
VENDORED = [path for path in FILES if path.parent.name == "vendor" and path.suffix == ".js"]
BUDGET = 600_000  # bytes, compressed
SVG_NAMESPACE = "http://www.w3.org/2000/svg"


def test_all_of_it_is_small_when_compressed() -> None:
    sizes = {path.name: len(gzip.compress(path.read_bytes())) for path in FILES}
    assert sum(sizes.values()) < BUDGET, sizes


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_no_file_names_an_outside_address_or_runs_inline(path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not [found for found in re.findall(r"https?://[^\s\"'`<>)]+", text) if found != SVG_NAMESPACE]
    if path.suffix == ".html":
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son[a-z]+=", text)
    if path.suffix == ".js":
        assert not re.search(r"\.(inner|outer)HTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)


@pytest.mark.parametrize("path", VENDORED, ids=lambda path: path.name)
def test_what_is_vendored_is_the_published_file_and_has_its_licence(path) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    listed = (PROJECT_ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    assert re.search(rf"`{re.escape(path.name)}`[^\n]*`{digest}`", listed), digest
    assert (path.parent / f"{path.name.split('-')[0]}-LICENSE.txt").is_file()


def test_every_file_that_is_named_is_there() -> None:
    names = re.findall(r'(?:src|href)="page/([^"]+)"', (STATIC / "index.html").read_text(encoding="utf-8"))
    assert names
    for module in (path for path in OWN if path.suffix == ".js"):
        found = re.findall(r'(?:from|import) "(\.[^"]+)"', module.read_text(encoding="utf-8"))
        names += [str((module.parent / name).resolve().relative_to(STATIC)) for name in found]
    assert {name for name in names if not (STATIC / name).is_file()} == set()


# --- as it is served ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/page/main.js", "/page/style.css", "/page/views/explain.js"])
def test_every_file_has_the_policy_and_is_asked_for_again_by_its_tag(server: Server, path: str) -> None:
    first = server.client.get(path)
    assert first.status_code == 200
    assert first.headers["content-security-policy"] == POLICY
    assert first.headers["x-content-type-options"] == "nosniff"
    assert first.headers["cache-control"] == "no-cache"
    assert first.headers["content-encoding"] == "gzip"
    again = server.client.get(path, headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["content-security-policy"] == POLICY


def test_the_policy_lets_nothing_in() -> None:
    assert "default-src 'none'" in POLICY
    assert not re.search(r"unsafe|\*|https?:|wss?:", POLICY)


@pytest.mark.parametrize(
    "path",
    ["/page/", "/page/views", "/page/nothing.js", "/page/..%2froutes.py", "/page/%2e%2e/__init__.py", "/page/a%00b",
     "/page/" + "a" * 5000, "/models/tiny/samples/..%2fmodel.yaml", "/models/tiny/samples/model.yaml"],
    ids=lambda path: path[:40],
)  # fmt: skip
def test_nothing_else_is_handed_out(server: Server, path: str) -> None:
    response = server.client.get(path)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"


def test_colour_maps_are_those_that_pictures_are_drawn_in(server: Server) -> None:
    import base64

    found = server.client.get("/page/palettes.json").json()
    assert {name: base64.b64decode(text) for name, text in found.items()} == {
        name: colours.tobytes() for name, colours in render.palettes().items()
    }
    assert set(found) == set(render.COLORMAPS)


def test_a_model_without_samples_has_none_and_one_that_is_not_there_is_unknown(server: Server) -> None:
    assert server.client.get("/models/tiny/samples").json() == {"samples": []}
    unknown = server.client.get("/models/nothing/samples")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "unknown_model")


def test_only_pictures_of_the_samples_folder_are_listed_and_sent(server: Server, home) -> None:
    folder = home.root / "models" / "tiny" / "1" / "samples"
    folder.mkdir()
    try:
        (folder / "b.png").write_bytes(b"png")
        (folder / "a.JPG").write_bytes(b"jpg")
        (folder / "notes.txt").write_text("no picture")
        assert server.client.get("/models/tiny/samples?version=1").json() == {"samples": ["a.JPG", "b.png"]}
        sent = server.client.get("/models/tiny/samples/a.JPG")
        assert (sent.status_code, sent.content, sent.headers["content-type"]) == (200, b"jpg", "image/jpeg")
        assert server.client.get("/models/tiny/samples/notes.txt").status_code == 404
        assert server.client.get("/models/tiny/samples?version=7").status_code == 404
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


# --- keys ---------------------------------------------------------------------------------------------------


def test_the_page_is_open_and_says_that_a_key_is_needed_for_the_rest() -> None:
    app = create_app()
    app.state.pipeline, app.state.needs_key = SimpleNamespace(settings=Settings(attacks=True)), True
    keys = [Key("me", hashlib.sha256(b"token").digest(), admin=False, rate=None)]
    client = TestClient(Gate(app, Access(keys, anonymous_anywhere=True)))
    assert client.get("/").status_code == 200
    assert client.get("/page/state.json").json().items() >= {"keys": True, "attacks": True}.items()
    assert client.get("/page/main.js").status_code == 200
    for path in ("/models", "/models/tiny/samples", "/pages", "/page"):
        assert client.get(path).status_code == 401
