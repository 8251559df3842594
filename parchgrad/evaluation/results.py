"""The findings of an evaluation: every value, their means with intervals, and the files they are written to."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parchgrad.errors import missing_package
from parchgrad.evaluation.cost import Cost
from parchgrad.evaluation.intervals import RESAMPLES, Interval, difference_interval, mean_interval
from parchgrad.evaluation.measures import MEASURES, Measure
from parchgrad.evaluation.methods import Method, Unavailable
from parchgrad.files import beside, write_text

Floats = NDArray[np.float64]

FORMAT = 1
# From fewer photographs a bootstrap's interval of a difference leaves 0 out too often: of equal methods, 11 % at 8
# photographs, 23 % at 4, 49 % at 2 (of normal differences, 150 repeats each).
FEWEST_IMAGES = 10
# The row that a report is about.
OURS = "ParchGrad"
# What every other method is compared with, picture by picture.
REFERENCE = "gradient"


@dataclass(frozen=True)
class Shown:
    """A picture that was measured."""

    name: str
    kind: str  # `mosaic` or `photograph`
    group: str  # the photograph its target is of
    target: int
    label: str
    probability: float  # of the target, in the untouched picture
    predicted: bool  # whether the target is the prediction


@dataclass(frozen=True)
class Row:
    """A method that was measured, without its code."""

    name: str
    group: str
    words: str
    source: str
    library: str
    options: Mapping[str, Any]
    cost: Cost | None

    @classmethod
    def of(cls, method: Method, cost: Cost | None) -> Row:
        return cls(method.name, method.group, method.words, method.source, method.library, method.options, cost)


@dataclass(frozen=True)
class Cell:
    """One method by one measure: its mean, and that of its difference from the plain gradient's."""

    interval: Interval
    difference: Interval | None  # None for the plain gradient itself, and without it

    @property
    def distinct(self) -> bool:
        """Whether the difference from the plain gradient is beyond its interval; never of fewer than FEWEST_IMAGES."""
        gap = self.difference
        return gap is not None and gap.images >= FEWEST_IMAGES and (gap.low > 0 or gap.high < 0)


@dataclass(frozen=True)
class MeanCurve:
    """A method's mean score at fractions of the pixels, `(n,)` each; of `images` pictures."""

    fractions: Floats
    mean: Floats
    images: int


@dataclass(frozen=True)
class Results:
    """All that was found. `values[measure][method]` holds one number a picture of `pictures[measure]`, NaN for none.

    curves: `insertion`, `deletion`, by method.  layers: the layers of the cascade, the last of the network first;
    `cascade[method]` the mean similarity when the weights of those up to each are drawn anew.
    """

    settings: Mapping[str, Any]
    rows: tuple[Row, ...]
    unavailable: tuple[Unavailable, ...]
    shown: tuple[Shown, ...]
    pictures: Mapping[str, tuple[int, ...]]  # of each measure: indices in `shown`
    values: Mapping[str, Mapping[str, Floats]]
    curves: Mapping[str, Mapping[str, MeanCurve]] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    cascade: Mapping[str, Floats] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    resamples: int = RESAMPLES

    @property
    def ours(self) -> Row | None:
        """The row that sentences and pictures are about: that called ParchGrad, else the first of its group."""
        rows = [row for row in self.rows if row.group == "parchgrad"]
        return next((row for row in rows if row.name == OURS), rows[0] if rows else None)

    @property
    def measures(self) -> tuple[Measure, ...]:
        """Those that were measured, in the order of MEASURES."""
        return tuple(measure for measure in MEASURES if self.values.get(measure.key))

    @cached_property
    def cells(self) -> Mapping[str, Mapping[str, Cell]]:
        """By measure and method; a method without any value is left out."""
        return {measure.key: dict(self._cells(measure.key)) for measure in self.measures}

    def _cells(self, key: str) -> Iterator[tuple[str, Cell]]:
        groups = [self.shown[index].group for index in self.pictures[key]]
        reference = self.values[key].get(REFERENCE)
        for name, values in self.values[key].items():
            if not np.isfinite(values).any():
                continue
            difference = None
            if reference is not None and name != REFERENCE and np.isfinite(values - reference).any():
                difference = difference_interval(values, reference, groups, resamples=self.resamples)
            yield name, Cell(mean_interval(values, groups, resamples=self.resamples), difference)

    def ranking(self, key: str) -> list[str]:
        """Methods by their mean, best first; of a measure without a direction, highest first."""
        (measure,) = (one for one in MEASURES if one.key == key)
        sign = 1 if measure.better == "lower" else -1
        return sorted(self.cells[key], key=lambda name: sign * self.cells[key][name].interval.mean)

    def long(self) -> Iterator[tuple[str, str, str, str, int, float]]:
        """Every value: (picture's name, kind, measure, method, target, value)."""
        for key, by_method in self.values.items():
            for name, values in by_method.items():
                for index, value in zip(self.pictures[key], values.tolist(), strict=True):
                    one = self.shown[index]
                    yield one.name, one.kind, key, name, one.target, value

    def to_json(self) -> dict[str, Any]:
        """JSON types only; NaN and infinity are null."""
        plain: dict[str, Any] = _plain(
            {
                "format": FORMAT,
                "settings": self.settings,
                "measures": [asdict(measure) for measure in self.measures],
                "methods": [asdict(row) for row in self.rows],
                "unavailable": [asdict(one) for one in self.unavailable],
                "notes": self.notes,
                "cells": {
                    key: {name: asdict(cell) | {"distinct": cell.distinct} for name, cell in cells.items()}
                    for key, cells in self.cells.items()
                },
                "curves": {
                    key: {name: asdict(curve) for name, curve in curves.items()} for key, curves in self.curves.items()
                },
                "layers": self.layers,
                "cascade": self.cascade,
                "pictures": [asdict(one) for one in self.shown],
                "values": {
                    key: {"pictures": self.pictures[key], "methods": by_method}
                    for key, by_method in self.values.items()
                },
            }
        )
        return plain

    def write_json(self, path: Path) -> None:
        """The whole, readable by anything. Raises OSError."""
        write_text(path, json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")

    def write_parquet(self, path: Path) -> None:
        """Every value a row; the settings are in the file's metadata. Raises OSError, MissingPackageError."""
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ModuleNotFoundError as error:
            raise missing_package("Parquet", error) or error from error
        names = ("picture", "kind", "measure", "method", "target", "value")
        columns = list(zip(*self.long(), strict=True)) or [()] * len(names)
        kinds = (pa.string(), pa.string(), pa.string(), pa.string(), pa.int64(), pa.float64())
        table = pa.table(
            {name: pa.array(column, kind) for name, column, kind in zip(names, columns, kinds, strict=True)},
            metadata={"parchgrad.settings": json.dumps(_plain(self.settings), allow_nan=False)},
        )
        with beside(path) as temporary:
            pq.write_table(table, temporary)


def _plain(value: Any) -> Any:
    """JSON types only; numbers rounded to nine digits."""
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    return value
