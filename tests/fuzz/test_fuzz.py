"""Every kept case again, a short run of every target, and the fuzzer itself: planted faults are found."""

import importlib
import random
from pathlib import Path

import pytest

from fuzz.__main__ import TARGETS
from fuzz.run import Report, fuzz
from fuzz.target import Target, corpus
from tests.fuzz import planted

SECONDS = 8  # of fuzzing, each target
PLANTED_SECONDS = 20  # at most: it ends with the fault
CASES = [path for name in TARGETS for path in sorted(corpus(name).iterdir())]


def target(name: str) -> Target:
    found: Target = importlib.import_module(f"fuzz.targets.{name}").TARGET
    return found


def run(module: str, kept: Path, crashers: Path, seconds: int) -> Report:
    pytest.importorskip("atheris", reason="atheris is not installed: pip install 'parchgrad[fuzz]'")
    return fuzz(module, kept, crashers, seconds=seconds, seed=1)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on damaged tags
@pytest.mark.parametrize("name", TARGETS)
def test_every_kept_case_keeps_the_promises(name: str) -> None:
    cases = [path for path in CASES if path.parent.name == name]
    assert len(cases) > 20
    for path in cases:
        try:
            target(name).check(path.read_bytes())
        except Exception as error:
            raise AssertionError(f"{path}: {error!r}") from error


@pytest.mark.parametrize("name", TARGETS)
def test_the_start_corpus_is_kept(name: str) -> None:
    kept = {path.name for path in corpus(name).iterdir()}
    assert {file for file, _ in target(name).seeds()} <= kept


def test_the_corpus_is_small() -> None:
    assert sum(path.stat().st_size for path in CASES) < 1_000_000


@pytest.mark.parametrize("name", TARGETS)
def test_fuzzing_finds_nothing(name: str, tmp_path: Path) -> None:
    report = run(f"fuzz.targets.{name}", corpus(name), tmp_path, SECONDS)
    print(f"{name}: {report}")
    assert not report.failed, report.log[-6000:]
    assert report.executions > len(list(corpus(name).iterdir()))
    assert report.coverage > 100


@pytest.mark.parametrize(
    ("fault", "said"),
    [("raise", "ValueError: planted"), ("crash", "deadly signal"), ("hoard", "One case took the memory")],
)
def test_a_planted_fault_is_found(fault: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a case one byte away from the fault."""
    monkeypatch.setenv(planted.FAULT, fault)
    kept, crashers = tmp_path / "kept", tmp_path / "crashers"
    kept.mkdir()
    (kept / "near").write_bytes(b"fault?")
    report = run("tests.fuzz.planted", kept, crashers, PLANTED_SECONDS)
    assert report.failed
    assert report.exit_status != 0
    assert [path.read_bytes()[:6] for path in report.crashers] == [b"fault!"]
    assert said in report.log


def test_a_run_that_does_not_start_is_no_success(tmp_path: Path) -> None:
    report = run("tests.fuzz.no_such_target", tmp_path, tmp_path / "crashers", SECONDS)
    assert report.failed
    assert (report.executions, report.crashers) == (0, ())


@pytest.mark.parametrize("name", TARGETS)
def test_mutations_stay_within_the_case_s_size(name: str) -> None:
    """libFuzzer refuses longer ones; and what is almost right must be made of anything, also of nothing."""
    mutate = target(name).mutate
    assert mutate is not None
    draw = random.Random(0)
    mutated = mutate(lambda case, most, random: bytes([*case, random.randrange(256)])[:most])
    cases = [b"", *(path.read_bytes() for path in CASES if path.parent.name == name)]
    made = {mutated(draw.choice(cases), most, draw) for most in (1, 100, 8000) for _ in range(200)}
    assert max(map(len, made)) <= 8000
    assert len(made) > 300
