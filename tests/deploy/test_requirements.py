"""requirements.cpu.txt and requirements.gpu.txt: pinned as in requirements.lock, nothing missing, one without torch."""

import importlib.metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.container import locks
from tests.service.serving import PROJECT_ROOT

FOLDER = PROJECT_ROOT / "deploy" / "container"


def listed(variant: str) -> dict[str, str]:
    lines = (FOLDER / f"requirements.{variant}.txt").read_text(encoding="utf-8").splitlines()
    return {canonicalize_name(line.split("==")[0]): line for line in lines if not line.startswith("#")}


@pytest.mark.parametrize("variant", ["cpu", "gpu"])
def test_they_are_what_the_lock_and_the_project_say(variant: str) -> None:
    found = (FOLDER / f"requirements.{variant}.txt").read_text(encoding="utf-8")
    assert found == locks.text(variant), "run: python deploy/container/locks.py"
    pinned = locks.pins()
    assert all(pinned[name] == line for name, line in listed(variant).items())


@pytest.mark.parametrize("variant", ["cpu", "gpu"])
def test_nothing_that_is_needed_is_missing(variant: str) -> None:
    names = set(listed(variant))
    for name in names:
        for needed in map(Requirement, importlib.metadata.requires(name) or []):
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                assert canonicalize_name(needed.name) in names, f"{name} needs {needed}"


def test_each_has_its_runtime_and_not_the_other_s() -> None:
    cpu, gpu = set(listed("cpu")), set(listed("gpu"))
    assert {"onnxruntime", "onnx"} <= cpu
    assert not [name for name in cpu if name.startswith(("torch", "triton-", "cuda-", "nvidia-c"))]
    assert {"torch", "torchvision", "nvidia-cudnn-cu13"} <= gpu
    assert not {"onnxruntime", "onnx"} & gpu
    assert not {"pytest", "mypy", "ray", "openvino", "matplotlib", "pip"} & (cpu | gpu)


@pytest.mark.parametrize(("file", "variant"), [("bentofile.yaml", "cpu"), ("bentofile.gpu.yaml", "gpu")])
def test_a_bentofile_names_what_is_there(file: str, variant: str) -> None:
    bento = yaml.safe_load((PROJECT_ROOT / file).read_text(encoding="utf-8"))
    assert bento["python"]["requirements_txt"] == f"./deploy/container/requirements.{variant}.txt"
    for path in (bento["docker"]["dockerfile_template"], bento["docker"]["setup_script"]):
        assert (PROJECT_ROOT / path).is_file()
    assert Path(PROJECT_ROOT / bento["docker"]["setup_script"]).stat().st_mode & 0o100  # BentoML refuses it else
