"""Which frames of a video are kept at a lower rate (golden 11)."""

from __future__ import annotations

import json

import pytest

from gkdcli.data.video import sampled
from tests.parity.golden import FOLDER, needs_golden


@needs_golden
def test_sampling_of_videos():
    """The two flow rules of the record choose among stored flow images of detection, and follow with it."""
    cases = json.loads((FOLDER / "11_frame_sampling.json").read_text())["video2npy"]
    refused = 0
    for case in cases:
        step = case["fps"] / case["sample_fps"]
        kept = list(sampled(range(case["n_frames"]), max(step, 1.0)))
        if isinstance(case["picked"], list):
            assert kept == case["picked"], case
            continue
        refused += 1
        # the published script stops where nothing is kept, and below the wanted rate, where ours keeps all
        assert kept == ([] if step >= 1 else list(range(case["n_frames"]))), case
    assert 0 < refused < len(cases)


@pytest.mark.parametrize(
    ("fps", "kept"),
    [
        (30.0, [2, 5, 8, 11]),
        (25.0, [2, 4, 7, 9]),
        (29.97, [2, 5, 8, 11]),
        (10.0, [0, 1, 2, 3]),
    ],
)
def test_quoted_choices(fps, kept):
    assert list(sampled(range(100), fps / 10))[:4] == kept
