"""A table's page: one self-contained HTML file, written from `page.html.j2`."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from numpy.typing import NDArray

from parchgrad.errors import OptionError, UncoveredTargetError
from parchgrad.files import write_text
from parchgrad.layers import match
from parchgrad.models import Model
from parchgrad.sources import Source
from parchgrad.table_page import figures, photographs
from parchgrad.table_page.heat_map import CLASSES_WITH_NAMES, heat_map, picture
from parchgrad.table_page.photographs import Progress
from parchgrad.tables import Quantile, SelectionTable, quantile_of_layers

# Up to this many classes every class gets pictures; of more only those that are named.
CLASSES_WITH_PICTURES = 20
# Bounds the part of the page that a class is chosen from: classes x layers x channels listed.
LISTED_CHANNELS = 200_000

DEPTHS = ("early", "middle", "late")
BINS = 20
TOP = 10  # columns of a histogram end at this many times the uniform
PAIRS = 20
ALIKE = 5


@dataclass(frozen=True)
class _Layer:
    """What the page says of one layer."""

    name: str
    owners: figures.Ownership
    jaccard: float  # mean over all pairs of classes
    p: figures.PValues


@dataclass(frozen=True)
class _Share:
    """Some of the layers, and how alike the classes are in them, in the order of the whole."""

    title: str
    layers: int
    picture: str
    mean: float
    chance: float


def write_page(
    table: SelectionTable,
    path: str | os.PathLike[str],
    *,
    model: Model | None = None,
    images: Source | None = None,
    picture_classes: Sequence[int] | None = None,
    layers: Sequence[str] | None = None,
    quantile: Quantile | None = None,
    channels_per_class: int = 8,
    crops_per_channel: int = 4,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> None:
    """Write `table` as one HTML file that needs nothing else: no other file, no network.

    `layers` and `quantile` take the table's defaults where left out. With `images`, which need the `model`, each of
    `picture_classes` (class indices; left out: all of at most 20 classes, none of more) shows the
    `crops_per_channel` photographs that excite its `channels_per_class` strongest channels most; `progress(done,
    total)` counts photographs. The page grows by about 20 kB a photograph shown. Raises OptionError,
    UncoveredTargetError for a class without a row, TableError for another model's table.
    """
    for option, count in (("channels_per_class", channels_per_class), ("crops_per_channel", crops_per_channel)):
        if count < 1:
            raise OptionError(option, count, "an integer >= 1")
    if images is not None and model is None:
        raise OptionError("model", None, "the table's model, where images are given")
    if model is not None:
        table.check_model(model)
    names = match(table.layer_names, table.defaults.layers if layers is None else layers)
    quantiles = quantile_of_layers(table.defaults.quantile if quantile is None else quantile, names)
    for value in quantiles.values():
        if not 0 < value <= 1:
            raise OptionError("quantile", value, "0 < quantile <= 1")
    rows = _picture_rows(table, picture_classes)
    context = _header(table, names, quantiles) | _numbers(table, names, quantiles, channels_per_class)
    context |= {"photographs": None, "pictures": None, "images_given": images is not None}
    if model is not None and model.class_ids:
        for entry in context["choice"]["classes"]:
            entry["id"] = model.class_ids[entry["index"]]
    if images is not None and model is not None and rows:
        wanted = {row: strongest_channels(table, names, row, channels_per_class) for row in rows}
        by_layer: dict[str, list[int]] = {}
        for layer, channel in (place for places in wanted.values() for place in places):
            by_layer.setdefault(layer, []).append(channel)
        excited = photographs.most_exciting(
            model, images, by_layer, crops_per_channel,
            point=table.statistics_point, batch_size=batch_size, device=device, progress=progress,
        )  # fmt: skip
        # The last part only, as in a table's manifest: a page is passed on, the folders of a machine are not.
        root = images.root.rstrip("/").rsplit("/", 1)[-1]
        context["photographs"] = {"root": root, "read": excited.images, "unreadable": len(excited.unreadable)}
        context["pictures"] = _pictures(table, model, images, wanted, excited, quantiles)
    write_text(Path(path), _render(context))


def strongest_channels(table: SelectionTable, layers: Sequence[str], row: int, count: int) -> list[tuple[str, int]]:
    """A class's `count` strongest channels `(layer, channel)` over all `layers`: the smallest log p.

    Ties go to the better rank in its layer, then to the earlier layer. Empty for a class that was not tested.
    """
    found: list[tuple[float, int, int, str, int]] = []
    for position, name in enumerate(layers):
        layer = table.layers[name]
        log_p, rank = layer.log_p[row].numpy(), layer.rank[row].numpy()
        for channel in np.flatnonzero((rank < count) & ~np.isnan(log_p)).tolist():
            found.append((float(log_p[channel]), int(rank[channel]), position, name, channel))
    return [(name, channel) for _, _, _, name, channel in sorted(found)[:count]]


def _header(table: SelectionTable, names: Sequence[str], quantiles: Mapping[str, float]) -> dict[str, Any]:
    images = table.images_per_class
    return {
        "table": table,
        "layers_shown": list(names),
        "layers_hidden": [name for name in table.layers if name not in set(names)],
        "quantile_text": _range(sorted(set(quantiles.values())), "g"),
        "images": {"all": sum(images), "least": min(images), "most": max(images)},
        "channels": sum(table.layers[name].channels for name in names),
        "defaults": table.defaults.to_json(),
        "built": [(key, _plain(value)) for key, value in table.built.items()],
    }


def _numbers(
    table: SelectionTable, names: Sequence[str], quantiles: Mapping[str, float], listed: int
) -> dict[str, Any]:
    """Everything that needs no photographs; one layer's selection in memory at a time."""
    classes = len(table.classes)
    listed = max(1, min(listed, LISTED_CHANNELS // (classes * len(names))))
    layers: list[_Layer] = []
    # Summed by depth as it is counted: a matrix a layer would be 400 MB for 1000 classes and 53 layers.
    depth = np.arange(len(names)) * len(DEPTHS) // len(names)
    commons = np.zeros((len(DEPTHS), classes, classes), np.int64)
    chosen: list[dict[str, Any]] = [{"owned": [], "strongest": []} for _ in table.classes]
    for name in names:
        layer, quantile = table.layers[name], quantiles[name]
        selected = figures.selected_channels(layer, quantile, table.defaults.normality_filter)
        common = figures.in_common(selected)
        owners = figures.ownership(layer, selected, quantile)
        commons[depth[len(layers)]] += common
        mean = figures.mean_of_pairs(figures.jaccard(common))
        layers.append(_Layer(name, owners, mean, figures.p_values(layer, BINS)))
        for row, best in enumerate(_strongest_of_layer(table, name, selected, listed)):
            chosen[row]["strongest"].append(best)
            chosen[row]["owned"].append(int(owners.owned_by_class[row]))
    whole = commons.sum(axis=0)
    similarity = figures.jaccard(whole)
    order = figures.similarity_order(similarity)
    for row, entry in enumerate(chosen):
        alike = [i for i in np.argsort(-similarity[row], kind="stable").tolist() if i != row][:ALIKE]
        entry["alike"] = [[i, round(float(similarity[row, i]), 3)] for i in alike]
    labels = [table.labels[table.classes[row]] for row in order]
    tested = sum(layer.p.tested for layer in layers)
    return {
        "layers": layers,
        "similarity": heat_map(labels, similarity[np.ix_(order, order)]) if classes > 1 else None,
        "shares": _shares(commons, layers, depth, order) if classes > 1 else [],
        "pairs": figures.most_similar(similarity, whole, PAIRS),
        "selections": whole.trace() / sum(layer.owners.channels for layer in layers),
        "chance": figures.chance_jaccard(*_widths(layers)),
        "below_001": sum(layer.p.below_001 * layer.p.tested for layer in layers) / tested if tested else math.nan,
        "untested": sum(layer.p.untested for layer in layers),
        "class_table": classes <= CLASSES_WITH_NAMES,
        "bins": BINS,
        "top": TOP,
        "crops": table.statistics_point == "convolution",
        "listed": listed,
        "choice": {
            "layers": [layer.name for layer in layers],
            "classes": [
                {"index": index, "label": table.labels[index], "images": table.images_per_class[row], **chosen[row]}
                for row, index in enumerate(table.classes)
            ],
        },
    }


def _strongest_of_layer(table: SelectionTable, name: str, selected: figures.Mask, count: int) -> Iterator[list[Any]]:
    """Class by class `[channel, log10 p, classes that select it, whether this one does, ...]`.

    Flat, so that the page stays small. Instead of its logarithm stands "0" for p = 0, null for a missing p.
    """
    layer = table.layers[name]
    best = figures.strongest(layer, count)
    log10_p = np.take_along_axis(layer.log_p.numpy(), best, axis=1) / math.log(10)
    times = selected.sum(axis=0)[best]
    own = np.take_along_axis(selected, best, axis=1).astype(int)
    for row in zip(best.tolist(), log10_p.tolist(), times.tolist(), own.tolist(), strict=True):
        yield [
            value
            for channel, exponent, by, selects in zip(*row, strict=True)
            for value in (channel, _json_exponent(exponent), by, selects)
        ]


def _json_exponent(log10_p: float) -> float | str | None:
    return round(log10_p, 1) if math.isfinite(log10_p) else None if math.isnan(log10_p) else "0"


def _widths(layers: Sequence[_Layer]) -> tuple[list[int], list[int]]:
    return [layer.owners.channels for layer in layers], [layer.owners.per_class for layer in layers]


def _shares(
    commons: figures.Counts, layers: Sequence[_Layer], depth: NDArray[np.int64], order: NDArray[np.int64]
) -> list[_Share]:
    """Early, middle and late layers, in the order the whole is shown in; none of fewer than three layers."""
    shares = []
    for part, title in enumerate(DEPTHS if len(layers) >= len(DEPTHS) else ()):
        similarity = figures.jaccard(commons[part])
        these = [layers[i] for i in np.flatnonzero(depth == part).tolist()]
        shares.append(
            _Share(
                title=f"{title} layers",
                layers=len(these),
                picture=picture(similarity[np.ix_(order, order)]),
                mean=figures.mean_of_pairs(similarity),
                chance=figures.chance_jaccard(*_widths(these)),
            )
        )
    return shares


def _picture_rows(table: SelectionTable, picture_classes: Sequence[int] | None) -> list[int]:
    if picture_classes is None:
        return list(range(len(table.classes))) if len(table.classes) <= CLASSES_WITH_PICTURES else []
    for index in picture_classes:
        if not 0 <= index < len(table.labels):
            raise OptionError("picture_classes", index, f"class indices in 0..{len(table.labels) - 1}")
        if index not in table.classes:
            raise UncoveredTargetError(f"Table '{table.name}' has no row for class {index} ({table.labels[index]}).")
    return [table.classes.index(index) for index in dict.fromkeys(picture_classes)]


def _pictures(
    table: SelectionTable,
    model: Model,
    images: Source,
    wanted: Mapping[int, Sequence[tuple[str, int]]],
    excited: photographs.Excited,
    quantiles: Mapping[str, float],
) -> dict[int, list[dict[str, Any]]]:
    """Row of a class -> its channels, each with its photographs."""
    pictures = {}
    for row, places in wanted.items():
        channels = []
        for name, channel in places:
            layer = table.layers[name]
            log10_p = float(layer.log_p[row, channel]) / math.log(10)
            mean, std = float(layer.mean[channel]), float(layer.std[channel])
            shown = [
                {
                    "label": table.labels[int(images.targets[found.index])],
                    "own": int(images.targets[found.index]) == table.classes[row],
                    "name": images.name(found.index),
                    "above": (found.feature - mean) / std if std > 0 else None,
                    "picture": photographs.picture(images, model.preprocessing, found),
                }
                for found in excited.by_channel[name, channel]
            ]
            selected = figures.selected_channels(layer, quantiles[name], table.defaults.normality_filter)
            times = int(selected[:, channel].sum())
            channels.append({"layer": name, "channel": channel, "log10_p": log10_p, "classes": times, "shown": shown})
        pictures[row] = channels
    return pictures


def _render(context: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("parchgrad.table_page", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters |= {"percent": _percent, "short": _short, "spread": figures.spread}
    environment.tests["infinite"] = math.isinf
    folder = files("parchgrad.table_page")
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    # The one script that may run is ours: a label that slipped through the escaping would still do nothing.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return environment.get_template("page.html.j2").render(context, style=style, script=script, script_sha256=digest)


def _percent(share: float) -> str:
    """'12 %', with more digits where it is small."""
    if math.isnan(share):
        return "–"
    value = 100 * share
    return f"{value:.0f} %" if value >= 10 else f"{value:.1f} %" if value >= 0.95 else f"{value:.2g} %"


def _short(label: str, length: int) -> str:
    """The first of a label's synonyms, cut where it is still too long."""
    first = label.split(",")[0].strip() or label
    return first if len(first) <= length else f"{first[: length - 1].rstrip()}…"


def _range(values: Sequence[float], spec: str) -> str:
    return f"{values[0]:{spec}}" if len(values) == 1 else f"{values[0]:{spec}} to {values[-1]:{spec}}, by layer"


def _plain(value: object) -> str:
    """A value of the manifest as text; long lists are cut."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 400 else f"{text[:400]} … ({len(text):,} characters)"
