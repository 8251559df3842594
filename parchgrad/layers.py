"""Which layers take part: the convolutions of a network by dotted name, and patterns over those names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from parchgrad.errors import OptionError


def convolutions(module: nn.Module) -> dict[str, int]:
    """Name -> output channels of every convolution, in `named_modules` order (registration order)."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return {name: layer.out_channels for name, layer in module.named_modules() if isinstance(layer, kinds)}


def match(names: Iterable[str], patterns: Sequence[str], option: str = "layers") -> tuple[str, ...]:
    """The names that fit any of the glob patterns (`layer4.*`, `*`), in the order of `names`.

    Raises OptionError for a pattern that fits none: a typing mistake must not switch the rule off;
    `option` is the name of the option the patterns came in.
    """
    names = tuple(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise OptionError(option, pattern, f"names or glob patterns ('layer4.*') of {names[0]} ... {names[-1]}")
    return tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))
