"""requirements.cpu.txt and requirements.gpu.txt: what the images install, of what requirements.lock pins.

`python deploy/container/locks.py` writes both, from the metadata of the packages that are installed here. `--sizes`
prints what each takes, and the lock. A package's needs are followed as pip follows them, on the Python that runs this.
"""

import importlib.metadata
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

PROJECT_ROOT = Path(__file__).resolve().parents[2]
FOLDER = PROJECT_ROOT / "deploy" / "container"
EXTRAS = ("service", "grpc", "tracing")
# The library's: matplotlib for figures, networkx for building class graphs; the service draws and reads without them.
NOT_SERVED = {"matplotlib", "networkx"}
RUNTIMES = {"cpu": {"onnx", "onnxruntime"}, "gpu": {"torch", "torchvision"}}  # of the extras `onnx` and `torch`

Pinned = dict[NormalizedName, str]


def pins() -> Pinned:
    """Name -> `name==version`, of requirements.lock."""
    lines = (PROJECT_ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    found = [line.split(";")[0].strip() for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(line.split("==")[0]): line for line in found}


def wanted(variant: str) -> list[Requirement]:
    """What the service of a variant needs itself, as pyproject.toml has it."""
    project = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    everywhere = [*project["dependencies"], *(line for extra in EXTRAS for line in extras[extra])]
    asked = [Requirement(line) for line in [*everywhere, *extras["onnx"], *extras["torch"]]]
    runtimes = set().union(*RUNTIMES.values())
    left_out = NOT_SERVED | {"parchgrad"} | (runtimes - RUNTIMES[variant])
    return [one for one in asked if canonicalize_name(one.name) not in left_out]


def closed(asked: Iterable[Requirement]) -> set[NormalizedName]:
    """The names of `asked` and of all that they need in turn. Raises PackageNotFoundError for one not installed."""
    todo, done = list(asked), set[tuple[NormalizedName, frozenset[str]]]()
    while todo:
        one = todo.pop()
        key = canonicalize_name(one.name), frozenset(one.extras)
        if key in done:
            continue
        done.add(key)
        for text in importlib.metadata.requires(one.name) or []:
            needed = Requirement(text)
            marker = needed.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *one.extras)):
                todo.append(needed)
    return {name for name, _ in done}


def text(variant: str) -> str:
    """The requirements file of a variant. Raises KeyError for a package that requirements.lock does not have."""
    pinned = pins()
    lines = sorted((pinned[name] for name in closed(wanted(variant))), key=str.lower)
    return "\n".join([f"# What the {variant} image installs; deploy/container/locks.py writes it.", *lines, ""])


def megabytes(names: Iterable[NormalizedName]) -> float:
    """The files of installed packages, without their byte code; what is not installed counts nothing."""
    installed = {canonicalize_name(one.name): one for one in importlib.metadata.distributions()}
    found = [file.locate() for name in names if name in installed for file in installed[name].files or []]
    paths = [Path(str(path)) for path in found]
    return sum(path.stat().st_size for path in paths if path.is_file() and path.suffix != ".pyc") / 1e6


def print_sizes() -> None:
    for variant in RUNTIMES:
        print(f"requirements.{variant}.txt  {megabytes(closed(wanted(variant))):,.0f} MB")
    print(f"requirements.lock     {megabytes(pins()):,.0f} MB")


if __name__ == "__main__":
    if sys.argv[1:] == ["--sizes"]:
        print_sizes()
        sys.exit()
    for each in RUNTIMES:
        (FOLDER / f"requirements.{each}.txt").write_text(text(each), encoding="utf-8")
