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

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before it is read: see `seconds`
import torch

from gkdcli.training.memory import peak_bytes
from tests.bench.iteration import Iteration

# what the published code's iteration takes: plain forwards and GB, with a spliced clip too
PUBLISHED = {"ucf101": (6.7, 8.7, None, None), "thumos14": (6.7, 5.4, 8.9, 7.1)}


def seconds(work: object) -> tuple[float, float]:
    """By the clock, and of the CPU, which is fair beside other processes: threads wait passively."""
    began = time.perf_counter(), time.process_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began[0], time.process_time() - began[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", choices=PUBLISHED, default="ucf101")
    parser.add_argument("--schedule", choices=["epoch", "step"], default="epoch")
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
    sets = [
        "optim.batch_size=1",
        f"train.device={given.device}",
        f"train.threads={given.threads}",
        f"train.schedule={given.schedule}",
        f"train.precision={given.precision}",
        f"train.checkpoint_activations={str(given.recompute).lower()}",
    ]
    iteration = Iteration(given.preset, "distill", sets, given.spliced, given.teacher_cache)
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
    published = PUBLISHED[given.preset][2 if given.spliced else 0 :]
    print(f"threads             {given.threads}")
    for kind, name in enumerate(("by the clock", "of the CPU")):
        step, plain = ([one[kind] for one in taken] for taken in (steps, plains))
        print(f"{name}")
        for what, taken in (("iteration", step), ("plain I3D forward", plain)):
            each = ", ".join(f"{one:.2f}" for one in taken)
            print(f"  {what:<18}{statistics.median(taken):.2f} s ({each})")
        print(f"  ratio             {statistics.median(step) / statistics.median(plain):.2f}")
    print(f"floor               {iteration.floor():.2f}")
    print(f"peak memory         {memory / 1e9:.2f} GB")
    print(f"published code      ratio {published[0]}, {published[1]} GB")


if __name__ == "__main__":
    main()
