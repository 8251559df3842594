"""The command line as the shell calls it, in this process: a process of its own would import torch each time."""

import subprocess
import sys

import pytest

from parchgrad.cli import main


@pytest.fixture
def typed(monkeypatch, capsys):
    """Runs `parchgrad` with arguments to its exit: the exit code and what it printed."""

    def run(*arguments):
        line = ["parchgrad", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", line)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return subprocess.CompletedProcess(line, ended.value.code or 0, *capsys.readouterr())

    return run
