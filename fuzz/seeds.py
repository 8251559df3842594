"""`python -m fuzz.seeds`: write every target's start cases into the kept corpus, beside what fuzzing added."""

import importlib

from fuzz.__main__ import TARGETS
from fuzz.target import Target, corpus


def main() -> None:
    for name in TARGETS:
        target: Target = importlib.import_module(f"fuzz.targets.{name}").TARGET
        folder = corpus(name)
        folder.mkdir(parents=True, exist_ok=True)
        for file, case in target.seeds():
            (folder / file).write_bytes(case)


if __name__ == "__main__":
    main()
