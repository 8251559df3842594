"""What tells that a network's weights were changed in place: the program holds copies of them, folded and packed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Values of each weight that are compared besides its counter.
_SAMPLES = 8


@dataclass(frozen=True)
class State:
    """What was seen of the weights at one moment."""

    versions: tuple[int, ...]
    samples: Tensor  # the values' bytes


class Weights:
    """The parameters and buffers of `view`, which share memory and PyTorch's counter of in-place changes with the
    caller's.

    A change through `.data` is not counted, nor is one of an inference tensor: of every floating-point tensor a few
    values are compared as well. A change through `.data` that misses those goes unseen.
    """

    def __init__(self, view: nn.Module) -> None:
        every = list({id(t): t for t in (*view.parameters(), *view.buffers())}.values())
        self._counted = [tensor for tensor in every if not tensor.is_inference()]
        device = next(view.parameters()).device
        sampled = [t for t in every if t.is_floating_point() and t.device == device and t.numel()]
        self._samples = [_sample(t) for t in sampled]

    def state(self) -> State:
        samples = torch.cat(self._samples) if self._samples else torch.empty(0)
        return State(tuple([tensor._version for tensor in self._counted]), samples.view(torch.uint8))

    def counted_since(self, state: State) -> bool:
        """Whether a change was counted since; asks the host alone."""
        return state.versions != tuple([tensor._version for tensor in self._counted])

    def differ_from(self, state: State) -> Tensor:
        """Whether the samples do: a bool on the device, for whoever must not wait for it yet."""
        return (self.state().samples != state.samples).any()

    def unchanged_since(self, state: State) -> bool:
        now = self.state()
        return now.versions == state.versions and torch.equal(now.samples, state.samples)


def _sample(tensor: Tensor) -> Tensor:
    """A few of the tensor's values, spread over its memory; a view of it."""
    values = tensor.detach()
    # Of a tensor with gaps in its memory, or overlaps, the first alone.
    dense = values.is_contiguous() or values.is_contiguous(memory_format=torch.channels_last)
    length = tensor.numel() if dense else 1
    step = max(1, (length - 1) // (_SAMPLES - 1))
    return values.as_strided(((length - 1) // step + 1,), (step,))
