"""The exports: from a model and its table to files, checked before they are in their place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch

from parchgrad import golden
from parchgrad.errors import ExportError
from parchgrad.explainer import Explainer
from parchgrad.export import parity
from parchgrad.export.card import describe
from parchgrad.export.engines import Engine, onnx_runtime, openvino_cpu
from parchgrad.files import claimed, new_folder, scratch_folder, write_tensors, write_text
from parchgrad.graph.explanation import explanation_graph
from parchgrad.graph.prediction import trace_prediction
from parchgrad.models import Model
from parchgrad.preprocessing import Preprocessing, read_image
from parchgrad.tables import SelectionTable

PARITY_FILE = "parity.json"
GRAPH_FILE = "model.onnx"
IR_FILE = "model.xml"
PURPOSE = "exporting a graph"

# Protocol buffers, and so ONNX files with their weights inside, end at 2 GB.
LARGEST_FILE = 2**31 - 2**20

Progress = Callable[[int, int], None]  # steps done, of how many
# Of every export: prediction traced, graph made, written, checked; and one an item of the check.
_STEPS = 4 + parity.ITEMS


@dataclass(frozen=True)
class Exported:
    """What was written where, and how it was checked (`parity.json`'s content)."""

    path: Path  # the graph's file
    report: dict[str, Any]


def export_onnx(
    model: Model,
    table: SelectionTable,
    path: str | os.PathLike[str],
    *,
    backward: str = "pruned",
    conserve: str | None = None,
    external_data: bool = False,
    images: Sequence[str | os.PathLike[str]] = (),
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> Exported:
    """Write prediction and explanation as the ONNX file `path`; beside it its report, `<stem>.parity.json`, and golden
    record, `<stem>.golden.safetensors`.

    Args:
        backward: `pruned` computes only what an infinite gamma keeps; `dense` computes everything. The maps are
            the same.
        conserve: the rule's conservation, fixed in the graph; default the table's.
        external_data: weights in a file of their own, `<path>.data`; needed beyond 2 GB.
        images: image files the graph is checked on; default synthetic ones.

    With `force` an export that is at `path` already is replaced. Raises ExportError where there is something at
    `path` and `force` is not given or it is no export, where the graph differs from PyTorch, and where an option of
    the table's defaults is none a graph has; UnsupportedModelError where the network cannot be exported. Nothing
    is written then.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ExportError(f"'{path.parent}' is no folder, expected the one that '{path.name}' goes to.")
    step = _Steps(progress)
    table = _own(model, table, conserve)
    report_file, weights = path.with_name(f"{path.stem}.{PARITY_FILE}"), Path(f"{path}.data")
    for file in (path, weights):
        _require_free(file, report_file, force)
    graph = _graph(model, table, backward, step)
    with scratch_folder(path) as staged:
        _save(graph, staged / path.name, external_data)
        del graph  # as large as the engine that now loads it
        step()
        record = _record(model, table, staged / golden.GOLDEN_FILE)
        report = _checked(onnx_runtime(staged / path.name), model, table, record, images, step)
        (staged / golden.GOLDEN_FILE).rename(staged / f"{path.stem}.{golden.GOLDEN_FILE}")
        write_text(staged / report_file.name, _json(report))
        if weights.exists():
            # A graph whose weights lie beside it must not find others there.
            path.unlink(missing_ok=True)
            weights.unlink()
        for file in sorted(staged.iterdir(), key=lambda file: file.name == path.name):
            file.chmod(0o644)
            os.replace(file, path.parent / file.name)
    step()
    return Exported(path, report)


def export_triton(
    model: Model,
    table: SelectionTable,
    repository: str | os.PathLike[str],
    *,
    backward: str = "pruned",
    conserve: str | None = None,
    external_data: bool = False,
    images: Sequence[str | os.PathLike[str]] = (),
    max_batch_size: int = 8,
    queue_microseconds: int = 2000,
    threads: int = 0,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> Exported:
    """Write an entry of a Triton model repository: `<repository>/<name>/`, the graph in its folder `<version>/`.

    The arguments that `export_onnx` has mean the same. `max_batch_size`: most images Triton gives the graph
    together; `queue_microseconds`: how long one waits for others; `threads`: of ONNX Runtime, 0 for all cores.
    With `force` an entry's version, and its `config.pbtxt` and `labels.txt`, are replaced. Raises as `export_onnx`,
    and ExportError where there is an entry and `force` is not given.
    """
    from parchgrad.export import triton

    entry = Path(repository) / model.name
    target = entry / model.version
    step = _Steps(progress)
    table = _own(model, table, conserve)
    labels = "".join(f"{label}\n" for label in model.labels)
    _require_free(target, target / PARITY_FILE, force)
    graph = _graph(model, table, backward, step)
    described = triton.config(model.name, graph, max_batch_size, queue_microseconds, threads)
    beside = {triton.CONFIG_FILE: described, triton.LABELS_FILE: labels}
    for name, text in beside.items():
        file = entry / name
        if not force and file.exists() and file.read_text(encoding="utf-8") != text:
            raise ExportError(f"'{file}' is there already and is another than this export's; --force replaces it.")
    with claimed(entry, PURPOSE):
        with new_folder(target) as staged:
            _save(graph, staged / GRAPH_FILE, external_data)
            del graph
            step()
            record = _record(model, table, staged / golden.GOLDEN_FILE)
            report = _checked(onnx_runtime(staged / GRAPH_FILE), model, table, record, images, step)
            write_text(staged / PARITY_FILE, _json(report))
            # Triton takes an entry whose configuration it finds: that comes before the version's folder.
            for name, text in beside.items():
                write_text(entry / name, text)
        step()
    return Exported(target / GRAPH_FILE, report)


def export_openvino(
    model: Model,
    table: SelectionTable,
    folder: str | os.PathLike[str],
    *,
    backward: str = "pruned",
    conserve: str | None = None,
    images: Sequence[str | os.PathLike[str]] = (),
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> Exported:
    """Write OpenVINO's IR into `<folder>/<name>/<version>/`: `model.xml`, `model.bin`, golden record and report.

    The arguments that `export_onnx` has mean the same. It is made from the same graph, and checked as OpenVINO runs
    it on the CPU. Raises as `export_onnx`, and ExportError where the version is there and `force` is not given.
    """
    from parchgrad.export.openvino_ir import write_ir

    target = Path(folder) / model.name / model.version
    step = _Steps(progress)
    table = _own(model, table, conserve)
    _require_free(target, target / PARITY_FILE, force)
    graph = _graph(model, table, backward, step)
    with claimed(target.parent, PURPOSE), new_folder(target) as staged:
        _save(graph, staged / GRAPH_FILE, external_data=graph.ByteSize() > LARGEST_FILE)
        write_ir(graph, staged / GRAPH_FILE, staged / IR_FILE)
        del graph
        for file in staged.glob(f"{GRAPH_FILE}*"):
            file.unlink()
        step()
        record = _record(model, table, staged / golden.GOLDEN_FILE)
        report = _checked(openvino_cpu(staged / IR_FILE), model, table, record, images, step)
        write_text(staged / PARITY_FILE, _json(report))
    step()
    return Exported(target / IR_FILE, report)


class _Steps:
    """Counts an export's steps."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._done = 0
        self.total = _STEPS

    def __call__(self) -> None:
        self._done += 1
        self._progress(self._done, self.total)


def _own(model: Model, table: SelectionTable, conserve: str | None) -> SelectionTable:
    """The table under the conservation that is exported, known to be the model's."""
    table.check_model(model)
    parity.check_exportable(table)
    return table if conserve is None else table.with_defaults(conserve=conserve)


def _graph(model: Model, table: SelectionTable, backward: str, step: _Steps) -> onnx.ModelProto:
    preprocessing = model.preprocessing
    prediction = trace_prediction(model.module, preprocessing.size, preprocessing.rule == "native")
    step()
    graph = explanation_graph(prediction, table, backward=backward, conserve=table.defaults.conserve)
    describe(graph, model, table, backward)
    step()
    return graph


def _save(graph: onnx.ModelProto, path: Path, external_data: bool) -> None:
    size = graph.ByteSize()
    if size > LARGEST_FILE and not external_data:
        raise ExportError(
            f"The graph takes {size / 1e9:.1f} GB, an ONNX file holds 2 GB; give external_data (--external-data)."
        )
    # Takes the weights out of the graph, where they are not to be in the file: it is not used again.
    onnx.save(graph, path, save_as_external_data=external_data, location=f"{path.name}.data")


def _record(model: Model, table: SelectionTable, path: Path) -> golden.Record:
    """The golden record of the export, beside the graph: what the PyTorch engine makes of the pattern."""
    golden.record(Explainer(model, table, "cpu"), path.parent)
    record = golden.read(path)
    tensors = {
        "image": torch.from_numpy(record.image),
        "target": torch.tensor([record.target]),
        "logits": torch.from_numpy(record.logits),
        "saliency": torch.from_numpy(record.saliency),
    }
    write_tensors(path, tensors, metadata={"digests": json.dumps(dict(record.digests))})
    return record


def _checked(
    engine: Engine,
    model: Model,
    table: SelectionTable,
    record: golden.Record,
    images: Sequence[str | os.PathLike[str]],
    step: _Steps,
) -> dict[str, Any]:
    native = model.preprocessing.rule == "native"
    if images:
        pictures, others = _read(images, model.preprocessing)
    else:
        pictures = parity.default_pictures(model, record.image)
        height, width = model.preprocessing.size
        # Neither square nor even: where sizes are the image's own, rounding shows.
        odd = (height + 7, width * 3 // 4 + 1)
        others = [parity.Picture(f"synthetic {odd[1]}x{odd[0]}", parity.synthetic(odd, 0))] if native else []
    step.total += len(others)
    report = parity.check(engine, model, table, pictures, others, step)
    step()
    return report


def _read(
    images: Sequence[str | os.PathLike[str]], preprocessing: Preprocessing
) -> tuple[list[parity.Picture], list[parity.Picture]]:
    """The images of a batch, of one size, and one of its own size where the model takes any."""
    native = preprocessing.rule == "native"
    together = replace(preprocessing, rule="stretch") if native else preprocessing
    # Of many, some from all over: the files of a folder lie class by class.
    most = min(len(images), parity.ITEMS)
    chosen = [images[number * len(images) // most] for number in range(most)]
    read = [(Path(image).name, read_image(image)) for image in chosen]
    pictures = [parity.Picture(name, together.apply(image)[0]) for name, image in read]
    name, first = read[0]
    return pictures, [parity.Picture(name, preprocessing.apply(first)[0])] if native else []


def _require_free(target: Path, report: Path, force: bool) -> None:
    """Nothing at `target`, or, with `force`, an export, which has its `report`."""
    if target.exists() and not force:
        raise ExportError(f"'{target}' exists already; --force replaces it.")
    if target.exists() and not report.is_file():
        # A file of the caller's, or a model package or a table of the same name and version: not ours to replace.
        raise ExportError(f"'{target}' is no exported graph, which --force would replace; it has no {report.name}.")


def _json(report: dict[str, Any]) -> str:
    return json.dumps(report, indent=1, ensure_ascii=False) + "\n"
