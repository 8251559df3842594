"""KServe's kinds against the types of its package, strictly; a process of its own, as tests/service/kserve_client.py.

python -m tests.deploy.kserve_types < lines > lines    a line: a list of objects; its answer: a list of errors
"""

import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.service.serving import PROJECT_ROOT

SCALARS = {"str": str, "int": int, "bool": bool, "float": (int, float)}


Check = Callable[[list[dict[str, Any]]], list[str]]


@contextmanager
def checking() -> Iterator[Check]:
    """What says what is wrong with InferenceServices and ServingRuntimes: unknown fields, other types, fields left out.

    One process for all questions: importing the package's types takes seconds. It ends with the context.
    """
    command = [sys.executable, "-m", __name__]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": PROJECT_ROOT}
    with subprocess.Popen(command, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdin is not None
        assert process.stdout is not None

        def check(objects: list[dict[str, Any]]) -> list[str]:
            process.stdin.write(json.dumps(objects) + "\n")
            process.stdin.flush()
            found: list[str] = json.loads(process.stdout.readline())
            return found

        yield check


def _classes() -> dict[str, Any]:
    import kserve.models
    import kubernetes.client.models

    classes: dict[str, Any] = {}
    for package in (kubernetes.client.models, kserve.models):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            classes |= dict(inspect.getmembers(importlib.import_module(module.name), inspect.isclass))
    return classes


def _check(value: Any, kind: str, path: str, classes: dict[str, Any]) -> list[str]:
    """Of one value that must be a `kind`, in the words of the package's `openapi_types`."""
    if kind == "object":  # an integer or a string
        return [] if isinstance(value, (int, str)) else [f"{path}: {value!r} is no integer or string"]
    if kind in SCALARS:
        right = isinstance(value, SCALARS[kind]) and (kind == "bool" or not isinstance(value, bool))
        return [] if right else [f"{path}: {value!r} is no {kind}"]
    if of := re.fullmatch(r"[lL]ist\[(.+)\]", kind):
        if not isinstance(value, list):
            return [f"{path}: {value!r} is no list"]
        return [text for i, one in enumerate(value) for text in _check(one, of[1], f"{path}[{i}]", classes)]
    if not isinstance(value, dict):
        return [f"{path}: {value!r} is no {kind}"]
    if of := re.fullmatch(r"[dD]ict[(\[]str, (.+)[)\]]", kind):
        return [text for key, one in value.items() for text in _check(one, of[1], f"{path}.{key}", classes)]
    types, names = classes[kind].openapi_types, classes[kind].attribute_map
    attributes = {name: attribute for attribute, name in names.items()}
    found = [f"{path}.{name}: no field of {kind}" for name in value if name not in attributes]
    known = {name: one for name, one in value.items() if name in attributes}
    for name, one in known.items():
        found += _check(one, types[attributes[name]], f"{path}.{name}", classes)
    try:  # their constructors know what may not be left out
        classes[kind](**{attributes[name]: one for name, one in known.items()})
    except ValueError as error:
        found.append(f"{path}: {error}")
    return found


def main() -> None:
    classes: dict[str, Any] = {}
    for line in sys.stdin:
        classes = classes or _classes()
        found = []
        for one in json.loads(line):
            version = one["apiVersion"].rpartition("/")[2]
            found += _check(one, f"{version[:1].upper()}{version[1:]}{one['kind']}", one["kind"], classes)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
