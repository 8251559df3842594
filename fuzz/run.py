"""One bounded run of a target in a process of its own, and what it found; growing the kept corpus."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
ONE_CASE_SECONDS = 10  # a case that takes longer is a finding: it would hold a decode thread
KINDS = ("crash-", "timeout-", "oom-")


@dataclass(frozen=True)
class Report:
    """`coverage` counts edges of instrumented Python; `grown` the new cases that reached more of them."""

    executions: int
    coverage: int
    grown: int
    peak_mb: int
    crashers: tuple[Path, ...]
    exit_status: int
    log: str

    @property
    def failed(self) -> bool:
        return bool(self.crashers) or self.exit_status != 0

    def __str__(self) -> str:
        return (
            f"{self.executions} executions, coverage {self.coverage}, corpus +{self.grown}, "
            f"peak {self.peak_mb} MB, crashers {len(self.crashers)}"
        )


def fuzz(
    module: str, kept: Path, crashers: Path, *, seconds: int, seed: int = 0, merge: bool = False, echo: bool = False
) -> Report:
    """Fuzz `module`'s TARGET from the cases in `kept`; what fails is written to the folder `crashers`.

    `merge` adds to `kept` the smallest new cases that reach what it did not. `seed` 0 draws one.
    """
    crashers.mkdir(parents=True, exist_ok=True)
    before = set(crashers.iterdir())
    with TemporaryDirectory(prefix="parchgrad-fuzz-") as grown:
        log, status, peak = _libfuzzer(
            module, f"-max_total_time={seconds}", f"-seed={seed}", f"-timeout={ONE_CASE_SECONDS}",
            # libFuzzer would count what the process that started it had (getrusage(2)); fuzz.process bounds memory.
            "-rss_limit_mb=0", "-print_final_stats=1", f"-artifact_prefix={crashers}/",
            grown, str(kept), echo=echo,
        )  # fmt: skip
        new = len(list(Path(grown).iterdir()))
        if merge and status == 0:
            merged, status, _ = _libfuzzer(module, "-merge=1", str(kept), grown, echo=echo)
            if status != 0:
                log += merged
    found = tuple(sorted(path for path in set(crashers.iterdir()) - before if path.name.startswith(KINDS)))
    return Report(
        executions=_last(r"^stat::number_of_executed_units: (\d+)", log),
        coverage=_last(r"^#\d+\t.*?cov: (\d+)", log),
        grown=new,
        peak_mb=peak,
        crashers=found,
        exit_status=status,
        log=log,
    )


def _libfuzzer(module: str, *arguments: str, echo: bool) -> tuple[str, int, int]:
    """(what it printed, its exit status, the most memory it was seen to have in MB)."""
    command = [sys.executable, "-m", "fuzz.process", module, *arguments]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        lines, peak = [], 0
        for line in process.stdout or ():
            lines.append(line)
            peak = max(peak, _resident_peak(process.pid))
            if echo:
                print(line, end="", file=sys.stderr)
    return "".join(lines), process.returncode, peak


def _resident_peak(pid: int) -> int:
    """The most memory the process has had, in MB; 0 once it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+)", text)
    return int(found[1]) // 1024 if found else 0


def _last(pattern: str, log: str) -> int:
    found = re.findall(pattern, log, re.MULTILINE)
    return int(found[-1]) if found else 0
