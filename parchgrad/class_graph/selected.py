"""The channels that a table's defaults select for each class, and how strongly. Arrays; runs no model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from parchgrad.class_graph.graph import strengths
from parchgrad.patterns import match
from parchgrad.quantiles import channels_of_quantile, quantile_of_layers
from parchgrad.tables import NORMALITY_LEVEL, SelectionTable


@dataclass(frozen=True)
class Selected:
    """The channels that a table's defaults select, slots as in `graph.py`; `K` classes, `S` slots."""

    layers: dict[str, int]  # name -> channels, of the layers that the defaults act on
    widths: dict[str, int]  # name -> slots
    channel: NDArray[np.int16]  # (K, S), -1 for none
    log_p: NDArray[np.float32]  # (K, S), 0 for none

    @property
    def slots(self) -> dict[str, slice]:
        ends = np.cumsum([0, *self.widths.values()]).tolist()
        return {name: slice(ends[i], ends[i + 1]) for i, name in enumerate(self.widths)}

    @property
    def group(self) -> NDArray[np.int64]:
        """`(S,)`: which layer a slot is of."""
        return np.repeat(np.arange(len(self.widths)), list(self.widths.values()))

    def of_class(self, row: int) -> dict[str, NDArray[np.int64]]:
        """By layer the class's channels, strongest first."""
        rows = {name: self.channel[row, here].astype(np.int64) for name, here in self.slots.items()}
        return {name: channels[channels >= 0] for name, channels in rows.items()}

    def of_any(self) -> dict[str, NDArray[np.int64]]:
        """By layer the channels that at least one class selects, ascending."""
        found = {name: np.unique(self.channel[:, here]).astype(np.int64) for name, here in self.slots.items()}
        return {name: channels[channels >= 0] for name, channels in found.items()}

    def strength(self) -> NDArray[np.float64]:
        """`(K, S)`, as `graph.strengths`."""
        return np.stack([self.strength_of(row) for row in range(len(self.channel))])

    def strength_of(self, row: int) -> NDArray[np.float64]:
        """`(S,)` of one class."""
        found = np.zeros(self.channel.shape[1])
        for here in self.slots.values():
            found[here] = strengths(self.log_p[row, here], self.channel[row, here] >= 0)
        return found


def selected(table: SelectionTable) -> Selected:
    """Class-wise, by the table's default quantile, layers and normality filter (method.md section 1)."""
    names = match(table.layer_names, table.defaults.layers)
    quantiles = quantile_of_layers(table.defaults.quantile, names)
    channels, log_p, widths = [], [], {}
    for name in names:
        layer = table.layers[name]
        count = channels_of_quantile(quantiles[name], layer.channels)
        # By rank: the table breaks ties of log p by t.
        best = layer.rank.numpy().argsort(axis=1, kind="stable")[:, :count].astype(np.int16)
        values = np.take_along_axis(layer.log_p.numpy(), best.astype(np.int64), axis=1)
        values = np.maximum(values, np.finfo(np.float32).min).astype(np.float32)
        if table.defaults.normality_filter and layer.normality_p is not None:
            out = layer.normality_p.numpy()[best] >= NORMALITY_LEVEL
            # Those that stay move up: none stands between two that are there.
            order = out.argsort(axis=1, kind="stable")
            best, values = (np.take_along_axis(a, order, axis=1) for a in (np.where(out, -1, best), values))
            values = np.where(best < 0, 0, values)
        channels.append(best.astype(np.int16))
        log_p.append(values.astype(np.float32))
        widths[name] = count
    layers = {name: table.layers[name].channels for name in names}
    return Selected(layers, widths, np.concatenate(channels, 1), np.concatenate(log_p, 1))
