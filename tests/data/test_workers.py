"""data.workers: a job that kills its process is named, and the others go on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gkdcli.data.workers import Crashed, Crew, beat


def act(job: str) -> str:
    match job.split():
        case ["signal", number]:
            os.kill(os.getpid(), int(number))
            time.sleep(30)
        case ["exit"]:
            os._exit(3)
        case ["raise"]:
            raise KeyError("ours")
        case ["sleep"]:
            time.sleep(60)
        case ["slow"]:
            for _ in range(30):
                time.sleep(0.1)
                beat()
    return f"{job} done"


def _run(crew: Crew[str, str], jobs: list[str]) -> dict[str, str | Crashed]:
    results: dict[str, str | Crashed] = {}
    waiting = list(jobs)
    while waiting or crew.busy:
        while waiting and crew.give(waiting[0]):
            waiting.pop(0)
        results.update(crew.collect(0.5))
    return results


def test_jobs_that_kill_their_process_are_named_and_the_rest_is_done() -> None:
    jobs = ["a", f"signal {int(signal.SIGSEGV)}", "b", f"signal {int(signal.SIGKILL)}", "exit", "c"]
    with Crew(act, 2) as crew:
        results = _run(crew, jobs)
    assert {job: results[job] for job in "abc"} == {"a": "a done", "b": "b done", "c": "c done"}
    assert results[jobs[1]] == Crashed(signal.SIGSEGV)
    assert results[jobs[3]] == Crashed(signal.SIGKILL)
    assert results["exit"] == Crashed(0)
    assert [Crashed(signal.SIGSEGV).killed, Crashed(signal.SIGKILL).killed] == [False, True]


def test_a_mistake_of_ours_is_raised_and_nobody_is_left() -> None:
    with pytest.raises(RuntimeError, match="KeyError: 'ours'"), Crew(act, 2) as crew:
        _run(crew, ["sleep", "raise"])
    assert multiprocessing.active_children() == []


def test_a_process_that_dies_while_it_waits_costs_no_job() -> None:
    with Crew(act, 1) as crew:
        assert _run(crew, ["a"]) == {"a": "a done"}
        child = multiprocessing.active_children()[0]
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        assert _run(crew, ["b"]) == {"b": "b done"}


def test_workers_ignore_the_signals_that_stop_their_parent() -> None:
    with Crew(act, 1) as crew:
        _run(crew, ["a"])
        child = multiprocessing.active_children()[0]
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(child.pid or 0, number)
        assert _run(crew, ["b"]) == {"b": "b done"}
        assert child.is_alive()


def test_a_job_that_stands_still_is_ended_and_one_that_is_only_slow_is_not() -> None:
    with Crew(act, 2, patience_sec=1.5) as crew:
        results = _run(crew, ["sleep", "slow", "a"])
    assert {job: results[job] for job in ("slow", "a")} == {"slow": "slow done", "a": "a done"}
    hung = results["sleep"]
    assert isinstance(hung, Crashed)
    assert (hung.silent_sec >= 1.5, hung.killed) == (True, False)


def test_workers_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """Even in the middle of a job; else two would write one part."""
    code = (
        "from tests.data.test_workers import act; from gkdcli.data.workers import Crew\n"
        "import multiprocessing, time\n"
        "if __name__ == '__main__':\n"
        "    with Crew(act, 1) as crew:\n"
        "        crew.give('sleep'); crew.collect(20)\n"
        "        print(multiprocessing.active_children()[0].pid, flush=True); time.sleep(60)\n"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
    ) as parent:
        assert parent.stdout
        worker = int(parent.stdout.readline())
        parent.kill()
    for _ in range(100):
        if not _lives(worker):
            return
        time.sleep(0.05)
    pytest.fail("the worker outlived its parent")


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
