"""Tiny trainings of detection: the page of `demo-detection-tiny`, its networks, a batch laid out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric

from gkdcli.console import Console
from gkdcli.data.store import Store
from gkdcli.data.windows import boundary_maps
from gkdcli.models.network import build_cvae
from gkdcli.resolve import resolve
from gkdcli.runs import Place, Run, create_run
from gkdcli.settings import Settings
from gkdcli.tasks import detection
from gkdcli.training.steps import Networks
from gkdcli.training.trainer import Job, Trainer
from tests.training.jobs import settle

LENGTH, CROP = 128, 32
OFFICIAL = ("recipe=official", "optim.batch_size=1")


def page(*sets: str) -> Settings:
    """What `gkd distill demo-detection-tiny --set ...` trains with."""
    return resolve("demo-detection-tiny", stage="distill", modality="rgb", root=Path(), sets=sets).settings


def networks(settings: Settings, classes: int, distilling: bool = True) -> Networks:
    """Student and teacher with CVAEs from the page's seed; both have seen data."""
    torch.manual_seed(settings.train.seed)
    clips = torch.randn(4, 3, LENGTH, CROP, CROP)
    student = detection.build_network(settings, "student", classes, "rgb", distilling)
    settle(student, clips)
    student.train()
    if not distilling:
        return Networks(student)
    teacher = detection.build_network(settings, "teacher", classes, "rgb")
    settle(teacher, clips)
    return Networks(student, build_cvae(student), teacher, build_cvae(teacher))


def batch(count: int = 2) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Normalised clips (B, 3, T, H, W), their spliced version of the last one, and targets."""
    clips = torch.randn(2, 3, LENGTH, CROP, CROP, generator=torch.Generator().manual_seed(1))
    rows = [[(10, 40, 1), (60, 100, 2)], [(20, 90, 3)]]
    segments = torch.zeros(2, 2, 3)
    for clip, actions in enumerate(rows):
        segments[clip, : len(actions)] = torch.tensor(actions)
    found = {
        "segments": segments[:, :, :2],
        "labels": segments[:, :, 2].long(),
        "valid": segments[:, :, 2] > 0,
        "maps": torch.from_numpy(np.stack([boundary_maps(np.array(row, float), LENGTH) for row in rows])),
        "spliced": torch.tensor([False, True]),
        "proposals": torch.tensor([[(0, 0)] * 3, [(20, 45), (60, 105), (46, 59)]]).float(),
    }
    chosen = slice(2 - count, 2)
    spliced = torch.cat([clips[1:, :, :46], clips[1:, :, 100:114], clips[1:, :, 46:-14]], dim=2)
    return clips[chosen], spliced, {name: value[chosen] for name, value in found.items()}


def trainer_of(
    root: Path, store: Store, settings: Settings, run: Run | None = None, **options: Any
) -> Trainer:
    """A trainer in a new run folder, or in `run` as `--resume` would have it."""
    videos = [row for row, video in enumerate(store.videos) if video.class_name == "train"]
    dataset = options.pop("dataset", None) or detection.training_set(store, videos, settings)
    run = run or create_run(Place(root, settings), "distill", {"classes": store.classes})
    plain = settings.distill.method == "none"
    job = Job(
        networks(settings, len(store.classes), not plain),
        settings,
        dataset,
        options.pop("supervised", detection.supervised_terms),
        score=detection.SCORE,
        validate=options.pop("validate", None),
        warm_up=lambda: None,
        resume_command="gkd distill demo-detection-tiny --resume",
    )
    group = options.pop("group", None)
    assert not options
    return Trainer(job, run, Console(quiet=True), Fabric(accelerator="cpu", devices=1), group)
