"""deploy/compose.yaml as podman-compose reads it: the restrictions, and that everything it mounts is there."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import Settings
from tests.service.serving import PROJECT_ROOT

DEPLOY = PROJECT_ROOT / "deploy"
SECRETS = {"parchgrad_keys", "grafana_password"}  # the reader makes their files


def read(*files: str) -> dict[str, Any]:
    """The services and the rest, several files laid over each other."""
    if not shutil.which("podman"):
        pytest.skip("not installed: podman, which podman-compose asks for its version")
    given = [part for file in files for part in ("-f", str(DEPLOY / file))]
    command = [sys.executable, "-m", "podman_compose", *given, "config"]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stderr.lower(), done.stderr
    whole: dict[str, Any] = yaml.safe_load(done.stdout)
    return whole


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return read("compose.yaml")


def test_no_service_has_rights(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {"parchgrad", "prometheus", "grafana"}
    for service in compose["services"].values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in service
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    ours = compose["services"]["parchgrad"]
    assert (ours["user"], ours["read_only"]) == ("10001:10001", True)
    assert [entry.partition(":")[0] for entry in ours["tmpfs"]] == ["/tmp"]


def test_every_mounted_path_is_there(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            source, target, *mode = volume.split(":")
            if source in compose["volumes"]:
                continue
            assert (DEPLOY / source).exists(), source
            assert mode == ["ro"], volume
            assert target.startswith("/")


def test_prometheus_and_grafana_find_what_they_are_given(compose: dict[str, Any]) -> None:
    services = compose["services"]
    mounted = {volume.split(":")[1]: DEPLOY / volume.split(":")[0] for volume in services["prometheus"]["volumes"]}
    config = yaml.safe_load(mounted["/etc/prometheus/prometheus.yml"].read_text(encoding="utf-8"))
    assert all(list(mounted["/etc/prometheus/rules"].glob(Path(one).name)) for one in config["rule_files"])
    targets = [target for job in config["scrape_configs"] for one in job["static_configs"] for target in one["targets"]]
    assert targets == ["parchgrad:3000"]
    assert services["parchgrad"]["ports"] == ["127.0.0.1:3000:3000"]
    shown = {volume.split(":")[1]: DEPLOY / volume.split(":")[0] for volume in services["grafana"]["volumes"]}
    provisioned = shown["/etc/grafana/provisioning"]
    (source,) = yaml.safe_load((provisioned / "datasources/prometheus.yml").read_text(encoding="utf-8"))["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((provisioned / "dashboards/parchgrad.yml").read_text(encoding="utf-8"))["providers"]
    assert list(shown[provider["options"]["path"]].glob("*.json"))


def test_secrets_are_files_and_no_variable_holds_one(compose: dict[str, Any]) -> None:
    assert set(compose["secrets"]) == SECRETS
    assert {name for service in compose["services"].values() for name in service.get("secrets", [])} == SECRETS
    for service in compose["services"].values():
        for name, text in service.get("environment", {}).items():
            if any(word in name for word in ("KEY", "PASSWORD")):
                assert text.startswith("/run/secrets/"), name
    ignored = (PROJECT_ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert "secrets/" in ignored


def test_its_settings_are_settings_and_the_end_is_waited_for(compose: dict[str, Any]) -> None:
    service = compose["services"]["parchgrad"]
    settings = Settings.from_environment(service["environment"])
    longest = settings.drain_ms + settings.body_timeout_ms + settings.max_timeout_ms
    assert int(service["stop_grace_period"].removesuffix("s")) * 1000 > longest


def test_the_gpu_s_file_changes_the_image_and_adds_a_gpu() -> None:
    service = read("compose.yaml", "compose.gpu.yaml")["services"]["parchgrad"]
    assert service["image"] == "parchgrad:gpu"
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert service["read_only"] is True
