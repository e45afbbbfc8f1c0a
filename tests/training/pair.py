"""Trainings by two processes, `python -m tests.training.pair FOLDER`, and the same by one.

What torchrun sets, `start` sets: the processes meet as a user's do.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from gkdcli.data.store import Store
from gkdcli.errors import GkdError
from gkdcli.launch import launched
from gkdcli.runs import Place, Run, create_run
from gkdcli.tasks import detection, recognition
from gkdcli.training.processes import Group
from gkdcli.training.trainer import Trainer
from tests.training import detection_jobs, jobs

RANKS = (0, 1)


class Case(NamedTuple):
    """Clips of a batch of both, batches of a group, and steps asked for."""

    task: str
    schedule: str
    batch: int
    accumulation: int
    steps: int
    more: tuple[tuple[str, Any], ...] = ()


CASES = {
    "recognition, step": Case("recognition", "step", 4, 1, 3),  # of 7 clips: the last batch is 2 + 1
    "recognition, epoch, accumulated": Case("recognition", "epoch", 6, 2, 6),  # the last is 1 + 0
    "recognition, step, scaled and averaged": Case(
        "recognition",
        "step",
        4,
        1,
        3,
        (("train__precision", "fp16"), ("optim__ema", 0.9), ("optim__label_smoothing", 0.1)),
    ),
    "detection, step": Case("detection", "step", 4, 1, 3),
    "detection, epoch, accumulated": Case("detection", "epoch", 2, 3, 5),
}
MORE = ("not finite", "signal", "failure")  # what happens to the second process, after the cases


def trainer_of(folder: Path, name: str, group: Group, **options: Any) -> Trainer:
    """In float64, where nothing but the order of additions is left; batch norm by its running statistics."""
    case = CASES[name]
    batch = case.batch // group.size
    store = Store.open(Path(json.loads((folder / "stores.json").read_text())[case.task]))
    if case.task == "recognition":
        settings = jobs.page(
            train__schedule=case.schedule,
            optim__batch_size=batch,
            optim__accumulation=case.accumulation,
            **dict(case.more),
        )
        played = jobs.networks(settings, len(store.classes))
        jobs.settle(played.student, torch.randn(4, 3, 16, 32, 32))
        options |= {"played": played}
    else:
        sets = (f"train.schedule={case.schedule}", f"optim.accumulation={case.accumulation}")
        settings = detection_jobs.page(*sets, f"optim.batch_size={batch}")
        videos = store.split(1, "train")[:2]
        options |= {"dataset": detection.training_set(store, videos, settings)}
    root = folder / f"{group.size}" / name
    run = group.share(lambda: create_run(Place(root, settings), "distill", {"classes": store.classes}))
    module = jobs if case.task == "recognition" else detection_jobs
    trainer: Trainer = module.trainer_of(root, store, settings, run, group=group, **options)
    played = trainer.job.networks
    for module in (played.generators, played.teacher_generators):
        module.double()
    for network in (played.student, played.teacher):
        seen = network.double().features
        network.features = lambda clips, seen=seen: seen(clips.double())
    played.student.hold_norms("frozen")
    return trainer


def train(folder: Path, name: str, group: Group) -> Run:
    """A few steps; beside the run lies which process had spliced clips in which step."""
    task = recognition if CASES[name].task == "recognition" else detection
    had: list[bool] = []

    def supervised(*arguments: Any) -> Any:
        had.append(arguments[2] is not None)
        return task.supervised_terms(*arguments)

    trainer = trainer_of(folder, name, group, supervised=supervised)
    trainer.fit(CASES[name].steps)
    if group.first:
        (folder / f"{group.size}" / f"{name}.run").write_text(str(trainer.run.folder))
    group.gather(None)
    write(trainer.run.folder / f"spliced{group.rank}.json", had)
    return trainer.run


def happening(folder: Path, what: str, group: Group) -> None:
    """Something happens to the second process in its second step; both write down what they saw."""
    calls = 0

    def supervised(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        found = recognition.supervised_terms(*arguments)
        if group.rank == 1 and calls == 2:
            if what == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            elif what == "failure":
                raise GkdError("a video is damaged", "a/v3", "prepare it again")
            else:
                term = found.terms["classification"]
                found.terms["classification"] = term._replace(value=term.value * torch.nan)
        return found

    trainer = trainer_of(folder, "recognition, step", group, supervised=supervised)
    try:
        trainer.fit(None)
    except GkdError as error:
        seen = [type(error).__name__, error.what, error.where, error.hint, trainer.position.step]
        names = [trainer.job.dataset.name_of(sample) for sample in _own(trainer)]
        speaks = group.speaks(error) if what == "failure" else None
        write(folder / f"{what}{group.rank}.json", [*seen, names, Run(trainer.run.folder).state, speaks])


def _own(trainer: Trainer) -> list[int]:
    """This process's clips of the second step."""
    (keys,) = trainer.schedule.keys(1, 2)
    return [position for position, _, _ in keys]


def write(path: Path, document: object) -> None:
    path.write_text(json.dumps(document))


def start(folder: Path) -> None:
    """Both processes, from start to end; as torchrun does it, this one keeps the store."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=900))
    together = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_RUN_ID": "pair",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    command = [sys.executable, "-m", __name__, str(folder)]
    both = [
        subprocess.Popen(
            command, env=os.environ | together | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE
        )
        for rank in map(str, RANKS)
    ]
    try:
        told = [process.communicate(timeout=900)[1].decode() for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], "\n".join(told)
    assert "Traceback" not in "".join(told)


def main(folder: Path) -> None:
    """One of the two."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    group = Group.join(launched())
    group.start(torch.device("cpu"))
    for name in CASES:
        train(folder, name, group)
    for what in MORE:
        happening(folder, what, group)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
