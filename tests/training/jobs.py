"""Tiny but whole trainings: real store, networks, trainer; built as `gkdcli.pipeline.train` builds them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from gkdcli.console import Console
from gkdcli.data.clips import ClipDataset
from gkdcli.data.store import Store
from gkdcli.models.network import build_cvae
from gkdcli.runs import Place, Run, create_run
from gkdcli.settings import Settings
from gkdcli.tasks import recognition
from gkdcli.training.processes import Group
from gkdcli.training.steps import Networks
from gkdcli.training.trainer import Job, Trainer
from tests.stores import Video, make_store, picture

TERMS = {
    "generator": [
        "cvae_reconstruction.Mixed_5c",
        "cvae_kl.Mixed_5c",
        "generative_distillation.Mixed_5c",
    ],
    "network": ["classification", "reconstruction.Mixed_5c", "attention_distillation.Mixed_5c"],
}


def page(**changes: Any) -> Settings:
    """Settings of the smallest network; `optim__batch_size=2` changes one."""
    document: dict[str, Any] = {
        "name": "tiny",
        "dataset": "drawn",
        "clips": {"length": 16, "crop": 32, "mean": [0.45], "std": [0.225], "scales": [1.0, 0.875]},
        "model": {"width": 0.0625},
        "optim": {
            "algorithm": "adam",
            "learning_rate": 1e-3,
            "generator_lr": 1e-3,
            "batch_size": 2,
            "epochs": 2,
            "schedule": "cosine",
            "warmup_epochs": 0.5,
        },
        "distill": {"ramp_epochs": 4},
        "train": {"schedule": "step"},
    }
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        (document.setdefault(section, {}) if section else document)[name] = value
    return Settings.model_validate(document)


def store_of(root: Path, videos: int) -> Store:
    """So many videos of three classes, a little longer than a clip."""
    return make_store(root, [Video("abc"[n % 3], f"v{n}", picture(n, 18)) for n in range(videos)])


def networks(settings: Settings, classes: int, distilling: bool = True) -> Networks:
    """Student and teacher with CVAEs from the page's seed; the teacher has seen data."""
    torch.manual_seed(settings.train.seed)
    student = recognition.build_network(settings, "student", classes, "rgb")
    if not distilling:
        return Networks(student, build_cvae(student))
    teacher = recognition.build_network(settings, "teacher", classes, "rgb")
    crop = settings.clips.crop
    settle(teacher, torch.randn(4, 3, settings.clips.length, crop, crop))
    return Networks(student, build_cvae(student), teacher, build_cvae(teacher))


def trainer_of(
    root: Path,
    store: Store,
    settings: Settings,
    run: Run | None = None,
    *,
    played: Networks | None = None,
    supervised: Any = recognition.supervised_terms,
    validate: Any = None,
    accelerator: str = "cpu",
    group: Group | None = None,
) -> Trainer:
    """A trainer in a new run folder, or in `run` as `--resume` would have it."""
    played = played or networks(settings, len(store.classes))
    run = run or create_run(Place(root, settings), "distill", {"classes": store.classes})
    job = Job(
        played,
        settings,
        ClipDataset(store, range(len(store.videos)), settings.clips, settings.recipe, settings.train.seed),
        supervised,
        score="top1",
        validate=validate,
        warm_up=lambda: None,
        resume_command="gkd distill tiny --resume",
    )
    return Trainer(job, run, Console(quiet=True), Fabric(accelerator=accelerator, devices=1), group)


class OneClip:
    """What the trainer asks of a data set, where batches are given to it by hand."""

    def __len__(self) -> int:
        return 1

    def name_of(self, sample: int) -> str:
        return "clip"


def job_of_one_clip(networks: Networks, settings: Settings, task: Any) -> Any:
    """A job for `Trainer._step` alone."""
    return SimpleNamespace(
        networks=networks,
        settings=settings,
        dataset=OneClip(),
        supervised=task.supervised_terms,
        score=task.SCORE,
    )


def settle(network: Any, clips: torch.Tensor) -> None:
    """Gives batch norm the statistics of these normalised clips: a fresh network is all but blind to them."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm3d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean of what it has seen
    with torch.no_grad():
        network.train().features(clips)
    for norm in norms:
        norm.momentum = 0.01
    network.eval()


def metrics_of(run: Run) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]


def rows_of(run: Run) -> list[dict[str, str]]:
    """The rows of metrics.csv."""
    with open(run.folder / "metrics.csv", encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def assert_the_table_is_the_lines(run: Run) -> None:
    """metrics.csv has what metrics.jsonl has."""
    for row, line in zip(rows_of(run), metrics_of(run), strict=True):
        values = {name: value for name, value in (line | line.get("mean", {})).items() if name != "mean"}
        assert {name: text for name, text in row.items() if text and name != "row"} == {
            name: str(value) for name, value in values.items()
        }
        assert row["row"] == ("epoch" if "mean" in line else "step")


def untimed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the times, which no two runs share."""
    return [{key: value for key, value in line.items() if not key.endswith("seconds")} for line in lines]


def copied(module: nn.Module) -> dict[str, torch.Tensor]:
    """The weights as they are now."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(module: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    """Names of the tensors that differ from `before`."""
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
