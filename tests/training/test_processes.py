"""Trainings as users run them: killed, interrupted, continued, and without any video decoder installed."""

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
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gkdcli.data.loader import load
from gkdcli.errors import GkdError
from gkdcli.pipeline import train as pipeline
from gkdcli.runs import Run
from gkdcli.training.trainer import Trainer
from tests.training.jobs import TERMS, changed, copied, metrics_of, untimed

EVERY_STEP = ("--set", "train.checkpoint_minutes=1e-9")


@pytest.fixture
def place(tiny_trained: Path, tmp_path: Path) -> Path:
    """A root with store and teacher, where a student is to be trained."""
    teachers = Path("runs/demo-tiny/pretrain-attention-rgb")
    shutil.copytree(tiny_trained / teachers, tmp_path / teachers)
    for name in ("datasets", "stores"):
        (tmp_path / name).symlink_to(tiny_trained / name)
    return tmp_path


def students(root: Path) -> list[Run]:
    return [Run(path.parent) for path in sorted(root.glob("runs/demo-tiny/distill-rgb/*/run.json"))]


def stop_after(root: Path, steps: int, how: Callable[[subprocess.Popen[str]], None], *words: str) -> Any:
    """Starts `gkd distill`, does `how` to it once so many steps are in the log, and waits for its end."""
    command = [sys.executable, "-m", "gkdcli", "distill", "demo-tiny", "--root", str(root), "--json", *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        runs = students(root)
        if runs and runs[-1].metrics.is_file() and runs[-1].metrics.read_text().count("\n") >= steps:
            break
        time.sleep(0.005)
    how(process)
    out, err = process.communicate(timeout=90)
    return process.returncode, out, err


def assert_same(run: Run, other: Run) -> None:
    for ours, theirs in ((run.last, other.last), (run.best, other.best)):
        a, b = load_file(ours), load_file(theirs)
        assert a.keys() == b.keys()
        assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert untimed(metrics_of(run)) == untimed(metrics_of(other))


def test_kill_9_loses_at_most_a_step_and_resume_ends_in_the_same_bits(place, tiny_trained, gkd):
    code, _, _ = stop_after(place, 3, lambda process: process.send_signal(signal.SIGKILL), *EVERY_STEP)
    assert code == -signal.SIGKILL
    (run,) = students(place)
    assert run.state == "interrupted"
    lines = len(metrics_of(run))
    assert 3 <= lines < 8
    resumed = gkd("distill", "demo-tiny", "--root", place, "--resume").must()
    step = int(resumed.err.split("continuing ")[1].split("step ")[1].split("\n")[0])
    assert lines - 2 <= step <= lines  # one step may be in the log and not in the checkpoint
    assert_same(Run(run.folder), students(tiny_trained)[0])


def test_ctrl_c_in_a_terminal_finishes_the_step_and_says_how_to_go_on(place, tiny_trained, gkd):
    """It reaches the whole process group: the process that loads clips, too."""
    code, out, err = stop_after(
        place, 2, lambda process: os.killpg(process.pid, signal.SIGINT), "--workers", "1"
    )
    assert code == 130, err
    assert "Traceback" not in err
    error = json.loads(out)["error"]
    assert error["what"].startswith("interrupted at epoch 1, step ")
    assert error["hint"] == f"`gkd distill demo-tiny --root {place} --resume` continues"
    (run,) = students(place)
    assert run.state == "interrupted"
    gkd("distill", "demo-tiny", "--root", place, "--resume", "--workers", "0").must()
    assert_same(Run(run.folder), students(tiny_trained)[0])


def test_training_evaluation_and_export_need_no_video_decoder(place):
    """Machines that only train have neither PyAV nor OpenCV."""
    lines = [
        "import sys",
        "sys.modules['av'] = sys.modules['cv2'] = None",
        "from gkdcli.cli import run",
        f"root = ['demo-tiny', '-q', '--root', {str(place)!r}]",
        "assert run(['distill', *root, '--epochs', '1', '--batch-size', '30']) == 0",
        "assert run(['evaluate', *root]) == 0",
        "assert run(['export', *root]) == 0",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def built(place: Path, gkd: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """The trainer of a real `gkd distill`, before its first step."""
    found: list[Trainer] = []

    class Kept(Trainer):
        def fit(self, max_steps: int | None) -> None:
            found.append(self)
            raise GkdError("enough")

    monkeypatch.setattr(pipeline, "Trainer", Kept)
    assert gkd("distill", "demo-tiny", "--root", place).code == 1
    return found[0]


def test_each_distillation_term_counts_in_a_real_job(built: Trainer):
    """With its weight at 0 the step ends elsewhere: stage 1 in the CVAE, stage 2 in the student."""
    job = built.job
    batch = next(load(job.dataset, built.schedule.keys(0, 1), workers=0))
    start = copied(job.networks.student), copied(job.networks.generators)

    def end_of_step(**weights: float) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Any]:
        job.networks.student.load_state_dict(start[0])
        job.networks.generators.load_state_dict(start[1])
        distill = job.settings.distill.model_copy(update=weights)
        optim = job.settings.optim.model_copy(update={"warmup_epochs": 0.0})
        job.settings = job.settings.model_copy(update={"distill": distill, "optim": optim})
        trainer = Trainer(job, built.run, built.console, built.fabric)
        values = trainer._step(batch)
        return copied(job.networks.student), copied(job.networks.generators), values

    whole = {"generative_weight": 0.01, "reconstruction_weight": 0.5, "beta": 0.1}
    student, generators, values = end_of_step(**whole)
    assert sorted(values) == sorted([*TERMS["generator"], *TERMS["network"], "loss"])
    assert all(value > 1e-8 for value in values.values())

    def differs(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
        return {name.split(".")[0] for name in a if not torch.equal(a[name], b[name])}

    without, unguided, _ = end_of_step(**whole | {"generative_weight": 0.0})
    assert differs(unguided, generators)
    for name in ("reconstruction_weight", "beta"):
        without, same, _ = end_of_step(**whole | {name: 0.0})
        assert {"backbone", "attention"} <= differs(without, student), name
        assert not differs(same, generators), name


def test_the_teacher_of_a_real_job_is_its_trained_self_and_stays_so(built: Trainer, tiny_trained: Path):
    played = built.job.networks
    before = copied(played.teacher), copied(played.teacher_generators)
    (teacher,) = (Run(path.parent) for path in tiny_trained.glob("runs/demo-tiny/pretrain*/*/run.json"))
    stored = load_file(teacher.weights)
    assert all(torch.equal(stored[f"network.{name}"], value) for name, value in before[0].items())
    assert all(torch.equal(stored[f"generator.{name}"], value) for name, value in before[1].items())
    assert differs_in_kind(played.student, played.teacher)
    for batch in load(built.job.dataset, built.schedule.keys(0, 2), workers=0):
        built._train_on(batch)
    for module, old in zip((played.teacher, played.teacher_generators), before, strict=True):
        assert changed(module, old) == set()
        assert not module.training
        assert all(p.grad is None and not p.requires_grad for p in module.parameters())


def differs_in_kind(student: Any, teacher: Any) -> bool:
    return (student.backbone.kind, teacher.backbone.kind) == ("top-i3d", "i3d")
