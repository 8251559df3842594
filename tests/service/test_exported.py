"""The bundled model, exported and served by ONNX Runtime: beside PyTorch, and in an environment without it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from tritonclient.http import InferenceServerClient

import parchgrad
from parchgrad.export import export_triton
from tests.service.conftest import files, picture, png
from tests.service.serving import PROJECT_ROOT, Server, environment, free_port, serving
from tests.service.test_protocol import asked, tensor
from tests.service.test_repository import index
from tests.service.test_server import distance, saliency

RUNTIME = f"onnxruntime {onnxruntime.__version__}"

# The engines sum in different orders, and a ReLU on the edge then flips a path. Another model's map is off by 1.
TOLERANCE = 0.02


@pytest.fixture(scope="module")
def explainer() -> parchgrad.Explainer:
    model = parchgrad.load_model(PROJECT_ROOT / "models" / "scenes")
    table = parchgrad.load_table(PROJECT_ROOT / "selection_tables" / "scenes", model)
    return parchgrad.Explainer(model, table)


@pytest.fixture(scope="module")
def graphs_dir(explainer: parchgrad.Explainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "onnx_graphs"
    export_triton(explainer.model, explainer.table, folder)
    return folder


@pytest.fixture(scope="module")
def scenes(graphs_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The settings' own choice of a runtime: the package and its table lie in the checkout, their graph beside them."""
    settings = {"graphs_dir": graphs_dir, "model": "scenes", "threads": 1, "drain_ms": 0}
    with serving(tmp_path_factory.mktemp("home"), settings=settings) as running:
        yield running


def explained(server: Server, image: bytes, **options: str) -> dict[str, Any]:
    answer = server.client.post("/explain", files=files(image), data={"saliency": "float32", **options})
    assert answer.status_code == 200, answer.text
    whole: dict[str, Any] = answer.json()
    assert whole["software"]["runtime"] == RUNTIME
    return whole


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "a class": {"target": "umbrella"},
    "quantile and gamma": {"quantile": 0.3, "gamma": 2.0},
    "plain": {"rule": False},
    "layers": {"layers": ["features.2.*", "!*.skip.*"]},
    "integrated": {"method": "integrated_gradients", "steps": 4},
    "times input": {"method": "input_x_gradient"},
}


@pytest.mark.parametrize("size", [(128, 128), (101, 75)])
@pytest.mark.parametrize("given", OPTIONS.values(), ids=OPTIONS)
def test_the_graphs_answers_are_torchs(
    scenes: Server, explainer: parchgrad.Explainer, given: dict[str, Any], size: tuple[int, int]
) -> None:
    image = picture(4, size)
    texts = {name: ",".join(value) if isinstance(value, list) else str(value).lower() for name, value in given.items()}
    (result,) = explained(scenes, png(image), top_k="10", **texts)["results"]
    options = {name: value for name, value in given.items() if name != "target"}
    tensor, _ = explainer.model.preprocessing.apply(image)
    expected = explainer.explain(tensor[None], given.get("target"), **options)
    assert distance(saliency(result), expected.saliency()[0].numpy()) < TOLERANCE
    assert result["explanation"]["target"]["index"] == int(expected.targets[0])
    assert result["explanation"]["quality"]["identity_layers"] == int(expected.identity_layers[0])
    probabilities = expected.probabilities()[0]
    for one in result["predictions"]:
        assert one["probability"] == pytest.approx(float(probabilities[one["index"]]), rel=1e-4, abs=1e-7)


def test_images_of_one_request_have_options_of_their_own(scenes: Server, explainer: parchgrad.Explainer) -> None:
    given = [("1", "0.1"), ("5", "0.5"), ("7", "1")]
    pictures = [picture(seed, (96, 64)) for seed in range(3)]
    data = {
        "target": [target for target, _ in given],
        "quantile": [quantile for _, quantile in given],
        "saliency": "float32",
    }
    answer = scenes.client.post("/explain", files=files(*map(png, pictures)), data=data).json()
    images = torch.stack([explainer.model.preprocessing.apply(one)[0] for one in pictures])
    quantiles = [float(quantile) for _, quantile in given]
    expected = explainer.explain(images, [int(target) for target, _ in given], quantile=quantiles).saliency().numpy()
    for result, one in zip(answer["results"], expected, strict=True):
        assert distance(saliency(result), one) < TOLERANCE


def test_triton_s_client_gets_the_same(scenes: Server, explainer: parchgrad.Explainer) -> None:
    images = torch.stack([explainer.model.preprocessing.apply(picture(seed, (80, 80)))[0] for seed in (1, 2)])
    inputs = [tensor("images", images.numpy()), tensor("targets", np.array([[3], [-1]]))]
    client = InferenceServerClient(scenes.url.removeprefix("http://"))
    try:
        result = client.infer("scenes", inputs, outputs=asked("logits", "target", "saliency"))
    finally:
        client.close()
    expected = explainer.explain(images, [3, -1])
    np.testing.assert_allclose(result.as_numpy("logits"), expected.logits.numpy(), rtol=1e-4, atol=1e-5)
    assert result.as_numpy("target").tolist() == expected.targets.tolist()
    for found, one in zip(result.as_numpy("saliency"), expected.saliency().numpy(), strict=True):
        assert distance(found, one) < TOLERANCE


# --- an environment without torch ------------------------------------------------------------------------------

MOST_MEGABYTES = 1000  # of the environment; with torch it takes several times that


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout without models, and `venv` in it with what the project needs to serve graphs, as the lock file has it.

    Skips where the package index cannot be reached, and only there.
    """
    checkout = tmp_path_factory.mktemp("bare") / "checkout"
    for folder in ("parchgrad", "service"):
        shutil.copytree(PROJECT_ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT_ROOT / file, checkout)
    constraints = checkout / "constraints.txt"
    lock = (PROJECT_ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    constraints.write_text("\n".join(line for line in lock if "==" in line and not line.startswith("#")) + "\n")
    subprocess.run([sys.executable, "-m", "venv", checkout / "venv"], check=True)
    pip = [checkout / "venv" / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "--retries", "1"]
    probe = [*pip, "install", "--dry-run", "--no-deps", "--ignore-installed", "--constraint", constraints, "click"]
    asked_index = subprocess.run(probe, capture_output=True, text=True, check=False)
    if asked_index.returncode:
        pytest.skip(f"the package index cannot be reached: {asked_index.stderr.strip().splitlines()[-1]}")
    installed = subprocess.run(
        [*pip, "install", "--constraint", constraints, f"{checkout}[service,onnx]"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert installed.returncode == 0, installed.stdout[-2000:] + installed.stderr[-2000:]
    return checkout


def megabytes(folder: Path) -> int:
    files_there = (Path(at, name) for at, _, names in os.walk(folder) for name in names)
    return round(sum(path.lstat().st_size for path in files_there) / 1e6)


def test_torch_is_not_there_and_little_else(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    script = (  # what the supervisor imports, and the command line
        "import importlib.util as u, parchgrad, parchgrad.cli, service.service;"
        "print(*(name for name in ('torch', 'torchvision', 'openvino', 'onnxscript') if u.find_spec(name)))"
    )
    run = subprocess.run(
        [bare / "venv" / "bin" / "python", "-c", script],
        cwd=bare, env=environment(bare / "home"), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (run.returncode, run.stdout.strip()) == (0, ""), run.stdout + run.stderr
    size = megabytes(bare / "venv")
    print(f"The environment that serves graphs takes {size} MB.")
    assert size < MOST_MEGABYTES


def test_it_serves_the_exported_model(
    bare: Path, graphs_dir: Path, explainer: parchgrad.Explainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    settings = {"graphs_dir": graphs_dir, "model": "scenes", "threads": 1, "drain_ms": 0}
    python = bare / "venv" / "bin" / "python"
    with serving(bare / "home", folder=bare, python=python, settings=settings) as server:
        assert index(server) == {("scenes", "1"): "READY"}
        image = picture(6, (128, 96))
        (result,) = explained(server, png(image), target="cup")["results"]
        pictured = server.client.post("/explain", files=files(png(image)), headers={"Accept": "image/png"})
        assert pictured.status_code == 200, pictured.text
        print(f"The worker that serves its graph takes {server.resident_bytes() / 1e6:.0f} MB.")
        assert server.stop() == 0
    tensor, _ = explainer.model.preprocessing.apply(image)
    expected = explainer.explain(tensor[None], "cup")
    assert distance(saliency(result), expected.saliency()[0].numpy()) < TOLERANCE
    best = result["predictions"][0]
    assert best["index"] == int(expected.logits.argmax())
    assert best["probability"] == pytest.approx(float(expected.probabilities().max()), rel=1e-4)


def test_without_a_graph_it_says_what_is_missing(bare: Path, tmp_path: Path) -> None:
    """A model package alone is nothing that can be served there."""
    shutil.copytree(PROJECT_ROOT / "models" / "scenes", tmp_path / "models" / "scenes")
    (tmp_path / "graphs").mkdir()
    command = [bare / "venv" / "bin" / "parchgrad", "serve", "--port", str(free_port())]
    given = {"models_dir": tmp_path / "models", "graphs_dir": tmp_path / "graphs", "model": "scenes"}
    for runtime, message in (
        ("auto", f"'parchgrad export scenes --format triton' writes {tmp_path}/graphs/scenes/VERSION/model.onnx, or "),
        ("torch", "there is no torch here: pip install 'parchgrad[torch]'."),
    ):
        ended = subprocess.run(
            command, cwd=bare, env=environment(tmp_path / "home", runtime=runtime, **given),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert ended.returncode != 0
        assert message in ended.stdout + ended.stderr
