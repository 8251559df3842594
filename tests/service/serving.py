"""A real `bentoml serve` in a process of its own, on a free loopback port, stopped by its process id."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

PROJECT_ROOT = Path(__file__).resolve().parents[2]
SERVICE = "service.service:ParchGradService"
START_TRIES = 3000  # times a tenth of a second


@dataclass
class Server:
    """A running server; `client` talks to it, `process` is its supervisor."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    client: httpx.Client

    def workers(self) -> list[psutil.Process]:
        """The worker processes, as opposed to the supervisor."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "_bentoml_impl.worker.service" in child.cmdline()]

    def resident_bytes(self) -> int:
        return sum(worker.memory_info().rss for worker in self.workers())

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry `labels`."""
        from prometheus_client.parser import text_string_to_metric_families

        text = self.client.get("/metrics").text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def stop(self) -> int:
        """SIGTERM, then wait; the supervisor's exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


def environment(home: Path, **settings: object) -> dict[str, str]:
    """This process's environment with BentoML at `home` and only the given PARCHGRAD_ settings."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PARCHGRAD_", "BENTOML_", "PROMETHEUS_"))
    }
    kept |= {"BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"}
    return kept | {f"PARCHGRAD_{name.upper()}": str(value) for name, value in settings.items()}


def free_port() -> int:
    """A port where nobody listens. A server takes it seconds later, so each pytest-xdist worker draws from its own.

    They lie below those that the system gives to outgoing connections.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    while True:
        port = random.SystemRandom().randrange(20_000 + worker, 32_000, workers)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextmanager
def serving(
    home: Path,
    *,
    target: str = SERVICE,
    folder: Path = PROJECT_ROOT,
    python: str | Path = sys.executable,
    wait_ready: bool = True,
    arguments: Sequence[str] = (),
    settings: Mapping[str, object],
) -> Iterator[Server]:
    """`python`: of the environment that serves; the tests' own by default."""
    home.mkdir(parents=True, exist_ok=True)
    port = free_port()
    log = home / f"serve-{port}.log"
    command = [python, "-m", "bentoml", "serve", target, "--host", "127.0.0.1", "--port", str(port), *arguments]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=folder, env=environment(home, **settings), stdout=out, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}"
    server = Server(url, process, log, httpx.Client(base_url=url, timeout=120))
    try:
        _wait(server, "/readyz" if wait_ready else "/livez")
        yield server
    finally:
        server.client.close()
        if process.poll() is None:
            server.stop()


def _wait(server: Server, path: str) -> None:
    for _ in range(START_TRIES):
        failed = path == "/readyz" and "was not loaded" in server.log.read_text()
        if failed or server.process.poll() is not None:
            break
        try:
            if server.client.get(path).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"The server did not answer {path}; its log:\n{server.log.read_text()[-4000:]}")
