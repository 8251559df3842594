"""The front door: a model and its selection table in, predictions and attributions out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from parchgrad.defaults import CONSERVE
from parchgrad.drift import LayerDrift, Reference
from parchgrad.errors import OptionError
from parchgrad.grad_cam import grad_cam
from parchgrad.interest import Interest
from parchgrad.labels import class_index
from parchgrad.methods import MANY_POINTS, PIXELS_PER_PASS, Point, number_of_points, points
from parchgrad.options import REDUCTIONS, Options, per_image
from parchgrad.patterns import match
from parchgrad.quantiles import channels_of_quantile, quantile_of_layers
from parchgrad.runtimes import Gradients, Plan, Points, Witness
from parchgrad.runtimes.dense import seed_score
from parchgrad.runtimes.evidence_seed import OF_LAST_MAP
from parchgrad.runtimes.pytorch import PyTorchRuntime
from parchgrad.tables import NORMALITY_LEVEL, SelectionTable, network_of

if TYPE_CHECKING:
    from parchgrad.models import Model

Target = int | str | None

# Distinct settings of layers and quantile that an explainer remembers what they mean for.
MAX_SETTINGS = 256


@dataclass(frozen=True)
class Explanation:
    """Predictions and attributions of `B` images; tensors on the explainer's device."""

    logits: Tensor  # (B, K)
    targets: Tensor  # (B,) long: the class explained
    attributions: Tensor  # (B, 3, h, w), signed
    identity_layers: Tensor  # (B,) long: layers of the rule whose gradient passed unchanged (the worst point)
    layers_used: Tensor  # (B,) long: layers the rule acts on
    covered: Tensor  # (B,) bool: False where the target has no row in the table; its attribution is NaN
    completeness_gap: Tensor  # (B,): sum of attribution minus score difference; NaN but for plain IG
    complete: Tensor  # (B,) bool: False where `wanted` ended it before its last point; its attribution is NaN
    options: tuple[Options, ...]

    def probabilities(self) -> Tensor:
        """Softmax of the logits, `(B, K)`, in float32 or wider."""
        return self.logits.to(torch.promote_types(self.logits.dtype, torch.float32)).softmax(dim=1)

    def saliency(self, reduction: str = "mean_abs") -> Tensor:
        """Saliency maps `(B, h, w)`, non-negative but for `sum`.

        `mean_abs`: mean over colours of |a|; `max_abs`: their maximum; `sum`: signed sum;
        `positive` / `negative`: the positive / negative part of the signed sum, as a magnitude.
        """
        a = self.attributions
        if reduction == "mean_abs":
            return a.abs().mean(dim=1)
        if reduction == "max_abs":
            return a.abs().amax(dim=1)
        if reduction == "sum":
            return a.sum(dim=1)
        if reduction == "positive":
            return a.sum(dim=1).clamp(min=0)
        if reduction == "negative":
            return (-a.sum(dim=1)).clamp(min=0)
        raise OptionError("reduction", reduction, ", ".join(REDUCTIONS))


class Explainer:
    """Explains images for one model and table. Thread safe; the model is never changed.

    `model` is a model package or a bare `nn.Module` in any mode (it is explained as in eval mode);
    `device` defaults to where its weights are. The weights are shared, not copied, unless they move.
    `backward` is the backward pass: `pruned` (method.md section 4) computes what the rule keeps, from a copy of the
    convolutions' weights in the processor's own order, and predicts faster too; `dense` lets autograd compute
    everything and scales it; `auto` is pruned where the network can be traced. The results are the same. Weights may
    change in place between explanations, as optimisers do; after writing through `.data` make a new explainer.
    Raises TableError when the table is not this model's, UnsupportedModelError where `pruned` is not possible.
    """

    def __init__(
        self,
        model: Model | nn.Module,
        table: SelectionTable,
        device: str | torch.device | None = None,
        backward: str = "auto",
    ) -> None:
        self.model = model
        self.table = table
        if not isinstance(model, nn.Module):
            table.check_model(model)
        self._rows: dict[tuple[object, ...], tuple[list[bool], list[int]]] = {}  # of settings: layers, and channels
        self._runtime = PyTorchRuntime(network_of(model), table, checked_device(device), backward)

    @property
    def device(self) -> torch.device:
        return self._runtime.device

    @property
    def network(self) -> nn.Module:
        """The network that is explained, on this device. Not to be changed: `private_view` gives one that may be."""
        return self._runtime.module

    @property
    def backward(self) -> str:
        """The backward pass in use: `pruned` or `dense`."""
        return self._runtime.backward

    @property
    def dense_because(self) -> str | None:
        """Why the backward pass is the dense one; None where it is pruned."""
        return self._runtime.dense_because

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The layers the table has rows for."""
        return self._runtime.layer_names

    def predict(self, images: Tensor) -> Tensor:
        """Logits `(B, K)` of normalised images `(B, 3, h, w)`, without any of the explanation's cost."""
        return self._runtime.predict(self._checked_images(images))

    def explain(
        self,
        images: Tensor,
        targets: Target | Sequence[Target] | Tensor = None,
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
        baseline: Tensor | None = None,
        uncovered: str = "raise",
        wanted: Callable[[], Sequence[bool]] | None = None,
        pixels_per_pass: int = PIXELS_PER_PASS,
    ) -> Explanation:
        """Predict and explain `images` `(B, 3, h, w)`, normalised, floating point.

        Args:
            targets: the class to explain: index or name, one or one an image; None or -1 = the predicted one.
            method ... noise_seed: see `Options`; each one value or one an image; None = the table's default,
                or Options' own where the table has none.
            baseline: where integrated gradients start, `(3, h, w)` or `(B, 3, h, w)`; default zeros, which is
                the mean colour of normalised images.
            uncovered: a target without a row in the table raises UncoveredTargetError (`raise`), or gets NaN
                for its attribution and False for its `covered` (`nan`). Only where the table is asked:
                instance-wise selection and plain methods cover every class.
            wanted: called before every pass, in this thread: for each image, whether somebody still wants it. An
                image once not wanted is left out of the passes that remain: NaN for its attribution, False for its
                `complete`. A pass that has begun is finished, and so are both of a batch of grad_cam and other methods
                of one point. Where none is wanted raises AbandonedError.
            pixels_per_pass: most pixels (points x h x w) of the points of integrated gradients and SmoothGrad that
                go through the network together, at least one point: bounds memory, whatever the picture's size
                and the number of points. The other methods take the batch in one pass, grad_cam in one of its own.

        A batch of mixed options gives each image what it gets alone. Raises OptionError.
        """
        images = self._checked_images(images).detach().to(self.device)
        if uncovered not in ("raise", "nan"):
            raise OptionError("uncovered", uncovered, "raise, nan")
        if pixels_per_pass < 1:
            raise OptionError("pixels_per_pass", pixels_per_pass, "an integer of at least 1")
        given = {
            "method": method, "rule": rule, "quantile": quantile, "alpha": alpha, "gamma": gamma,
            "conserve": conserve, "selection": selection, "layers": layers,
            "normality_filter": normality_filter, "seed": seed, "steps": steps, "samples": samples,
            "noise": noise, "noise_seed": noise_seed,
        }  # fmt: skip
        options = per_image(len(images), self.table.defaults, given)
        self.require_statistics(options, images.shape[1:])
        chosen = self._target_indices(targets, len(images))
        plan = self._plan(options)
        if uncovered == "raise":
            known = chosen >= 0  # the others are known only after the forward pass
            asked = [o for o, k in zip(options, known.tolist(), strict=True) if k]
            self._require(self._covered(chosen[known], asked), chosen[known])
        interest = Interest(wanted, len(images))
        many = torch.tensor([o.method in MANY_POINTS for o in options])
        cams = torch.tensor([o.method == "grad_cam" for o in options])
        parts = []
        interest.ask()
        if len(one := (~(many | cams)).nonzero()[:, 0]):
            parts.append((one, self._explain_at_image(images, chosen, options, plan, one)))
        if len(mapped := cams.nonzero()[:, 0]):
            parts.append((mapped, self._explain_by_last_map(images, chosen, options, mapped)))
        if len(several := many.nonzero()[:, 0]):
            start = torch.zeros_like(images) if baseline is None else _expanded(baseline, images)
            room = max(1, pixels_per_pass // (images.shape[-2] * images.shape[-1]))
            parts.append(
                (several, self._explain_over_points(images, start, chosen, options, plan, several, room, interest))
            )
        logits, final_targets, attributions, identity, gap, complete = _in_order(parts, len(images))

        covered = self._covered(final_targets, options)
        if uncovered == "raise":
            self._require(covered, final_targets)
        if not bool(covered.all()):
            attributions[~covered] = math.nan
        return Explanation(
            logits=logits,
            targets=final_targets,
            attributions=attributions,
            identity_layers=identity,
            layers_used=plan.active.sum(dim=1).to(self.device),
            covered=covered,
            completeness_gap=gap,
            complete=complete,
            options=tuple(options),
        )

    def watched(self, image: Tensor, target: Target, options: Options, witness: Witness) -> Gradients:
        """One pass of one image `(1, 3, h, w)`, normalised, forward and back under `options`, seen by `witness`.

        The gradient alone: what a method does beyond it (its points, times the input) is left out. `witness` sees
        every layer of the table, in a pass of the dense engine whatever `backward` is. Raises OptionError and, where
        the table is asked, UncoveredTargetError.
        """
        image = self._checked_images(image).detach().to(self.device)
        if len(image) != 1:
            raise OptionError("image", tuple(image.shape), "one image, (1, 3, h, w)")
        self.require_statistics([options], image.shape[1:])
        chosen = self._target_indices(target, 1)
        if bool((chosen >= 0).all()):
            self._require(self._covered(chosen, [options]), chosen)  # before the pass, where it is known by then
        found = self._runtime.watched(image, chosen, self._plan([options]), witness)
        self._require(self._covered(found.targets, [options]), found.targets)
        return found

    def drift(self, images: Tensor, targets: Target | Sequence[Target] | Tensor) -> list[dict[str, LayerDrift]]:
        """How far each of `images` `(B, 3, h, w)`, normalised, is from the table's in the channels of its target.

        The channels are those that the table's defaults select, layer by layer; the features those the table has
        statistics of. Costs one forward pass. A target of -1 or None is the predicted class, for a second one.
        Raises OptionError, UncoveredTargetError, and UnsupportedModelError where a feature cannot be had.
        """
        images = self._checked_images(images)
        chosen = self._target_indices(targets, len(images))
        if bool((chosen < 0).any()):
            chosen = torch.where(chosen < 0, self._runtime.predict(images).argmax(dim=1).cpu(), chosen)
        rows = self.table.rows(chosen)
        features = self.gap_features(images).double().numpy()
        ranks = self.table.rank[rows].numpy()
        return [self.reference.drift(gap, rank) for gap, rank in zip(features, ranks, strict=True)]

    def gap_features(self, images: Tensor) -> Tensor:
        """GAP features `(B, N)` of normalised `images` `(B, 3, h, w)` at the table's own point, on the CPU.

        The layers of `layer_names` lie side by side. Raises OptionError, and UnsupportedModelError where a feature
        cannot be had.
        """
        return self._runtime.features(self._checked_images(images))

    @cached_property
    def reference(self) -> Reference:
        """What GAP features are compared with, and which channels of a class: the table's, by its defaults."""
        table = self.table
        layers = table.layers.values()
        filtered = table.defaults.normality_filter
        return Reference.of(
            {name: layer.channels for name, layer in table.layers.items()},
            table.defaults,
            np.concatenate([layer.mean.numpy() for layer in layers]),
            np.concatenate([layer.std.numpy() for layer in layers]),
            np.concatenate([layer.normality_p.numpy() for layer in layers if layer.normality_p is not None])
            if filtered
            else None,
            NORMALITY_LEVEL,
        )

    def _explain_at_image(
        self, images: Tensor, targets: Tensor, options: list[Options], plan: Plan, which: Tensor
    ) -> tuple[Tensor, ...]:
        if len(which) < len(images):
            images, targets, plan = images[which.to(images.device)], targets[which], plan.take(which)
        here = images
        result = self._runtime.gradients(here, targets, plan)
        attributions = result.gradients
        times_input = [options[i].method == "input_x_gradient" for i in which.tolist()]
        if any(times_input):
            rows = torch.tensor(times_input, device=here.device)[:, None, None, None]
            attributions = torch.where(rows, attributions * here, attributions)
        nothing = torch.full((len(which),), math.nan, dtype=result.gradients.dtype, device=here.device)
        complete = torch.ones(len(which), dtype=torch.bool, device=here.device)
        return result.logits, result.targets, attributions, result.identity_layers, nothing, complete

    def _explain_by_last_map(
        self, images: Tensor, targets: Tensor, options: list[Options], which: Tensor
    ) -> tuple[Tensor, ...]:
        images = images[which.to(images.device)]
        weighted = torch.tensor([options[i].seed == "probability_weighted_logit" for i in which.tolist()])
        found = self._runtime.at_last_map(images, targets[which], weighted)
        cam = grad_cam(found.values, found.gradients, images.shape[-2:]).to(images.dtype)
        attributions = cam[:, None].repeat(1, images.shape[1], 1, 1)
        identity = torch.zeros(len(which), dtype=torch.long, device=cam.device)
        nothing = torch.full((len(which),), math.nan, dtype=cam.dtype, device=cam.device)
        complete = torch.ones(len(which), dtype=torch.bool, device=cam.device)
        return found.logits, found.targets, attributions, identity, nothing, complete

    def _explain_over_points(
        self,
        images: Tensor,
        baseline: Tensor,
        targets: Tensor,
        options: list[Options],
        plan: Plan,
        which: Tensor,
        room: int,
        interest: Interest,
    ) -> tuple[Tensor, ...]:
        """`room`: how many points go through the network together."""
        interest.ask()
        logits = self._runtime.predict(images[which])
        asked = targets[which].to(logits.device)
        final = torch.where(asked < 0, logits.argmax(dim=1), asked)
        total = torch.zeros_like(images[which])
        identity = torch.zeros(len(which), dtype=torch.long, device=self.device)
        walks = [points(images[i], options[i], baseline[i]) for i in which.tolist()]
        left = [number_of_points(options[i]) for i in which.tolist()]
        lines = [number > 2 for number in left]  # what two points give is no help to fewer
        complete = [True] * len(which)
        starts, ends = baseline[which], images[which]
        kept: dict[str, Any] = {}
        while any(left):
            # A GPU's passes are queued long before they end; reading a number waits.
            still = interest.ask(partial(_read, identity))
            for row, i in enumerate(which.tolist()):
                if left[row] and not still[i]:
                    left[row], complete[row] = 0, False
            if not any(left):
                break  # what is still wanted is done
            chunk: list[tuple[int, Point]] = []
            for row, walk in enumerate(walks):
                taken = list(islice(walk, min(left[row], room - len(chunk))))
                left[row] -= len(taken)
                chunk += ((row, one) for one in taken)
            rows = torch.tensor([row for row, _ in chunk])
            together = Points(
                images=torch.stack([point.image for _, point in chunk]),
                rows=rows.tolist(),
                weights=[point.weight for _, point in chunk],
                fractions=[point.fraction if lines[row] else None for row, point in chunk],
                starts=starts,
                ends=ends,
                kept=kept,
            )
            sums, unchanged = self._runtime.sums(together, final[rows.to(final.device)], plan.take(which[rows]))
            total.index_add_(0, torch.unique(rows).to(total.device), sums)
            identity = identity.scatter_reduce(0, rows.to(total.device), unchanged, "amax")
        integrated = torch.tensor([options[i].method == "integrated_gradients" for i in which.tolist()])
        path = torch.where(integrated.to(total.device)[:, None, None, None], (images - baseline)[which], 1.0)
        attributions = total * path
        finished = torch.tensor(complete, device=total.device)
        attributions[~finished] = math.nan
        gap = self._completeness_gap(attributions, logits, baseline[which], final, [options[i] for i in which.tolist()])
        return logits, final, attributions, identity, gap, finished

    def _completeness_gap(
        self, attributions: Tensor, logits: Tensor, baseline: Tensor, targets: Tensor, options: list[Options]
    ) -> Tensor:
        """Sum of attribution minus (score at image - score at baseline); NaN where completeness does not hold."""
        plain = torch.tensor(
            [o.method == "integrated_gradients" and not o.rule and o.seed != "evidence" for o in options]
        )
        gap = torch.full((len(options),), math.nan, dtype=attributions.dtype, device=attributions.device)
        if bool(plain.any()):
            weighted = torch.tensor([o.seed == "probability_weighted_logit" for o in options]).to(self.device)
            rise = seed_score(logits, targets, weighted) - seed_score(
                self._runtime.predict(baseline), targets, weighted
            )
            gap = torch.where(plain.to(gap.device), attributions.sum(dim=(1, 2, 3)) - rise, gap)
        return gap

    def _plan(self, options: list[Options]) -> Plan:
        names = self.layer_names
        channels = [self.table.layers[name].channels for name in names]
        rows = self._rows
        if len(rows) > MAX_SETTINGS:
            rows.clear()

        def row(o: Options) -> tuple[list[bool], list[int]]:
            # Callers rarely have more than a few distinct settings; each is matched against the layers once.
            key = (o.layers, o.rule, repr(o.quantile))
            found = rows.get(key)
            if found is None:
                quantiles = quantile_of_layers(o.quantile, match(names, o.layers)) if o.rule else {}
                active = [name in quantiles for name in names]
                counts = [
                    channels_of_quantile(quantiles.get(name, 1.0), c) for name, c in zip(names, channels, strict=True)
                ]
                found = rows[key] = active, counts
            return found

        each = [row(o) for o in options]
        return Plan(
            active=torch.tensor([active for active, _ in each]),
            count=torch.tensor([counts for _, counts in each]),
            log_alpha=torch.tensor(
                [math.nan if o.alpha is None else math.log(o.alpha) for o in options], dtype=torch.float64
            ),
            gamma=torch.tensor([float(o.gamma) for o in options], dtype=torch.float64),
            conserve=torch.tensor([CONSERVE.index(o.conserve) for o in options]),
            instance=torch.tensor([o.selection == "instance" for o in options]),
            normality_filter=torch.tensor([o.normality_filter for o in options]),
            guided=torch.tensor([o.method == "guided_backprop" for o in options]),
            probability_weighted=torch.tensor([o.seed == "probability_weighted_logit" for o in options]),
            evidence=torch.tensor([o.seed == "evidence" for o in options]),
        )

    def _require(self, covered: Tensor, targets: Tensor) -> None:
        if not bool(covered.all()):
            self.table.rows(targets[~covered])  # raises, naming the classes

    def _covered(self, targets: Tensor, options: list[Options]) -> Tensor:
        asks_table = torch.tensor([o.rule and o.selection == "class" for o in options], dtype=torch.bool)
        asks_table = asks_table.to(targets.device)
        return ~asks_table | (self.table.row_of_class.to(targets.device)[targets] >= 0)

    def _checked_images(self, images: Tensor) -> Tensor:
        if not isinstance(images, Tensor):
            raise OptionError("images", type(images).__name__, "a torch.Tensor")
        if images.dim() != 4 or len(images) == 0 or not images.is_floating_point():
            found = f"{images.dtype} {tuple(images.shape)}"
            raise OptionError("images", found, "floating point of shape (batch >= 1, channels, height, width)")
        if images.dtype != self._runtime.dtype and not torch.is_autocast_enabled(self.device.type):
            raise OptionError("images", images.dtype, f"{self._runtime.dtype}, as the model's weights")
        return images

    def require_statistics(
        self, options: Sequence[Options], size: Sequence[int] | None = None, *, look: bool = True
    ) -> None:
        """Raises OptionError where an option asks for statistics that the table does not hold, or the seed `evidence`
        or the method `grad_cam` for a last map that the network does not have.

        That depends on the images' `size`, (3, height, width); default: the model package's, and of a bare network or
        a package of pictures in their own sizes it is not looked for. Each size's first time takes some predictions of
        one image; without `look` none is made, and only what was found before is refused.
        """
        if not self.table.normality_tested and any(o.normality_filter for o in options):
            raise OptionError("normality_filter", True, f"false: table '{self.table.name}' holds no normality test")
        if self.table.statistics_point != "convolution" and any(o.rule and o.selection == "instance" for o in options):
            raise OptionError(
                "selection", "instance", f"class: table '{self.table.name}' has its statistics after the activation"
            )
        if size is None and not isinstance(self.model, nn.Module) and self.model.preprocessing.rule != "native":
            size = (3, *self.model.preprocessing.size)
        for option, (value, _) in OF_LAST_MAP.items():
            if size is not None and any(getattr(o, option) == value for o in options):
                self._runtime.require_last_map(size, option, look=look)

    def _target_indices(self, targets: Target | Sequence[Target] | Tensor, batch: int) -> Tensor:
        if isinstance(targets, (Tensor, np.ndarray)):
            targets = targets.tolist()
        if isinstance(targets, str) or not isinstance(targets, Sequence):
            targets = [targets] * batch
        if len(targets) != batch:
            raise OptionError("targets", targets, f"one target, or one for each of the {batch} images")
        return torch.tensor([self.target_index(target) for target in targets])

    def target_index(self, target: Target) -> int:
        """A target's class index; -1 for the predicted class. Raises UnknownTargetError.

        A target is an index, -1 or None, or a class's name; with a model package also its class id.
        """
        if target is None or (isinstance(target, int) and target == -1):
            return -1
        if not isinstance(self.model, nn.Module):
            return self.model.class_index(target)
        return class_index(target, self.table.labels)


def checked_device(device: str | torch.device | None) -> torch.device | None:
    """The device, if this machine has it; None stays None. Raises OptionError."""
    if device is None:
        return None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError("device", str(device), "a torch device of this machine, such as cpu or cuda") from error
    return torch.device(device)


def _read(number: Tensor) -> int:
    return int(number.sum())


def _expanded(baseline: Tensor, images: Tensor) -> Tensor:
    if baseline.shape not in (images.shape[1:], images.shape):
        allowed = f"a tensor of shape {tuple(images.shape[1:])} or {tuple(images.shape)}"
        raise OptionError("baseline", tuple(baseline.shape), allowed)
    return baseline.detach().to(images).expand_as(images)


def _in_order(parts: list[tuple[Tensor, tuple[Tensor, ...]]], batch: int) -> Iterator[Tensor]:
    """Each column of the parts put back into the batch's order."""
    if len(parts) == 1:
        yield from parts[0][1]
        return
    order = torch.cat([which for which, _ in parts]).argsort()
    assert len(order) == batch
    for column in zip(*(values for _, values in parts), strict=True):
        joined = torch.cat(column)
        yield joined[order.to(joined.device)]
