"""The front door where there is no torch: one ONNX graph of a model and its table, run by ONNX Runtime.

What `parchgrad export --format onnx` wrote computes prediction and explanation in one call, without autograd. Arrays
in, arrays out. Which options there are was decided when the graph was exported.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from parchgrad import golden
from parchgrad.drift import LayerDrift, Reference
from parchgrad.errors import GoldenError, ModelError, OptionError, missing_package
from parchgrad.interest import Interest
from parchgrad.labels import no_row_for
from parchgrad.methods import PIXELS_PER_PASS, straight_nodes
from parchgrad.options import Options, per_image
from parchgrad.patterns import match
from parchgrad.quantiles import channels_of_quantile, quantile_of_layers
from parchgrad.runtimes.array_explanation import ArrayExplanation, softmax
from parchgrad.runtimes.onnx_metadata import (
    METADATA_KEY,
    GraphFeatures,
    GraphModel,
    GraphSettings,
    GraphTable,
    read_metadata,
)
from parchgrad.versions import resolve_version

Target = int | str | None
Floats = NDArray[np.float32]

MODEL_FILE = "model.onnx"
METHODS = ("gradient", "input_x_gradient", "integrated_gradients")

# Distinct settings of layers and quantile that an explainer remembers what they mean for.
MAX_SETTINGS = 256

_INPUTS = {"images": "float", "targets": "int64", "quantile": "float", "gamma": "float"}
_OUTPUTS = {
    "logits": "float",
    "probabilities": "float",
    "target": "int64",
    "saliency": "float",
    "attributions": "float",
    "identity_layers": "int64",
    "covered": "bool",
}
_GAP, _RANK, _ROWS = "watch/gap", "watch/rank", "watch/rows"  # of the part that gives the features
# Where a model that comes as bytes has its external weights (onnxruntime_session_options_config_keys.h).
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
_DEVICES = {"CPUExecutionProvider": "cpu", "CUDAExecutionProvider": "cuda"}


class OnnxExplainer:
    """Explains images by the graph in an ONNX file. Thread safe.

    `path` is the file, its version folder, or that one's parent (then the highest version). `threads` is how many
    ONNX Runtime computes with, default its own choice; `providers` are its execution providers, first choice first,
    default the CPU's. `content` is the file's, where it has been read: then of the file no more is read than its
    weights outside of it, and `prepare` makes what else is made of it. Raises ModelError naming what does not hold of
    the file, OptionError for the others.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        providers: Sequence[str] | None = None,
        content: bytes | None = None,
    ) -> None:
        given = Path(path)
        self._path = resolve_version(given, MODEL_FILE, ModelError) / MODEL_FILE if given.is_dir() else given
        if content is None and not self._path.is_file():
            raise ModelError(f"ONNX file '{self._path}' does not exist.")
        self._content = content
        self._threads = threads
        self._providers = _checked_providers(providers)
        if content is None:
            self._session = _opened(self._path, self._path, _session_options(threads), self._providers)
        else:
            self._session = self._session_of(content)
        metadata = read_metadata(
            self._session.get_modelmeta().custom_metadata_map.get(METADATA_KEY), os.fspath(self._path)
        )
        self.model: GraphModel = metadata.model
        self.table: GraphTable = metadata.table
        self.graph: GraphSettings = metadata.graph
        self.versions = metadata.versions
        self._features = metadata.features
        self._reference = self._reference_of(metadata.features)
        self._feature_cut: Any = None
        self._no_features: str | None = None  # why it could not be made, once that was tried
        self._making_features = threading.Lock()
        self._size = self._checked_signature()
        self._predictor: Any = None
        self._making_predictor = threading.Lock()
        self._rows: dict[tuple[object, ...], Floats] = {}  # of settings: the row of the input `quantile`

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The layers the table has rows for."""
        return self.table.layer_names

    @property
    def device(self) -> str:
        """`cpu` or `cuda`; another provider's name where it is neither's."""
        first: str = self._session.get_providers()[0]
        return _DEVICES.get(first, first)

    @property
    def runtime(self) -> str:
        """The engine and its version."""
        return f"onnxruntime {onnxruntime.__version__}"

    def predict(self, images: Floats) -> Floats:
        """Logits `(B, K)` of normalised images `(B, 3, h, w)`, without any of the explanation's cost.

        The first call makes the prediction's own engine from the file, with weights of its own in memory, if `prepare`
        has not.
        """
        (logits,) = self._prediction_session().run(["logits"], {"images": self._checked_images(images)})
        return np.asarray(logits)

    def explain(
        self,
        images: Floats,
        targets: Target | Sequence[Target] | NDArray[np.int64] = None,
        *,
        method: str | Sequence[str | None] | None = None,
        rule: bool | Sequence[bool | None] | None = None,
        quantile: Any = None,
        alpha: Any = None,
        gamma: Any = None,
        conserve: str | Sequence[str | None] | None = None,
        selection: str | Sequence[str | None] | None = None,
        layers: Any = None,
        normality_filter: bool | Sequence[bool | None] | None = None,
        seed: str | Sequence[str | None] | None = None,
        steps: Any = None,
        samples: Any = None,
        noise: Any = None,
        noise_seed: Any = None,
        baseline: Floats | None = None,
        uncovered: str = "raise",
        wanted: Callable[[], Sequence[bool]] | None = None,
        pixels_per_pass: int = PIXELS_PER_PASS,
    ) -> ArrayExplanation:
        """Predict and explain `images` `(B, 3, h, w)`, normalised, float32: `Explainer.explain` in arrays.

        The arguments are those of `Explainer.explain`; left out, `conserve` and `seed` are the exported ones. An option
        that the graph was not exported for raises OptionError: `require_statistics` says which.
        """
        images = self._checked_images(images)
        if uncovered not in ("raise", "nan"):
            raise OptionError("uncovered", uncovered, "raise, nan")
        if pixels_per_pass < 1:
            raise OptionError("pixels_per_pass", pixels_per_pass, "an integer of at least 1")
        given = {
            "method": method, "rule": rule, "quantile": quantile, "alpha": alpha, "gamma": gamma,
            "conserve": conserve, "selection": selection, "layers": layers,
            "normality_filter": normality_filter, "seed": self._with_own_seed(seed), "steps": steps, "samples": samples,
            "noise": noise, "noise_seed": noise_seed,
        }  # fmt: skip
        options = per_image(len(images), self.table.defaults, given)
        self.require_statistics(options)
        chosen = self._target_indices(targets, len(images))
        plan = _Plan(
            quantile=np.stack([self._quantile_row(o) for o in options]),
            gamma=np.array([o.gamma for o in options], dtype=np.float32),
        )
        if uncovered == "raise":
            known = chosen >= 0  # the others are known only after the forward pass
            self._require(self._covered(chosen, options) | ~known, chosen)
        interest = Interest(wanted, len(images))
        interest.ask()
        found = _Found(images, len(self.model.labels))
        many = np.array([o.method == "integrated_gradients" for o in options])
        if len(one := np.flatnonzero(~many)):
            self._explain_at_image(images, chosen, options, plan, one, found)
        if len(several := np.flatnonzero(many)):
            start = np.zeros_like(images) if baseline is None else _expanded(baseline, images)
            room = max(1, pixels_per_pass // (images.shape[-2] * images.shape[-1]))
            self._explain_over_points(images, start, chosen, options, plan, several, room, interest, found)
        covered = self._covered(found.targets, options)
        if uncovered == "raise":
            self._require(covered, found.targets)
        layers_used = (plan.quantile > 0).sum(axis=1)
        found.attributions[~covered] = math.nan
        found.identity[~covered] = layers_used[~covered]  # without a row no channel is selected
        return ArrayExplanation(
            logits=found.logits,
            targets=found.targets,
            attributions=found.attributions,
            identity_layers=found.identity,
            layers_used=layers_used,
            covered=covered,
            completeness_gap=found.gap,
            complete=found.complete,
            options=tuple(options),
        )

    @property
    def no_drift(self) -> str | None:
        """Why `drift` cannot be asked; None where it can."""
        if self._features is None:
            return f"ONNX file '{self._path}' does not say where its features are; export it again."
        if not any(self._features.std > 0):
            return f"No feature of table '{self.table.name}' is known in ONNX file '{self._path}'."
        return self._no_features

    def prepare(self, *, drift: bool, after_each: Callable[[], None] = lambda: None) -> None:
        """Make now what `predict` makes at its first call, and `drift` where it is to be asked.

        Of the `content` that was given, which is then let go; without `drift` it can not be asked any more. Raises
        what `predict` would; where the features' engine cannot be made `no_drift` says why, and all else is as before.
        `after_each` is called once an engine was made, which takes several times the memory that it keeps.
        """
        self._prediction_session()
        after_each()
        if drift and self.no_drift is None:
            with suppress(Exception):  # which no_drift then says
                self._feature_session()
            after_each()
        elif self._content is not None and self.no_drift is None:
            self._no_features = f"ONNX file '{self._path}' was opened without its features."
        self._content = None

    def drift(
        self, images: Floats, targets: Target | Sequence[Target] | NDArray[np.int64]
    ) -> list[dict[str, LayerDrift]]:
        """How far each image is from the table's in the channels of its target: `Explainer.drift` in arrays.

        The first call makes an engine of its own from the file's prediction, with weights of its own in memory, if
        `prepare` has not. Where that fails it is not tried again. Raises ModelError where drift cannot be asked:
        `no_drift` says why.
        """
        if (reason := self.no_drift) is not None:
            raise ModelError(reason)
        assert self._reference is not None  # no_drift looked
        images = self._checked_images(images)
        chosen = self._target_indices(targets, len(images))
        if (chosen < 0).any():
            chosen = np.where(chosen < 0, self.predict(images).argmax(axis=1), chosen)
        self._require(np.isin(chosen, self.table.classes), chosen)
        rows = np.array([self.table.classes.index(target) for target in chosen.tolist()], dtype=np.int64)
        gap, rank = self._feature_session().run([_GAP, _RANK], {"images": images, _ROWS: rows})
        return [self._reference.drift(*each) for each in zip(gap, rank, strict=True)]

    def _reference_of(self, features: GraphFeatures | None) -> Reference | None:
        if features is None:
            return None
        return Reference.of(self.table.channels, self.table.defaults, features.mean, features.std)

    def require_statistics(self, options: Sequence[Options]) -> None:
        """Raises OptionError for an option that needs more than the graph holds, or that was fixed otherwise."""
        for o in options:
            if o.method not in METHODS:
                raise _not_in_graph("method", o.method, ", ".join(METHODS))
            if o.seed != self.graph.seed:
                raise _not_in_graph("seed", o.seed, self.graph.seed)
            if not o.rule:
                continue
            if o.selection != "class":
                raise _not_in_graph("selection", o.selection, "class")
            if o.alpha is not None:
                raise _not_in_graph("alpha", o.alpha, "none: select by quantile")
            if o.normality_filter:
                raise _not_in_graph("normality_filter", True, "false")
            if o.conserve != self.graph.conserve:
                raise _not_in_graph("conserve", o.conserve, self.graph.conserve)

    def target_index(self, target: Target) -> int:
        """A target's class index; -1 for the predicted class. Raises UnknownTargetError.

        A target is an index, -1 or None, a class's name or its class id.
        """
        if target is None or (isinstance(target, int) and target == -1):
            return -1
        return self.model.class_index(target)

    def self_test(self) -> None:
        """Explain the golden record beside the file. Raises GoldenError, saying what differs and by how much."""
        own = self._path.with_name(f"{self._path.stem}.{golden.GOLDEN_FILE}")  # of a file among others
        path = own if own.is_file() else self._path.with_name(golden.GOLDEN_FILE)
        if not path.is_file():
            raise GoldenError(f"'{self._path.parent}' has no {golden.GOLDEN_FILE}; 'parchgrad export' writes one.")
        recorded = golden.read(path)
        loaded = {"weights_sha256": self.model.weights_sha256, "table_sha256": self.table.table_sha256}
        for what, digest in recorded.digests.items():
            if loaded.get(what, digest) != digest:
                raise golden.differs(path, what, digest, loaded[what])
        explanation = self.explain(recorded.image, recorded.target)
        recorded.compare(explanation.logits, explanation.saliency())

    def _explain_at_image(
        self,
        images: Floats,
        targets: NDArray[np.int64],
        options: list[Options],
        plan: _Plan,
        which: NDArray[np.intp],
        found: _Found,
    ) -> None:
        here = images[which]
        logits, found.targets[which], attributions, found.identity[which] = self._run(
            ("logits", "target", "attributions", "identity_layers"), here, targets[which], plan, which
        )
        found.logits[which] = logits
        times_input = np.array([options[i].method == "input_x_gradient" for i in which])
        found.attributions[which] = np.where(times_input[:, None, None, None], attributions * here, attributions)

    def _explain_over_points(
        self,
        images: Floats,
        baseline: Floats,
        targets: NDArray[np.int64],
        options: list[Options],
        plan: _Plan,
        which: NDArray[np.intp],
        room: int,
        interest: Interest,
        found: _Found,
    ) -> None:
        """Integrated gradients; `room`: how many points go through the graph together."""
        interest.ask()
        logits = self.predict(images[which])
        found.logits[which] = logits
        final = np.where(targets[which] < 0, logits.argmax(axis=1), targets[which])
        found.targets[which] = final
        total = np.zeros_like(images[which])
        walks = [iter(straight_nodes(options[i].steps)) for i in which]
        left = [options[i].steps for i in which]
        while any(left):
            still = interest.ask()
            for row, i in enumerate(which):
                if left[row] and not still[i]:
                    left[row], found.complete[i] = 0, False
            if not any(left):
                break  # what is still wanted is done
            rows: list[int] = []
            points: list[Floats] = []
            weights: list[np.float32] = []
            for row, i in enumerate(which):
                for fraction, weight in islice(walks[row], min(left[row], room - len(rows))):
                    left[row] -= 1
                    rows.append(row)
                    points.append(baseline[i] + np.float32(fraction) * (images[i] - baseline[i]))
                    weights.append(np.float32(weight))
            gradients, identity = self._run(
                ("attributions", "identity_layers"), np.stack(points), final[rows], plan, which[rows]
            )
            for n, row in enumerate(rows):
                total[row] += weights[n] * gradients[n]
                found.identity[which[row]] = max(found.identity[which[row]], identity[n])
        attributions = total * (images[which] - baseline[which])
        attributions[~found.complete[which]] = math.nan
        found.attributions[which] = attributions
        plain = np.array([not options[i].rule for i in which])
        if plain.any():
            rise = self._score(logits, final) - self._score(self.predict(baseline[which]), final)
            found.gap[which] = np.where(plain, attributions.sum(axis=(1, 2, 3)) - rise, math.nan)

    def _run(
        self,
        outputs: Sequence[str],
        images: Floats,
        targets: NDArray[np.int64],
        plan: _Plan,
        which: NDArray[np.intp],
    ) -> list[Any]:
        inputs = {
            "images": np.ascontiguousarray(images),
            "targets": targets.astype(np.int64),
            "quantile": plan.quantile[which],
            "gamma": plan.gamma[which],
        }
        found: list[Any] = self._session.run(list(outputs), inputs)
        return found

    def _score(self, logits: Floats, targets: NDArray[np.int64]) -> Floats:
        """What the graph differentiates for each image, `(B,)`."""
        at = np.arange(len(logits)), targets
        score = logits[at] * softmax(logits)[at] if self.graph.seed == "probability_weighted_logit" else logits[at]
        return np.asarray(score)

    def _with_own_seed(self, seed: str | Sequence[str | None] | None) -> str | list[str]:
        if seed is None or isinstance(seed, str):
            return seed or self.graph.seed
        return [one or self.graph.seed for one in seed]

    def _quantile_row(self, o: Options) -> Floats:
        """An image's row of the input `quantile`: 0 where the rule does not act.

        Elsewhere `k / C`, as many channels as its quantile means: so rounding to float32 changes no selection, nor is
        a quantile too small for it none.
        """
        # Callers rarely have more than a few distinct settings; each is matched against the layers once.
        if not o.rule:
            return np.zeros(len(self.graph.layers), dtype=np.float32)
        key = (o.layers, repr(o.quantile))
        row = self._rows.get(key)
        if row is None:
            quantiles = quantile_of_layers(o.quantile, match(self.layer_names, o.layers))
            channels = self.table.channels
            shares = [
                channels_of_quantile(quantiles[name], channels[name]) / channels[name] if name in quantiles else 0.0
                for name in self.graph.layers
            ]
            row = np.array(shares, dtype=np.float32)
            if len(self._rows) > MAX_SETTINGS:
                self._rows.clear()
            self._rows[key] = row
        return row

    def _covered(self, targets: NDArray[np.int64], options: Sequence[Options]) -> NDArray[np.bool_]:
        asks_table = np.array([o.rule for o in options])
        return ~asks_table | np.isin(targets, self.table.classes)

    def _require(self, covered: NDArray[np.bool_], targets: NDArray[np.int64]) -> None:
        if not covered.all():
            missing = sorted({int(target) for target in targets[~covered]})
            raise no_row_for(missing, self.table.name, len(self.table.classes), self.table.labels)

    def _checked_images(self, images: Floats) -> Floats:
        if not isinstance(images, np.ndarray):
            raise OptionError("images", type(images).__name__, "a numpy.ndarray")
        height, width = self._size
        fits = images.ndim == 4 and len(images) > 0 and images.shape[1] == 3 and images.dtype == np.float32
        if not fits or any(
            side < 1 or fixed not in (None, side) for side, fixed in zip(images.shape[2:], self._size, strict=True)
        ):
            shape = f"(batch >= 1, 3, {height or 'height'}, {width or 'width'})"
            raise OptionError("images", f"{images.dtype} {images.shape}", f"float32 of shape {shape}")
        return np.ascontiguousarray(images)

    def _target_indices(self, targets: Target | Sequence[Target] | NDArray[np.int64], batch: int) -> NDArray[np.int64]:
        given = targets.tolist() if isinstance(targets, np.ndarray) else targets
        if isinstance(given, str) or not isinstance(given, Sequence):
            given = [given] * batch
        if len(given) != batch:
            raise OptionError("targets", given, f"one target, or one for each of the {batch} images")
        return np.array([self.target_index(target) for target in given], dtype=np.int64)

    def _checked_signature(self) -> tuple[int | None, int | None]:
        """Height and width of the images, None where any will do. Raises ModelError for another graph than ours."""
        for expected, found in (
            (_INPUTS, self._session.get_inputs()),
            (_OUTPUTS, self._session.get_outputs()),
        ):
            types = {one.name: one.type for one in found}
            if types != {name: f"tensor({kind})" for name, kind in expected.items()}:
                what = "inputs" if expected is _INPUTS else "outputs"
                wanted = ", ".join(f"{name} {kind}" for name, kind in expected.items())
                raise ModelError(f"ONNX file '{self._path}' has the {what} {types}, expected {wanted}.")
        shapes = {one.name: one.shape for one in (*self._session.get_inputs(), *self._session.get_outputs())}
        classes, columns = shapes["logits"][-1], shapes["quantile"][-1]
        if isinstance(classes, int) and classes != len(self.model.labels):
            raise ModelError(
                f"ONNX file '{self._path}' has logits of {classes} classes, its metadata has "
                f"{len(self.model.labels)} labels."
            )
        if isinstance(columns, int) and columns != len(self.graph.layers):
            raise ModelError(
                f"ONNX file '{self._path}' takes quantiles of {columns} layers, its metadata has "
                f"{len(self.graph.layers)}."
            )
        height, width = (side if isinstance(side, int) else None for side in shapes["images"][2:])
        return height, width

    def _prediction_session(self) -> Any:
        with self._making_predictor:
            if self._predictor is None:
                self._predictor = self._session_of(_prediction_alone(self._read()))
            return self._predictor

    def _feature_session(self) -> Any:
        with self._making_features:
            if self._no_features is not None:  # another thread tried meanwhile
                raise ModelError(self._no_features)
            if self._feature_cut is None:
                assert self._features is not None  # drift looked
                try:
                    part = _features_alone(self._read(), self._features, self.table.channels)
                    if self._predictor is not None:
                        self._content = None  # all that is made of it has been: not while a session is made as well
                    self._feature_cut = self._session_of(part)
                except Exception as error:
                    what = f"{type(error).__name__}: {error}"
                    self._no_features = f"The features of ONNX file '{self._path}' cannot be computed: {what}"
                    raise
            return self._feature_cut

    def _read(self) -> Any:
        """The file's model, its external weights where they were."""
        if self._content is not None:
            return _onnx().load_model_from_string(self._content)
        return _onnx().load(os.fspath(self._path), load_external_data=False)

    def _session_of(self, model: bytes) -> Any:
        settings = _session_options(self._threads)
        settings.add_session_config_entry(_WEIGHTS_FOLDER, os.fspath(self._path.parent.absolute()))
        return _opened(model, self._path, settings, self._providers)


@dataclass(frozen=True)
class _Plan:
    """What the graph is asked for each image."""

    quantile: Floats  # (B, L)
    gamma: Floats  # (B,)


class _Found:
    """An explanation's arrays, filled image by image."""

    def __init__(self, images: Floats, classes: int) -> None:
        batch = len(images)
        self.logits = np.empty((batch, classes), dtype=np.float32)
        self.targets = np.empty(batch, dtype=np.int64)
        self.attributions = np.empty_like(images)
        self.identity = np.zeros(batch, dtype=np.int64)
        self.gap = np.full(batch, math.nan, dtype=np.float32)
        self.complete = np.ones(batch, dtype=np.bool_)


def _not_in_graph(option: str, value: object, allowed: str) -> OptionError:
    return OptionError(option, value, f"{allowed}, with this ONNX graph")


def _expanded(baseline: Floats, images: Floats) -> Floats:
    if not isinstance(baseline, np.ndarray) or baseline.shape not in (images.shape[1:], images.shape):
        found = baseline.shape if isinstance(baseline, np.ndarray) else type(baseline).__name__
        raise OptionError("baseline", found, f"an array of shape {images.shape[1:]} or {images.shape}")
    return np.broadcast_to(baseline.astype(np.float32), images.shape)


def _session_options(threads: int | None) -> Any:
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise OptionError("threads", threads, "an integer of at least 1, or none for ONNX Runtime's own choice")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3  # errors: a library says nothing on standard error
    return options


def _checked_providers(providers: Sequence[str] | None) -> list[str]:
    if providers is None:
        return ["CPUExecutionProvider"]
    known = onnxruntime.get_available_providers()
    if isinstance(providers, str) or not providers or any(one not in known for one in providers):
        raise OptionError("providers", providers, f"one or more of {', '.join(known)}")
    return list(providers)


def _opened(model: Path | bytes, path: Path, settings: Any, providers: list[str]) -> Any:
    """A session of the file, or of a model made from the file at `path`. Raises ModelError."""
    content = os.fspath(model) if isinstance(model, Path) else model
    try:
        session = onnxruntime.InferenceSession(content, settings, providers=providers)
        session.disable_fallback()  # to another provider than was chosen, where a call fails
        if isinstance(model, bytes):
            session._model_bytes = None  # kept for that alone: a copy of all weights
        return session
    except MemoryError:
        raise
    except Exception as error:  # its own classes share no base
        raise ModelError(f"ONNX file '{path}' cannot be opened: {error}") from error


def _prediction_alone(model: Any) -> bytes:
    """The part of a file's graph that the logits need, with its weights where they were. Changes `model`.

    A session computes all of its graph whatever outputs it is asked for: ONNX Runtime's builds for inference take no
    notice of `RunOptions.only_execute_path_to_fetches`. So prediction alone has a session of its own.
    """
    _cut(model.graph, ["logits"])
    content: bytes = model.SerializeToString()
    return content


def _features_alone(model: Any, features: GraphFeatures, channels: Mapping[str, int]) -> bytes:
    """The part of a file's graph that the features need, and their means. Changes `model`.

    `images` `(B, 3, h, w)`, `watch/rows` `(B,)` of the table -> `watch/gap` `(B, N)`, `watch/rank` `(B, N)`. No
    names of the network's own begin so.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    _cut(graph, [name for name in (*features.tensors, features.ranks) if name])

    def add(kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        graph.node.append(helper.make_node(kind, list(inputs), [output], name=output, **attributes))
        return output

    def constant(name: str, array: NDArray[Any]) -> str:
        graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    spatial = constant("watch/spatial", np.array([2, 3], dtype=np.int64))
    parts, start = [], 0
    for place, (tensor, positive, width) in enumerate(
        zip(features.tensors, features.positive, channels.values(), strict=True)
    ):
        own, here = f"watch/{place}", slice(start, start + width)
        start += width
        if tensor is None:  # not compared: its deviations are 0
            batch = add("Shape", ["images"], f"{own}/batch", start=0, end=1)
            shape = add("Concat", [batch, constant(f"{own}/width", np.array([width]))], f"{own}/shape", axis=0)
            parts.append(add("ConstantOfShape", [shape], own))
            continue
        scale, shift = (one[here].reshape(1, -1, 1, 1).copy() for one in (features.scale, features.shift))
        if (scale != 1).any() or (shift != 0).any():
            tensor = add("Sub", [tensor, constant(f"{own}/shift", shift)], f"{own}/shifted")
            tensor = add("Div", [tensor, constant(f"{own}/scale", scale)], f"{own}/scaled")
        if positive:
            tensor = add("Relu", [tensor], f"{own}/positive")
        parts.append(add("ReduceMean", [tensor, spatial], own, keepdims=0))
    add("Concat", parts, _GAP, axis=1)
    add("Gather", [features.ranks, _ROWS], _RANK, axis=0)
    graph.input.append(helper.make_tensor_value_info(_ROWS, TensorProto.INT64, ["batch"]))
    ranks = next(one for one in graph.initializer if one.name == features.ranks)
    graph.output.append(helper.make_tensor_value_info(_GAP, TensorProto.FLOAT, ["batch", start]))
    graph.output.append(helper.make_tensor_value_info(_RANK, ranks.data_type, ["batch", start]))
    content: bytes = model.SerializeToString()
    return content


def _onnx() -> Any:
    try:
        import onnx
    except ModuleNotFoundError as error:
        if (named := missing_package("A part of an exported graph", error)) is None:
            raise
        raise named from error
    return onnx


def _cut(graph: Any, wanted: Sequence[str]) -> None:
    """Leave, in place, what `wanted` needs of the images; of the outputs those that are wanted."""
    maker = {name: node for node in graph.node for name in node.output}
    needed: set[str] = set()
    waiting = list(wanted)
    while waiting:
        name = waiting.pop()
        if name and name not in needed:
            needed.add(name)
            if name in maker:
                waiting.extend(_names_read(maker[name]))
    for parts, keeps in (
        (graph.node, lambda node: any(name in needed for name in node.output)),
        (graph.initializer, lambda one: one.name in needed),
        (graph.sparse_initializer, lambda one: one.values.name in needed),
        (graph.input, lambda one: one.name == "images"),
        (graph.output, lambda one: one.name in wanted),
        (graph.value_info, lambda one: one.name in needed),
    ):
        kept = [part for part in parts if keeps(part)]
        del parts[:]
        parts.extend(kept)


def _names_read(node: Any) -> list[str]:
    """What a node reads, and its subgraphs' nodes: names of their own among it do no harm."""
    names = list(node.input)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            names += (name for inner in graph.node for name in _names_read(inner))
            names += (one.name for one in graph.output)
    return names


def weights_outside(content: bytes) -> set[str]:
    """The files, as a graph names them from where it lies, that its weights are in beside itself. Raises ModelError."""
    onnx = _onnx()
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's own
        raise ModelError(f"These {len(content)} bytes are no ONNX file: {error}") from error
    return {
        entry.value for tensor in _tensors(model.graph, *model.functions)
        for entry in tensor.external_data if entry.key == "location"
    }  # fmt: skip


def _tensors(*graphs: Any) -> Iterator[Any]:
    """The stored tensors of graphs and functions, those of their nodes and subgraphs among them."""
    for graph in graphs:
        yield from getattr(graph, "initializer", ())
        for sparse in getattr(graph, "sparse_initializer", ()):
            yield from (sparse.values, sparse.indices)
        for node in graph.node:
            for attribute in node.attribute:
                yield from (attribute.t, *attribute.tensors)
                for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                    yield from (sparse.values, sparse.indices)
                yield from _tensors(attribute.g, *attribute.graphs)
