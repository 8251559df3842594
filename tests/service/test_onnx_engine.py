"""service/onnx_engine.py: one call of an exported graph, its want of memory, and what it cannot do."""

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from parchgrad.errors import GoldenError, ModelError, OptionError
from service.engine import PREDICTED, DeviceMemoryError, Explained, Job
from service.onnx_engine import OnnxEngine
from service.settings import PROJECT_ROOT, Settings, SettingsError
from service.torch_engine import TorchEngine
from tests.service import graphs
from tests.service.conftest import Home, picture


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    graphs.write(tmp_path / "graphs")
    return Settings(graphs_dir=tmp_path / "graphs", model="small", runtime="onnx")


@pytest.fixture
def engine(settings: Settings) -> OnnxEngine:
    return OnnxEngine(settings, "small", "1")


def job(engine: OnnxEngine, seed: int = 0, target: int | None = None, **given: Any) -> Job:
    tensor, _ = engine.model.preprocessing.array(picture(seed))
    return Job(tensor, None if target is None else Explained(target, engine.options(given), "mean_abs"))


def test_predictions_are_the_networks(engine: OnnxEngine) -> None:
    jobs = [job(engine, seed) for seed in range(3)]
    for one, result in zip(jobs, engine.run(jobs), strict=True):
        assert result is not None
        logits = one.tensor.mean(axis=(1, 2)) @ graphs.weights()
        np.testing.assert_allclose(result.logits, logits, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(result.probabilities, np.exp(logits) / np.exp(logits).sum(), rtol=1e-4)
        assert result.saliency is None


def test_maps_are_each_images_own(engine: OnnxEngine) -> None:
    jobs = [
        job(engine, 0, 0),
        job(engine, 1, 2, layers=["two"]),
        job(engine, 2, graphs.COVERED),
        job(engine, 3, graphs.COVERED, rule=False),
        job(engine, 5, PREDICTED, quantile={"one": 0.5, "two": 0.25}),
    ]
    results = engine.run(jobs)
    for one, result, layers in zip(jobs, results, (2, 1, None, 0, 2), strict=True):
        assert result is not None
        assert one.explained is not None
        target = int(result.logits.argmax()) if one.explained.target == PREDICTED else one.explained.target
        assert result.target == target
        assert result.covered == (layers is not None)
        if layers is None:
            assert result.saliency is None
        else:
            assert result.saliency is not None
            expected = np.abs(graphs.weights()[:, target]).mean() * layers / math.prod(graphs.SIZE)
            np.testing.assert_allclose(result.saliency, np.full(graphs.SIZE, expected), rtol=1e-5)


def test_a_job_that_nobody_waits_for_is_given_up(engine: OnnxEngine) -> None:
    one = job(engine, 0, 0, method="integrated_gradients", steps=10)
    assert engine.run([one, one], lambda: [False, False]) == [None, None]
    first, second = engine.run([one, one], lambda: [True, False])
    assert first is not None
    assert second is None


# --- options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"selection": "instance"}, "selection"),
        ({"alpha": 0.05}, "alpha"),
        ({"normality_filter": True}, "normality_filter"),
        ({"method": "guided_backprop"}, "method"),
        ({"method": "smoothgrad"}, "method"),
        ({"method": "grad_cam"}, "method"),
        ({"conserve": "none"}, "conserve"),
        ({"seed": "probability_weighted_logit"}, "seed"),
        ({"seed": "evidence"}, "seed"),
        ({"layers": ["three"]}, "layers"),
        ({"quantile": 2.0}, "quantile"),
    ],
)
def test_what_the_graph_cannot_do_is_refused_by_name(engine: OnnxEngine, given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        engine.options(given)
    assert caught.value.option == message
    if message not in ("layers", "quantile"):
        assert engine.cannot[message]
        assert str(given[message]) not in engine.cannot[message].split(", ")


def test_a_graph_of_another_seed_and_order_is_asked_for_its_own(settings: Settings, tmp_path: Path) -> None:
    says = graphs.metadata("small", "1", "a" * 64, "b" * 64)
    says["graph"] |= {"seed": "probability_weighted_logit", "conserve": "exact", "layers": ["two", "one"]}
    graphs.write(tmp_path / "others", says=says)
    engine = OnnxEngine(Settings(graphs_dir=tmp_path / "others", model="small", runtime="onnx"), "small", "1")
    options = engine.options({})
    assert (options.seed, options.conserve) == ("probability_weighted_logit", "exact")
    assert (engine.defaults["seed"], engine.defaults["conserve"]) == (options.seed, options.conserve)
    assert engine.layer_names == ("two", "one")  # as the graph's quantiles come
    with pytest.raises(OptionError, match="'seed' is 'logit'"):
        engine.options({"seed": "logit"})


# --- files -----------------------------------------------------------------------------------------------------


def test_what_is_not_the_version_asked_for_is_refused(settings: Settings) -> None:
    graphs.write(settings.graphs_dir, "renamed", says=graphs.metadata("small", "1", "a" * 64, "b" * 64))
    with pytest.raises(ModelError, match="holds model 'small/1', expected 'renamed/1'"):
        OnnxEngine(settings, "renamed", "1")
    with pytest.raises(ModelError, match=r"model\.onnx'; 'parchgrad export absent --format triton' writes one"):
        OnnxEngine(settings, "absent", "1")


def test_the_golden_record_is_held_against_the_graph(settings: Settings) -> None:
    OnnxEngine(settings, "small", "1").self_test()
    folder = settings.graphs_dir / "small" / "1"
    graphs.record(folder, seed=5)
    with pytest.raises(GoldenError, match="logits is off"):
        OnnxEngine(settings, "small", "1").self_test()
    (folder / "golden.safetensors").unlink()
    with pytest.raises(GoldenError):
        OnnxEngine(settings, "small", "1").self_test()


def test_a_device_that_is_not_here(settings: Settings) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    elsewhere = Settings(graphs_dir=settings.graphs_dir, model="small", runtime="onnx", device="cuda")
    with pytest.raises(SettingsError, match="PARCHGRAD_DEVICE='cuda': expected a device that is here: cpu; this ONNX"):
        OnnxEngine(elsewhere, "small", "1")


# --- memory ----------------------------------------------------------------------------------------------------


def allocating(elements: int, *, arena: bool) -> Callable[..., Any]:
    """A session's call that asks for so many floats."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Expand", ["x", "shape"], ["y"])],
        "large",
        [value("x", TensorProto.FLOAT, ["a"]), value("shape", TensorProto.INT64, ["b"])],
        [value("y", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena, options.log_severity_level = arena, 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda *_, **__: session.run(None, {"x": np.ones(1, np.float32), "shape": np.array([elements])})


@pytest.mark.parametrize("arena", [True, False], ids=["arena", "allocator"])
@pytest.mark.parametrize("target", [None, 0], ids=["predict", "explain"])
def test_a_real_allocation_too_large_is_want_of_memory(
    engine: OnnxEngine, arena: bool, target: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [job(engine, 0, target)] * 2
    monkeypatch.setattr(engine.explainer, "predict" if target is None else "explain", allocating(1 << 40, arena=arena))
    with pytest.raises(DeviceMemoryError, match="memory for 2 images"):
        engine.run(jobs)
    monkeypatch.undo()
    assert len(engine.run(jobs)) == 2


def test_other_failures_stay_what_they_are(engine: OnnxEngine) -> None:
    small = Job(np.zeros((3, 8, 8), np.float32), job(engine, 0, 0).explained)
    with pytest.raises(OptionError, match="images"):
        engine.run([small])


# --- without torch ---------------------------------------------------------------------------------------------

SCRIPT = """
import sys
sys.modules["torch"] = sys.modules["torchvision"] = sys.modules["safetensors.torch"] = None
import io
import numpy as np
from PIL import Image
from service import answers, service, versions
from service.engine import Explained, Job
from service.settings import Settings
settings = Settings.from_environment({"PARCHGRAD_GRAPHS_DIR": sys.argv[1], "PARCHGRAD_MODEL": "small"})
versions.check(settings)
engine = versions.load(settings, "small", "1")
engine.self_test()
tensor, _ = engine.model.preprocessing.array(Image.new("RGB", (40, 40), "red"))
(result,) = engine.run([Job(tensor, Explained(0, engine.options({}), "mean_abs"))])
print(answers.software(engine).runtime, result.saliency.shape)
"""


def test_nothing_of_it_imports_torch(settings: Settings) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(settings.graphs_dir)],
        cwd=PROJECT_ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.stdout.strip() == f"onnxruntime {onnxruntime.__version__} (32, 32)", ended.stderr


def test_torchs_engine_says_that_it_can_all(home: Home) -> None:
    kept = {name: value for name, value in home.settings.items() if name != "threads"}
    engine = TorchEngine(Settings(**kept), "tiny", "1")  # type: ignore[arg-type]
    assert engine.cannot == {}
    assert engine.defaults == engine.table.defaults.to_json()
    assert engine.runtime.startswith("torch ")


@pytest.mark.parametrize("rate", [0.0, 0.01])
def test_all_that_is_made_of_the_file_is_made_at_load(
    settings: Settings, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from parchgrad.runtimes.onnx_runtime import OnnxExplainer

    prepared: list[bool] = []
    prepare = OnnxExplainer.prepare

    def noting(explainer: OnnxExplainer, *, drift: bool, **given: Any) -> None:
        prepared.append(drift)
        prepare(explainer, drift=drift, **given)

    monkeypatch.setattr(OnnxExplainer, "prepare", noting)
    checked: list[bytes] = []
    engine = OnnxEngine(replace(settings, watch_rate=rate), "small", "1", checked.append)
    path = settings.graph("small", "1")
    assert checked == [path.read_bytes()]
    assert prepared == [rate > 0]
    path.unlink()
    engine.run([job(engine)])
    engine.run([job(engine, target=0)])
