"""A table's page: one self-contained HTML file, written from `page.html.j2`."""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections import Counter
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
from parchgrad.models import Model
from parchgrad.patterns import match
from parchgrad.quantiles import Quantile, quantile_of_layers
from parchgrad.sources import Source
from parchgrad.table_page import figures, photographs
from parchgrad.table_page.heat_map import CLASSES_WITH_NAMES, heat_map, limits, picture, scale
from parchgrad.table_page.history import history, in_words
from parchgrad.table_page.photographs import Progress
from parchgrad.tables import SelectionTable

# Up to this many classes every class gets pictures; of more only those that are named.
CLASSES_WITH_PICTURES = 20
# Bounds the part of the page that a class is chosen from: classes x layers x channels listed.
LISTED_CHANNELS = 200_000

DEPTHS = ("early", "middle", "late")
BINS = 20
TOP = 10  # columns of a histogram end at this many times the uniform
PAIRS = 20
ALIKE = 5
BLOCKS = 40  # the most branches a map without names is described by
# From this share of shared channels on, bars of owned, common and unused ones would all look the same.
MOSTLY_SHARED = 0.95
# Smaller p-values are written as powers of ten.
SMALLEST_DECIMAL = -3


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
    low: float  # the ends of the picture's own scale
    high: float
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
    `crops_per_channel` photographs that most excite `channels_per_class` of its strongest channels, taken from all
    depths; `progress(done, total)` counts photographs. The page grows by about 20 kB a photograph shown. Raises
    OptionError, UncoveredTargetError for a class without a row, TableError for another model's table.
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
    layers_pictured = pictured_layers(table, names)
    context |= {
        "photographs": None,
        "pictures": None,
        "images_given": images is not None,
        "class_layers": [name for name in names if name not in layers_pictured],
    }
    if model is not None and model.class_ids:
        for entry in context["choice"]["classes"]:
            entry["id"] = model.class_ids[entry["index"]]
    if images is not None and model is not None and rows:
        wanted = {row: pictured_channels(table, layers_pictured, row, channels_per_class) for row in rows}
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
        times = {layer.name: layer.owners.classes_by_channel for layer in context["layers"]}
        context["pictures"] = _pictures(table, model, images, wanted, excited, times)
    write_text(Path(path), _render(context))


def pictured_layers(table: SelectionTable, layers: Sequence[str]) -> list[str]:
    """Those of `layers` whose channels are worth a picture.

    Left out is the network's last layer where it has a channel for each class of the model: its strongest channel
    is the class's own logit, which says no more than that the network classifies. Kept if there is no other.
    """
    last = table.layer_names[-1]
    if table.layers[last].channels != len(table.labels):
        return list(layers)
    return [name for name in layers if name != last] or list(layers)


def pictured_channels(table: SelectionTable, layers: Sequence[str], row: int, count: int) -> list[tuple[str, int]]:
    """At most `count` channels `(layer, channel)` of a class, from the first of `layers` to the last.

    The best-ranked channel of each of `count` evenly spaced layers; of fewer layers several best-ranked each.
    p-values do not decide: late layers would take all places. Empty for a class that was not tested.
    """
    found = []
    for position, places in Counter(np.linspace(0, len(layers) - 1, count).round().astype(int).tolist()).items():
        layer = table.layers[layers[position]]
        rank = layer.rank[row].numpy()
        best = np.flatnonzero((rank < places) & ~np.isnan(layer.log_p[row].numpy()))
        found += [(layers[position], channel) for channel in best[np.argsort(rank[best])].tolist()]
    return found


def _header(table: SelectionTable, names: Sequence[str], quantiles: Mapping[str, float]) -> dict[str, Any]:
    images = table.images_per_class
    return {
        "table": table,
        "layers_shown": list(names),
        "layers_hidden": [name for name in table.layers if name not in set(names)],
        "quantile_text": _range(sorted(set(quantiles.values())), "g"),
        "images": {"all": sum(images), "least": min(images), "most": max(images)},
        "channels": sum(table.layers[name].channels for name in names),
        "defaults": in_words(table.defaults.to_json()),
        "history": history(table.built),
    }


def _numbers(
    table: SelectionTable, names: Sequence[str], quantiles: Mapping[str, float], listed: int
) -> dict[str, Any]:
    """Everything that needs no photographs; one layer's selection in memory at a time."""
    classes = len(table.classes)
    asked, listed = listed, max(1, min(listed, LISTED_CHANNELS // (classes * len(names))))
    layers: list[_Layer] = []
    # Summed by depth as it is counted: a matrix a layer would be 400 MB for 1000 classes and 53 layers.
    depth = np.arange(len(names)) * len(DEPTHS) // len(names)
    commons = np.zeros((len(DEPTHS), classes, classes), np.int64)
    chosen: list[dict[str, Any]] = [{"owned": [], "strongest": []} for _ in table.classes]
    for name in names:
        layer, quantile = table.layers[name], quantiles[name]
        selected = figures.selected_channels(layer, quantile, table.defaults.normality_filter)
        common = figures.in_common(selected)
        owners = figures.ownership(layer, selected, quantile, table.defaults.normality_filter)
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
    channels = sum(layer.owners.channels for layer in layers)
    named, blocks_most = classes <= CLASSES_WITH_NAMES, min(BLOCKS, classes // 4)
    return {
        "layers": layers,
        "similarity": heat_map(labels, similarity[np.ix_(order, order)]) if classes > 1 else None,
        "shares": _shares(commons, layers, depth, order) if classes > 1 else [],
        "pairs": figures.most_similar(similarity, whole, PAIRS),
        "scale": scale(),
        "blocks": [] if named else figures.blocks(similarity, order, blocks_most),
        "blocks_most": blocks_most,
        "selections": whole.trace() / channels,
        "mostly_shared": sum(layer.owners.shared for layer in layers) / channels >= MOSTLY_SHARED,
        "most_classes": max(layer.owners.quarters[-1] for layer in layers),
        "mean": figures.mean_of_pairs(similarity),
        "chance": figures.chance_jaccard([layer.owners for layer in layers]),
        "below_001": sum(layer.p.below_001 * layer.p.tested for layer in layers) / tested if tested else math.nan,
        "untested": sum(layer.p.untested for layer in layers),
        "class_table": named,
        "bins": BINS,
        "top": TOP,
        "crops": table.statistics_point == "convolution",
        "listed": listed,
        "listed_asked": asked,
        "choice": {
            "layers": [layer.name for layer in layers],
            "order": order.tolist(),
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
    """A whole number for a power of ten, three digits where p is written as a decimal."""
    if not math.isfinite(log10_p):
        return None if math.isnan(log10_p) else "0"
    return round(log10_p) if log10_p <= SMALLEST_DECIMAL else round(log10_p, 3)


def _shares(
    commons: figures.Counts, layers: Sequence[_Layer], depth: NDArray[np.int64], order: NDArray[np.int64]
) -> list[_Share]:
    """Early, middle and late layers, in the order the whole is shown in; none of fewer than three layers."""
    shares = []
    for part, title in enumerate(DEPTHS if len(layers) >= len(DEPTHS) else ()):
        similarity = figures.jaccard(commons[part])
        low, high = limits(similarity)
        these = [layers[i] for i in np.flatnonzero(depth == part).tolist()]
        shares.append(
            _Share(
                title=f"{title} layers",
                layers=len(these),
                picture=picture(similarity[np.ix_(order, order)]),
                low=low,
                high=high,
                mean=figures.mean_of_pairs(similarity),
                chance=figures.chance_jaccard([layer.owners for layer in these]),
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
    times: Mapping[str, figures.Counts],
) -> dict[int, list[dict[str, Any]]]:
    """Row of a class -> its channels, each with its photographs; `times` a layer's channels are selected."""
    pictures = {}
    for row, places in wanted.items():
        channels = []
        for name, channel in places:
            layer = table.layers[name]
            log10_p = _json_exponent(float(layer.log_p[row, channel]) / math.log(10))
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
            by = int(times[name][channel])
            channels.append({"layer": name, "channel": channel, "log10_p": log10_p, "classes": by, "shown": shown})
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
    environment.filters |= {"percent": _percent, "short": _short, "spread": figures.spread, "number": _number}
    environment.globals["smallest_decimal"] = SMALLEST_DECIMAL
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
    if 0 < value < 0.001:
        return "under 0.001 %"
    return f"{value:.0f} %" if value >= 10 else f"{value:.1f} %" if value >= 0.95 else f"{value:.2g} %"


def _short(label: str, length: int) -> str:
    """The first of a label's synonyms, cut where it is still too long."""
    first = label.split(",")[0].strip() or label
    return first if len(first) <= length else f"{first[: length - 1].rstrip()}…"


def _range(values: Sequence[float], spec: str) -> str:
    return f"{values[0]:{spec}}" if len(values) == 1 else f"{values[0]:{spec}} to {values[-1]:{spec}}, by layer"


def _number(value: float) -> str:
    """An expected count: one decimal while it is small."""
    return f"{value:,.0f}" if value >= 100 else "< 0.1" if 0 < value < 0.05 else f"{value:.1f}"
