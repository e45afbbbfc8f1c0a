"""One distillation iteration against a plain I3D forward, and its memory.

    python tests/bench/bench_step.py [--preset ucf101|thumos14] [--spliced] [--schedule epoch|step]
        [--teacher-cache] [--recompute] [--precision 32|bf16] [--device cpu|cuda] [--repeats 5] [--profile]

An iteration is both stages by the trainer itself with its optimisers: with their own forward pass each under
schedule `epoch`, on one of the student under `step`. Recipe `official`, batch 1, 64x224x224, or for detection
256x96x96, where `--spliced` adds a clip with background in an action. With `--teacher-cache` the batch brings
what the teacher would say of it. The plain forward is the teacher's backbone up to Mixed_5c without
gradients, in the same precision. Both are timed in turn, so that a busy moment hits both; the floor is what
the multiply-adds of the networks would take at the plain forward's rate.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before it is read: see `seconds`
import torch
from lightning_fabric import Fabric

from gkdcli.data.batches import ClipBatch
from gkdcli.data.clips import normalise
from gkdcli.models.cost import cost
from gkdcli.models.network import build_cvae
from gkdcli.pipeline.train import forward_of
from gkdcli.resolve import resolve
from gkdcli.tasks.trained import chosen_device, task_of
from gkdcli.training.memory import peak_bytes
from gkdcli.training.steps import Networks
from gkdcli.training.trainer import Trainer
from tests.training.jobs import job_of_one_clip

# classes, and what the published code's iteration takes: plain forwards and GB, with a spliced clip too
FACTS = {"ucf101": (101, 6.7, 8.7, None, None), "thumos14": (20, 6.7, 5.4, 8.9, 7.1)}
FORWARDS = {"epoch": 2, "step": 1}  # of the student


class Iteration:
    """Everything of `gkd distill <preset>` but the reading of clips."""

    def __init__(self, given: argparse.Namespace) -> None:
        preset, spliced = given.preset, given.spliced
        sets = [
            "optim.batch_size=1",
            f"train.device={given.device}",
            f"train.threads={given.threads}",
            f"train.schedule={given.schedule}",
            f"train.precision={given.precision}",
            f"train.checkpoint_activations={str(given.recompute).lower()}",
        ]
        page = resolve(preset, stage="distill", modality="rgb", root=Path(), sets=sets).settings
        self.parts = (0, 1) if given.schedule == "epoch" else (0,)
        device = chosen_device(page)
        torch.manual_seed(0)
        task, classes = task_of(page), FACTS[preset][0]
        teacher, student = (task.build_network(page, role, classes, "rgb") for role in ("teacher", "student"))
        student.hold_norms("held" if page.task == "detection" else "trained")
        if given.recompute:
            student.recompute()
        self.teacher = teacher
        self.forward = forward_of(page, device)
        networks = Networks(student, build_cvae(student), teacher, build_cvae(teacher), self.forward)
        job = job_of_one_clip(networks, page, task)
        self.trainer = Trainer(job, None, None, Fabric(accelerator=given.device, devices=1))
        clip = torch.randint(0, 256, (1, 3, page.clips.length, page.clips.crop, page.clips.crop))
        targets = {"labels": torch.tensor([10])} if page.task == "recognition" else actions(spliced)
        self.batch = ClipBatch(clip.to(torch.uint8), targets, [0])
        self.clip = normalise(self.batch.clips.to(device), page.clips)
        if given.teacher_cache:
            for tap, (channels, time, *_) in teacher.shapes.items():
                for name in [f"teacher.{tap}"] + [f"teacher.spliced.{tap}"] * spliced:
                    targets[name] = torch.rand(1, channels, time).half()
            networks.teacher = None
        build = partial(task.build_network, page, classes=classes, modality="rgb")
        parts = ("teacher", "student")
        self.gmac = [cost(lambda p=p: build(role=p).backbone, clip.shape[1:]).gmac for p in parts]

    def __call__(self) -> dict[str, float]:
        """Both stages; returns all terms."""
        values = {}
        for part in self.parts:
            self.trainer.position.step = part
            values |= self.trainer._step(self.batch)
        return values

    @torch.inference_mode()
    def plain(self) -> torch.Tensor:
        """The I3D forward that the ratio is to."""
        return self.forward.features(self.teacher, self.clip)["Mixed_5c"]

    def floor(self, given: argparse.Namespace) -> float:
        """The backbones' multiply-adds, in plain forwards; the way back takes twice the way there."""
        teacher, student = self.gmac
        seen = (FORWARDS[given.schedule] - 1) * student + (1 + given.spliced) * 3 * student
        return (seen + (0 if given.teacher_cache else (1 + given.spliced) * teacher)) / teacher


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


def seconds(work: object) -> tuple[float, float]:
    """By the clock, and of the CPU, which is fair beside other processes: threads wait passively."""
    began = time.perf_counter(), time.process_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began[0], time.process_time() - began[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", choices=FACTS, default="ucf101")
    parser.add_argument("--schedule", choices=FORWARDS, default="epoch")
    parser.add_argument("--teacher-cache", action="store_true", help="the teacher's attention is known")
    parser.add_argument("--precision", choices=["32", "bf16"], default="32", help="bf16: on GPUs only")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--spliced", action="store_true", help="detection: with a spliced clip")
    parser.add_argument("--recompute", action="store_true", help="train.checkpoint_activations")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="print the operations that take longest")
    parser.add_argument("--memory", action="store_true", help="only the peak of two iterations, in bytes")
    given = parser.parse_args()
    iteration = Iteration(given)
    if given.memory:
        for _ in range(2):  # optimiser states are there from the second on
            iteration()
        print(peak_bytes(torch.device(given.device)))
        return
    iteration()
    iteration.plain()
    if given.profile:
        with torch.profiler.profile() as profile:
            iteration()
        print(
            profile.key_averages().table(
                sort_by=f"self_{given.device}_time_total", row_limit=15, max_name_column_width=40
            )
        )
        return
    steps, plains = [], []
    for _ in range(given.repeats):
        plains.append(seconds(iteration.plain))
        steps.append(seconds(iteration))
    memory = int(
        subprocess.run(
            [sys.executable, __file__, "--memory", *sys.argv[1:]], check=True, capture_output=True, text=True
        ).stdout
    )
    published = FACTS[given.preset][3 if given.spliced else 1 :]
    print(f"threads             {given.threads}")
    for kind, name in enumerate(("by the clock", "of the CPU")):
        step, plain = ([one[kind] for one in taken] for taken in (steps, plains))
        print(f"{name}")
        for what, taken in (("iteration", step), ("plain I3D forward", plain)):
            each = ", ".join(f"{one:.2f}" for one in taken)
            print(f"  {what:<18}{statistics.median(taken):.2f} s ({each})")
        print(f"  ratio             {statistics.median(step) / statistics.median(plain):.2f}")
    print(f"floor               {iteration.floor(given):.2f}")
    print(f"peak memory         {memory / 1e9:.2f} GB")
    print(f"published code      ratio {published[0]}, {published[1]} GB")


if __name__ == "__main__":
    main()
