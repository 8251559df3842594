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
    "patterns": set(),
    "quantiles": {"patterns"},
    "defaults": {"quantiles"},
    "options": {"defaults", "quantiles"},
    "drift": {"defaults", "patterns", "quantiles"},
    "class_graph.graph": {"files", "labels"},
    "class_graph.walks": set(),
    "class_graph.layout": set(),
    "class_graph.influence": {"runtimes.view"},
    "activation_histograms": set(),
    "layer_views": {"options", "rule", "runtimes.view", "tables"},
    "methods": {"options"},
    "grad_cam": set(),
    "interest": set(),
    "labels": set(),
    "rule": {"defaults"},
    "statistics": set(),
    "selection": {"quantiles"},
    "render": set(),
    "layers": {"patterns"},
    "files": set(),
    "versions": set(),
    "evaluation.maps": set(),
    "attacks.attack": set(),
    "attacks.corruptions": {"attacks.attack"},
    "attacks.gradients": {"attacks.attack", "attacks.corruptions", "preprocessing", "runtimes.view"},
    "evaluation.mosaics": set(),
    "evaluation.boxes": {"preprocessing"},
    "evaluation.images": {"evaluation.mosaics", "evidence", "preprocessing"},
    "evaluation.photographs": {"evaluation.boxes", "evaluation.images", "preprocessing"},
    "evaluation.intervals": set(),
    "evaluation.imputation": set(),
    "evaluation.perturbation": {"evaluation.imputation"},
    "preprocessing": set(),
    "architectures": set(),
    "programs": {"layers"},
    "sources": set(),
    "sources.folder": set(),
    "sources.labels": set(),
    "sources.listed": {"sources.folder", "sources.labels", "evaluation.boxes"},
    "evidence": {"defaults", "tables", "statistics", "files"},
    "checkpoint": {"evidence", "files"},
    "tables": {"defaults", "files", "labels", "layers", "patterns", "quantiles", "statistics", "versions"},
    "runtimes.interface": set(),
    "runtimes.array_explanation": {"options"},
    "runtimes.onnx_metadata": {"defaults", "labels", "options", "patterns", "preprocessing", "quantiles"},
    "runtimes.onnx_runtime": {
        "drift", "golden", "interest", "labels", "methods", "options", "patterns", "quantiles", "versions",
        "runtimes.array_explanation", "runtimes.onnx_metadata",
    },
}  # fmt: skip

# What works where torch is not installed, and all it imports.
WITHOUT_TORCH = (
    "activation_histograms",
    *("class_graph", "class_graph.graph"),
    *("attacks.attack", "attacks.corruptions"),
    *("answers", "cli", "client", "defaults", "drift", "errors", "files", "golden", "interest", "labels", "methods"),
    "options",
    *("patterns", "preprocessing", "quantiles", "render", "runtimes", "runtimes.array_explanation"),
    *("runtimes.onnx_metadata", "runtimes.onnx_runtime", "statistics", "uploads", "versions"),
)

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


BLOCKED = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

sys.meta_path.insert(0, Missing())
"""


def without(blocked, code, *arguments):
    """What Python says to `code` where these packages are not installed."""
    program = f"blocked = {blocked}\n{BLOCKED}\nsys.path.insert(0, {str(ROOT.parent)!r})\n{code}"
    command = [sys.executable, "-W", "error", "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent)


@pytest.mark.parametrize("name", ["parchgrad", *(f"parchgrad.{room}" for room in WITHOUT_TORCH)])
def test_it_works_without_torch(name):
    found = without(["torch", "torchvision"], f"import {name}")
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.parametrize(
    ("name", "blocked", "extra"),
    [
        *((name, "torch", "torch") for name in ("Explainer", "ParchGrad", "add_model", "load_model", "load_table")),
        ("OnnxExplainer", "onnxruntime", "onnx"),
    ],
)
def test_what_needs_a_package_that_is_not_there_says_so(name, blocked, extra):
    code = f"import parchgrad\ntry:\n    parchgrad.{name}\nexcept parchgrad.ParchGradError as error:\n    print(error)"
    found = without([blocked], code)
    assert found.stdout == (
        f"parchgrad.{name} needs {blocked}, which is not installed: pip install 'parchgrad[{extra}]'.\n"
    )


def test_an_image_becomes_an_input_without_torch():
    code = (
        "import PIL.Image; from parchgrad.preprocessing import Preprocessing\n"
        "p = Preprocessing(size=(8, 6), rule='stretch')\n"
        "pixels, placement = p.array(PIL.Image.new('RGB', (12, 16), (255, 0, 0)))\n"
        "print(pixels.shape, p.restore(pixels)[0, 0].tolist(), placement.original_size)"
    )
    assert without(["torch"], code).stdout == "(3, 8, 6) [255, 0, 0] (12, 16)\n"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "Predictions with ParchGrad saliency maps"),
        (["serve", "--help"], 0, "Serve over HTTP from the checkout"),
        (["serve", "--host", "no such host"], 1, "is no address to listen at here"),
        (["explain", "any", "README.md", "--url", "ftp://here"], 1, "ftp://here"),
        (["table", "show", "any"], 1, "Error: This command needs torch, which is not installed: pip install"),
    ],
    ids=["help", "serve --help", "serve", "explain --url", "table show"],
)
def test_the_commands_that_need_no_torch(arguments, code, said):
    found = without(["torch", "torchvision"], "from parchgrad.cli import main; main()", *arguments)
    assert found.returncode == code
    assert said in found.stdout + found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize("name", parchgrad.__all__)
def test_every_public_name_is_there(name):
    assert getattr(parchgrad, name) is not None


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Explaner'"):
        _ = parchgrad.Explaner
