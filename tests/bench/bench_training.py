"""Clips per second of training from memory, in several ways, and the share of what the device can multiply.

    python tests/bench/bench_training.py [--preset ucf101] [--stage pretrain distill] [--schedule step epoch]
        [--ways bf16 bf16-last ...] [--batch 6 32 ...] [--seconds 3] [--largest] [--profile]
        [--teacher-cache] [--device cuda|cpu]

A step is the trainer's own, with the transfer of the clips, losses and optimisers; clips are not read. The
multiply-adds of forward and backward passes are counted as PyTorch does them. What they could reach is
measured in the same run: a product of two matrices, 8192x8192 on a GPU, in bf16 (in float32 where the device
is the CPU). `--largest` looks for the largest batch that fits, to within an eighth.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator

import torch
from torch.utils.flop_counter import FlopCounterMode

from gkdcli.errors import GkdError
from gkdcli.training.memory import expected_bytes
from tests.bench.iteration import CLASSES, Iteration

WAYS = {
    "32": ["train.precision=32"],
    "32-last": ["train.precision=32", "train.channels_last=on"],
    "bf16": ["train.precision=bf16", "train.channels_last=off"],
    "bf16-last": ["train.precision=bf16", "train.channels_last=on"],
    "bf16-compiled": ["train.precision=bf16", "train.channels_last=off", "train.compile=true"],
    "bf16-last-compiled": ["train.precision=bf16", "train.channels_last=on", "train.compile=true"],
    "bf16-recomputed": [
        "train.precision=bf16",
        "train.channels_last=on",
        "train.checkpoint_activations=true",
    ],
    "fp16-last": ["train.precision=fp16", "train.channels_last=on"],
}


def finish(device: torch.device) -> None:
    """Waits for all that the device has been asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def pace(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of one call, over so many seconds; before them two calls compile and choose kernels."""
    for _ in range(2):
        work()
    finish(device)
    began, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - began < seconds:
        work()
        finish(device)
        calls += 1
    return (time.perf_counter() - began) / calls


def most_flops(device: torch.device) -> float:
    """Operations per second of a large product of matrices, a multiply-add being two."""
    side, kind = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    left, right = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    return float(2 * side**3 / pace(lambda: left @ right, device, 1.0))


def fresh(device: torch.device) -> None:
    """Lets go of the memory of the iterations before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def flops_of(given: argparse.Namespace, stage: str, schedule: str) -> float:
    """Operations of one clip's step, counted on the device."""
    iteration = build(given, stage, schedule, "32", 1)
    with FlopCounterMode(display=False) as counter:
        iteration()
    return float(counter.get_total_flops())


def build(given: argparse.Namespace, stage: str, schedule: str, way: str, batch: int) -> Iteration:
    sets = [f"train.device={given.device}", f"train.schedule={schedule}", f"optim.batch_size={batch}"]
    iteration = Iteration(given.preset, stage, sets + WAYS[way], cached=given.teacher_cache)
    if iteration.device.type == "cuda":
        iteration.batch = iteration.batch.pin_memory()
    return iteration


def expected(iteration: Iteration) -> int:
    """What `gkd` would state before the run."""
    numbers = [
        sum(p.numel() for p in module.parameters()) for module in (iteration.generators, iteration.teacher)
    ]
    network = iteration.cost_of("student" if iteration.distilled else "teacher", backbone=False)
    teacher = sum(numbers) if iteration.distilled and not iteration.cached else 0
    return expected_bytes(iteration.settings, network, numbers[0], teacher, iteration.clips[0].numel())


def fits(given: argparse.Namespace, stage: str, schedule: str, way: str, batch: int) -> bool:
    """Whether two steps of this batch find room."""
    fresh(torch.device(given.device))
    try:
        iteration = build(given, stage, schedule, way, batch)
        for _ in range(2):  # optimiser states are there from the second on
            iteration()
    except (torch.OutOfMemoryError, GkdError):
        return False
    return True


def largest(given: argparse.Namespace, stage: str, schedule: str, way: str) -> int:
    """The largest batch that fits, to within an eighth."""
    good, bad = 0, given.batch[-1]
    while fits(given, stage, schedule, way, bad):
        good, bad = bad, 2 * bad
    while bad - good > max(good // 8, 1):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(given, stage, schedule, way, middle) else (good, middle)
    return good


def rows(given: argparse.Namespace) -> Iterator[str]:
    """One line per way of training."""
    device = torch.device(given.device)
    peak = most_flops(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    yield f"{name}, PyTorch {torch.__version__}, {peak / 1e12:.1f} TFLOP/s in a product of matrices"
    yield "stage     schedule  way                 batch   clips/s  TFLOP/s   share  peak GB  expected GB"
    for stage in given.stage:
        for schedule in given.schedule:
            each = flops_of(given, stage, schedule)
            for way in given.ways:
                for batch in given.batch:
                    fresh(device)
                    iteration = build(given, stage, schedule, way, batch)
                    rate = batch / pace(iteration, device, given.seconds)
                    held = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else float("nan")
                    yield (
                        f"{stage:<9} {schedule:<9} {way:<18} {batch:6} {rate:9.2f} {rate * each / 1e12:8.2f}"
                        f" {rate * each / peak:7.1%} {held:8.2f} {expected(iteration) / 1e9:12.2f}"
                    )
                    if given.profile:
                        yield profile(iteration, device)
                    del iteration
                if given.largest:
                    yield f"{stage:<9} {schedule:<9} {way:<18} {largest(given, stage, schedule, way):6} fit"


def profile(iteration: Iteration, device: torch.device) -> str:
    """The operations that take longest in a step, of a GPU its kernels: share, milliseconds, how many."""
    with torch.profiler.profile() as found:
        iteration()
        finish(device)
    kernel = torch.autograd.DeviceType.CUDA if device.type == "cuda" else torch.autograd.DeviceType.CPU
    times = [
        (one.self_device_time_total if device.type == "cuda" else one.self_cpu_time_total, one)
        for one in found.key_averages()
        if one.device_type == kernel
    ]
    whole = sum(time for time, _ in times)
    longest = sorted(times, key=lambda one: -one[0])[:25]
    return "\n".join(
        f"    {time / whole:6.1%} {time / 1e3:9.2f} ms {one.count:5} x {one.key[:90]}"
        for time, one in longest
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", choices=CLASSES, default="ucf101")
    parser.add_argument(
        "--stage", nargs="+", choices=["pretrain", "distill"], default=["pretrain", "distill"]
    )
    parser.add_argument("--schedule", nargs="+", choices=["epoch", "step"], default=["step"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["32", "bf16", "bf16-last"])
    parser.add_argument("--batch", nargs="+", type=int, default=[6])
    parser.add_argument("--teacher-cache", action="store_true", help="the teacher's attention is known")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each way")
    parser.add_argument("--largest", action="store_true", help="look for the largest batch that fits")
    parser.add_argument("--profile", action="store_true", help="print the operations that take longest")
    given = parser.parse_args()
    for line in rows(given):
        print(line, flush=True)


if __name__ == "__main__":
    main()
