"""Pairs of frames per second of TV-L1 in PyTorch against OpenCV's, one thread each, on the same pairs.

    python tests/bench/bench_flow.py [--videos DIR] [--pairs N] [--rounds N]
        [--device cuda] [--batch N] [--profile]

Without DIR moving textures are drawn, 340x256. Both take turns, CPU seconds count, the best round of each;
the mean end-point difference is asserted. With `--device cuda` a batch runs on the GPU instead: pairs per
second of wall-clock time, and the share of the memory bandwidth that the iterations need at least (compiled:
two passes over 22 numbers a pixel, see gkdcli/data/tvl1.py).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch

from gkdcli.data.torch_flow import compiled_tvl1
from gkdcli.data.tvl1 import BYTES_PER_PIXEL, Counts, tvl1_flow
from gkdcli.data.video import VideoReader
from gkdcli.settings import DataSettings

MOST_PX = 0.1
Pair = tuple[np.ndarray, np.ndarray]


def drawn(count: int) -> list[Pair]:
    """A texture that moves by another speed in each pair."""
    rng = np.random.default_rng(0)
    noise = cv2.GaussianBlur(rng.random((296, 380), np.float32), (0, 0), 2.5)
    picture = cv2.normalize(noise, None, 0, 255, cv2.NORM_MINMAX)
    pairs = []
    for _ in range(count):
        x, y = rng.uniform(-5, 5, 2)
        shift = np.array([[1, 0, x], [0, 1, y]], np.float32)
        after = cv2.warpAffine(picture, shift, (380, 296), flags=cv2.INTER_CUBIC)
        pairs.append(
            tuple(
                np.ascontiguousarray(np.clip(np.rint(frame[20:-20, 20:-20]), 0, 255).astype(np.uint8))
                for frame in (picture, after)
            )
        )
    return pairs


def real(folder: Path, count: int) -> list[Pair]:
    """The first two frames after the tenth of each video, at 340x256."""
    pairs: list[Pair] = []
    for path in sorted(folder.iterdir()):
        with VideoReader(path) as video:
            frames = []
            for picture in video.pictures(DataSettings(size=[340, 256])):
                frames.append(picture.grey())
                if len(frames) == 12:
                    break
        pairs.append((frames[-2], frames[-1]))
    return (pairs * count)[:count]


def opencv(pairs: list[Pair]) -> np.ndarray:
    """One after the other, with one estimator, as `gkd prepare` does."""
    estimator = cv2.optflow.DualTVL1OpticalFlow_create()
    return np.stack([estimator.calc(before, after, None) for before, after in pairs])


def stacked(pairs: list[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
    before, after = (torch.from_numpy(np.stack(frames)) for frames in zip(*pairs, strict=True))
    return before, after


def best(rounds: int, clock: Callable[[], float], *actions: Callable[[], object]) -> list[float]:
    """Seconds of each action, in turns."""
    seconds = [float("inf")] * len(actions)
    for _ in range(rounds):
        for number, action in enumerate(actions):
            started = clock()
            action()
            seconds[number] = min(seconds[number], clock() - started)
    return seconds


def on_cpu(pairs: list[Pair], rounds: int) -> None:
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    frames = stacked(pairs)
    with torch.inference_mode():
        found = tvl1_flow(*frames).movedim(1, -1).numpy()
        difference = np.hypot(*np.moveaxis(found - opencv(pairs), -1, 0)).mean()
        assert difference <= MOST_PX, difference
        theirs, ours = best(rounds, time.process_time, lambda: opencv(pairs), lambda: tvl1_flow(*frames))
    print(f"OpenCV tvl1   {len(pairs) / theirs:8.3f} pairs per CPU second")
    print(f"tvl1-torch    {len(pairs) / ours:8.3f} pairs per CPU second, {theirs / ours:.2f} times as many")
    print(f"difference    {difference:8.4f} px (mean end-point difference)")


def bandwidth(device: torch.device) -> float:
    """Bytes per second of a long copy, read and written."""
    source = torch.empty(1 << 28, device=device)
    target = torch.empty_like(source)
    target.copy_(source)

    def copy() -> None:
        target.copy_(source)
        torch.cuda.synchronize()

    return 2 * source.nbytes / best(10, time.perf_counter, copy)[0]


def on_cuda(pairs: list[Pair], rounds: int, profile: bool) -> None:
    device = torch.device("cuda")
    before, after = (frames.to(device) for frames in stacked(pairs))
    compiled, note = compiled_tvl1("cuda")
    counts: list[Counts] = []
    with torch.inference_mode():
        found = tvl1_flow(before, after, compiled=compiled, counts=counts).movedim(1, -1).cpu().numpy()
        few = slice(min(len(pairs), 8))
        difference = np.hypot(*np.moveaxis(found[few] - opencv(pairs[few]), -1, 0)).mean()
        assert difference <= MOST_PX, difference

        def run() -> None:
            tvl1_flow(before, after, compiled=compiled)
            torch.cuda.synchronize()

        run()
        if profile:
            with torch.profiler.profile() as kernels:
                run()
            print(kernels.key_averages().table(sort_by="self_cuda_time_total", row_limit=25))
            return
        torch.cuda.reset_peak_memory_stats()
        (seconds,) = best(rounds, time.perf_counter, run)
    # a pair that has stopped costs as much as one that goes on: the slowest of the batch counts for all
    needed = sum(level.pixels * level.pairs * float(level.iterations.max()) for level in counts)
    useful = sum(level.pixels * float(level.iterations.sum()) for level in counts)
    peak = torch.cuda.max_memory_allocated() / len(pairs) / 2**20
    limit = bandwidth(device) / BYTES_PER_PIXEL
    print(f"{torch.cuda.get_device_name()}, {limit * BYTES_PER_PIXEL / 1e12:.2f} TB/s measured. {note}")
    print(f"tvl1-torch    {len(pairs) / seconds:8.1f} pairs per second, {len(pairs)} at once")
    print(
        f"bandwidth     {needed / limit / seconds:8.1%} of the limit, {useful / limit / seconds:.1%} useful"
    )
    print(f"memory        {peak:8.1f} MiB per pair at most")
    print(f"difference    {difference:8.4f} px (mean end-point difference)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--videos", type=Path)
    parser.add_argument("--pairs", type=int, default=4, help="on the CPU")
    parser.add_argument("--batch", type=int, default=32, help="pairs on the GPU")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--profile", action="store_true", help="print the kernels of the GPU that take longest"
    )
    given = parser.parse_args()
    count = given.batch if given.device == "cuda" else given.pairs
    pairs = real(given.videos, count) if given.videos else drawn(count)
    if given.device == "cuda":
        on_cuda(pairs, given.rounds, given.profile)
    else:
        on_cpu(pairs, given.rounds)


if __name__ == "__main__":
    main()
