"""Images -> a class graph beside its table: what it is to be, one pass that can go on after any end, the files."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import parchgrad
from parchgrad import activation_histograms
from parchgrad.build import note_of
from parchgrad.class_graph.exemplars import MOST_STRIP_PIXELS, Exemplars, cut, require_room
from parchgrad.class_graph.graph import (
    EXEMPLAR_COUNT,
    EXEMPLAR_FIELD,
    EXEMPLARS_FOLDER,
    FORMAT_VERSION,
    MANIFEST_FILE,
    MOST_SLOTS,
    STRIPS_FILE,
    TENSORS_FILE,
    ClassGraph,
    load,
    write_arrays,
)
from parchgrad.class_graph.layout import positions, similarity
from parchgrad.class_graph.look import Images, Look, drawn
from parchgrad.class_graph.selected import Selected, selected
from parchgrad.class_graph.unfinished import Unfinished
from parchgrad.errors import DataError, InUseError, OptionError
from parchgrad.explainer import checked_device
from parchgrad.files import beside, file_sha256, write_text
from parchgrad.models import Model
from parchgrad.sources import Source
from parchgrad.tables import SelectionTable, load_table


@dataclass(frozen=True)
class Options:
    """What a class graph is to be; all of it decides the result."""

    images_per_class: int = 50
    edges_per_channel: int = 2  # kept into a layer, for each of its selected channels
    exemplars: int = 0  # crops a channel; 0 keeps no piece of any image
    crop_pixels: int = 64
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("images_per_class", "edges_per_channel", "crop_pixels", "batch_size"):
            if getattr(self, name) < 1:
                raise OptionError(name, getattr(self, name), "a number of at least 1")
        if not 0 <= self.exemplars <= 100:
            raise OptionError("exemplars", self.exemplars, "0 to 100")
        if self.exemplars * self.crop_pixels > MOST_STRIP_PIXELS:
            raise OptionError(
                "exemplars, crop_pixels",
                (self.exemplars, self.crop_pixels),
                f"a strip, exemplars x crop_pixels, of at most {MOST_STRIP_PIXELS} pixels",
            )


@dataclass(frozen=True)
class Progress:
    """How far the pass is: `what` is 'Looking' (images through the network) or 'Cutting' (images cut again)."""

    what: str
    done: int  # images
    total: int
    classes: int  # finished
    of_classes: int


def build(
    model: Model,
    table: SelectionTable,
    source: Source,
    options: Options | None = None,
    *,
    workers: int = 0,
    device: str | torch.device = "cpu",
    max_bad: float = 0.01,
    restart: bool = False,
    data: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> ClassGraph:
    """Build the class graph of `table` and write it into the table's folder, replacing one that is there.

    What is done is kept class by class in `unfinished(folder)`, and the same call goes on from there, also after a
    kill, with the same result; `restart` begins anew. `workers` processes read and decode. Hold
    `files.claimed(folder.parent)` where others may write the table meanwhile. Raises DataError, also where more than
    the share `max_bad` of the images cannot be read; TableError, UnsupportedModelError, ClassGraphError, InUseError.
    """
    options = options or Options()
    table.check_model(model)
    chosen = selected(table)
    images = drawn(source, table, options.images_per_class)
    note = note_of(images.source, images=len(images.row), images_per_class=options.images_per_class)
    note |= {} if data is None else {"root": data}
    built = {
        "by": f"parchgrad {parchgrad.__version__}",
        "data": note,
        "quantile": table.defaults.to_json()["quantile"],
        "layers": list(table.defaults.layers),
        "normality_filter": table.defaults.normality_filter,
        "edges_per_channel": options.edges_per_channel,
    }
    kept = Unfinished(unfinished(table.in_folder), _key(table, images, options, built), restart)
    exemplars = Exemplars(chosen.of_any(), options.exemplars) if options.exemplars else None
    if exemplars is not None:
        require_room(exemplars, options.crop_pixels, table.in_folder)
        kept.restore(exemplars)

    def report(what: str, done: int, total: int) -> None:
        if progress is not None:
            progress(Progress(what, done, total, kept.done, len(table.classes)))

    report("Looking", int(images.end[kept.done - 1]) if kept.done else 0, len(images.row))
    look = Look(
        model, table, chosen, images, options.batch_size, options.edges_per_channel, checked_device(device), exemplars
    )
    bad = sum(len(kept.read(row).bad) for row in range(kept.done))
    for found in look.classes(kept.done, workers, lambda done: report("Looking", done, len(images.row))):
        bad += len(found.bad)
        if bad > max_bad * len(images.row):
            raise DataError(
                f"{bad} of {len(images.row)} images cannot be read, more than the {max_bad:.2%} allowed. "
                f"{' '.join(reason for _, reason in found.bad[:3])}"
            )
        kept.add(found, exemplars)
    graph = _write(table, chosen, kept, exemplars, options, images, model, built, report)
    shutil.rmtree(kept.folder)
    return graph


def unfinished(folder: Path) -> Path:
    """Where the class graph of a table's folder is kept while it is unfinished."""
    return folder.with_name(f".{folder.name}.class_graph")


def _key(table: SelectionTable, images: Images, options: Options, built: Mapping[str, Any]) -> str:
    """Digest of all that decides the result."""
    what = [FORMAT_VERSION, table.table_sha256, table.weights_sha256, images.source.fingerprint(), asdict(options)]
    return hashlib.sha256(json.dumps([*what, built], sort_keys=True).encode()).hexdigest()


def _write(
    table: SelectionTable, chosen: Selected, kept: Unfinished, exemplars: Exemplars | None, options: Options,
    images: Images, model: Model, built: dict[str, Any], report: Callable[[str, int, int], None],
) -> ClassGraph:  # fmt: skip
    """Put the classes together and write the files, the one that vouches for the others last."""
    folder = table.in_folder
    found = [kept.read(row) for row in range(len(table.classes))]
    sizes = [len(of_class.arrays["edge_from"]) for of_class in found]
    strength = chosen.strength()
    arrays: dict[str, NDArray[Any]] = {
        "channel": chosen.channel,
        "log_p": chosen.log_p,
        "pagerank": np.stack([of_class.arrays["pagerank"] for of_class in found]),
        "edge_start": np.cumsum([0, *sizes]).astype(np.int64),
        "position": positions(similarity(_by_channel(chosen, strength))).astype(np.float32),
        "images": np.concatenate([of_class.arrays["images"] for of_class in found]),
        "reference_counts": np.stack([of_class.arrays["reference_counts"] for of_class in found]),
        "reference_edges": activation_histograms.EDGES,
    }
    slot: type[np.generic] = np.uint16 if chosen.channel.shape[1] <= MOST_SLOTS else np.int32
    largest = float(np.finfo(np.float16).max)
    for name in ("edge_from", "edge_to"):
        arrays[name] = np.concatenate([of_class.arrays[name] for of_class in found]).astype(slot)
    weights = np.concatenate([of_class.arrays["edge_weight"] for of_class in found])
    arrays["edge_weight"] = np.minimum(weights, largest).astype(np.float16)
    of_exemplars = None
    if exemplars is not None:
        starts, counts, size = _write_strips(
            folder, kept.folder, chosen, exemplars, images, model, options.crop_pixels, report
        )
        arrays |= {EXEMPLAR_FIELD: starts, EXEMPLAR_COUNT: counts}
        of_exemplars = {
            "channels": int((counts > 0).sum()),
            "crops": options.exemplars,
            "pixels": options.crop_pixels,
            "bytes": size,
        }
    # Under the lock of whoever calls; a table written without it must not get another's graph.
    if load_table(folder).table_sha256 != table.table_sha256:
        raise InUseError(f"Table '{folder}' was replaced by another while its class graph was built.")
    write_arrays(folder / TENSORS_FILE, arrays)
    manifest = {
        "format_version": FORMAT_VERSION,
        "model": {"name": table.model_name, "version": table.version, "weights_sha256": table.weights_sha256},
        "table_sha256": table.table_sha256,
        "tensors_sha256": file_sha256(folder / TENSORS_FILE),
        "classes": list(table.classes),
        "layers": [
            {"name": name, "channels": channels, "selected": chosen.widths[name]}
            for name, channels in chosen.layers.items()
        ],
        "exemplars": of_exemplars,
        "built": {**built, "bad_images": [entry for of_class in found for entry in of_class.bad]},
    }
    write_text(folder / MANIFEST_FILE, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    if exemplars is None:
        shutil.rmtree(folder / EXEMPLARS_FOLDER, ignore_errors=True)  # of a class graph that was here before
    return load(folder, table)


def _by_channel(chosen: Selected, strength: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """The strengths of each layer by channel, `(K, channels)`, 0 for those not selected."""
    for name, here in chosen.slots.items():
        spread = np.zeros((len(strength), chosen.layers[name]))
        rows, places = np.nonzero(chosen.channel[:, here] >= 0)
        spread[rows, chosen.channel[:, here][rows, places]] = strength[:, here][rows, places]
        yield spread


def _write_strips(
    folder: Path, scratch: Path, chosen: Selected, exemplars: Exemplars, images: Images, model: Model, pixels: int,
    report: Callable[[str, int, int], None],
) -> tuple[NDArray[np.int64], NDArray[np.int16], int]:  # fmt: skip
    """Cut the exemplars; where each channel's strip begins, `(N + 1,)`, its crops `(N,)`, and the file's size."""
    base = np.cumsum([0, *chosen.layers.values()])
    place = np.concatenate([base[i] + channels for i, channels in enumerate(exemplars.channels.values())])
    lengths, counts = np.zeros(base[-1], np.int64), np.zeros(base[-1], np.int16)
    counts[place] = (exemplars.image >= 0).sum(1)
    (folder / EXEMPLARS_FOLDER).mkdir(exist_ok=True)
    with beside(folder / EXEMPLARS_FOLDER / STRIPS_FILE) as temporary:
        strips = cut(
            exemplars, images.source, model.preprocessing, pixels, scratch / "squares",
            lambda done, total: report("Cutting", done, total),
        )  # fmt: skip
        with temporary.open("wb") as file, closing(strips):
            for channel, strip in zip(place, strips, strict=True):
                lengths[channel] = file.write(strip)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return starts, counts, int(starts[-1])
