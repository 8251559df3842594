"""service/versions.py: which versions there are, what runs each of them, and what is said where nothing can."""

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from parchgrad.errors import ModelError
from service import settings as settings_module
from service import versions
from service.engine import Job
from service.onnx_engine import OnnxEngine
from service.settings import Settings, SettingsError
from service.torch_engine import TorchEngine
from tests.service import graphs
from tests.service.conftest import Home


@pytest.fixture
def folders(tmp_path: Path) -> Settings:
    """`net` 1 as a package with its table, `net` 2 as both, `graph` 1 as a graph alone."""
    for folder in ("models/net/1", "models/net/2", "tables/net/1", "tables/net/2", "graphs/net/3"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("graphs/net/2/model.onnx", "graphs/graph/1/model.onnx"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    return Settings(
        models_dir=tmp_path / "models", tables_dir=tmp_path / "tables", graphs_dir=tmp_path / "graphs", model="net"
    )


def install(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """As if these runtimes were installed, and no other."""
    for module in (settings_module, versions):
        monkeypatch.setattr(module, "is_installed", lambda package: package in packages)


# --- what runs a version ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("runtime", "device", "installed", "expected"),
    [
        ("auto", "cpu", "torch onnxruntime", {"net/1": "torch", "net/2": "onnx", "graph/1": "onnx"}),
        ("auto", "cuda", "torch onnxruntime", {"net/1": "torch", "net/2": "torch", "graph/1": "onnx"}),
        ("auto", "cpu", "torch", {"net/1": "torch", "net/2": "torch"}),
        ("auto", "cpu", "onnxruntime", {"net/2": "onnx", "graph/1": "onnx"}),
        ("auto", "cuda", "onnxruntime", {"net/2": "onnx", "graph/1": "onnx"}),
        ("torch", "cpu", "torch onnxruntime", {"net/1": "torch", "net/2": "torch"}),
        ("onnx", "cpu", "torch onnxruntime", {"net/2": "onnx", "graph/1": "onnx"}),
        ("onnx", "cuda", "torch onnxruntime", {"net/2": "onnx", "graph/1": "onnx"}),
    ],
)
def test_what_there_is_and_what_runs_it(
    folders: Settings,
    runtime: str,
    device: str,
    installed: str,
    expected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, *installed.split())
    settings = replace(folders, runtime=runtime, device=device)
    there = [f"{name}/{version}" for name in settings.names_there for version in settings.versions_there(name)]
    found = {one: versions.runtime_of(settings, *one.split("/")) for one in there}
    assert found == expected
    assert all(settings.versions_there(name) == sorted(settings.versions_there(name), key=int, reverse=True)
               for name in settings.names_there)  # fmt: skip


def test_a_graph_alone_is_an_entry_of_every_model(folders: Settings) -> None:
    assert replace(folders, models="*").entries == [("net", None), ("graph", None)]


# --- what is refused before anything starts --------------------------------------------------------------------

EXPORT = "'parchgrad export {} --format triton' writes"


@pytest.mark.parametrize(
    ("given", "installed", "message"),
    [
        (
            {"runtime": "torch"}, "onnxruntime",
            "PARCHGRAD_RUNTIME='torch': expected a runtime that is installed; there is no torch here: "
            "pip install 'parchgrad[torch]'.",
        ),
        (
            {"runtime": "onnx"}, "torch",
            "PARCHGRAD_RUNTIME='onnx': expected a runtime that is installed; there is no onnxruntime here: "
            "pip install 'parchgrad[onnx]'.",
        ),
        (
            {}, "",
            "PARCHGRAD_RUNTIME='auto': expected a runtime that is installed; there is no torch or onnxruntime here: "
            "pip install 'parchgrad[torch]' or pip install 'parchgrad[onnx]'.",
        ),
        (
            {"runtime": "onnx", "model": "other"}, "torch onnxruntime",
            f"PARCHGRAD_MODEL='other': expected a model of {{}}/graphs; there is 'graph', 'net'; "
            f"{EXPORT.format('other')} {{}}/graphs/other/VERSION/model.onnx.",
        ),
        (
            {"runtime": "onnx", "model": "net/1"}, "torch onnxruntime",
            f"PARCHGRAD_MODEL='net/1': expected a version of 'net'; there is 2; {EXPORT.format('net')} "
            "{}/graphs/net/1/model.onnx.",
        ),
        (
            {"model": "net/1"}, "onnxruntime",
            f"PARCHGRAD_MODEL='net/1': expected a version of 'net'; there is 2; {EXPORT.format('net')} "
            "{}/graphs/net/1/model.onnx, or install torch: pip install 'parchgrad[torch]'.",
        ),
        (
            {"runtime": "onnx", "graphs_dir": "/nope"}, "torch onnxruntime",
            "PARCHGRAD_GRAPHS_DIR='/nope': expected a folder that exists; "
            "'parchgrad export NAME --format triton' writes it.",
        ),
        (
            {"model": "nope"}, "torch onnxruntime",
            "PARCHGRAD_MODEL='nope': expected a model of {}/models or {}/graphs; there is 'graph', 'net'.",
        ),
        ({"graphs_dir": "/nope", "models_dir": "/nope"}, "torch onnxruntime",
            "PARCHGRAD_MODELS_DIR='/nope': expected a folder that exists.",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_said_in_one_line(
    folders: Settings, given: dict[str, str], installed: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, *installed.split())
    paths = {name: Path(text) if name.endswith("_dir") else text for name, text in given.items()}
    with pytest.raises(SettingsError) as caught:
        versions.check(replace(folders, **paths))  # type: ignore[arg-type]
    assert str(caught.value) == message.replace("{}", str(folders.models_dir.parent))


def test_a_graph_needs_neither_models_nor_tables(folders: Settings, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    versions.check(replace(folders, models_dir=nowhere, tables_dir=nowhere, runtime="onnx"))
    versions.check(replace(folders, models_dir=nowhere, tables_dir=nowhere, model="graph"))


def test_a_version_without_its_table_is_refused_where_torch_is_to_run_it(folders: Settings) -> None:
    (folders.tables_dir / "net" / "2").rmdir()
    versions.check(folders)  # net/2 has a graph
    with pytest.raises(SettingsError, match="expected a folder with the selection table net/2; there is net/1"):
        versions.check(replace(folders, runtime="torch"))


# --- what is loaded --------------------------------------------------------------------------------------------


@pytest.fixture
def both(home: Home, tmp_path: Path) -> Settings:
    """The tiny model, which has a package, and beside it the folder of graphs."""
    (tmp_path / "graphs").mkdir()
    return Settings(
        models_dir=home.root / "models", tables_dir=home.root / "tables", graphs_dir=tmp_path / "graphs", model="tiny"
    )


def test_auto_takes_the_graph_that_is_of_the_same_model_and_table(both: Settings, home: Home) -> None:
    assert isinstance(versions.load(both, "tiny", "1"), TorchEngine)
    explainer = home.explainer()
    digests = {"weights_sha256": explainer.model.weights_sha256, "table_sha256": explainer.table.table_sha256}
    graphs.write(both.graphs_dir, "tiny", **digests)
    assert isinstance(versions.load(both, "tiny", "1"), OnnxEngine)
    assert isinstance(versions.load(replace(both, runtime="torch"), "tiny", "1"), TorchEngine)


@pytest.mark.parametrize("what", ["weights", "table"])
def test_auto_refuses_a_graph_of_another_model_or_table(both: Settings, home: Home, what: str) -> None:
    explainer = home.explainer()
    digests = {"weights_sha256": explainer.model.weights_sha256, "table_sha256": explainer.table.table_sha256}
    graphs.write(both.graphs_dir, "tiny", **{**digests, f"{what}_sha256": "c" * 64})
    with pytest.raises(ModelError, match=f"is of {what} {'c' * 64}, '.*' says {digests[f'{what}_sha256']}; export it"):
        versions.load(both, "tiny", "1")
    assert isinstance(versions.load(replace(both, runtime="onnx"), "tiny", "1"), OnnxEngine)  # the operator has chosen


def test_auto_refuses_a_package_that_it_cannot_compare(both: Settings, tmp_path: Path) -> None:
    graphs.write(both.graphs_dir, "tiny")
    package = tmp_path / "models" / "tiny" / "1"
    package.mkdir(parents=True)
    (package / "model.yaml").write_text("weights: 3\n")
    with pytest.raises(ModelError, match=r"model\.yaml' beside the graph cannot be read: TypeError"):
        versions.load(replace(both, models_dir=tmp_path / "models"), "tiny", "1")


# --- what must be loaded ---------------------------------------------------------------------------------------


def digests(home: Home) -> dict[str, str]:
    """Of the tiny model, as `graphs.write` takes them."""
    explainer = home.explainer()
    return {"weights_sha256": explainer.model.weights_sha256, "table_sha256": explainer.table.table_sha256}


@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_what_has_the_digests_is_loaded(both: Settings, home: Home, runtime: str) -> None:
    of_tiny = digests(home)
    folder = graphs.write(both.graphs_dir, "tiny", **of_tiny)
    graph = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    entries = [":".join([*of_tiny.values(), graph])]
    if runtime == "torch":  # what a graph is made of, it only says
        entries += [of_tiny["weights_sha256"], ":".join(of_tiny.values())]
    for entry in entries:
        versions.load(replace(both, runtime=runtime, digests=f"tiny/1:{entry},other/1:{'d' * 64}"), "tiny", "1")


@pytest.mark.parametrize("runtime", ["torch", "onnx"])
@pytest.mark.parametrize("what", ["weights", "table"])
def test_what_has_another_digest_is_refused(both: Settings, home: Home, runtime: str, what: str) -> None:
    of_tiny = digests(home)
    folder = graphs.write(both.graphs_dir, "tiny", **of_tiny)
    graph = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    wanted = ":".join([*(of_tiny | {f"{what}_sha256": "d" * 64}).values(), graph])
    expected = f"is expected with a {what} of SHA-256 {'d' * 64} (PARCHGRAD_DIGESTS), found {of_tiny[f'{what}_sha256']}"
    with pytest.raises(ModelError, match=re.escape(expected)):
        versions.load(replace(both, runtime=runtime, digests=f"tiny/1:{wanted}"), "tiny", "1")


@pytest.mark.parametrize("changed", ["model.onnx", "model.onnx.data"])
def test_a_graph_of_other_bytes_is_refused_before_it_is_read(both: Settings, home: Home, changed: str) -> None:
    of_tiny = digests(home)
    folder = graphs.write(both.graphs_dir, "tiny", **of_tiny)
    graph = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    with (folder / changed).open("ab") as file:
        file.write(b"no graph")
    settings = replace(both, runtime="onnx", digests=f"tiny/1:{':'.join([*of_tiny.values(), graph])}")
    with pytest.raises(ModelError, match=f"version 1 is expected with a graph of SHA-256 {graph} .*, found [0-9a-f]+"):
        versions.load(settings, "tiny", "1")


def test_where_there_are_digests_nothing_else_is_loaded(both: Settings) -> None:
    with pytest.raises(ModelError, match=r"version 1 is expected in PARCHGRAD_DIGESTS, found no entry for it\."):
        versions.load(replace(both, digests=f"tiny/2:{'d' * 64}"), "tiny", "1")


@pytest.mark.parametrize("runtime", ["auto", "onnx"])
def test_a_graph_whose_digest_is_not_named_is_not_run(both: Settings, home: Home, runtime: str) -> None:
    """Whoever can write the folder could else put any graph there that says it is of the right weights."""
    of_tiny = digests(home)
    settings = replace(both, runtime=runtime, digests=f"tiny/1:{':'.join(of_tiny.values())}")
    if runtime == "auto":
        versions.load(settings, "tiny", "1")  # there is no graph
    graphs.write(both.graphs_dir, "tiny", **of_tiny)
    with pytest.raises(ModelError, match=r"whose digest PARCHGRAD_DIGESTS does not name; expected .*:GRAPH_SHA256"):
        versions.load(settings, "tiny", "1")


def test_a_graph_that_is_not_there_is_said_so_in_spite_of_its_digest(both: Settings) -> None:
    settings = replace(both, runtime="onnx", digests=f"tiny/1:{':'.join('def'[i] * 64 for i in range(3))}")
    with pytest.raises(ModelError, match="There is no graph "):
        versions.load(settings, "tiny", "1")


@pytest.mark.parametrize("place", ["model.onnx.data", "weights.bin"])
def test_weights_beside_a_graph_are_covered_by_its_digest_or_refused(both: Settings, home: Home, place: str) -> None:
    import onnx

    of_tiny = digests(home)
    path = graphs.write(both.graphs_dir, "tiny", **of_tiny) / "model.onnx"
    onnx.save_model(
        onnx.load(path), path, save_as_external_data=True, location=place, size_threshold=70, convert_attribute=True
    )
    beside = path.with_name(place)
    assert beside.is_file()
    covered = path.read_bytes() + (beside.read_bytes() if place == "model.onnx.data" else b"")
    digest = hashlib.sha256(covered).hexdigest()
    settings = replace(both, runtime="onnx", digests=f"tiny/1:{':'.join([*of_tiny.values(), digest])}")
    if place == "model.onnx.data":
        versions.load(settings, "tiny", "1")
    else:
        with pytest.raises(ModelError, match=r"has weights in 'weights.bin'; with PARCHGRAD_DIGESTS they are expected"):
            versions.load(settings, "tiny", "1")


def test_nothing_is_read_again_of_a_graph_that_was_compared(
    both: Settings, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_tiny = digests(home)
    path = graphs.write(both.graphs_dir, "tiny", **of_tiny) / "model.onnx"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    compare = versions._compare

    def replaced(what: str, *given: str) -> None:
        compare(what, *given)
        path.write_bytes(b"another graph")

    monkeypatch.setattr(versions, "_compare", replaced)
    settings = replace(both, runtime="onnx", digests=f"tiny/1:{':'.join([*of_tiny.values(), digest])}")
    engine = versions.load(settings, "tiny", "1")
    engine.run([Job(np.zeros((3, *graphs.SIZE), np.float32))])
