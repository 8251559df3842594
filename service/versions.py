"""Which versions of which models are on the disk, and what runs each: a model package on PyTorch, or an exported graph.

The settings decide; where they leave it open (`PARCHGRAD_RUNTIME=auto`), what is there does. No file is opened and no
runtime imported before `load`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

from parchgrad.errors import ModelError
from parchgrad.versions import versions_of
from service.engine import Engine
from service.settings import GRAPH_FILE, PREFIX, PROJECT_ROOT, Settings, SettingsError, is_installed

log = logging.getLogger(__name__)

Runtime = Literal["torch", "onnx"]

_INSTALL = {"torch": "pip install 'parchgrad[torch]'", "onnxruntime": "pip install 'parchgrad[onnx]'"}


def check(settings: Settings) -> None:
    """Raises SettingsError where what is to be served cannot be: its runtime, a folder, a version is not there."""
    _check_installed(settings)
    for variable, folder in _needed_folders(settings):
        if not folder.is_dir():
            hint = "; 'parchgrad export NAME --format triton' writes it" if variable == "GRAPHS_DIR" else ""
            raise SettingsError(f"{PREFIX}{variable}", _given(folder), f"a folder that exists{hint}")
    for name, pinned in settings.entries:
        variable = f"{PREFIX}MODEL" if name == settings.entries[0][0] else f"{PREFIX}MODELS"
        there = settings.versions_there(name)
        if not there:
            known = ", ".join(f"'{one}'" for one in settings.names_there) or "none"
            where = " or ".join(_given(one) for one in settings.folders if one.is_dir())
            allowed = f"a model of {where}; there is {known}{_wanting(settings, name, pinned or 'VERSION')}"
            raise SettingsError(variable, name, allowed)
        if pinned and pinned not in there:
            allowed = f"a version of '{name}'; there is {', '.join(there)}{_wanting(settings, name, pinned)}"
            raise SettingsError(variable, f"{name}/{pinned}", allowed)
        for version in chosen(settings, pinned, there):
            if runtime_of(settings, name, version) == "torch" and not (settings.tables_dir / name / version).is_dir():
                tables = ", ".join(f"{name}/{one}" for one in versions_of(settings.tables_dir / name)) or "none"
                allowed = f"a folder with the selection table {name}/{version}; there is {tables}"
                raise SettingsError(f"{PREFIX}TABLES_DIR", _given(settings.tables_dir), allowed)


def chosen(settings: Settings, pinned: str | None, there: list[str]) -> list[str]:
    """Which versions the settings ask for, of those that are `there`, newest first."""
    if pinned:
        return [pinned]
    return there if settings.versions == "all" else there[:1]


def runtime_of(settings: Settings, name: str, version: str) -> Runtime:
    """What runs this version, one of those that are there.

    `auto` takes PyTorch where the model is to run on a GPU and its package is there, else the graph where one is there,
    else PyTorch.
    """
    if settings.runtime == "torch" or not settings.runs_graphs:
        return "torch"
    if settings.runtime == "onnx" or not settings.runs_torch:
        return "onnx"
    package = (settings.models_dir / name / version).is_dir()
    if not settings.graph(name, version).is_file() or (package and settings.device != "cpu"):
        return "torch"
    return "onnx"


def load(settings: Settings, name: str, version: str) -> Engine:
    """Load and check a version. Raises what the library raises, and SettingsError where its runtime is not here."""
    _check_installed(settings)
    if runtime_of(settings, name, version) == "torch":
        from service.torch_engine import TorchEngine

        torch_engine = TorchEngine(settings, name, version)
        _check_digests(settings, torch_engine, name, version)
        return torch_engine
    from service.onnx_engine import OnnxEngine

    engine = OnnxEngine(settings, name, version, partial(_check_graph, settings, name, version))
    _check_digests(settings, engine, name, version)
    if settings.runtime == "auto":
        _check_same(settings, engine, name, version)
    return engine


def _check_graph(settings: Settings, name: str, version: str, content: bytes) -> None:
    """Raises ModelError where a graph's file is another than the settings have it, or they do not say which it is.

    `content` is the file's. A graph only says what weights and table it was made of, so that their digests do not do.
    """
    if not settings.digests:
        return
    path, digests = settings.graph(name, version), _digests_of(settings, name, version)
    if "graph" not in digests:
        raise ModelError(
            f"Model '{name}': version {version} would run the graph '{path}', whose digest {PREFIX}DIGESTS does not "
            "name; expected NAME/VERSION:WEIGHTS_SHA256:TABLE_SHA256:GRAPH_SHA256 for it."
        )
    beside = path.with_name(f"{path.name}.data")  # where it was exported with --external-data
    digest = hashlib.sha256(content)
    if beside.is_file():
        with beside.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    _compare("graph", name, version, digests["graph"], digest.hexdigest())
    from parchgrad.runtimes.onnx_runtime import weights_outside

    if elsewhere := weights_outside(content) - {beside.name}:
        raise ModelError(
            f"Graph '{path}' has weights in {', '.join(sorted(map(repr, elsewhere)))}; with {PREFIX}DIGESTS they are "
            f"expected in it or in '{beside.name}', which its digest covers."
        )


def _check_digests(settings: Settings, engine: Engine, name: str, version: str) -> None:
    """Raises ModelError where weights or table are others than the settings have them, or the settings lack them.

    Both digests are of what was read: the library compares them with the files, a graph carries those it was made of.
    """
    if not settings.digests:
        return
    wanted = _digests_of(settings, name, version)
    found = {"weights": engine.model.weights_sha256, "table": engine.table.table_sha256}
    for what in sorted(wanted.keys() & found.keys()):
        _compare(what, name, version, wanted[what], found[what])


def _digests_of(settings: Settings, name: str, version: str) -> dict[str, str]:
    """Raises ModelError where the settings have no entry for the version."""
    digests = settings.digests_of(name, version)
    if digests is None:
        raise ModelError(f"Model '{name}': version {version} is expected in {PREFIX}DIGESTS, found no entry for it.")
    return digests


def _compare(what: str, name: str, version: str, wanted: str, found: str) -> None:
    if found != wanted:
        raise ModelError(
            f"Model '{name}': version {version} is expected with a {what} of SHA-256 {wanted} ({PREFIX}DIGESTS), "
            f"found {found}."
        )


def _check_same(settings: Settings, engine: Engine, name: str, version: str) -> None:
    """Raises ModelError where the package or the table beside a graph is another than it was exported from.

    The operator has not said which of them to serve.
    """
    import yaml

    package, table = settings.models_dir / name / version, settings.tables_dir / name / version
    beside: list[tuple[str, Path, Any, tuple[str, ...], str]] = [
        ("weights", package / "model.yaml", yaml.safe_load, ("weights", "sha256"), engine.model.weights_sha256),
        ("table", table / "manifest.json", json.loads, ("table_sha256",), engine.table.table_sha256),
    ]
    for what, path, read, keys, of_graph in beside:
        if not path.is_file():
            continue
        try:
            found = read(path.read_text(encoding="utf-8"))
            for key in keys:
                found = found[key]
        except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            raise ModelError(f"'{path}' beside the graph cannot be read: {type(error).__name__} {error}.") from error
        if found != of_graph:
            raise ModelError(
                f"Graph '{settings.graph(name, version)}' is of {what} {of_graph}, '{path}' says {found}; export it "
                f"again ('parchgrad export {name} --format triton') or choose with {PREFIX}RUNTIME=onnx or torch."
            )


def _check_installed(settings: Settings) -> None:
    """Raises SettingsError where nothing is installed that runs what the settings ask for."""
    wanted = {"torch": ["torch"], "onnx": ["onnxruntime"], "auto": ["torch", "onnxruntime"]}[settings.runtime]
    if not any(map(is_installed, wanted)):
        packages, commands = " or ".join(wanted), " or ".join(_INSTALL[one] for one in wanted)
        allowed = f"a runtime that is installed; there is no {packages} here: {commands}"
        raise SettingsError(f"{PREFIX}RUNTIME", settings.runtime, allowed)


def _needed_folders(settings: Settings) -> Iterator[tuple[str, Path]]:
    """Folders without which nothing can be served, by the variable that names them."""
    if not settings.runs_torch:
        yield "GRAPHS_DIR", settings.graphs_dir
    elif not (settings.runs_graphs and settings.graphs_dir.is_dir()):
        yield "MODELS_DIR", settings.models_dir
        yield "TABLES_DIR", settings.tables_dir


def _wanting(settings: Settings, name: str, version: str) -> str:
    """Which graph is missing and what writes it, where only a graph will do."""
    if settings.runs_torch:
        return ""
    file = _given(settings.graphs_dir / name / version / GRAPH_FILE)
    installed = "" if settings.runtime == "onnx" else f", or install torch: {_INSTALL['torch']}"
    return f"; 'parchgrad export {name} --format triton' writes {file}{installed}"


def _given(folder: Path) -> str:
    """A folder of the settings as it is written in them: relative ones start at the project root."""
    return str(folder.relative_to(PROJECT_ROOT) if folder.is_relative_to(PROJECT_ROOT) else folder)
