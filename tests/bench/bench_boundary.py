"""Boundary max pooling against the plain loop over segments: forward, and forward with backward.

    python tests/bench/bench_boundary.py [--repeats 20] [--threads 1] [--device cpu]

Sizes are those of the detector, batch 1: the frame feature with the 64 segments of level 0 and with those of
all levels at once, and the levels' own features. The loop takes one maximum per segment and half of the
channels, which on levels of 2 and 4 steps is little work and the faster way forward. Its gradient splits
equal maxima, so features without ties are drawn; equal values and gradients are asserted. Both take turns;
medians, and ratios above 1 where the table is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from gkdcli.models.boundary import boundary_max_pool, proposal_segments

CHANNELS = 512
SIZES = {"frame, level 0": (256, 64), "frame, all levels": (256, 126)} | {
    f"level of {steps}": (steps, steps) for steps in (64, 32, 16, 8, 4, 2)
}


def plain(feature: Tensor, segments: Tensor) -> Tensor:
    """Segment by segment."""
    batch, channels, frames = feature.shape
    ends = segments.long().clamp(0, frames - 1).tolist()
    half = channels // 2
    rows = []
    for b in range(batch):
        columns = []
        for start, start_end, end, end_end in ends[b]:
            first = feature[b, :half, start : max(start, start_end) + 1].amax(dim=1)
            last = feature[b, half:, end : max(end, end_end) + 1].amax(dim=1)
            columns.append(torch.cat([first, last]))
        rows.append(torch.stack(columns, dim=1))
    return torch.stack(rows)


def measure(frames: int, count: int, repeats: int, device: torch.device) -> dict[str, float]:
    """Milliseconds and ratios for one size."""
    generator = torch.Generator().manual_seed(frames + count)
    orders = [torch.randperm(frames, generator=generator) for _ in range(CHANNELS)]
    feature = torch.stack(orders).float().unsqueeze(0)
    ends = (torch.rand(1, count, 2, generator=generator) * frames).sort(dim=2).values
    given = torch.randn(1, CHANNELS, count, generator=generator).to(device)
    feature, segments = feature.to(device), proposal_segments(ends).to(device)

    def forward(pool: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        with torch.no_grad():
            return pool(feature, segments)

    def backward(pool: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        leaf = feature.clone().requires_grad_()
        pool(leaf, segments).backward(given)
        assert leaf.grad is not None
        return leaf.grad

    row: dict[str, float] = {}
    for name, work in (("forward", forward), ("forward_backward", backward)):
        torch.testing.assert_close(work(boundary_max_pool), work(plain), rtol=0, atol=1e-4)
        times: dict[str, list[float]] = {"plain": [], "table": []}
        for _ in range(repeats):
            for way, pool in (("plain", plain), ("table", boundary_max_pool)):
                began = time.perf_counter()
                work(pool)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times[way].append(1e3 * (time.perf_counter() - began))
        ours, theirs = (statistics.median(times[way]) for way in ("table", "plain"))
        row |= {f"{name}_ms": round(ours, 3), f"{name}_ratio": round(theirs / ours, 2)}
    return row


def main() -> None:
    """Measures and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    report: dict[str, object] = {"threads": given.threads, "device": given.device, "load": os.getloadavg()}
    for name, (frames, count) in SIZES.items():
        report[name] = measure(frames, count, given.repeats, torch.device(given.device))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
