"""data.flow: the direction and size of what moves, and how it is stored."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
from typing import get_args

import cv2
import numpy as np
import pytest
import torch

from gkdcli.data import torch_flow
from gkdcli.data.flow import FlowEstimator, dequantise, flow_difference, quantise
from gkdcli.data.video import BadVideo
from gkdcli.errors import GkdError
from gkdcli.settings import FlowMethod

METHODS = [method for method in get_args(FlowMethod) if method != "raft"]  # which needs weights


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
    flow = FlowEstimator(method, 20.0).block(_shifted(x, y))[0]
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
        assert np.abs(FlowEstimator(method, 20.0).block([still, still]).astype(int) - 128).mean() < 0.5


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
            assert FlowEstimator(method, 20.0).block([one, two]).shape == (1, height, width, 2)


def test_the_difference_to_tvl1_is_what_was_added() -> None:
    """TV-L1 itself differs by its rounding; a px added to x is seen as a px, what the bound cut is not."""
    before, after = _shifted(3, -1)
    stored = FlowEstimator("tvl1", 20.0).block([before, after])[0]
    step = 40 / 255
    same = flow_difference(before, after, stored, 20.0)
    assert same.shape == before.shape
    assert same.max() <= step / 2 * 2**0.5 + 1e-4
    moved = stored.copy()
    moved[..., 0] += 7
    assert flow_difference(before, after, moved, 20.0).mean() == pytest.approx(7 * step, abs=step / 2)
    narrow = FlowEstimator("tvl1", 2.0).block([before, after])[0]
    assert flow_difference(before, after, narrow, 2.0).max() <= 4 / 255 / 2 * 2**0.5 + 1e-4
    with pytest.raises(BadVideo):
        flow_difference(before[:1, :1], after[:1, :1], stored[:1, :1], 20.0)


def test_speeds_come_back_to_half_a_step() -> None:
    speeds = np.linspace(-20, 20, 1001, dtype=np.float32)
    assert np.abs(dequantise(quantise(speeds, 20.0), 20.0) - speeds).max() <= 20 / 255 + 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_a_block_is_its_pairs(method: FlowMethod) -> None:
    """However long: also where more pairs come than are taken at once."""
    whole = _texture()
    frames = [np.ascontiguousarray(whole[20:44, 10 + 2 * step : 42 + 2 * step]) for step in range(5)]
    flow = FlowEstimator(method, 20.0, batch=3).block(frames)
    assert flow.shape == (4, 24, 32, 2)
    for number, pair in enumerate(itertools.pairwise(frames)):
        one = FlowEstimator(method, 20.0).block(pair)[0].astype(int)
        assert np.abs(one - flow[number]).max() <= (method == "tvl1-torch")


def test_only_methods_of_pytorch_import_it() -> None:
    code = (
        "import sys; from gkdcli.data import jobs; from gkdcli.data.flow import FlowEstimator;"
        "[FlowEstimator(method, 20.0) for method in ('tvl1', 'dis', 'farneback')];"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_work_on_large_frames_is_seen_to_get_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU takes a batch a few pairs at a time; a worker silent for all of them would be dismissed."""
    beats: list[int] = []
    monkeypatch.setattr(torch_flow, "_CPU_PX", 2 * 24 * 32)
    monkeypatch.setattr(torch_flow, "beat", lambda: beats.append(1))
    assert len(FlowEstimator("tvl1-torch", 20.0, batch=5).block([np.zeros((24, 32), np.uint8)] * 6)) == 5
    assert len(beats) == 3


def test_spent_memory_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    def spent(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch_flow, "tvl1_flow", spent)
    with pytest.raises(GkdError, match="12 pairs of 80x64 px") as caught:
        FlowEstimator("tvl1-torch", 20.0, batch=12).block([np.zeros((64, 80), np.uint8)] * 3)
    assert "data.flow_batch=6" in caught.value.hint


def test_where_nothing_can_be_compiled_flow_is_computed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU without a compiler: it fails when it is first used. The device is the CPU here."""

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr(torch_flow, "_COMPILED_ON", ("cpu",))
    monkeypatch.setattr(torch, "compile", lambda *_, **__: fails)
    torch_flow.compiled_tvl1.cache_clear()
    try:
        estimator = FlowEstimator("tvl1-torch", 20.0)
    finally:
        torch_flow.compiled_tvl1.cache_clear()
    assert estimator.note.endswith("nothing can be compiled here (no compiler)")
    assert estimator.block(_shifted(1, 1)).shape == (1, 96, 128, 2)
