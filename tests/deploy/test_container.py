"""The CPU's image: built without a registry, run without rights, asked, mounted, checked by digest, stopped at work.

`make container-test` runs this. Needs root, podman, runc and debootstrap; skips, and says so, where they are missing.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from PIL import Image

import parchgrad
from scenes.generator import sample
from tests.deploy.podman import IMAGE, RESTRICTED, Container, Podman, built_once
from tests.service.conftest import DATA, files, png
from tests.service.serving import PROJECT_ROOT
from tests.service.test_server import distance, saliency

TOLERANCE = 0.02  # as in tests/service/test_exported.py
MOST_MEGABYTES = 500
TOKEN = "a token of this test"
KEY = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Iterator[Podman]:
    base = tmp_path_factory.getbasetemp()
    with built_once(base if worker_id == "master" else base.parent) as store:
        yield store


@pytest.fixture(scope="module")
def running(podman: Podman, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """With a key from a file, as deploy/compose.yaml has it; room for many requests."""
    keys = tmp_path_factory.mktemp("secrets") / "keys"
    keys.write_text(f"tester:{hashlib.sha256(TOKEN.encode()).hexdigest()}\n")
    keys.chmod(0o444)
    mount = f"--volume={keys}:/run/secrets/parchgrad_keys:ro"
    with podman.container(mount, api_keys_file="/run/secrets/parchgrad_keys", threads=1) as container:
        yield container


@pytest.fixture(scope="module")
def explainer() -> parchgrad.Explainer:
    model = parchgrad.load_model(PROJECT_ROOT / "models" / "scenes")
    table = parchgrad.load_table(PROJECT_ROOT / "selection_tables" / "scenes", model)
    return parchgrad.Explainer(model, table)


def scene(number: int = 0) -> Image.Image:
    return Image.fromarray(sample("test", number).image)


# --- what is in it ---------------------------------------------------------------------------------------------


def test_there_is_python_and_no_other_program(podman: Podman) -> None:
    root = Path(podman.run("image", "mount", IMAGE))
    try:
        programs = [
            path
            for folder in ("bin", "sbin", "usr/bin", "usr/sbin", "usr/local/bin")
            for path in (root / folder).glob("*")
        ]
        packages = {path.name.lower().split("-")[0] for path in root.glob("app/venv/lib/python3.*/site-packages/*")}
        sources = {path.name for path in (root / "app/bento/src").iterdir()}
        data = {
            path.name for name in ("models", "selection_tables") for path in root.glob(f"app/bento/src/{name}/*/*/*")
        }
        listed = {path.name for path in (root / "var/lib/dpkg/status.d").iterdir()}
        compiled = [*root.glob("app/bento/src/service/__pycache__/pipeline.*.pyc")]
    finally:
        podman.run("image", "unmount", IMAGE)
    assert {path.name for path in programs} == {"python3.11"}
    assert {"onnxruntime", "bentoml", "numpy"} <= packages
    assert not packages & {
        "pip",
        "setuptools",
        "wheel",
        "torch",
        "torchvision",
        "triton",
        "nvidia_cublas",
        "matplotlib",
        "pytest",
    }
    assert sources == {"parchgrad", "service", "models", "selection_tables", "onnx_graphs", "bentofile.yaml"}
    # Of package and table only what the page shows beside the graph.
    assert data == {"samples", "exemplars", "class_graph.json", "class_graph.safetensors"}
    assert {"libc6", "libssl3"} <= listed  # what a scanner looks for
    assert compiled
    size = int(podman.run("image", "inspect", "--format", "{{.Size}}", IMAGE)) / 1e6
    print(f"The image takes {size:.0f} MB.")
    assert size < MOST_MEGABYTES


def test_nothing_of_the_machine_that_built_it_is_in_its_settings(podman: Podman) -> None:
    (config,) = json.loads(podman.run("image", "inspect", "--format", "json", IMAGE))
    names = {entry.partition("=")[0] for entry in config["Config"]["Env"]}
    assert not [name for name in names if name.startswith(("PIP_", "UV_")) or "PROXY" in name.upper()]
    assert config["User"] == "10001:10001"
    assert config["Config"]["Entrypoint"] == ["/app/venv/bin/python", "-m", "bentoml", "serve", "/app/bento"]
    assert config["Healthcheck"]["Test"][:2] == ["CMD", "/app/venv/bin/python"]  # no shell


# --- at work ---------------------------------------------------------------------------------------------------


def test_it_answers_as_the_library_does(running: Container, explainer: parchgrad.Explainer) -> None:
    pictures = [scene()]
    photographs = DATA / "imagenet_val"
    if photographs.is_dir():
        pictures.append(Image.open(photographs / "ILSVRC2012_val_00000001.JPEG").convert("RGB"))
    assert running.client.post("/explain", files=files(png(scene()))).status_code == 401
    for picture in pictures:
        answer = running.client.post("/explain", files=files(png(picture)), data={"saliency": "float32"}, headers=KEY)
        assert answer.status_code == 200, answer.text[:500]
        (result,) = answer.json()["results"]
        assert answer.json()["software"]["runtime"].startswith("onnxruntime ")
        expected = explainer.explain(explainer.model.preprocessing.apply(picture)[0][None])
        assert result["predictions"][0]["index"] == int(expected.targets[0])
        off = distance(saliency(result), expected.saliency()[0].numpy())
        print(f"A map of {picture.size} is off by {off:.1e}.")
        assert off < TOLERANCE
    drawn = running.client.post("/explain", files=files(png(scene())), headers={**KEY, "Accept": "image/png"})
    assert drawn.status_code == 200
    assert drawn.content.startswith(b"\x89PNG")


def test_it_has_no_rights(running: Container) -> None:
    status = Path("/proc", running.state("Pid"), "status").read_text()
    rights = dict(re.findall(r"^(\w+):\s+(.*)$", status, re.MULTILINE))
    assert (rights["Uid"].split(), rights["Gid"].split()) == (["10001"] * 4, ["10001"] * 4)
    assert {int(rights[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert (rights["NoNewPrivs"], rights["Seccomp"]) == ("1", "2")
    write = "import os\nfor path in ('/x', '/app/x', '/app/bento/src/x', '/data/x', '/run/x', '/tmp/x'):\n"
    write += "    try: open(path, 'w').close(); print(path)\n    except OSError as error: print(error.strerror)\n"
    assert running.python(write).splitlines() == ["Read-only file system"] * 5 + ["/tmp/x"]
    for shell in ("sh", "/bin/sh", "bash", "busybox"):
        assert running.podman.tried("exec", running.id, shell, "-c", "true").returncode == 127
    assert running.podman.tried("exec", running.id, "/app/venv/bin/python", "-m", "pip").returncode == 1
    assert running.podman.tried("healthcheck", "run", running.id).returncode == 0


def test_what_is_in_flight_is_answered_after_sigterm(podman: Podman) -> None:
    with podman.container(allow_anonymous="true", threads=1) as container:
        image = files(*[png(scene(number)) for number in range(8)])
        given = {"method": "integrated_gradients", "steps": "16"}

        def asked() -> httpx.Response:
            return container.client.post("/explain", files=image, data=given)

        with ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(asked) for _ in range(4)]
            while "parchgrad_in_flight_requests 4.0" not in container.client.get("/metrics").text:
                assert not any(answer.done() for answer in answers)
            assert container.stop() == 0
            done = [answer.result() for answer in answers]
    assert [answer.status_code for answer in done] == [200] * 4
    maps = [result["explanation"]["status"] for answer in done for result in answer.json()["results"]]
    assert maps == ["ok"] * 32


def test_the_page_and_what_it_shows_without_torch_are_there(running: Container) -> None:
    assert "<title>ParchGrad</title>" in running.client.get("/").text
    assert running.client.get("/page/main.js").status_code == 200
    assert running.client.get("/models/scenes/samples", headers=KEY).json()["samples"]
    graph = running.client.get("/models/scenes/class-graph", headers=KEY).json()
    assert len(graph["classes"]) == 10
    assert graph["exemplars"]["channels"] > 0


def test_its_metrics_are_there(running: Container) -> None:
    text = running.client.get("/metrics", headers=KEY).text
    assert re.search(r"^parchgrad_workers(\{.*\})? 1\.0$", text, re.MULTILINE)
    assert "parchgrad_model_info{" in text


# --- mounted, and held to digests ------------------------------------------------------------------------------


def test_mounted_graphs_are_held_to_their_digests(
    podman: Podman, tmp_path: Path, explainer: parchgrad.Explainer
) -> None:
    root = Path(podman.run("image", "mount", IMAGE))
    shutil.copytree(root / "app/bento/src/onnx_graphs", tmp_path / "graphs")
    podman.run("image", "unmount", IMAGE)
    graph = hashlib.sha256((tmp_path / "graphs/scenes/1/model.onnx").read_bytes()).hexdigest()
    right = [explainer.model.weights_sha256, explainer.table.table_sha256, graph]
    for path in (tmp_path, *tmp_path.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    mount = f"--volume={tmp_path / 'graphs'}:/data/onnx_graphs:ro"
    given = {"graphs_dir": "/data/onnx_graphs", "allow_anonymous": "true", "threads": 1}
    with podman.container(mount, **given, digests=f"scenes/1:{':'.join(right)}") as container:
        assert container.client.post("/predict", files=files(png(scene()))).status_code == 200
        assert container.stop() == 0
    for place, what in enumerate(("weights", "table", "graph")):
        wrong = [*right[:place], "0" * 64, *right[place + 1 :]]
        with podman.container(mount, wait_ready=False, **given, digests=f"scenes/1:{':'.join(wrong)}") as container:
            with pytest.raises(RuntimeError, match="was not loaded"):
                container.wait("/readyz")
            answer = container.client.get("/readyz")
            assert answer.status_code == 503
            expected = (
                f"version 1 is expected with a {what} of SHA-256 {'0' * 64} (PARCHGRAD_DIGESTS), found {right[place]}."
            )
            assert answer.json()["error"]["message"].endswith(expected)
            assert container.podman.tried("healthcheck", "run", container.id).returncode == 1


def test_beyond_loopback_it_wants_keys(podman: Podman) -> None:
    done = podman.tried("run", "--rm", "--network=none", "--no-healthcheck", *RESTRICTED, IMAGE)
    assert done.returncode == 1
    assert "PARCHGRAD_API_KEYS" in done.stderr
