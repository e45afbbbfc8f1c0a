"""Losses on boundaries against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from gkdcli.losses.boundary import boundary_contrast, boundary_loss


def positive(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_boundary_loss_is_the_cross_entropy_of_a_probability():
    """Not of a logit; each feature with its own map, the mean over clips and time."""
    start, end = positive(2, 3, 8), positive(2, 3, 8, seed=1)
    maps = positive(2, 2, 8, seed=2).round().float()
    assert 0 < maps.mean() < 1
    wanted = [0.0, 0.0]
    for side, feature in enumerate((start, end)):
        for b in range(2):
            for t in range(8):
                score = sum(math.tanh(feature[b, c, t]) for c in range(3)) / 3
                wanted[side] -= math.log(score if maps[b, side, t] else 1 - score) / 16
    got = boundary_loss(start, end, maps)
    assert [float(got.start), float(got.end)] == pytest.approx(wanted)


def test_shorter_features_see_every_fourth_place():
    start, end = positive(1, 3, 4), positive(1, 3, 4, seed=1)
    maps = torch.zeros(1, 2, 16)
    maps[0, 0, 4], maps[0, 1, 5:8] = 1, 1
    reduced = torch.tensor([[[0.0, 1, 0, 0], [0, 0, 0, 0]]])
    assert boundary_loss(start, end, maps) == boundary_loss(start, end, reduced)


def test_boundary_loss_is_finite_at_certain_scores_and_says_nan():
    feature = torch.tensor([[[0.0, 0.0, 50.0, 50.0]]], requires_grad=True)
    maps = torch.tensor([[[0.0, 1, 0, 1]] * 2])
    loss = boundary_loss(feature, feature, maps).start
    loss.backward()
    assert loss.isfinite()
    assert feature.grad.isfinite().all()
    spoilt = torch.tensor([[[math.nan, 0.5, 0.5, 0.5]]])
    got = boundary_loss(spoilt, torch.full((1, 1, 4), 0.5), maps)
    assert got.start.isnan()
    assert got.end.isfinite()


def contrast_of_one(pooled: torch.Tensor) -> float:
    """(2P, 3): max(0, |end(first) - start(second)| - |end(first) - start(third)| + 1)."""
    half = len(pooled) // 2
    anchor, near, far = pooled[half:, 0], pooled[:half, 1], pooled[:half, 2]
    apart = [math.sqrt(sum((float(a) - float(b) + 1e-6) ** 2 for a, b in zip(anchor, other, strict=True)))
             for other in (near, far)]  # fmt: skip
    return max(0.0, apart[0] - apart[1] + 1)


def test_contrast_is_the_mean_over_the_spliced_clips():
    pooled = positive(4, 6, 3) * 3
    each = [contrast_of_one(clip) for clip in pooled]
    assert min(each) >= 0
    assert max(each) > 0
    for spliced in ([True] * 4, [False, True, True, False], [True, False, False, False]):
        wanted = [value for value, has in zip(each, spliced, strict=True) if has]
        got = boundary_contrast(pooled, torch.tensor(spliced))
        assert float(got) == pytest.approx(sum(wanted) / len(wanted), rel=1e-6)


def test_clips_without_a_splice_send_and_take_nothing():
    pooled = positive(2, 6, 3)
    pooled[1] = math.nan
    pooled.requires_grad_()
    loss = boundary_contrast(pooled, torch.tensor([True, False]))
    loss.backward()
    assert loss.isfinite()
    assert pooled.grad[0].any()
    assert not pooled.grad[1].any()
    none = boundary_contrast(pooled, torch.tensor([False, False]))
    assert none.item() == 0.0
    assert not torch.autograd.grad(none, pooled)[0].any()


def test_contrast_of_equal_features_has_a_finite_gradient():
    pooled = torch.ones(1, 4, 3, requires_grad=True)
    boundary_contrast(pooled, torch.tensor([True])).backward()
    assert pooled.grad.isfinite().all()
