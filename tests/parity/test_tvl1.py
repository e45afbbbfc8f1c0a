"""TV-L1 in PyTorch against OpenCV's on real clips, where they are there.

Rounding is magnified where the flow is badly determined (motion of tens of px, no texture): there OpenCV
differs from itself by as much once a frame is disturbed by 1e-5 of a grey level. That is the measure.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from gkdcli.data.tvl1 import tvl1_flow
from gkdcli.data.video import VideoReader
from gkdcli.settings import DataSettings

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data" / "videos"
CLIPS = sorted(path.name for path in FOLDER.glob("*") if "_flow" not in path.name)
pytestmark = pytest.mark.skipif(not CLIPS, reason=f"there are no clips in {FOLDER}")


def _pairs(name: str, short_side: int, places: tuple[int, ...]) -> list[tuple[np.ndarray, np.ndarray]]:
    with VideoReader(FOLDER / name) as video:
        frames = []
        for picture in video.pictures(DataSettings(short_side=short_side)):
            frames.append(picture.grey())
            if len(frames) > max(places) + 1:
                break
    return [(frames[place], frames[place + 1]) for place in places if place + 1 < len(frames)]


def _opencv(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    return cv2.optflow.DualTVL1OpticalFlow_create().calc(before, after, None)


def _distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.hypot(*np.moveaxis(one - other, -1, 0))


def _differences(name: str, short_side: int, places: tuple[int, ...]) -> tuple[float, float]:
    """Mean end-point difference in px: ours from OpenCV's, and OpenCV's from that of disturbed frames."""
    ours, own = [], []
    rng = np.random.default_rng(0)
    for frames in _pairs(name, short_side, places):
        wanted = _opencv(*frames)
        flow = tvl1_flow(*(torch.from_numpy(frame)[None] for frame in frames))[0].movedim(0, -1).numpy()
        ours.append(_distance(flow, wanted).mean())
        disturbed = [
            ((frame + rng.normal(0, 1e-5, frame.shape)) / 255).astype(np.float32) for frame in frames
        ]
        own.append(_distance(_opencv(*disturbed), wanted).mean())
    return float(np.mean(ours)), float(np.mean(own))


@pytest.mark.parametrize("name", [name for name in CLIPS if name.startswith(("mmaction2_test.avi", "v_"))])
def test_a_pair_of_real_frames(name: str) -> None:
    found, _ = _differences(name, 112, (10,))
    assert found <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", CLIPS)
def test_real_clips(name: str) -> None:
    found, own = _differences(name, 256, (0, 20, 40))
    print(f"{name}: {found:.4f} px, OpenCV's own {own:.4f} px")
    assert found <= max(0.1, 2 * own)
    assert found <= max(0.02, 3 * own)
