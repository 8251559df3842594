"""What the benchmarks of the one graph run: networks with tables and pictures, their ONNX graphs, sessions of those."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torchvision.models.convnext import CNBlock
from torchvision.transforms import functional as transforms

from benchmarks.peer_methods import calibrate
from parchgrad import SelectionTable, load_model, load_table
from parchgrad.architectures import build_network
from parchgrad.export.parity import synthetic
from parchgrad.graph.explanation import explanation_graph
from parchgrad.graph.prediction import Prediction, trace_prediction

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
SCENES = "scenes"  # the bundled package, with its own weights and its own table
CLASSES, QUANTILE = 1000, 0.1
SIZES = {"inception_v3": 299, SCENES: 128}
REAL_WEIGHTS = ("squeezenet1_1", "mobilenet_v2")
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@dataclass(frozen=True)
class Subject:
    """A network, what to explain it with, and whether its weights are trained ones."""

    name: str
    network: nn.Module
    table: SelectionTable
    size: int  # of its square pictures
    native: bool = False  # takes pictures as large as they come
    trained: bool = False

    def pictures(self, number: int, data: Path = DATA) -> Tensor:
        return pictures(number, self.size, data)

    def targets(self, number: int) -> list[int]:
        """A class of its own for every picture."""
        return [37 * image % len(self.table.labels) for image in range(number)]


def subject(name: str, data: Path = DATA) -> Subject:
    """The bundled package, or a network of torchvision's: with real weights where `data` has them, else random ones."""
    if name == SCENES:
        model = load_model(ROOT / "models" / SCENES)
        table = load_table(ROOT / "selection_tables" / SCENES, model)
        return Subject(name, model.module, table, SIZES[name], model.preprocessing.rule == "native", trained=True)
    size = SIZES.get(name, 224)
    torch.manual_seed(0)
    network = build_network(name, CLASSES).eval().requires_grad_(False)
    weights = data / "weights" / f"{name}.pth"
    trained = name in REAL_WEIGHTS and weights.is_file()
    if trained:
        network.load_state_dict(torch.load(weights, weights_only=True))
    else:
        for one in network.modules():
            if isinstance(one, CNBlock):
                # Its 1e-6 squared is what the rule takes for nothing: which side of that is a matter of rounding.
                nn.init.constant_(one.layer_scale, 0.5)
        # By pictures like those it will see: by others, the values of the deep networks leave all bounds.
        calibrate(network, pictures(8, size, data))
    return of_network(name, network, size, CLASSES, trained)


def of_network(name: str, network: nn.Module, size: int, classes: int, trained: bool = False) -> Subject:
    """With a table of random channels in the convolutions that run."""
    running = _running(network, torch.zeros(1, 3, size, size))
    idle = [n for n, one in network.named_modules() if isinstance(one, nn.Conv2d) and n not in running]
    return Subject(name, network, SelectionTable.random(network, classes, 0, idle_layers=idle), size, trained=trained)


def pictures(number: int, size: int, data: Path = DATA) -> Tensor:
    """Photographs where there are some, else coloured noise; `(number, 3, size, size)`, normalised."""
    files = sorted((data / "imagenette" / "val").glob("*/*"))
    if len(files) < number:
        return torch.stack([synthetic((size, size), seed) for seed in range(number)])
    return torch.stack([_photograph(file, size) for file in files[:: len(files) // number][:number]])


def _running(network: nn.Module, images: Tensor) -> set[str]:
    """The convolutions that take part in a prediction; auxiliary heads do not."""
    seen: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: seen.add(name))
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    try:
        with torch.no_grad():
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _photograph(file: Path, size: int) -> Tensor:
    with Image.open(file) as picture:
        resized = transforms.center_crop(transforms.resize(picture.convert("RGB"), size), [size, size])
    return transforms.normalize(transforms.to_tensor(resized), MEAN, STD)  # type: ignore[no-any-return]


def traced(found: Subject) -> Prediction:
    return trace_prediction(found.network, (found.size, found.size), found.native)


def explained(found: Subject, prediction: Prediction, backward: str) -> onnx.ModelProto:
    return explanation_graph(prediction, found.table, backward=backward)


def session(model: onnx.ModelProto, *, profile: Path | None = None) -> onnxruntime.InferenceSession:
    """On one thread, with every optimisation; `profile`: what the profile's file begins with."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def feeds(images: Tensor, targets: Sequence[int]) -> dict[str, NDArray[Any]]:
    """An explanation graph's inputs: a quantile of 0.1 in all convolutions, infinite gamma."""
    batch = len(images)
    return {
        "images": images.numpy(),
        "targets": np.array(targets, dtype=np.int64),
        "quantile": np.full((batch, 1), QUANTILE, dtype=np.float32),
        "gamma": np.full(batch, math.inf, dtype=np.float32),
    }


def prediction_call(running: onnxruntime.InferenceSession, images: Tensor) -> Callable[[], Any]:
    given = {"images": images.numpy()}
    return lambda: running.run(["logits"], given)


def explanation_call(
    running: onnxruntime.InferenceSession, images: Tensor, targets: Sequence[int]
) -> Callable[[], Any]:
    given = feeds(images, targets)
    return lambda: running.run(["logits", "saliency"], given)
