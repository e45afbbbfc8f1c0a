"""data.tvl1: the same flow as OpenCV's TV-L1, of many pairs at once, each with its own end."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from gkdcli.data.flow import FlowEstimator
from gkdcli.data.median import median
from gkdcli.data.tvl1 import SMALLEST_PX, Compiled, Counts, Tvl1, _fused, tvl1_flow

QUICK = Tvl1(outer=2, inner=10, warps=2)


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).random((height, width), np.float32)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2.5), None, 0, 255, cv2.NORM_MINMAX)


def moved(speed_x: np.ndarray, speed_y: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two frames (H, W) uint8: what is at x in the first is at x + speed in the second."""
    height, width = speed_x.shape
    after = texture(height, width, seed)
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    before = cv2.remap(
        after, columns + speed_x, rows + speed_y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT
    )
    return tuple(np.clip(np.rint(frame), 0, 255).astype(np.uint8) for frame in (before, after))


def pair(shift: float, height: int = 32, width: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    ones = np.ones((height, width), np.float32)
    return moved(ones * shift, ones * -shift / 2, seed)


def reference(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    return cv2.optflow.DualTVL1OpticalFlow_create().calc(before, after, None)


def ours(before: np.ndarray, after: np.ndarray, method: Tvl1 | None = None) -> np.ndarray:
    flow = tvl1_flow(*(torch.from_numpy(frame)[None] for frame in (before, after)), method)
    return flow[0].movedim(0, -1).numpy()


def distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.hypot(*np.moveaxis(one - other, -1, 0))


def stacked(*pairs: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, Tensor]:
    before, after = (torch.from_numpy(np.stack(frames)) for frames in zip(*pairs, strict=True))
    return before, after


def test_it_agrees_with_opencv_on_drawn_motion() -> None:
    for shift, size in ((0.6, (40, 56)), (2.5, (61, 31))):
        frames = pair(shift, *size)
        assert distance(ours(*frames), reference(*frames)).mean() < 2e-2  # rounding, magnified


ROWS, COLUMNS = (axis.astype(np.float32) for axis in np.mgrid[:64, :80])
MOTIONS = {
    "shift": (np.full((64, 80), 2.3, np.float32), np.full((64, 80), -1.4, np.float32)),
    "turn": (-(ROWS - 32) * 0.04, (COLUMNS - 40) * 0.04),
    "zoom": ((COLUMNS - 40) * 0.03, (ROWS - 32) * 0.03),
    "two halves": (np.where(COLUMNS < 40, 2.0, -2.0).astype(np.float32), np.zeros((64, 80), np.float32)),
}


@pytest.mark.parametrize("motion", MOTIONS)
def test_it_is_as_close_to_the_truth_as_opencv(motion: str) -> None:
    truth = np.stack(MOTIONS[motion], -1)
    frames = moved(*MOTIONS[motion])
    found, wanted = (distance(flow, truth)[8:-8, 8:-8].mean() for flow in (ours(*frames), reference(*frames)))
    assert found <= wanted + 1e-2
    assert found < 0.5


def test_each_step_agrees_with_opencv_where_nothing_stops() -> None:
    """One round at one level, so that no rounding is magnified: sign, border and step sizes are the same."""
    frames = pair(1.2)
    single = cv2.optflow.DualTVL1OpticalFlow_create()
    single.setEpsilon(0)
    single.setScalesNumber(1)
    single.setWarpingsNumber(1)
    single.setOuterIterations(2)
    found = ours(*frames, Tvl1(epsilon=0, scales=1, warps=1, outer=2))
    assert np.abs(found - single.calc(*frames, None)).max() < 1e-4


def test_a_batch_is_its_pairs_one_at_a_time() -> None:
    pairs = [pair(0.0), pair(0.4, seed=1), pair(3.0, seed=2), pair(-2.0, seed=3)]
    together = tvl1_flow(*stacked(*pairs))
    for flow, frames in zip(together, pairs, strict=True):
        np.testing.assert_allclose(flow.movedim(0, -1).numpy(), ours(*frames), atol=1e-5)


def test_a_pair_that_stopped_keeps_its_values() -> None:
    """Beside one that goes on for long, a slow pair is what it is alone, to the bit, and is counted alone."""
    slow, fast = pair(0.4, 24, 24), pair(5.0, 24, 24, seed=4)
    counts: list[Counts] = []
    alone: list[Counts] = []
    together = tvl1_flow(*stacked(slow, fast), counts=counts)
    single = tvl1_flow(*stacked(slow), counts=alone)
    assert torch.equal(together[0], single[0])
    for both, one in zip(counts, alone, strict=True):
        assert both.iterations[0] == one.iterations[0] < both.iterations[1]
    still: list[Counts] = []
    assert not tvl1_flow(*stacked((slow[0], slow[0])), counts=still).any()
    assert int(still[0].iterations[0]) == Tvl1().warps  # each round ends after its first iteration


def test_what_is_compiled_is_the_same() -> None:
    """The function for the compiler, run as it stands, in blocks of another length."""

    def iterate(state, fixed, count, method):
        _fused(state, fixed, count, method)

    frames = stacked(pair(0.5), pair(2.0, seed=1))
    found = tvl1_flow(*frames, QUICK, Compiled(iterate, median))
    torch.testing.assert_close(found, tvl1_flow(*frames, QUICK), atol=1e-2, rtol=0)


def test_iterations_after_the_stop_change_nothing() -> None:
    """A GPU is asked for several at a time: those after a pair's last one are done in vain."""

    def overdone(state, fixed, count, method):
        _fused(state, fixed, count, method)
        kept = [part.clone() for part in state]
        if not state.live.any():
            _fused(state, fixed, 10, method)
            assert all(map(torch.equal, kept, state))
            stops.append(1)

    stops: list[int] = []
    tvl1_flow(*stacked(pair(0.5)), compiled=Compiled(overdone, median))
    assert stops


def test_nothing_moves_in_constant_pictures() -> None:
    grey = np.full((40, 50), 77, np.uint8)
    assert not ours(grey, grey).any()
    assert not ours(grey, grey + 50).any()  # brighter, but nowhere does a gradient say where to
    black = np.zeros((40, 50), np.uint8)
    assert not ours(black, black).any()


@pytest.mark.parametrize("size", [(3, 3), (3, 40), (15, 16), (17, 20), (21, 60)])
def test_tiny_pictures(size: tuple[int, int]) -> None:
    """The pyramid ends at 16 px, as OpenCV's does."""
    frames = pair(0.4, *size)
    quick = cv2.optflow.DualTVL1OpticalFlow_create()
    quick.setOuterIterations(1)
    found = ours(*frames, Tvl1(outer=1))
    assert found.shape == (*size, 2)
    assert distance(found, quick.calc(*frames, None)).mean() < 2e-2


def test_what_points_beyond_the_border_sees_black_there() -> None:
    """As OpenCV's remap does; a border that repeats would give another flow."""
    frames = pair(6.0, 17, 40)
    one = cv2.optflow.DualTVL1OpticalFlow_create()
    one.setOuterIterations(1)
    one.setWarpingsNumber(3)
    found = ours(*frames, Tvl1(outer=1, warps=3))
    assert distance(found, one.calc(*frames, None))[:, -6:].mean() < 2e-2


def test_too_small_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="3 px"):
        ours(*(np.zeros((SMALLEST_PX - 1, 9), np.uint8),) * 2)


def test_no_pairs_give_no_flow() -> None:
    none = torch.zeros(0, 20, 30, dtype=torch.uint8)
    assert tvl1_flow(none, none).shape == (0, 2, 20, 30)


def test_the_parameters_are_opencvs() -> None:
    found, wanted = Tvl1(), FlowEstimator("tvl1", 20.0).parameters
    names = {
        "tau": "Tau",
        "lambda_": "Lambda",
        "theta": "Theta",
        "scales": "ScalesNumber",
        "scale_step": "ScaleStep",
        "warps": "WarpingsNumber",
        "epsilon": "Epsilon",
        "inner": "InnerIterations",
        "outer": "OuterIterations",
    }
    assert {name: getattr(found, name) for name in names} == {
        name: wanted[theirs] for name, theirs in names.items()
    }
    assert wanted["MedianFiltering"] == 5


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 3), (5, 5), (9, 40), (33, 17)])
def test_the_median_is_opencvs_to_the_bit(size: tuple[int, int]) -> None:
    values = torch.randn(3, 2, *size, generator=torch.Generator().manual_seed(0))
    values[0] = values[0].round()  # many alike
    for found, wanted in zip(median(values).view(-1, *size), values.view(-1, *size), strict=True):
        np.testing.assert_array_equal(found.numpy(), cv2.medianBlur(wanted.numpy(), 5))
