"""service/engine.py: one call of the device, and its want of memory told apart from other failures."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from parchgrad.errors import ModelError, OptionError, TableError
from parchgrad.runtimes.dense import DenseEngine, Found
from service.engine import DeviceMemoryError, Explained, Job
from service.errors import from_exception
from service.settings import Settings
from service.torch_engine import TorchEngine
from tests.service.conftest import Home, picture


@pytest.fixture
def settings(home: Home) -> Settings:
    return Settings(models_dir=home.root / "models", tables_dir=home.root / "tables", model="tiny")


@pytest.fixture
def engine(settings: Settings) -> TorchEngine:
    return TorchEngine(settings, "tiny", "1")


@pytest.fixture
def job(engine: TorchEngine) -> Job:
    return Job(engine.model.preprocessing.array(picture())[0])


def raising(error: Exception) -> Callable[..., Any]:
    def predict(*given: object) -> torch.Tensor:
        raise error

    return predict


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_want_of_memory_has_an_error_of_its_own(
    engine: TorchEngine, job: Job, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.explainer, "predict", raising(error))
    with pytest.raises(DeviceMemoryError, match="memory for 2 images"):
        engine.run([job, job])
    monkeypatch.undo()
    assert len(engine.run([job, job])) == 2


def test_other_failures_stay_what_they_are(engine: TorchEngine, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.explainer, "predict", raising(RuntimeError("a shape that does not fit")))
    with pytest.raises(RuntimeError, match="a shape that does not fit"):
        engine.run([job])


def test_a_real_allocation_too_large_is_want_of_memory(
    engine: TorchEngine, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.explainer, "predict", lambda images: torch.empty(1 << 50))
    with pytest.raises(DeviceMemoryError):
        engine.run([job])


def test_a_network_without_a_last_map_refuses_that_seed_before_there_is_a_batch(
    settings: Settings, engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engine.options({"seed": "evidence"}).seed == "evidence"
    monkeypatch.setattr(DenseEngine, "_found_last_map", lambda self, size: Found("it has no map", kept=True))
    refusing = TorchEngine(settings, "tiny", "1")  # loaded nevertheless: all else works
    with pytest.raises(OptionError, match=r"'seed' is 'evidence'; allowed: .*; it has no map") as caught:
        refusing.options({"seed": "evidence"})
    assert (from_exception(caught.value).code, from_exception(caught.value).status) == ("option_invalid", 422)
    with pytest.raises(OptionError, match=r"'method' is 'grad_cam'; allowed: gradient, .*backprop; it has no map"):
        refusing.options({"method": "grad_cam"})
    assert refusing.options({"seed": "logit"}).seed == "logit"
    with pytest.raises(OptionError, match=r"'seed' is 'evidence'; allowed: logit, .*_logit with method grad_cam"):
        engine.options({"method": "grad_cam", "seed": "evidence"})


@pytest.mark.parametrize("rule", ["shorter_side", "native"])
def test_options_are_held_against_the_model_without_a_prediction(
    engine: TorchEngine, job: Job, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are on the event loop; the search of the last map is done at loading, or with the batch."""
    looked: list[object] = []

    def look(self: DenseEngine, size: object) -> Found:
        looked.append(size)
        return Found("it has no map", kept=True)

    monkeypatch.setattr(DenseEngine, "_found_last_map", look)
    preprocessing = dataclasses.replace(engine.model.preprocessing, rule=rule)
    object.__setattr__(engine.model, "preprocessing", preprocessing)
    engine.explainer._runtime._dense._last_maps.clear()
    options = engine.options({"seed": "evidence"})
    assert not looked
    with pytest.raises(OptionError, match="it has no map") as caught:
        engine.run([Job(job.tensor, Explained(0, options, "mean_abs"))])
    assert from_exception(caught.value).code == "option_invalid"
    assert looked == [job.tensor.shape]


def test_want_of_memory_in_the_search_of_the_last_map_is_as_any_other(
    settings: Settings, engine: TorchEngine, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = engine.options({"seed": "evidence"})
    asked = Job(job.tensor, Explained(0, options, "mean_abs"))
    engine.explainer._runtime._dense._last_maps.clear()
    monkeypatch.setattr(DenseEngine, "_found_last_map", raising(torch.OutOfMemoryError("CUDA out of memory.")))
    engine.options({"seed": "evidence"})
    with pytest.raises(DeviceMemoryError, match="memory for 1 images"):
        engine.run([asked])
    with pytest.raises(DeviceMemoryError):
        TorchEngine(settings, "tiny", "1")
    monkeypatch.undo()
    assert engine.run([asked])[0] is not None


def test_a_folder_of_another_model_is_refused(settings: Settings, home: Home, tmp_path: Any) -> None:
    import shutil

    shutil.copytree(home.root / "models" / "tiny", tmp_path / "models" / "renamed")
    shutil.copytree(home.root / "tables" / "tiny", tmp_path / "tables" / "renamed")
    moved = Settings(models_dir=tmp_path / "models", tables_dir=tmp_path / "tables", model="renamed")
    with pytest.raises(ModelError, match="'renamed/1' holds model 'tiny'"):
        TorchEngine(moved, "renamed", "1")
    with pytest.raises(TableError):
        TorchEngine(Settings(models_dir=home.root / "models", tables_dir=tmp_path / "none", model="tiny"), "tiny", "1")
