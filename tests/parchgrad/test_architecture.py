"""Imports go down only, and `import parchgrad` stays light (architecture.md)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import parchgrad

ROOT = Path(parchgrad.__file__).parent

# Room -> the rooms it may import; `errors` is anyone's. "tensors only" rooms may import errors alone.
MAY_IMPORT = {
    "errors": set(),
    "rule": set(),
    "statistics": set(),
    "selection": set(),
    "render": set(),
    "layers": set(),
    "files": set(),
    "versions": set(),
    "evaluation.maps": set(),
    "evaluation.mosaics": set(),
    "preprocessing": set(),
    "architectures": set(),
    "programs": {"layers"},
    "sources": set(),
    "evidence": {"tables", "statistics", "files"},
    "checkpoint": {"evidence", "files"},
    "tables": {"statistics", "layers", "files", "versions", "selection", "options", "rule"},
}

SERVICE_SIDE = {"bentoml", "starlette", "fastapi", "prometheus_client", "service", "os.environ"}


def imports(path):
    """Every module a file imports, wherever in it, but for type checking only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


FILES = sorted(path for path in ROOT.rglob("*.py"))
NAMES = [path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in FILES]


@pytest.mark.parametrize(("path", "name"), list(zip(FILES, NAMES, strict=True)), ids=NAMES)
def test_imports_go_down_only(path, name):
    used = imports(path)
    assert not {module for module in used if module.split(".")[0] in SERVICE_SIDE}, "the library knows no service"
    if name in MAY_IMPORT:
        ours = {module.removeprefix("parchgrad.") for module in used if module.startswith("parchgrad.")}
        rooms = {module for module in ours if (ROOT / (module.replace(".", "/") + ".py")).exists()}
        assert rooms <= MAY_IMPORT[name] | {"errors"}


@pytest.mark.parametrize("name", NAMES)
def test_the_library_prints_nothing_and_reads_no_environment(name):
    if name.split(".")[0] == "cli":
        pytest.skip("the command line prints")
    text = (ROOT / (name.replace(".", "/") + ".py")).read_text(encoding="utf-8")
    calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)}
    assert "print" not in calls
    assert not any(call.startswith(("os.getenv", "os.environ")) for call in calls)


def test_importing_the_package_is_light():
    heavy = ("torch", "torchvision", "onnxruntime", "ray", "scipy")
    code = f"import sys, parchgrad; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("name", parchgrad.__all__)
def test_every_public_name_is_there(name):
    assert getattr(parchgrad, name) is not None


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Explaner'"):
        _ = parchgrad.Explaner
