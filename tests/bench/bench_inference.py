"""Inference of a detector over whole videos against a loop over single windows.

    python tests/bench/bench_inference.py [--videos 6] [--width 0.25] [--threads 2] [--repeats 3]

The loop reads and decodes each window by itself and runs the network on it, as the published test does with
its arrays in memory; ours reads and decodes every frame once and runs windows in batches. Store: JPEG and raw
videos of the detection demo, windows of 128 frames with stride 64, 48x48 px. Equal outputs within 1e-5 are
asserted; both take turns, medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from gkdcli.console import silent
from gkdcli.data.clips import normalise, read_frames, to_working_size
from gkdcli.data.store import Store
from gkdcli.data.windows import test_offsets
from gkdcli.evaluation.decode import Heads
from gkdcli.evaluation.windows import predict_windows
from gkdcli.models.detector import Detector
from gkdcli.resolve import resolve
from tests.readme import run


def one_by_one(store: Store, network: Detector, clips, stride: int) -> list[Heads]:
    """Window by window."""
    found = []
    for video, row in enumerate(store.videos):
        outputs = []
        for offset in test_offsets(row.frames, clips.length, stride):
            count = min(clips.length, row.frames - offset)
            frames = to_working_size(read_frames(store, video, offset, count), clips)
            top, left = (round((size - clips.crop) / 2) for size in frames.shape[2:])
            window = torch.zeros(1, 3, clips.length, clips.crop, clips.crop, dtype=torch.uint8)
            square = frames[:, :, top : top + clips.crop, left : left + clips.crop]
            window[0, :, :count] = square.transpose(0, 1)
            with torch.inference_mode():
                real = torch.tensor([count])
                outputs.append([part.numpy() for part in network(normalise(window, clips, real))])
        found.append(Heads(*(np.concatenate(parts) for parts in zip(*outputs, strict=True))))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--videos", type=int, default=6)
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    page = resolve("demo-detection", stage="evaluate", modality="rgb", root=Path()).settings
    clips, stride = page.clips, page.eval.stride
    torch.manual_seed(0)
    network = Detector(
        "top-i3d", 6, length=clips.length, crop=clips.crop, width=given.width, recipe="corrected"
    ).eval()
    for storage in ("jpeg", "raw"):
        with tempfile.TemporaryDirectory() as name:
            sets = f"--set data.draw_train={given.videos} --set data.draw_test=2 --set data.storage={storage}"
            code, output = run(f"gkd prepare demo-detection {sets}", Path(name))
            assert code == 0, output
            store = Store.open(Path(name) / "stores/demo-detection/rgb.h5")

            def ours(store: Store = store) -> list[Heads]:
                found = predict_windows(
                    store,
                    range(len(store.videos)),
                    network,
                    clips,
                    stride=stride,
                    batch_size=page.eval.batch_size,
                    workers=0,
                    device=torch.device("cpu"),
                    tick=silent,
                )
                return [video.heads for video in found]

            for mine, theirs in zip(ours(), one_by_one(store, network, clips, stride), strict=True):
                for a, b in zip(mine, theirs, strict=True):
                    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
            times: dict[str, list[float]] = {"ours": [], "loop": []}
            for _ in range(given.repeats):
                for who, work in (
                    ("ours", ours),
                    ("loop", lambda store=store: one_by_one(store, network, clips, stride)),
                ):
                    began = time.perf_counter()
                    work()
                    times[who].append(time.perf_counter() - began)
            loop, mine = statistics.median(times["loop"]), statistics.median(times["ours"])
            windows = sum(len(test_offsets(row.frames, clips.length, stride)) for row in store.videos)
            print(
                f"{storage}: {windows} windows, loop {loop:.2f} s, ours {mine:.2f} s, ratio {loop / mine:.2f}"
            )


if __name__ == "__main__":
    main()
