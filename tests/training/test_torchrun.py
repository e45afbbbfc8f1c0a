"""Training under torchrun, as users type it: killed and started again, told to stop and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from gkdcli.runs import Run
from tests.training.jobs import assert_the_table_is_the_lines, metrics_of, untimed

if not Path("/proc/self/environ").exists():
    pytest.skip("finds its processes in /proc", allow_module_level=True)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
DISTILL = ("distill", "demo-tiny", "--batch-size", "8", "--json")
EVERY_STEP = ("--set", "train.checkpoint_minutes=1e-9")


class Job(NamedTuple):
    """A torchrun that goes on under a root."""

    process: subprocess.Popen[str]
    root: Path

    def rank(self, number: int) -> int:
        """The process with this number."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        wanted = f"RANK={number}".encode()
        return next(
            int(pid) for pid in children if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        )

    def wait_for_steps(self, steps: int) -> None:
        """Until so many are in the log of the newest run."""
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and self.process.poll() is None:
            runs = students(self.root)
            if runs and runs[-1].metrics.is_file() and runs[-1].metrics.read_text().count("\n") >= steps:
                return
            time.sleep(0.01)
        raise AssertionError(f"no such step\n{self.process.communicate()}")

    def end(self) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        out, err = self.process.communicate(timeout=300)
        return self.process.returncode, out, err


def torchrun(root: Path, *words: object, options: tuple[str, ...] = (), script: Path | None = None) -> Job:
    command = [*TORCHRUN, *options, *([str(script)] if script else ["-m", "gkdcli"]), *map(str, words)]
    process = subprocess.Popen(
        [*command, "--root", str(root)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    return Job(process, root)


def students(root: Path) -> list[Run]:
    return [Run(path.parent) for path in sorted(root.glob("runs/demo-tiny/distill-rgb/*/run.json"))]


def own_lines(err: str) -> list[str]:
    """Without what torchrun says itself."""
    return [line for line in err.splitlines() if line.startswith(("error:", "where:", "hint:"))]


def assert_same(run: Run, other: Run) -> None:
    for ours, theirs in ((run.last, other.last), (run.best, other.best)):
        a, b = load_file(ours), load_file(theirs)
        assert a.keys() == b.keys()
        assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert untimed(metrics_of(run)) == untimed(metrics_of(other))


@pytest.fixture
def place(tiny_trained: Path, tmp_path: Path) -> Path:
    return _place(tiny_trained, tmp_path)


def _place(trained: Path, root: Path) -> Path:
    """A root with store and teacher, where a student is to be trained."""
    teachers = Path("runs/demo-tiny/pretrain-attention-rgb")
    shutil.copytree(trained / teachers, root / teachers)
    for name in ("datasets", "stores"):
        (root / name).symlink_to(trained / name)
    return root


@pytest.fixture(scope="module")
def stopped(tiny_trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run of which one process was sent SIGTERM, and what came of it."""
    root = _place(tiny_trained, tmp_path_factory.mktemp("torchrun") / "root")
    job = torchrun(root, *DISTILL)
    job.wait_for_steps(2)
    os.kill(job.rank(1), signal.SIGTERM)
    return root, job.end()


def test_sigterm_to_one_process_stops_all_saved_and_resume_ends_in_the_bits_of_a_run_that_was_killed(
    stopped: tuple[Path, Any], place: Path, gkd: Callable[..., Any]
):
    """Three runs end alike: one told to stop and resumed; one that lost a process and was started again."""
    root, (code, out, err) = stopped
    assert code == 1, err
    assert err.count("Traceback") == 1  # torchrun's own, at its end
    (run,) = students(root)
    assert (run.state, run.record["processes"]) == ("interrupted", 2)
    error = json.loads(out)["error"]
    assert error["code"] == 130
    assert error["what"].startswith("interrupted at epoch 1, step ")
    assert error["hint"] == (
        f"`torchrun --nproc-per-node 2 -m gkdcli distill demo-tiny --root {root} --resume` continues"
    )
    assert len(own_lines(err)) == 3
    assert "exitcode  : 130" in err

    alone = gkd("distill", "demo-tiny", "--root", root, "--resume")
    assert alone.code == 2
    assert "the number of processes has changed since this run began: 2 -> 1" in alone.err
    assert "torchrun --nproc-per-node 2 -m gkdcli distill demo-tiny" in alone.err

    # one goes on; the other begins, loses its second process and is started again
    going = torchrun(root, *DISTILL, "--resume")
    killed = torchrun(place, *DISTILL, *EVERY_STEP, options=("--max-restarts", "1"))
    killed.wait_for_steps(3)
    os.kill(killed.rank(1), signal.SIGKILL)
    code, out, err = going.end()
    assert code == 0, err
    assert json.loads(out)["result"]["state"] == "complete"
    code, out, err = killed.end()
    assert code == 0, err
    told, _, after = out.partition("\n")
    assert json.loads(told)["error"]["what"] == "another process of this run has died"
    assert json.loads(after)["result"]["state"] == "complete"
    assert own_lines(err) == [
        "error: another process of this run has died",
        "where: one of 2; torchrun says below which one and how",
        "hint: `torchrun --nproc-per-node 2 -m gkdcli distill demo-tiny"
        f" --root {place} --resume` continues from the last checkpoint",
    ]
    assert "continuing" in err
    assert "Traceback" not in err
    (again,) = students(place)
    assert again.state == "complete"
    assert_same(Run(run.folder), again)
    for one in (*students(root), again):
        assert_the_table_is_the_lines(one)
        report = json.loads((one.folder / "report.json").read_text())["training"]
        assert (report["processes"], report["steps"]) == (2, one.record["progress"]["step"])


SCRIPT = """
import sys
from gkdcli.errors import GkdError
from gkdcli.launch import launched
from gkdcli.tasks import recognition
from gkdcli.training import trainer

plain, calls = trainer.load, 0

def broken(*arguments):
    for number, batch in enumerate(plain(*arguments)):
        if number == 1 and launched().rank == 1:
            {happens}
        yield batch

trainer.load = broken
from gkdcli.cli import main
main()
"""


@pytest.mark.parametrize(
    ("happens", "what", "code"),
    [
        ("raise GkdError('a video is damaged', 'up/v3', 'prepare it again')", "a video is damaged", 1),
        pytest.param(
            "raise ZeroDivisionError('no such luck')",
            "this is a bug in gkd: ZeroDivisionError: no such luck",
            70,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_happens_to_one_process_is_told_once(place: Path, tmp_path: Path, happens, what, code):
    """On stderr and as the one JSON document, by the first process."""
    script = tmp_path / "broken.py"
    script.write_text(SCRIPT.format(happens=happens))
    _, out, err = torchrun(place, *DISTILL, script=script).end()
    error = json.loads(out)["error"]
    assert (error["what"], error["code"]) == (what, code)
    assert error["where"].endswith("process 1 of 2, counted from 0")
    assert [line for line in own_lines(err) if line.startswith("error:")] == [f"error: {what}"]
    assert students(place)[0].state == "failed"


@pytest.mark.slow
def test_a_first_process_that_is_killed_is_missed_by_the_others(place: Path):
    job = torchrun(place, *DISTILL, *EVERY_STEP)
    job.wait_for_steps(2)
    os.kill(job.rank(0), signal.SIGKILL)
    _, out, err = job.end()
    assert json.loads(out)["error"]["what"] == "another process of this run has died"
    assert len(own_lines(err)) == 3
    assert students(place)[0].state == "interrupted"


@pytest.mark.slow
def test_a_mistake_that_all_processes_see_is_told_once(place: Path):
    _, out, err = torchrun(place, "distill", "demo-tin", "--json").end()
    assert json.loads(out)["error"]["what"] == "no preset is called `demo-tin`"
    assert len(own_lines(err)) == 3


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """The environment that torchrun gives."""
    given = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1, "TORCHELASTIC_RUN_ID": "job",
        "TORCHELASTIC_RESTART_COUNT": 0,
    }  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("command", ["prepare", "evaluate", "export", "import"])
def test_what_runs_in_one_process_refuses_several(gkd, monkeypatch, tmp_path, command):
    as_rank(monkeypatch, 0)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # a process about to end ignores them
    words = ("x.pt", "--dataset", "demo-tiny") if command == "import" else ("demo-tiny",)
    outcome = gkd(command, *words, "--root", tmp_path)
    assert outcome.code == 2
    assert f"`gkd {command}` runs in one process" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_a_plan_counts_the_processes(gkd, monkeypatch, tiny_trained):
    words = ("distill", "demo-tiny", "--root", tiny_trained, "--dry-run", "--json")
    alone = gkd(*words).must().json["result"]
    as_rank(monkeypatch, 0)
    shared = gkd(*words).must().json["result"]
    assert (alone["processes"], alone["global_batch_size"]) == (1, alone["batch_size"])
    assert (shared["processes"], shared["global_batch_size"]) == (2, 2 * alone["batch_size"])
    assert shared["steps"] < alone["steps"]
    as_rank(monkeypatch, 1)
    silent = gkd(*words)
    assert (silent.code, silent.out, silent.err) == (0, "", "")


def test_leftovers_of_another_program_change_nothing(gkd, monkeypatch, place):
    """Kubernetes, MPI and one's own shell set some of these."""
    for name, value in (
        ("RANK", "1"),
        ("WORLD_SIZE", "2"),
        ("LOCAL_RANK", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
    ):
        monkeypatch.setenv(name, value)
    outcome = gkd("distill", "demo-tiny", "--root", place, "--max-steps", "1", "--json").must()
    assert outcome.json["result"]["steps"] == 1
    assert "launch" not in students(place)[0].record


def test_a_job_started_again_takes_the_run_it_had_begun_and_no_other(place: Path, gkd, monkeypatch):
    """The same id is no proof: torchrun's default is one for all. One process is enough to see it."""
    once = ("distill", "demo-tiny", "--root", place, "--batch-size", "30", "--epochs", "2")
    as_rank(monkeypatch, 0)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    gkd(*once, "--max-steps", "1").must()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    continued = gkd(*once, "--max-steps", "2").must()
    assert "step 1\n" in continued.err
    (begun,) = students(place)
    record = begun.record["launch"]
    for odd in ({"id": "other"}, {"agents": ["elsewhere:1:1"]}):
        begun.update(launch=record | odd)
        fresh = gkd(*once, "--max-steps", "1").must()
        assert "continuing" not in fresh.err
        shutil.rmtree(students(place)[-1].folder)
