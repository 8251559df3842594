"""docs/deploy.md: its five commands, each run here, or by the test that the page names, or said to be not run."""

import re
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image

from scenes.generator import sample
from tests.service.serving import PROJECT_ROOT, Server, serving

PAGE = (PROJECT_ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
COMMANDS = PAGE.split("```")[1].strip().splitlines()
CLONE, CONTAINER, SECRETS, COMPOSE, ASK = COMMANDS
URL = "http://127.0.0.1:3000"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `make secrets` has run: a folder with the Makefile and this environment."""
    made = tmp_path_factory.mktemp("checkout")
    shutil.copy(PROJECT_ROOT / "Makefile", made)
    bin_ = made / ".venv" / "bin"
    bin_.mkdir(parents=True)
    for program in ("python", "parchgrad"):
        (bin_ / program).symlink_to(Path(sys.executable).parent / program)
    for name in ("requirements.lock", "pyproject.toml"):  # what the environment is made of, older than itself
        (made / name).touch()
    (made / ".venv" / ".installed").touch()
    subprocess.run(shlex.split(SECRETS), cwd=made, check=True, capture_output=True)
    return made


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    keys = folder / "secrets" / "parchgrad_keys"
    with serving(tmp_path_factory.mktemp("bento"), settings={"api_keys_file": keys}) as running:
        yield running


def test_there_are_five_and_each_has_its_line() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)
    assert len(rows) == len(COMMANDS) == 5
    for row, command in zip(rows, COMMANDS, strict=True):
        assert all(part in command for part in row.split(" … ")), row


def test_the_tests_that_it_names_are_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)`", PAGE)
    assert len(named) >= 3
    assert [name for name in named if not (PROJECT_ROOT / name).is_file()] == []
    help_ = subprocess.run(["make", "help"], cwd=PROJECT_ROOT, check=True, capture_output=True, text=True).stdout
    targets = {line.split()[0] for line in help_.splitlines()}
    assert set(re.findall(r"`make ([\w-]+)`", PAGE)) <= targets


def test_container_builds_the_cpu_image() -> None:
    """With the program that tests/deploy/test_container.py runs."""
    command = ["make", "--dry-run", "--always-make", *shlex.split(CONTAINER)[1:]]
    steps = subprocess.run(command, cwd=PROJECT_ROOT, check=True, capture_output=True, text=True)
    lines = [line for line in steps.stdout.splitlines() if not line.startswith("make")]  # of a make within a make
    assert lines[-1].endswith("python deploy/container/build.py cpu")


def test_the_secrets_are_those_of_the_compose_file(folder: Path) -> None:
    file = shlex.split(COMPOSE)[3]
    compose = yaml.safe_load((PROJECT_ROOT / file).read_text("utf-8"))
    for secret in compose["secrets"].values():
        path = (folder / "deploy" / secret["file"]).resolve()
        assert path.read_text("utf-8").strip()
        assert stat.S_IMODE(path.stat().st_mode) == 0o644  # read by 10001 and by Grafana's own user
    assert stat.S_IMODE((folder / "secrets").stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "secrets" / "token").stat().st_mode) == 0o600
    assert {path.name for path in (folder / "secrets").iterdir()} == {"token", "parchgrad_keys", "grafana_password"}


def test_secrets_that_are_there_stay(folder: Path) -> None:
    before = {path: path.read_bytes() for path in (folder / "secrets").iterdir()}
    subprocess.run(shlex.split(SECRETS), cwd=folder, check=True, capture_output=True)
    assert {path: path.read_bytes() for path in (folder / "secrets").iterdir()} == before


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_asking(folder: Path, server: Server) -> None:
    Image.fromarray(sample("test", 9, 128).image).save(folder / "photo.jpg")
    assert URL in ASK
    command = ASK.replace(URL, server.url) + " --fail-with-body"
    ran = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, check=False)
    assert ran.returncode == 0, ran.stdout
    with Image.open(folder / "map.png") as drawn:
        assert drawn.size == (128, 128)


def test_asking_without_the_key(folder: Path, server: Server) -> None:
    Image.fromarray(sample("test", 9, 128).image).save(folder / "photo.jpg")
    answer = server.client.post("/explain", files={"image": (folder / "photo.jpg").read_bytes()})
    assert answer.status_code == 401
