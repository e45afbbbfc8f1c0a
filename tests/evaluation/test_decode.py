"""evaluation.decode: against a slow reading of METHOD.md 5, and fusion before it."""

from __future__ import annotations

import inspect
import math
import re

import numpy as np
import pytest

from gkdcli.evaluation import decode as module
from gkdcli.evaluation import nms
from gkdcli.evaluation.decode import Heads, decode, fuse_heads

FRAMES, FPS, THRESHOLD = 256, 10.0, 0.05


def heads(seed: int, windows: int = 3, priors: int = 7, classes: int = 4) -> Heads:
    rng = np.random.default_rng(seed)
    return Heads(
        rng.uniform(1, 90, (windows, priors, 2)).astype(np.float32),
        rng.normal(0, 2, (windows, priors, classes + 1)).astype(np.float32),
        rng.normal(0, 1.5, (windows, priors, 2)).astype(np.float32),
        rng.normal(0, 2, (windows, priors, classes + 1)).astype(np.float32),
        rng.normal(0, 1, (windows, priors, 1)).astype(np.float32),
    )


def softmax(logits: list[float]) -> list[float]:
    whole = sum(math.exp(value) for value in logits)
    return [math.exp(value) / whole for value in logits]


def slow(given: Heads, offsets: list[int], priors: list[float]) -> list[tuple[int, float, float, float]]:
    found, turned = [], 0
    for label in range(given.conf.shape[-1] - 1):
        for window, offset in enumerate(offsets):
            for place, prior in enumerate(priors):
                left, right = given.loc[window, place].tolist()
                width = left + right
                left += 0.5 * width * float(given.prop_loc[window, place, 0])
                right += 0.5 * width * float(given.prop_loc[window, place, 1])
                coarse = softmax(given.conf[window, place].tolist())[label + 1]
                refined = softmax(given.prop_conf[window, place].tolist())[label + 1]
                quality = 1 / (1 + math.exp(-float(given.center[window, place, 0])))
                score = (coarse + refined) / 2 * quality
                if score > THRESHOLD:
                    start = min(max(prior * FRAMES - left, 0), FRAMES)
                    end = min(max(prior * FRAMES + right, 0), FRAMES)
                    turned += end < start
                    if end >= start:
                        found.append((label, (start + offset) / FPS, (end + offset) / FPS, score))
    assert turned  # by its refinement: it is none
    return found


def test_it_equals_a_slow_loop() -> None:
    given = heads(0)
    given.prop_loc[0, 3:5] = -3
    offsets, priors = [0, 128, 200], [(place + 0.5) / 7 for place in range(7)]
    found = decode(
        given,
        np.array(offsets),
        np.array(priors)[:, None],
        clip_frames=FRAMES,
        fps=FPS,
        threshold=THRESHOLD,
    )
    wanted = slow(given, offsets, priors)
    assert 10 < len(wanted) < 80
    assert found.labels.tolist() == [row[0] for row in wanted]
    np.testing.assert_allclose(found.segments, [row[1:3] for row in wanted], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found.scores, [row[3] for row in wanted], rtol=1e-4)
    assert any(row[1] == 0 for row in wanted)  # clamped


def test_a_segment_that_its_refinement_turns_around_is_dropped() -> None:
    """One of no length is not turned: it stays, and overlaps nothing."""
    given = heads(0, windows=1, priors=3, classes=1)
    given.loc[:], given.conf[:], given.prop_conf[:], given.center[:] = 10, 0, 0, 9
    given.prop_loc[0] = [[0, 0], [-1, -1], [-1.5, -1.5]]  # widths of 20, 0 and -10 frames
    found = decode(given, np.array([0]), np.full(3, 0.5), clip_frames=FRAMES, fps=FPS, threshold=0.01)
    assert (found.segments * FPS).round(3).tolist() == [
        [FRAMES / 2 - 10, FRAMES / 2 + 10],
        [FRAMES / 2, FRAMES / 2],
    ]


def test_nothing_above_the_threshold() -> None:
    found = decode(heads(0), np.array([0, 1, 2]), np.zeros(7), clip_frames=256, fps=10.0, threshold=0.999)
    assert (found.segments.shape, found.scores.shape, found.labels.shape) == ((0, 2), (0,), (0,))


def test_the_input_is_left_alone() -> None:
    given = heads(1)
    for array in given:
        array.setflags(write=False)
    decode(given, np.array([0, 1, 2]), np.zeros(7), clip_frames=256, fps=10.0, threshold=0.01)


def test_large_logits_do_not_overflow() -> None:
    given = heads(2)._replace(conf=np.full((3, 7, 5), 1e4, np.float32), center=np.full((3, 7, 1), 50.0))
    given.center[0] = -1e4
    found = decode(given, np.array([0, 1, 2]), np.zeros(7), clip_frames=256, fps=10.0, threshold=0.01)
    assert len(found.scores)
    assert np.isfinite(found.scores).all()


def test_fusion_is_a_weighted_average() -> None:
    rgb, flow = heads(3), heads(4)
    for name, *arrays in zip(Heads._fields, fuse_heads([rgb, flow], [1, 1]), rgb, flow, strict=True):
        assert np.array_equal(arrays[0], (arrays[1] + arrays[2]) / 2), name
    third = fuse_heads([rgb, flow], [1.0, 3.0])
    np.testing.assert_allclose(third.conf, 0.25 * rgb.conf + 0.75 * flow.conf, rtol=1e-5, atol=1e-6)
    for weights, alone in (((1, 0), rgb), ((0, 2), flow)):
        assert all(
            np.array_equal(*pair) for pair in zip(fuse_heads([rgb, flow], weights), alone, strict=True)
        )


@pytest.mark.parametrize("weights", [(0, 0), (1, -1), (1,), (1, math.nan)])
def test_useless_weights_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="no weights"):
        fuse_heads([heads(0), heads(1)], weights)


def test_streams_of_other_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="`loc` of the streams is 3x7x2 and 2x7x2"):
        fuse_heads([heads(0), heads(1, windows=2)], (1, 1))


@pytest.mark.parametrize("shown", [module, nms])
def test_whoever_uses_an_exported_graph_needs_numpy_alone(shown: object) -> None:
    """The two files are shown beside the graph as they are."""
    imports = re.findall(r"^(?:from|import) (\w+)", inspect.getsource(shown), re.MULTILINE)
    assert set(imports) <= {"__future__", "collections", "typing", "numpy"}
