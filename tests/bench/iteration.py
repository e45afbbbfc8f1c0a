"""A training iteration as the trainer does it, on clips from memory: what benchmarks of training time."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import Tensor

from gkdcli.data.batches import ClipBatch
from gkdcli.data.clips import normalise
from gkdcli.models.cost import Cost, cost
from gkdcli.models.network import build_cvae
from gkdcli.pipeline.train import forward_of
from gkdcli.resolve import resolve
from gkdcli.tasks.trained import ROLE, chosen_device, task_of
from gkdcli.training.steps import Networks
from gkdcli.training.trainer import Trainer
from tests.training.jobs import job_of_one_clip

CLASSES = {"ucf101": 101, "hmdb51": 51, "thumos14": 20}


class Iteration:
    """Everything of `gkd distill <preset>` or `gkd pretrain-attention <preset>` but the reading of clips.

    Args:
        preset: of CLASSES.
        stage: `distill` or `pretrain`.
        sets: settings, `optim.batch_size=1`.
        spliced: detection: whether each clip has a version with background in an action.
        cached: the batch brings what the teacher would say of it.
    """

    def __init__(
        self, preset: str, stage: str, sets: list[str], spliced: bool = False, cached: bool = False
    ) -> None:
        page = resolve(preset, stage=stage, modality="rgb", root=Path(), sets=sets).settings
        self.settings, self.spliced, self.cached = page, spliced, cached
        self.parts = (0, 1) if page.train.schedule == "epoch" else (0,)
        self.device = chosen_device(page)
        torch.manual_seed(0)
        task, classes, batch = task_of(page), CLASSES[preset], page.optim.batch_size
        self.distilled = stage == "distill"
        student = task.build_network(page, ROLE[stage], classes, "rgb")
        student.hold_norms("held" if page.task == "detection" else "trained")
        if page.train.checkpoint_activations:
            student.recompute()
        self.teacher = task.build_network(page, "teacher", classes, "rgb")
        self.forward = forward_of(page, self.device)
        networks = Networks(student, build_cvae(student), forward=self.forward)
        if self.distilled:
            networks.teacher, networks.teacher_generators = self.teacher, build_cvae(self.teacher)
        self.trainer = Trainer(
            job_of_one_clip(networks, page, task), None, None, Fabric(accelerator=self.device.type, devices=1)
        )
        self.teacher.to(self.device)
        shape = (batch, 3, page.clips.length, page.clips.crop, page.clips.crop)
        clips = torch.randint(0, 256, shape, dtype=torch.uint8)
        targets = {"labels": torch.full((batch,), 10)}
        if page.task == "detection":
            targets = {name: value.repeat_interleave(batch, 0) for name, value in actions(spliced).items()}
        self.batch = ClipBatch(clips, targets, list(range(batch)))
        self.clips = normalise(self.batch.clips.to(self.device), page.clips)
        if cached:
            for tap, (channels, time, *_) in self.teacher.shapes.items():
                for name in [f"teacher.{tap}"] + [f"teacher.spliced.{tap}"] * spliced:
                    targets[name] = torch.rand(batch, channels, time).half()
            networks.teacher = None
        self._build = partial(task.build_network, page, classes=classes, modality="rgb")
        self.student, self.generators = student, networks.generators

    def __call__(self) -> dict[str, float]:
        """Both stages; returns all terms."""
        values = {}
        for part in self.parts:
            self.trainer.position.step = part
            values |= self.trainer._step(self.batch)
        return values

    @torch.inference_mode()
    def plain(self) -> Tensor:
        """The I3D forward that ratios are to."""
        return self.forward.features(self.teacher, self.clips)["Mixed_5c"]

    def cost_of(self, role: str, backbone: bool = True) -> Cost:
        """What the backbone of the teacher or the student, or all of it, takes for a clip."""
        network = partial(self._build, role=role)
        shape = tuple(self.clips.shape[1:])
        return cost((lambda: network().backbone) if backbone else network, shape)

    def floor(self) -> float:
        """The backbones' multiply-adds, in plain forwards; the way back takes twice the way there."""
        trained = self.cost_of("student" if self.distilled else "teacher").gmac
        teacher = self.cost_of("teacher").gmac
        seen = (len(self.parts) - 1) * trained + (1 + self.spliced) * 3 * trained
        taught = self.distilled and not self.cached
        return (seen + (1 + self.spliced) * teacher * taught) / teacher


def actions(spliced: bool) -> dict[str, torch.Tensor]:
    """Two actions of a clip of 256 frames, and the second with background spliced in."""
    order = torch.arange(256)[None]
    order[0, 150:170] = torch.arange(20)
    return {
        "segments": torch.tensor([[[30.0, 80.0], [120.0, 200.0]]]),
        "labels": torch.tensor([[3, 7]]),
        "valid": torch.ones(1, 2, dtype=torch.bool),
        "maps": torch.zeros(1, 2, 256),
        "splices": order,
        "spliced": torch.tensor([spliced]),
        "proposals": torch.tensor([[[120.0, 150.0], [170.0, 220.0], [151.0, 169.0]]]),
    }
