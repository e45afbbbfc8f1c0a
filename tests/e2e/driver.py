"""Commands that are killed: a process that has imported everything forks each, so that the moments fall into
their work and not into imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_PROGRAM = """
import importlib, json, os, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
from gkdcli.cli import run, whole_app
whole_app()
for line in sys.stdin:
    log, *words = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(handle, number)
        code = run(words)
        sys.stdout.flush()
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Driver:
    """Runs one command after another, each in a session of its own, which has the number of the process.

    Args:
        log: where a command's output goes, the last one's alone.
        modules: what is imported beforehand.
    """

    def __init__(self, log: Path, *modules: str) -> None:
        here = Path(__file__).parents[2]
        self._log = log
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *modules],
            cwd=here,
            env=os.environ | {"PYTHONPATH": str(here), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, words: Sequence[str]) -> int:
        """The process id."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps([str(self._log), *words]) + "\n")
        self._process.stdin.flush()
        return self._number()

    def end(self) -> int:
        """Waits for the exit code of the command that was started."""
        return self._number()

    def close(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()

    def _number(self) -> int:
        assert self._process.stdout
        return int(self._process.stdout.readline())


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def sleep(pid: int, seconds: float) -> None:
    """As long as the process lives."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and lives(pid):
        time.sleep(min(0.002, max(deadline - time.monotonic(), 0)))
