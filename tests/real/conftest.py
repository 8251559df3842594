"""Real weights and photographs, from the folder beside the project; the tests skip where it is absent."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner
from filelock import FileLock

from parchgrad.cli import cli

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
CAM_LAYER = {"squeezenet1_1": "features.12", "mobilenet_v2": "features.18"}


def pytest_collection_modifyitems(items):
    if not DATA.is_dir():
        here = Path(__file__).parent
        for item in items:
            if here in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="no ../shared/data: real weights and photographs are not here"))


@dataclass(frozen=True)
class Repository:
    """A model repository and its tables, made by the commands a user would type."""

    root: Path
    output: str

    @property
    def arguments(self) -> list[str]:
        return ["--models-dir", str(self.models), "--tables-dir", str(self.tables)]

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def tables(self) -> Path:
        return self.root / "selection_tables"


@pytest.fixture(scope="session", params=sorted(CAM_LAYER))
def real_model(request):
    return request.param


@pytest.fixture(scope="session")
def repository(real_model, tmp_path_factory):
    """`parchgrad model add` and `parchgrad table build` on the real weights and training photographs.

    Once for all of pytest-xdist's workers: whoever comes first builds it, and the others wait.
    """
    if os.environ.get("PYTEST_XDIST_WORKER") is None:
        return _built(tmp_path_factory.mktemp(real_model), real_model)
    root = tmp_path_factory.getbasetemp().parent / real_model
    said = root.with_suffix(".txt")
    with FileLock(root.with_suffix(".lock")):
        if said.exists():
            return Repository(root, said.read_text(encoding="utf-8"))
        built = _built(root, real_model)
        said.write_text(built.output, encoding="utf-8")
    return built


def _built(root, real_model):
    made = Repository(root, "")
    weights, labels = DATA / "weights" / f"{real_model}.pth", DATA / "imagenet_classes.txt"
    add = ["model", "add", real_model, "--arch", real_model, "--weights", str(weights), "--labels", str(labels)]
    run([*add, *made.arguments[:2]])
    build = ["table", "build", real_model, "--data", str(DATA / "imagenette" / "train"), "--no-normality"]
    return Repository(root, run([*build, *made.arguments]))


def run(arguments):
    """One command line, in this process; its output. Anything but exit code 0 fails the test."""
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output
