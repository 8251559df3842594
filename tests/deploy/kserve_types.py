"""KServe's kinds against the types of its package, strictly; a process of its own, as tests/service/kserve_client.py.

python -m tests.deploy.kserve_types < objects.json > errors.json
"""

import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from functools import cache
from typing import Any

from tests.service.serving import PROJECT_ROOT

SCALARS = {"str": str, "int": int, "bool": bool, "float": (int, float)}


def errors(objects: list[dict[str, Any]]) -> list[str]:
    """What is wrong with InferenceServices and ServingRuntimes: unknown fields, other types, fields left out."""
    return _errors(json.dumps(objects))


@cache
def _errors(objects: str) -> list[str]:
    """Importing the package's types takes seconds."""
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, input=objects.encode(), capture_output=True, cwd=PROJECT_ROOT)
    assert done.returncode == 0, done.stderr.decode()
    found: list[str] = json.loads(done.stdout)
    return found


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
    classes = _classes()
    found = []
    for one in json.load(sys.stdin):
        version = one["apiVersion"].rpartition("/")[2]
        found += _check(one, f"{version[:1].upper()}{version[1:]}{one['kind']}", one["kind"], classes)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
