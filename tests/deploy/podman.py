"""Podman with a store of its own in a temporary folder, so that nobody's images are touched; and the CPU's image in it.

The image is built once for all processes of pytest-xdist; the last that uses it takes the store away.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from deploy.container.build import SUITE, mirror
from tests.service.serving import PROJECT_ROOT, START_TRIES, free_port

PROGRAMS = ("podman", "runc", "debootstrap")
IMAGE = "localhost/parchgrad:test"
# As in deploy/compose.yaml and deploy/kubernetes. Podman's own limits may be above this machine's.
RESTRICTED = (
    "--read-only", "--read-only-tmpfs=false", "--tmpfs=/tmp:rw,nosuid,nodev,noexec,size=256m,mode=1777",
    "--cap-drop=all", "--security-opt=no-new-privileges", "--ulimit=nofile=4096:4096", "--ulimit=nproc=4096:4096",
)  # fmt: skip


@dataclass(frozen=True)
class Podman:
    """`folder` holds its store, its settings and its state."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        names = {"CONTAINERS_STORAGE_CONF": "storage.conf", "CONTAINERS_CONF": "containers.conf"}
        return os.environ | {name: str(self.folder / file) for name, file in names.items()}

    def configure(self) -> None:
        """Overlay, as a store of plain copies takes the size of every layer; runc; locks that nobody else uses."""
        storage = {"driver": "overlay", "graphroot": str(self.folder / "graph"), "runroot": str(self.folder / "run")}
        engine = {"runtime": "runc", "cgroup_manager": "cgroupfs", "events_logger": "file", "lock_type": "file"}
        engine |= {"tmp_dir": str(self.folder / "state")}
        for file, section, entries in (("storage.conf", "storage", storage), ("containers.conf", "engine", engine)):
            lines = [f"[{section}]", *(f"{name} = {json.dumps(value)}" for name, value in entries.items())]
            (self.folder / file).write_text("\n".join(lines) + "\n")

    def run(self, *arguments: str) -> str:
        """Standard output. Raises CalledProcessError, whose message lacks what podman said: it is printed."""
        done = self.tried(*arguments)
        if done.returncode:
            print(done.stdout[-3000:], done.stderr[-3000:])
        done.check_returncode()
        return done.stdout.strip()

    def tried(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["podman", *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)

    @contextmanager
    def container(self, *options: str, wait_ready: bool = True, **settings: object) -> Iterator["Container"]:
        """The image at work under the restrictions, on this machine's loopback; `settings` are PARCHGRAD_ variables."""
        port = free_port()
        variables = {f"PARCHGRAD_{name.upper()}": str(value) for name, value in settings.items()}
        variables |= {"BENTOML_HOST": "127.0.0.1", "BENTOML_PORT": str(port), "OMP_NUM_THREADS": "1"}
        given = [part for name, value in variables.items() for part in ("--env", f"{name}={value}")]
        # Without systemd podman has nothing that would run the health check from time to time; we ask for it ourselves.
        command = ["run", "--detach", "--network=host", "--health-interval=disable", *RESTRICTED, *given, *options]
        container = Container(self, self.run(*command, IMAGE), port)
        try:
            container.wait("/readyz" if wait_ready else "/livez")
            yield container
        finally:
            container.client.close()
            self.run("rm", "--force", container.id)

    def remove(self) -> None:
        """Every container and image of this store, and the store."""
        self.run("rm", "--all", "--force")
        self.run("rmi", "--all", "--force")
        for mount in sorted(_mounts_below(self.folder), reverse=True):
            subprocess.run(["umount", mount], check=True)
        shutil.rmtree(self.folder)


class Container:
    """One running container, and a client of its service."""

    def __init__(self, podman: Podman, id: str, port: int) -> None:
        self.podman, self.id = podman, id
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)

    @property
    def log(self) -> str:
        done = self.podman.tried("logs", self.id)
        return done.stdout + done.stderr

    def state(self, of: str) -> str:
        return self.podman.run("inspect", "--format", f"{{{{.State.{of}}}}}", self.id)

    def python(self, code: str) -> str:
        """What a program in the container prints."""
        return self.podman.run("exec", self.id, "/app/venv/bin/python", "-c", code)

    def wait(self, path: str) -> None:
        for attempt in range(START_TRIES):
            try:
                if self.client.get(path).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            if attempt % 10 == 9 and ("was not loaded" in self.log or self.state("Running") != "true"):
                break
            time.sleep(0.1)
        raise RuntimeError(f"The container did not answer {path}; its log:\n{self.log[-4000:]}")

    def stop(self) -> int:
        """SIGTERM; the exit status. Podman waits, as nothing here does, longer than any request may take."""
        self.podman.run("kill", "--signal=TERM", self.id)
        return int(self.podman.run("wait", self.id))


@contextmanager
def built_once(shared: Path) -> Iterator[Podman]:
    """The store with the image; made by the first that asks, removed by the last that gives it back.

    `shared`: a folder that all processes of this run of pytest have in common. Skips where something is missing.
    """
    _require()
    note = shared / "podman.json"
    with _locked(shared):
        known = json.loads(note.read_text()) if note.exists() else {"folder": _store(), "users": 0}
        podman = Podman(Path(known["folder"]))
        if not known["users"]:
            podman.configure()
            asked = podman.tried("info")
            if asked.returncode:
                shutil.rmtree(podman.folder)
                pytest.skip(f"podman does not run here: {asked.stderr.strip()[-300:]}")
            try:
                _build(podman)
            except BaseException:
                podman.remove()
                raise
        note.write_text(json.dumps({**known, "users": known["users"] + 1}))
    try:
        yield podman
    finally:
        with _locked(shared):
            users = json.loads(note.read_text())["users"] - 1
            note.write_text(json.dumps({**known, "users": users}))
            if not users:
                podman.remove()
                note.unlink()


def _store() -> str:
    return tempfile.mkdtemp(prefix="pg-")  # short: a path of a socket, of which podman makes some below, has 108 bytes


def _build(podman: Podman) -> None:
    script = PROJECT_ROOT / "deploy" / "container" / "build.py"
    command = [sys.executable, str(script), "cpu", "--engine", "podman", "--debootstrap", "--tag", IMAGE]
    done = subprocess.run(command, env=podman.environment, capture_output=True, text=True, check=False)
    print(*(line for line in done.stdout.splitlines() if not line.startswith(("INFO", " "))), sep="\n")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def _require() -> None:
    """Skips, naming what is missing of what a build takes."""
    if os.geteuid():
        pytest.skip("not root: debootstrap and podman's overlay store need it")
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    try:
        urllib.request.urlopen(f"{mirror()}/dists/{SUITE}/Release", timeout=60).close()
    except (OSError, SystemExit) as error:
        pytest.skip(f"no mirror of Debian can be reached: {error}")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "1"]
    probe = [*pip, "install", "--dry-run", "--no-deps", "--ignore-installed", "click"]
    asked = subprocess.run(probe, capture_output=True, text=True, check=False)
    if asked.returncode:
        pytest.skip(f"the package index cannot be reached: {asked.stderr.strip().splitlines()[-1]}")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "podman.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _mounts_below(folder: Path) -> Sequence[str]:
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [line.split()[1] for line in lines if line.split()[1].startswith(f"{folder}/")]
