"""What keeps the service from starting, or a model from loading: said in one line that names what is wrong."""

import json
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from parchgrad.errors import ModelError
from service import repository, versions
from service.settings import PROJECT_ROOT, Settings, SettingsError
from tests.service.conftest import Home, files, picture, png
from tests.service.serving import SERVICE, environment, free_port, serving
from tests.service.test_repository import Shelf, change, index, shelf  # noqa: F401 - a fixture
from tests.service.test_server import refused

IMAGE = files(png(picture()))

# --- before anything is started --------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for folder in ("models/net/1", "models/net/2", "models/other/1", "tables/net/1", "tables/other/1"):
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "nope"}, "PARCHGRAD_MODEL='nope': expected a model of {}/models; there is 'net', 'other'."),
        ({"model": "net/7"}, "PARCHGRAD_MODEL='net/7': expected a version of 'net'; there is 2, 1."),
        (
            {"model": "net/1", "models": "other,nope"},
            "PARCHGRAD_MODELS='nope': expected a model of {}/models; there is 'net', 'other'.",
        ),
        (
            {"model": "net/1", "models": "other/3"},
            "PARCHGRAD_MODELS='other/3': expected a version of 'other'; there is 1.",
        ),
        (
            {"model": "net"},
            "PARCHGRAD_TABLES_DIR='{}/tables': expected a folder with the selection table net/2; there is net/1.",
        ),
        (
            {"model": "other", "models": "*"},
            "PARCHGRAD_TABLES_DIR='{}/tables': expected a folder with the selection table net/2; there is net/1.",
        ),
        ({"models_dir": "nope"}, "PARCHGRAD_MODELS_DIR='nope': expected a folder that exists."),
        ({"models_dir": "/nope/models"}, "PARCHGRAD_MODELS_DIR='/nope/models': expected a folder that exists."),
        ({"tables_dir": "../nope"}, "PARCHGRAD_TABLES_DIR='../nope': expected a folder that exists."),
        (
            {"models_dir": "{}/tables/net/1"},
            "PARCHGRAD_MODEL='net': expected a model of {}/tables/net/1; there is none.",
        ),
    ],
)
def test_what_is_to_be_served_must_be_there(folders: Path, given: dict[str, str], message: str) -> None:
    folders_given = {"models_dir": "{}/models", "tables_dir": "{}/tables", "graphs_dir": "{}/graphs"}
    given = {**folders_given, "model": "net", **given}
    variables = {f"PARCHGRAD_{name.upper()}": text.format(folders) for name, text in given.items()}
    with pytest.raises(SettingsError) as caught:
        versions.check(Settings.from_environment(variables))
    assert str(caught.value) == message.replace("{}", str(folders))


def test_what_is_there_may_be_served(folders: Path) -> None:
    settings = Settings(
        models_dir=folders / "models", tables_dir=folders / "tables", graphs_dir=folders / "graphs", model="net/1",
        models="other",
    )  # fmt: skip
    versions.check(settings)
    every = replace(settings, model="net", models="*", versions="all")
    with pytest.raises(SettingsError, match="net/2"):
        versions.check(every)
    (folders / "tables" / "net" / "2").mkdir()
    versions.check(every)


def test_the_supervisor_ends_with_the_one_line(home: Home, tmp_path: Path) -> None:
    port = str(free_port())
    ended = subprocess.run(
        [sys.executable, "-m", "bentoml", "serve", SERVICE, "--host", "127.0.0.1", "--port", port],
        cwd=PROJECT_ROOT, env=environment(tmp_path, **{**home.settings, "model": "nope"}),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode != 0
    expected = f"Error: PARCHGRAD_MODEL='nope': expected a model of {home.root / 'models'}; there is 'tiny'."
    assert (ended.stdout + ended.stderr).strip() == expected


def test_a_build_needs_no_models_and_no_torch(tmp_path: Path) -> None:
    """`bentoml build` imports the module as well."""
    script = "import sys, service.service; assert 'torch' not in sys.modules, 'torch'"
    nowhere = environment(tmp_path, model="nope", models_dir="/nope")
    subprocess.run([sys.executable, "-c", script], cwd=PROJECT_ROOT, env=nowhere, check=True)


# --- a model that does not load --------------------------------------------------------------------------------


def unready(folder: Path, settings: dict[str, object]) -> tuple[str, str]:
    """Start, wait until the first load is over; why /readyz says it is not ready, which callers hear too; the log."""
    with serving(folder, settings=settings, wait_ready=False) as server:
        while "LOADING" in index(server).values():
            time.sleep(0.05)
        (state,) = server.client.post("/v2/repository/index").json()
        message: str = refused(server.client.get("/readyz"), 503, "not_ready")
        assert refused(server.client.post("/explain", files=IMAGE), 503, "not_ready") == message == state["reason"]
        assert server.stop() == 0
        return message, server.log.read_text()


def test_a_device_that_is_not_here(home: Home, tmp_path: Path) -> None:
    reason, log = unready(tmp_path, {**home.settings, "device": "cuda:99"})
    assert reason.startswith(
        "Model 'tiny' was not loaded: PARCHGRAD_DEVICE='cuda:99': expected a device that is here: cpu"
    )
    assert log.count(reason) == 1
    assert "Traceback" not in log


def test_damaged_weights_are_one_line_with_the_model_named_once(shelf: Shelf) -> None:  # noqa: F811
    weights = shelf.root / "models" / "tiny" / "1" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    reason, log = unready(shelf.root / "home", shelf.settings)
    assert reason.startswith("Model 'tiny' was not loaded: weights.safetensors has sha256 ")
    assert log.count(reason) == 1
    assert "Traceback" not in log


def test_a_table_of_an_old_format_says_what_to_do_and_not_where_it_is(shelf: Shelf) -> None:  # noqa: F811
    path = shelf.root / "tables" / "tiny" / "1" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 1}))
    reason, log = unready(shelf.root / "home", shelf.settings)
    assert reason == (
        "Model 'tiny' was not loaded: Table manifest 'tables/tiny/1/manifest.json' has format version 1; "
        "this library reads 2. Build it again: parchgrad table build NAME --data FOLDER."
    )
    assert f"Table manifest '{path}' has format version 1" in log  # the operator is told where
    assert "Traceback" not in log


def test_what_nobody_foresaw_keeps_its_traceback_and_is_told_to_nobody(caplog: pytest.LogCaptureFixture) -> None:
    models = repository.Repository(Settings(), {}, lambda: None)
    with pytest.raises(OSError, match="secret") as caught:
        Path("/srv/secret").read_text()
    told = models._told("tiny", caught.value)
    assert told == "Model 'tiny' was not loaded: FileNotFoundError; the log says more."
    assert "Model 'tiny' was not loaded:\nTraceback" in caplog.text
    assert "/srv/secret" in caplog.text


def test_a_model_that_says_itself_what_it_lacks_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    models = repository.Repository(Settings(), {}, lambda: None)
    told = models._told("tiny", ModelError("Model 'tiny' has no weights file\n'w'."))
    assert told == "Model 'tiny' was not loaded: it has no weights file 'w'."
    assert [record.getMessage() for record in caplog.records] == [told]


def test_a_load_names_what_is_missing(shelf: Shelf) -> None:  # noqa: F811
    with serving(shelf.root / "home", settings={**shelf.settings, "model": "tiny/1"}) as server:
        shelf.add("other", 1)
        shutil.rmtree(shelf.root / "tables" / "other")
        answer = change(server, "other", "load")
        assert (answer.status_code, answer.json()["error"]) == (
            409,
            "Model 'other' was not loaded: There is no selection table for other/1; expected one in tables/other/1.",
        )
        (shelf.root / "models" / "tiny" / "1").rename(shelf.root / "models" / "tiny" / "3")
        answer = change(server, "tiny", "load")
        assert (answer.status_code, answer.json()["error"]) == (
            404, "Model 'tiny' has no version 1 on disk; there is 3.",
        )  # fmt: skip
        assert "Traceback" not in server.log.read_text()


# --- the default model unloaded --------------------------------------------------------------------------------


def test_an_unloaded_default_is_no_failure_of_another_model(shelf: Shelf) -> None:  # noqa: F811
    shelf.add("other", 2)
    weights = shelf.root / "models" / "other" / "1" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with serving(shelf.root / "home", settings={**shelf.settings, "models": "other"}, wait_ready=False) as server:

        def told(status: int, code: str, **fields: str) -> Any:
            return refused(server.client.post("/explain", files=IMAGE, data=fields), status, code)

        while "LOADING" in index(server).values():
            time.sleep(0.05)
        assert told(404, "unknown_model", model="nope") == "There is no model 'nope'; there is 'tiny'."
        assert change(server, "tiny", "unload").status_code == 200
        assert told(404, "unknown_model") == "Model 'tiny' was unloaded."
        assert told(404, "unknown_model", model="tiny") == "Model 'tiny' was unloaded."
        assert told(404, "unknown_model", model="nope") == "There is no model 'nope'; there is none."
        assert told(503, "not_ready", model="other").startswith("Model 'other' was not loaded: weights.safetensors")
        assert change(server, "tiny", "load").status_code == 200
        assert server.client.post("/explain", files=IMAGE).status_code == 200


# --- no folders in what callers are told ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("'/models' holds nothing.", "'models' holds nothing."),
        ("expected one in /srv/models/tables/net/1.", "expected one in tables/net/1."),
        ("'/models/net/1/model.yaml' of '/models'.", "'models/net/1/model.yaml' of 'models'."),
        ("'/models-old/net' of /usr/lib/python/x.so.", "'net' of x.so."),
        ("data/models/net.", "data/models/net."),
        ("models/net/1 has 3 / 4 of https://host/a/b.", "models/net/1 has 3 / 4 of https://host/a/b."),
    ],
)
def test_callers_are_told_no_absolute_path(text: str, told: str) -> None:
    assert repository.without_folders(text, (Path("/models"), Path("/srv/models/tables"))) == told


# --- parchgrad serve -------------------------------------------------------------------------------------------


def serve(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("parchgrad"), "serve", *arguments],
        cwd=PROJECT_ROOT, env=environment(folder, model="nope", graphs_dir=folder / "graphs"),
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("port", ["0", "99999", "-1"])
def test_a_port_that_is_none(tmp_path: Path, port: str) -> None:
    ended = serve(tmp_path, "--port", port)
    assert ended.returncode == 2
    assert f"Invalid value for '--port': {port} is not in the range 1<=x<=65535." in ended.stderr


def test_an_address_that_cannot_be_had(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = serve(tmp_path, "--port", port)
    assert ended.returncode == 1
    assert ended.stderr == f"Error: 127.0.0.1:{port} is in use by another process; choose another --port.\n"
    ended = serve(tmp_path, "--host", "192.0.2.1", "--port", port)  # an address for documentation, nobody's
    assert ended.returncode == 1
    message = f"Error: 192.0.2.1:{port} is no address to listen at here (Cannot assign requested address).\n"
    assert ended.stderr == message
    ended = serve(tmp_path, "--port", port)  # free again: bentoml has taken over, and the service refuses its setting
    assert ended.returncode != 0
    assert "Error: PARCHGRAD_MODEL='nope': expected a model of models; there is " in ended.stdout + ended.stderr
