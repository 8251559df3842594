"""`python -m fuzz TARGET --seconds N`: fuzz from the kept corpus; exit status 1 where something was found."""

import argparse
import sys
import time
from pathlib import Path

from fuzz.run import ROOT, fuzz
from fuzz.target import corpus

TARGETS = tuple(sorted(path.stem for path in (Path(__file__).parent / "targets").glob("[!_]*.py")))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("target", choices=(*TARGETS, "all"))
    parser.add_argument("--seconds", type=int, default=60, help="of fuzzing, each target (60)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations; 0 draws one (0)")
    parser.add_argument("--merge", action="store_true", help="add what reached new code to the kept corpus")
    parser.add_argument("--crashers", type=Path, default=ROOT / "out" / "fuzz", help="folder for cases that fail")
    parser.add_argument("--verbose", action="store_true", help="print libFuzzer's own lines as well")
    given = parser.parse_args()
    failed = False
    for name in TARGETS if given.target == "all" else (given.target,):
        start = time.perf_counter()
        report = fuzz(
            f"fuzz.targets.{name}", corpus(name), given.crashers / name,
            seconds=given.seconds, seed=given.seed, merge=given.merge, echo=given.verbose,
        )  # fmt: skip
        print(f"{name}: {report}, {time.perf_counter() - start:.0f} s", flush=True)
        if report.failed:
            failed = True
            print("\n".join([report.log[-6000:], *(f"crasher: {path}" for path in report.crashers)]), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
