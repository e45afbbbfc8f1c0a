"""training.noise: what a sample sees depends on the sample, not on its company."""

from __future__ import annotations

import torch

from gkdcli.training.noise import Noise

SHAPE = (4, 5)


def test_a_samples_draws_do_not_depend_on_its_batch():
    together = Noise(1, 2, 0, [7, 3, 9])
    alone = Noise(1, 2, 0, [3])
    first = together.normal((3, *SHAPE)), alone.normal((1, *SHAPE))
    second = together.normal((3, 2)), alone.normal((1, 2))
    kept = together.keep((3, 50), 0.5), alone.keep((1, 50), 0.5)
    for batch, single in (first, second, kept):
        assert torch.equal(batch[1], single[0])
    assert not torch.equal(first[0][0], first[0][1])


def test_every_part_of_the_name_counts():
    base = (1, 2, 0, 5)
    drawn = [Noise(*base[:3], base[3:]).normal((1, 8))]
    for place in range(4):
        other = list(base)
        other[place] += 1
        drawn.append(Noise(*other[:3], other[3:]).normal((1, 8)))
    assert len({tuple(draw.flatten().tolist()) for draw in drawn}) == 5


def test_successive_draws_differ_and_large_seeds_work():
    noise = Noise(2**63 - 1, 1, 1, [0])
    assert not torch.equal(noise.normal((1, 8)), noise.normal((1, 8)))


def test_normal_is_normal():
    drawn = Noise(0, 1, 0, range(50)).normal((50, 4000))
    assert abs(drawn.mean()) < 0.01
    assert abs(drawn.std() - 1) < 0.01


def test_keep_drops_with_the_probability_and_keeps_the_mean():
    mask = Noise(0, 1, 0, range(20)).keep((20, 20000), 0.3)
    assert set(mask.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    assert abs((mask == 0).float().mean() - 0.3) < 0.01
    assert abs(mask.mean() - 1) < 0.01
    assert Noise(0, 1, 0, [1]).keep((1, 5), 0.0) is None
