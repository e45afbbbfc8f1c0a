"""data.flow: the direction and size of what moves, and how it is stored."""

from __future__ import annotations

import contextlib
from typing import get_args

import cv2
import numpy as np
import pytest

from gkdcli.data.flow import FlowEstimator, dequantise, flow_difference, quantise
from gkdcli.data.video import BadVideo
from gkdcli.settings import FlowMethod

METHODS = get_args(FlowMethod)


def _texture(height: int = 96, width: int = 128) -> np.ndarray:
    noise = np.random.default_rng(0).random((height + 40, width + 40), np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 2.5)
    return cv2.normalize(smooth, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


def _shifted(x: int, y: int) -> tuple[np.ndarray, np.ndarray]:
    """Two frames between which everything moves by (x, y) px, to the right and downwards."""
    whole = _texture()
    before, after = whole[20:-20, 20:-20], whole[20 - y : 116 - y, 20 - x : 148 - x]
    return np.ascontiguousarray(before), np.ascontiguousarray(after)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("x", "y"), [(3, 0), (0, -2), (-2, 3)])
def test_a_known_shift_is_found(method: FlowMethod, x: int, y: int) -> None:
    flow = FlowEstimator(method, 20.0).between(*_shifted(x, y))
    assert flow.shape == (96, 128, 2)
    assert flow.dtype == np.uint8
    speed = flow[16:-16, 16:-16].astype(float) * 40 / 255 - 20
    assert np.median(speed[..., 0]) == pytest.approx(x, abs=0.3)
    assert np.median(speed[..., 1]) == pytest.approx(y, abs=0.3)


def test_the_stored_value_is_that_of_the_published_tools() -> None:
    """METHOD.md 7: cut to [-20, 20], then round(255 * (v + 20) / 40)."""
    speeds = np.array([-99, -20, -10, -0.08, 0, 0.08, 5, 20, 99, np.nan], np.float32)
    assert quantise(speeds, 20.0).tolist() == [0, 0, 64, 127, 128, 128, 159, 255, 255, 128]
    assert quantise(np.array([5.0, -5.0, 0.0], np.float32), 5.0).tolist() == [255, 0, 128]
    # mirrored motion is the negative picture, which is what a flip relies on
    both = quantise(np.array([[1.7, -1.7]], np.float32), 20.0).astype(int)
    assert abs(both.sum() - 255) <= 1


def test_no_motion_is_grey() -> None:
    still = _texture()
    for method in METHODS:
        assert np.abs(FlowEstimator(method, 20.0).between(still, still).astype(int) - 128).mean() < 0.5


def test_parameters_are_those_of_the_paper() -> None:
    tvl1 = FlowEstimator("tvl1", 20.0).parameters
    wanted = {
        "Tau": 0.25,
        "Lambda": 0.15,
        "Theta": 0.3,
        "ScalesNumber": 5,
        "WarpingsNumber": 5,
        "Epsilon": 0.01,
        "InnerIterations": 30,
        "OuterIterations": 10,
        "MedianFiltering": 5,
    }
    assert {name: tvl1[name] for name in wanted} == pytest.approx(wanted)
    kinds = [FlowEstimator(method, 20.0).parameters for method in METHODS]
    assert all(kinds)
    assert len({str(kind) for kind in kinds}) == len(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_frames_of_any_size_give_flow_or_a_reason(method: FlowMethod) -> None:
    rng = np.random.default_rng(1)
    for height, width in ((1, 1), (2, 9), (7, 7), (13, 17), (33, 31)):
        one, two = (rng.integers(0, 255, (height, width)).astype(np.uint8) for _ in range(2))
        with contextlib.suppress(BadVideo):
            assert FlowEstimator(method, 20.0).between(one, two).shape == (height, width, 2)


def test_the_difference_to_tvl1_is_what_was_added() -> None:
    """TV-L1 itself differs by its rounding; a px added to x is seen as a px, what the bound cut is not."""
    before, after = _shifted(3, -1)
    stored = FlowEstimator("tvl1", 20.0).between(before, after)
    step = 40 / 255
    same = flow_difference(before, after, stored, 20.0)
    assert same.shape == before.shape
    assert same.max() <= step / 2 * 2**0.5 + 1e-4
    moved = stored.copy()
    moved[..., 0] += 7
    assert flow_difference(before, after, moved, 20.0).mean() == pytest.approx(7 * step, abs=step / 2)
    narrow = FlowEstimator("tvl1", 2.0).between(before, after)
    assert flow_difference(before, after, narrow, 2.0).max() <= 4 / 255 / 2 * 2**0.5 + 1e-4
    with pytest.raises(BadVideo):
        flow_difference(before[:1, :1], after[:1, :1], stored[:1, :1], 20.0)


def test_speeds_come_back_to_half_a_step() -> None:
    speeds = np.linspace(-20, 20, 1001, dtype=np.float32)
    assert np.abs(dequantise(quantise(speeds, 20.0), 20.0) - speeds).max() <= 20 / 255 + 1e-5
