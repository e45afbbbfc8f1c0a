"""A backbone's forward, and forward with backward, in each of the ways that `train.*` offers.

    python tests/bench/bench_precision.py [--kinds i3d top-i3d] [--clip 64 224] [--threads 2] [--compile]

Batch 1, training mode. The ways take turns, so that a busy machine slows all alike; medians, and ratios to
float32 with channels outermost (below 1 is faster). The distance of the tap from that of float32 is printed
beside them: root mean square, relative. Equal weights are loaded into each. bf16 goes
forward only: its gradients of 3D convolutions are wrong on CPUs, see `pipeline/train.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

import torch

from gkdcli.models.recognizer import Recognizer
from gkdcli.training.forward import Forward

WAYS = {  # train.channels_last, train.precision, train.compile
    "float32": ("off", "32", False),
    "channels_last": ("on", "32", False),
    "bf16": ("off", "bf16", False),
    "bf16, channels_last": ("on", "bf16", False),
    "compile": ("off", "32", True),
    "compile, bf16": ("off", "bf16", True),
}


def main() -> None:
    """Measures and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", default=["i3d", "top-i3d"])
    parser.add_argument("--clip", nargs=2, type=int, default=[64, 224], metavar=("LENGTH", "CROP"))
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="also the compiled ways; minutes each")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    report = {
        "threads": given.threads,
        "clip": given.clip,
        "width": given.width,
        "load_before": os.getloadavg(),
    }
    for kind in given.kinds:
        report[kind] = measure(kind, given)
    print(json.dumps(report | {"load_after": os.getloadavg()}, indent=1))


def measure(kind: str, given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds, ratios and distances of every way for a backbone."""
    length, crop = given.clip
    clip = torch.randn(1, 3, length, crop, crop, generator=torch.Generator().manual_seed(0))
    ways, state = {}, None
    for name, (layout, precision, compiled) in WAYS.items():
        if compiled and not given.compile:
            continue
        torch.manual_seed(0)
        network = Recognizer(
            kind, 101, length=length, crop=crop, width=given.width, attention=None, channels_last=layout
        ).train()
        state = state or {key: value.clone() for key, value in network.state_dict().items()}
        network.load_state_dict(state)
        ways[name] = (network, Forward(precision, compiled))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    taps = {}
    for turn in range(given.rounds + 1):  # the first warms up, and compiles
        for name, (network, forward) in ways.items():
            start = time.perf_counter()
            with torch.no_grad():
                taps[name] = forward.features(network, clip)["Mixed_5c"]
            middle = time.perf_counter()
            if not forward.autocast:
                forward.features(network, clip)["Mixed_5c"].square().mean().backward()
            if turn:
                times[name].append((middle - start, time.perf_counter() - middle))
            network.zero_grad()
    base = [statistics.median(column) for column in zip(*times["float32"], strict=True)]
    size = taps["float32"].square().mean().sqrt()
    rows = {}
    for name in ways:
        one, both = (statistics.median(column) for column in zip(*times[name], strict=True))
        rows[name] = {
            "forward_s": round(one, 3),
            "forward_ratio": round(one / base[0], 3),
            "distance": float((taps[name] - taps["float32"]).square().mean().sqrt() / size),
        }
        if not ways[name][1].autocast:
            rows[name] |= {
                "forward_backward_s": round(both, 3),
                "forward_backward_ratio": round(both / base[1], 3),
            }
    return rows


if __name__ == "__main__":
    main()
