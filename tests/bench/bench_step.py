"""One distillation iteration of recognition against a plain I3D forward, and its memory.

    python tests/bench/bench_step.py [--repeats 5] [--threads 2] [--profile]

An iteration is both stages with their own forward pass, as schedule `epoch` has them, by the trainer itself
with its optimisers: recipe `official`, batch 1, 64x224x224, float32. The plain forward is the teacher's
backbone up to Mixed_5c without gradients. Both are timed in turn, so that a busy moment hits both.
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
from gkdcli.tasks import recognition
from gkdcli.tasks.trained import chosen_device
from gkdcli.training.steps import Networks
from gkdcli.training.trainer import Trainer

CLASSES = 101


class Iteration:
    """Everything of `gkd distill ucf101` but the reading of clips."""

    def __init__(self, threads: int) -> None:
        page = resolve("ucf101", stage="distill", modality="rgb", root=Path()).settings
        page = page.model_copy(
            update={
                "optim": page.optim.model_copy(update={"batch_size": 1}),
                "train": page.train.model_copy(update={"device": "cpu", "threads": threads}),
            }
        )
        chosen_device(page)
        torch.manual_seed(0)
        teacher, student = (
            recognition.build_network(page, role, CLASSES, "rgb") for role in ("teacher", "student")
        )
        self.teacher = teacher.backbone
        networks = Networks(student, build_cvae(student), teacher, build_cvae(teacher))
        job = SimpleNamespace(
            networks=networks,
            settings=page,
            dataset=[0],
            supervised=recognition.supervised_terms,
            score="top1",
        )
        self.trainer = Trainer(job, None, None, Fabric(accelerator="cpu", devices=1))
        clip = torch.randint(0, 256, (1, 3, page.clips.length, page.clips.crop, page.clips.crop))
        self.batch = ClipBatch(clip.to(torch.uint8), {"labels": torch.tensor([10])}, [0])
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


def seconds(work: object) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def peak_bytes() -> int:
    """Of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="print the operations that take longest")
    parser.add_argument("--memory", action="store_true", help="only the peak of two iterations, in bytes")
    given = parser.parse_args()
    iteration = Iteration(given.threads)
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
    fresh = [sys.executable, __file__, "--memory", "--threads", str(given.threads)]
    memory = int(subprocess.run(fresh, check=True, capture_output=True, text=True).stdout)
    print(f"threads             {given.threads}")
    print(f"iteration           {step:.2f} s ({', '.join(f'{one:.2f}' for one in steps)})")
    print(f"plain I3D forward   {plain:.2f} s ({', '.join(f'{one:.2f}' for one in plains)})")
    print(f"ratio               {step / plain:.2f} (published code: 6.7)")
    print(f"peak memory         {memory / 1e9:.2f} GB (published code: 8.7)")


if __name__ == "__main__":
    main()
