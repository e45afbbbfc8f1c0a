"""evaluation.fusion: logits are added per time step, and only those of the same videos."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gkdcli.errors import GkdError
from gkdcli.evaluation.fusion import fuse
from gkdcli.evaluation.predict import Predictions
from gkdcli.evaluation.scores import class_scores


def _stream(seed: int, videos: str = "abcd", classes: int = 3, steps: int = 2) -> Predictions:
    logits = np.random.default_rng(seed).normal(size=(len(videos), classes, steps)).astype(np.float32)
    return Predictions(logits, np.arange(len(videos)) % 3, list(videos), {"weights": "some"})


def test_logits_are_added_before_the_softmax() -> None:
    """METHOD.md 6: add the two logits per time step, softmax over classes, sum over time."""
    rgb, flow = _stream(0), _stream(1)
    for weights in ((1.0, 1.0), (1.0, 1.5), (0.0, 1.0)):
        expected = weights[0] * rgb.logits + weights[1] * flow.logits
        np.testing.assert_allclose(fuse([rgb, flow], weights).logits, expected, rtol=1e-6)
    steps = np.exp(rgb.logits + flow.logits)
    scores = (steps / steps.sum(1, keepdims=True)).sum(2)
    np.testing.assert_allclose(class_scores(fuse([rgb, flow], (1, 1)).logits, "official"), scores, rtol=1e-5)
    assert fuse([rgb], (1.0, 1.0)) is rgb


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (_stream(1, "abce"), "other videos"),
        (_stream(1, "abc"), "other videos: 4 and 3"),
        (_stream(1, "abdc"), "other videos"),
        (replace(_stream(1), labels=np.zeros(4, np.int64)), "other videos"),
        (_stream(1, classes=4), r"unlike things: 3x2 and 4x2"),
        (_stream(1, steps=5), r"unlike things: 3x2 and 3x5"),
    ],
)
def test_unlike_streams_are_refused(other: Predictions, what: str) -> None:
    with pytest.raises(GkdError, match=what) as caught:
        fuse([_stream(0), other], (1.0, 1.0))
    assert caught.value.hint
    assert caught.value.where
