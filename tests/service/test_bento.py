"""`bentoml build`, and the built bento served from another folder, with nothing of the checkout in reach."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.service.conftest import Home, files, picture, png
from tests.service.serving import PROJECT_ROOT, environment, serving

PACKED = ("parchgrad", "service", "scenes", "models", "selection_tables")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, home: Home) -> Path:
    """A copy of what is packed, so that the build runs without touching the checkout; the tiny model joins it."""
    folder = tmp_path_factory.mktemp("bento") / "checkout"
    folder.mkdir()
    for name in PACKED:
        if (PROJECT_ROOT / name).is_dir():
            shutil.copytree(PROJECT_ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(PROJECT_ROOT / "deploy" / "container", folder / "deploy" / "container")
    for name in ("bentofile.yaml", "README.md"):
        shutil.copy(PROJECT_ROOT / name, folder / name)
    shutil.copytree(home.root / "models", folder / "models", dirs_exist_ok=True)
    shutil.copytree(home.root / "tables", folder / "selection_tables", dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def bento(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BENTOML_HOME with the built bento in it."""
    home = tmp_path_factory.mktemp("bentoml")
    build = subprocess.run(
        [sys.executable, "-m", "bentoml", "build", "--output", "tag", str(source)],
        cwd=source, env=environment(home), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert build.returncode == 0, build.stdout + build.stderr
    shutil.rmtree(source)  # from here on only the bento exists
    return home


def test_the_bento_holds_what_it_needs_and_no_more(bento: Path) -> None:
    (packed,) = (bento / "bentos" / "parchgrad").glob("*/src")
    assert {path.name for path in packed.iterdir()} <= {*PACKED, "bentofile.yaml"}
    assert (packed / "models" / "tiny" / "1" / "weights.safetensors").is_file()
    assert not list(packed.rglob("__pycache__"))
    pinned = (packed.parent / "env/python/requirements.txt").read_text()
    assert "onnxruntime==" in pinned
    assert "torch==" not in pinned  # the lock of development is not what a service installs


@pytest.mark.parametrize("model", ["tiny", "scenes"])
def test_the_bento_serves_from_another_folder(bento: Path, tmp_path: Path, model: str) -> None:
    (packed,) = (bento / "bentos" / "parchgrad").glob("*/src")
    if not ((packed / "models" / model).is_dir() and (packed / "selection_tables" / model).is_dir()):
        pytest.skip(f"model '{model}' is not here")
    with serving(bento, target="parchgrad:latest", folder=tmp_path, settings={"model": model, "threads": 1}) as server:
        answer = server.client.post("/explain", files=files(png(picture()))).json()
        assert answer["model"]["name"] == model
        assert answer["results"][0]["explanation"]["status"] == "ok"
        assert server.stop() == 0
