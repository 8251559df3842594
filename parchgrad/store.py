"""The folder of a table: written whole or not at all, and examined to the last number."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from parchgrad import golden
from parchgrad.errors import EvidenceError, InUseError, ParchGradError, TableError
from parchgrad.evidence import EVIDENCE_FILE, IMAGES_FILE, Evidence
from parchgrad.explainer import Explainer
from parchgrad.files import copy_or_link, file_sha256, new_folder
from parchgrad.models import Model
from parchgrad.tables import MANIFEST_FILE, SelectionTable, load_table


def write_table(
    table: SelectionTable,
    folder: Path,
    model: Model,
    evidence: Evidence | None = None,
    *,
    keep_evidence: bool = True,
    device: str | torch.device = "cpu",
) -> SelectionTable:
    """Write `table` with its golden record, its record of images and, if it is to grow later, its evidence.

    What stood in `folder` is replaced in one step at the end: a crash or a full disk before leaves it as it was.
    Without `evidence`, the files that a table already there has of it are kept. Returns the table as saved.
    """
    if (
        evidence is None
        and (folder / MANIFEST_FILE).is_file()
        and load_table(folder).table_sha256 != table.table_sha256
    ):
        raise InUseError(f"Table '{folder}' was replaced by another while this one was worked on.")
    with new_folder(folder) as staged:
        saved = table.save(staged)
        golden.record(Explainer(model, saved, device), staged)
        if evidence is None:
            for name in (EVIDENCE_FILE, IMAGES_FILE):
                if (folder / name).is_file():
                    copy_or_link(folder / name, staged / name)
        else:
            # No time of day in it: the same images give the same file.
            (staged / IMAGES_FILE).write_bytes(gzip.compress(evidence.images_record(), mtime=0))
            if keep_evidence:
                evidence.save(staged / EVIDENCE_FILE)
        saved.save_manifest()
    return load_table(folder, model)


def read_evidence(table: SelectionTable) -> Evidence:
    """The evidence beside a loaded table. Raises EvidenceError where there is none."""
    path = table.in_folder / EVIDENCE_FILE
    if path.is_file() and table.files.get(EVIDENCE_FILE, "") not in ("", file_sha256(path)):
        raise EvidenceError(f"'{path}' is not what it was when the table was written; it is damaged or was changed.")
    if not path.is_file():
        raise EvidenceError(
            f"Table '{table.folder}' has no {EVIDENCE_FILE}: it was built with --no-evidence, or the file was removed; "
            "only a table with its evidence can grow."
        )
    return Evidence.load(path)[0]


@dataclass(frozen=True)
class Finding:
    """One thing examined: `ok`, `failed`, or `absent` where there was nothing to examine."""

    what: str
    state: str
    detail: str


def examine(table: SelectionTable, model: Model, device: str | torch.device = "cpu") -> list[Finding]:
    """Everything about an opened table that opening it does not look at, the slow things too.

    Its model, every value, the golden record, the record of images, and whether its evidence gives this very table.
    """
    checks: dict[str, Callable[[], str]] = {
        "files": lambda: _files_match(table),
        "model": lambda: _model_matches(table, model),
        "values": lambda: _values_hold(table),
        "channels": lambda: _channels_vary(table),
        "golden record": lambda: _golden_holds(table, model, device),
        "images": lambda: _images_match(table),
        "evidence": lambda: _evidence_agrees(table),
    }
    findings = []
    for what, check in checks.items():
        try:
            findings.append(Finding(what, "ok", check()))
        except _AbsentError as absent:
            findings.append(Finding(what, "absent", str(absent)))
        except ParchGradError as error:
            findings.append(Finding(what, "failed", str(error)))
    return findings


class _AbsentError(ParchGradError):
    """There is nothing to examine."""


def _files_match(table: SelectionTable) -> str:
    """What was there when the table was written is the same or gone: a served table needs less."""
    there = {name: table.in_folder / name for name in table.files if (table.in_folder / name).is_file()}
    for name, path in there.items():
        if (found := file_sha256(path)) != table.files[name]:
            raise TableError(f"Table '{table.name}': {name} has sha256 {found}, its manifest says {table.files[name]}.")
    return f"{', '.join(there) or 'none beside the table'}: as they were written"


def _model_matches(table: SelectionTable, model: Model) -> str:
    table.check_model(model)
    return f"{model.name} version {model.version}, weights {model.weights_sha256[:12]}"


def _values_hold(table: SelectionTable) -> str:
    table.check_values()
    numbers = len(table.classes) * sum(layer.channels for layer in table.layers.values())
    return f"{numbers:,} p-values and ranks: no NaN, ranks in the order of the p-values"


def _channels_vary(table: SelectionTable) -> str:
    """A channel that says the same of every image is no failure, a layer of nothing else is."""
    constant = {name: int((layer.std == 0).sum()) for name, layer in table.layers.items()}
    dead = [name for name, count in constant.items() if count == table.layers[name].channels]
    if dead:
        raise TableError(f"Table '{table.name}': no channel of layer '{dead[0]}' varies from image to image.")
    channels = sum(layer.channels for layer in table.layers.values())
    return f"{sum(constant.values())} of {channels:,} channels are constant over all images"


def _golden_holds(table: SelectionTable, model: Model, device: str | torch.device) -> str:
    golden.check(Explainer(model, table, device), table.in_folder)
    return "logits and map of the golden record reproduced"


def _images_match(table: SelectionTable) -> str:
    path = table.in_folder / IMAGES_FILE
    if not path.is_file():
        raise _AbsentError(f"no {IMAGES_FILE}: which images were used is not known")
    try:
        record = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise EvidenceError(f"{IMAGES_FILE} cannot be read: {error}.") from error
    found = hashlib.sha256(record).hexdigest()
    if found != table.built.get("images_sha256"):
        raise EvidenceError(f"{IMAGES_FILE} has sha256 {found}, the manifest says {table.built.get('images_sha256')}.")
    return f"{sum(table.images_per_class):,} images recorded"


def _evidence_agrees(table: SelectionTable) -> str:
    if not (table.in_folder / EVIDENCE_FILE).is_file():
        raise _AbsentError(f"no {EVIDENCE_FILE}: the table cannot grow")
    evidence = read_evidence(table)
    try:
        again = evidence.table(table.defaults, table.built.get("control", "none"))
    except (LookupError, TypeError, ValueError) as error:
        raise EvidenceError(f"The evidence gives no table: {type(error).__name__} {error}.") from error
    for what in ("model_name", "version", "weights_sha256", "labels", "classes", "images_per_class", "layer_names"):
        if getattr(again, what) != getattr(table, what):
            raise EvidenceError(f"The evidence is of another table: {what} differs.")
    if again.built.get("points") != table.built.get("points"):
        raise EvidenceError("The evidence has its features at other points of the network than the manifest says.")
    if again.built["images_sha256"] != table.built.get("images_sha256"):
        raise EvidenceError("The evidence is of other images than the manifest says.")
    for name, layer in again.layers.items():
        for field in fields(layer):
            mine, found = getattr(table.layers[name], field.name), getattr(layer, field.name)
            if mine is not found and (mine is None or found is None or not torch.equal(mine, found)):
                raise EvidenceError(f"The evidence gives other values in layer '{name}': '{field.name}' differs.")
    return "the evidence gives this very table"
