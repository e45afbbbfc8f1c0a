"""Soft-NMS of the published code (golden 08)."""

from __future__ import annotations

import numpy as np
import pytest

from gkdcli.evaluation.nms import soft_nms
from tests.parity.golden import needs_golden, recorded


@needs_golden
def test_recorded_cases() -> None:
    figures = recorded("08_softnms")
    cases = sorted({name.split("/")[0] for name in figures})
    assert len(cases) == 15
    kept_in_all = 0
    for case in cases:
        given = figures[f"{case}/segments"]
        sigma, top_k, floor = figures[f"{case}/params"]
        kept, scores = soft_nms(
            given[:, :2], given[:, 2], sigma=sigma, floor=floor, top_k=int(top_k), recipe="official"
        )
        wanted = figures[f"{case}/out"]
        assert len(kept) == figures[f"{case}/count"], case
        assert np.array_equal(given[kept, :2], wanted[:, :2]), case
        np.testing.assert_allclose(scores, wanted[:, 2], rtol=0, atol=1e-6)
        kept_in_all += len(kept)
    assert kept_in_all == 3741


@needs_golden
def test_all_recorded_cases_in_one_call() -> None:
    """Groups do not disturb each other, whatever their sizes."""
    figures = recorded("08_softnms")
    cases = [f"c{number:02d}" for number in range(15)]
    cases = [case for case in cases if figures[f"{case}/params"].tolist() == [0.1, 5000, 0.001]]
    parts = [figures[f"{case}/segments"] for case in cases]
    given = np.concatenate(parts)
    groups = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    kept, scores = soft_nms(given[:, :2], given[:, 2], sigma=0.1, recipe="official", groups=groups)
    wanted = np.concatenate([figures[f"{case}/out"] for case in cases])
    assert np.array_equal(given[kept, :2], wanted[:, :2])
    np.testing.assert_allclose(scores, wanted[:, 2], rtol=0, atol=1e-6)


def test_quoted_case() -> None:
    """A quoted small case: the overlapping neighbour decays, the last open one is lost."""
    segments = np.array([[0.0, 10.0], [5.0, 15.0], [40.0, 50.0]])
    scores = np.array([0.9, 0.8, 0.5])
    kept, new = soft_nms(segments, scores, sigma=0.5, recipe="official")
    assert kept.tolist() == [0, 1]
    assert new == pytest.approx([0.9, 0.8 * np.exp(-((1 / 3) ** 2) / 0.5)])
