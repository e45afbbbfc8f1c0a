"""Training is killed at any moment of its life; `--resume` goes on, and the run comes out equal, bit for bit.

    python -m tests.e2e.test_training_kills [--kills N] [--seed S] [--minutes M]

Real kills of real processes. Weights, optimisers, best weights and metrics are compared with those
of a run that nobody disturbed; times are not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from gkdcli.runs import Run
from tests.conftest import borrow, run_gkd
from tests.e2e.driver import Driver, lives, sleep
from tests.training.jobs import metrics_of, untimed


class Case(NamedTuple):
    """What is trained; a checkpoint comes every so many steps."""

    task: str
    schedule: str
    every: int
    sets: tuple[str, ...] = ()

    @property
    def preset(self) -> str:
        return "demo-tiny" if self.task == "recognition" else "demo-detection-tiny"

    def words(self, root: Path, resume: bool) -> list[str]:
        """The command."""
        sets = (f"train.schedule={self.schedule}", f"train.checkpoint_steps={self.every}", *self.sets)
        (teacher,) = (root / "runs" / self.preset / "pretrain-attention-rgb").iterdir()
        words = ["distill", self.preset, "--root", str(root), "--teacher", str(teacher), "-q"]
        words += ["--resume"] if resume else []
        return words + [word for one in sets for word in ("--set", one)]


AVERAGED = ("optim.ema=0.9", "train.keep_checkpoints=3", "optim.label_smoothing=0.1")
CASES = (
    Case("recognition", "epoch", 1),
    Case("detection", "step", 2, AVERAGED),
    Case("recognition", "step", 3, (*AVERAGED, "optim.accumulation=2")),
    Case("detection", "epoch", 3, ("recipe=official", "optim.batch_size=1", "optim.epochs=1")),
)


class Study:
    """Kills of one case, and the comparison at the end of each run."""

    def __init__(self, folder: Path, source: Path, case: Case, seed: int) -> None:
        self.case, self.root, self.log = case, folder / "root", folder / "log"
        self.rng = random.Random(f"{case} {seed}")
        self.seen: Counter[str] = Counter()
        borrow(source, self.root)
        teachers = Path("runs") / case.preset / "pretrain-attention-rgb"
        shutil.copytree(source / teachers, self.root / teachers)
        self._driver = Driver(self.log, "gkdcli.pipeline.train")
        self._undisturbed(resume=False)
        self.whole = self._run()
        self.wanted = state(self.whole)
        self.steps = [line for line in metrics_of(self.whole) if "mean" not in line]
        shutil.move(self.whole.folder, folder / "whole")
        self.runs = 0

    # ---- the command ----

    def _start(self, resume: bool) -> int:
        return self._driver.start(self.case.words(self.root, resume))

    def _undisturbed(self, resume: bool) -> None:
        self._start(resume)
        assert self._driver.end() == 0, self.log.read_text()

    def _run(self) -> Run | None:
        """The run in work."""
        found = sorted(self.root.glob(f"runs/{self.case.preset}/distill-rgb/*/run.json"))
        return Run(found[-1].parent) if found else None

    # ---- kills ----

    def kill(self, kind: str = "") -> bool:
        """Starts the command or goes on with its run, and kills it; False where it had ended before.

        Args:
            kind: "start", while it begins; "step", some steps later; "turn", where another stage or epoch is
                to begin; drawn where it is not given.
        """
        run = self._run()
        if run is not None and run.state == "complete":  # the kill came after that
            self.compare()
            run = None
        done = _lines(run)
        turns = [n for n in range(1, len(self.steps)) if _place(self.steps[n]) != _place(self.steps[n - 1])]
        ahead = [n for n in turns if n > done]
        kind = kind or self.rng.choice(["start", *["step"] * 5, *["turn"] * (4 if ahead else 0)])
        if done >= len(self.steps):
            kind = "end"
        pid = self._start(resume=run is not None)
        if kind == "end":
            self._await(pid, lambda: _saved(self._run()) >= len(self.steps))
            sleep(pid, self.rng.uniform(0, 0.5))
        elif kind == "start":
            sleep(pid, self.rng.uniform(0, 2.0))
        elif kind == "turn":  # another stage or epoch is to begin
            self._await(pid, lambda: _saved(self._run()) >= ahead[0])
        else:
            step = min(done + self.rng.randint(1, 4), len(self.steps))
            self._await(pid, lambda: _lines(self._run()) >= step)
            sleep(pid, self.rng.choice([0.0, self.rng.uniform(0, 0.2)]))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        code = self._driver.end()
        if code == 0:
            self.seen["ended before the kill"] += 1
            self.compare()
            return False
        assert code == -signal.SIGKILL, self.log.read_text()
        self.seen[self._moment()] += 1
        return True

    def _await(self, pid: int, come: Callable[[], bool]) -> None:
        """Until something has come, or the process ends."""
        deadline = time.monotonic() + 300
        while lives(pid) and time.monotonic() < deadline and not come():
            time.sleep(0.002)

    def _moment(self) -> str:
        """What the kill met."""
        run = self._run()
        if run is None:
            return "before there was a run"
        half = [path.name.split(".")[1] for path in run.folder.glob(".*.tmp")]
        if half:
            return f"{half[0]} half written"
        if not run.last.is_file():
            return "before the first checkpoint"
        if run.state == "complete":
            return "after the end"
        step = _saved(run)
        if step >= len(self.steps):
            return "after the last checkpoint"
        if step and _place(self.steps[step]) != _place(self.steps[step - 1]):
            same = self.steps[step]["epoch"] == self.steps[step - 1]["epoch"]
            return "between the stages of an epoch" if same else "between epochs"
        return "within a pass"

    def compare(self) -> None:
        """The run equals the undisturbed one; it makes room for another."""
        run = self._run()
        assert run is not None
        assert run.state == "complete"
        differing = different(state(run), self.wanted)
        assert differing == [], f"after {dict(self.seen)}"
        self.runs += 1
        shutil.rmtree(run.folder)

    def finish(self) -> None:
        """The run in work goes on undisturbed."""
        run = self._run()
        if run is None or run.state != "complete":
            self._undisturbed(resume=run is not None)
        self.compare()
        self._driver.close()


def state(run: Run) -> dict[str, Any]:
    """All that a run comes to, but times: tensors, positions, metrics, progress."""
    found: dict[str, Any] = {"metrics": untimed(metrics_of(run)), "progress": run.record["progress"]}
    for path in sorted(run.folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata())
        if "position" in metadata:
            metadata["position"] = json.loads(metadata["position"]) | {"seconds": 0}
        found |= {f"{path.name} {name}": value for name, value in (load_file(path) | metadata).items()}
    found["left over"] = sorted(path.name for path in run.folder.glob(".*.tmp"))
    return found


def different(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Names of what is not the same."""
    return sorted(
        name
        for name in ours.keys() | theirs.keys()
        if name not in ours or name not in theirs or not _equal(ours[name], theirs[name])
    )


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def _place(line: dict[str, Any]) -> tuple[int, str]:
    return line["epoch"], line["part"]


def _lines(run: Run | None) -> int:
    """Steps in the log."""
    if run is None or not run.metrics.is_file():
        return 0
    return run.metrics.read_bytes().count(b'"loss"')


def _saved(run: Run | None) -> int:
    """Steps in the last checkpoint."""
    if run is None or not run.last.is_file():
        return 0
    with open(run.last, "rb") as file:  # safetensors opens it twice, and it may be replaced in between
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return int(json.loads(header["__metadata__"]["position"])["step"])


def kill_often(
    folder: Path,
    source: Path,
    case: Case,
    kills: int,
    seed: int,
    until: float = float("inf"),
    kinds: Sequence[str] = (),
) -> tuple[Counter[str], int]:
    """So many kills, or as many as there is time for; what they met, and how many runs came out equal.

    Of the first ones `kinds` says what they are.
    """
    study = Study(folder, source, case, seed)
    done = 0
    while done < kills and time.monotonic() < until:
        done += study.kill(*kinds[done : done + 1])
        if done % 10 == 0:
            print(f"{case}: {done} kills, {study.runs} runs", file=sys.stderr, flush=True)
    study.finish()
    return study.seen, study.runs


@pytest.mark.parametrize(
    ("case", "kinds"),
    [(CASES[0], ("turn", "step", "step")), (CASES[1], ("start", "step"))],
    ids=["epoch", "step"],
)
def test_five_kills_change_nothing(
    case: Case, kinds: tuple[str, ...], tiny_trained: Path, tiny_detection: Path, tmp_path: Path
) -> None:
    """Of both tasks and schedules: between two stages, within an epoch, before the first step."""
    source = tiny_trained if case.task == "recognition" else tiny_detection
    seen, runs = kill_often(tmp_path, source, case, len(kinds), seed=4, kinds=kinds)
    assert seen.total() - seen["ended before the kill"] == len(kinds)
    assert runs >= 1


def test_the_comparison_sees_a_single_bit(tiny_trained: Path) -> None:
    (folder,) = tiny_trained.glob("runs/demo-tiny/distill-rgb/*")
    one, other = state(Run(folder)), state(Run(folder))
    assert different(one, other) == []
    name = next(name for name in other if name.startswith("last.safetensors optim."))
    other[name].view(torch.uint8 if other[name].ndim else torch.float32).view(-1)[0] += 1
    other["metrics"][0]["loss"] *= 1 + 1e-9
    assert different(one, other) == sorted([name, "metrics"])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.task}-{case.schedule}")
def test_two_hundred_kills(
    case: Case, tiny_trained: Path, tiny_detection: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_trained if case.task == "recognition" else tiny_detection
    seen, runs = kill_often(tmp_path, source, case, 50, seed=5)
    with capsys.disabled():
        print(f"\n{case}: {runs} runs, {json.dumps(seen, indent=1)}")


def main() -> None:
    """A share of the kills on each case; prints what they met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=600.0, help="no more kills after this")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "source"
        for preset in dict.fromkeys(case.preset for case in CASES):
            run_gkd("prepare", preset, "--root", source, timeout=900).must()
            run_gkd("pretrain-attention", preset, "--root", source, timeout=900).must()
        for number, case in enumerate(CASES):
            began = time.monotonic()
            kills = given.kills // len(CASES) + (number < given.kills % len(CASES))
            folder = Path(name) / f"case{number}"
            seen, runs = kill_often(
                folder, source, case, kills, given.seed, began + given.minutes * 60 / len(CASES)
            )
            killed = seen.total() - seen["ended before the kill"]
            took = time.monotonic() - began
            met = json.dumps(seen, indent=1, sort_keys=True)
            print(f"{case}, {took:.0f} s: {killed} kills, {runs} runs equal\n{met}", flush=True)


if __name__ == "__main__":
    main()
