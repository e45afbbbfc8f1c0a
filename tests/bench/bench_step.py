"""One distillation iteration against a plain I3D forward, and its memory.

    python tests/bench/bench_step.py [--preset ucf101|thumos14] [--spliced] [--repeats 5] [--profile]
                                     [--recompute]

An iteration is both stages with their own forward pass, as schedule `epoch` has them, by the trainer itself
with its optimisers: recipe `official`, batch 1, float32, 64x224x224 or for detection 256x96x96, where
`--spliced` adds a clip with background in an action. `--recompute` is train.checkpoint_activations. The plain
forward is the teacher's backbone up to Mixed_5c without gradients. Both are timed in turn, so that a busy
moment hits both.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from lightning_fabric import Fabric

from gkdcli.data.batches import ClipBatch
from gkdcli.data.clips import normalise
from gkdcli.models.network import build_cvae
from gkdcli.resolve import resolve
from gkdcli.tasks.trained import chosen_device, task_of
from gkdcli.training.steps import Networks
from gkdcli.training.trainer import Trainer

# classes, and what the published code's iteration takes: plain forwards and GB, with a spliced clip too
FACTS = {"ucf101": (101, 6.7, 8.7, None, None), "thumos14": (20, 6.7, 5.4, 8.9, 7.1)}


class OneClip:
    """What the trainer asks of a data set."""

    def __len__(self) -> int:
        return 1

    def name_of(self, sample: int) -> str:
        return "clip"


class Iteration:
    """Everything of `gkd distill <preset>` but the reading of clips."""

    def __init__(self, preset: str, threads: int, spliced: bool, recompute: bool = False) -> None:
        page = resolve(preset, stage="distill", modality="rgb", root=Path()).settings
        page = page.model_copy(
            update={
                "optim": page.optim.model_copy(update={"batch_size": 1}),
                "train": page.train.model_copy(update={"device": "cpu", "threads": threads}),
            }
        )
        chosen_device(page)
        torch.manual_seed(0)
        task, classes = task_of(page), FACTS[preset][0]
        teacher, student = (task.build_network(page, role, classes, "rgb") for role in ("teacher", "student"))
        student.hold_norms("held" if page.task == "detection" else "trained")
        if recompute:
            student.recompute()
        self.teacher = teacher.backbone
        networks = Networks(student, build_cvae(student), teacher, build_cvae(teacher))
        job = SimpleNamespace(
            networks=networks,
            settings=page,
            dataset=OneClip(),
            supervised=task.supervised_terms,
        )
        self.trainer = Trainer(job, None, None, Fabric(accelerator="cpu", devices=1))
        clip = torch.randint(0, 256, (1, 3, page.clips.length, page.clips.crop, page.clips.crop))
        targets = {"labels": torch.tensor([10])} if page.task == "recognition" else actions(spliced)
        self.batch = ClipBatch(clip.to(torch.uint8), targets, [0])
        self.clip = normalise(self.batch.clips, page.clips)

    def __call__(self) -> dict[str, float]:
        """Both stages; returns all terms."""
        values = {}
        for part in (0, 1):
            self.trainer.position.step = part
            values |= self.trainer._step(self.batch)
        return values

    @torch.inference_mode()
    def plain(self) -> torch.Tensor:
        """The I3D forward that the ratio is to."""
        return self.teacher(self.clip)["Mixed_5c"]


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


def seconds(work: object) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def peak_bytes() -> int:
    """Of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", choices=FACTS, default="ucf101")
    parser.add_argument("--spliced", action="store_true", help="detection: with a spliced clip")
    parser.add_argument("--recompute", action="store_true", help="keep less for backward")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="print the operations that take longest")
    parser.add_argument("--memory", action="store_true", help="only the peak of two iterations, in bytes")
    given = parser.parse_args()
    iteration = Iteration(given.preset, given.threads, given.spliced, given.recompute)
    if given.memory:
        for _ in range(2):  # optimiser states are there from the second on
            iteration()
        print(peak_bytes())
        return
    iteration()
    iteration.plain()
    if given.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            iteration()
        print(
            profile.key_averages().table(
                sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40
            )
        )
        return
    steps, plains = [], []
    for _ in range(given.repeats):
        plains.append(seconds(iteration.plain))
        steps.append(seconds(iteration))
    step, plain = statistics.median(steps), statistics.median(plains)
    fresh = [sys.executable, __file__, "--memory", "--threads", str(given.threads), "--preset", given.preset]
    fresh += ["--spliced"] * given.spliced + ["--recompute"] * given.recompute
    memory = int(subprocess.run(fresh, check=True, capture_output=True, text=True).stdout)
    published = FACTS[given.preset][3 if given.spliced else 1 :]
    print(f"threads             {given.threads}")
    print(f"iteration           {step:.2f} s ({', '.join(f'{one:.2f}' for one in steps)})")
    print(f"plain I3D forward   {plain:.2f} s ({', '.join(f'{one:.2f}' for one in plains)})")
    print(f"ratio               {step / plain:.2f} (published code: {published[0]})")
    print(f"peak memory         {memory / 1e9:.2f} GB (published code: {published[1]})")


if __name__ == "__main__":
    main()
