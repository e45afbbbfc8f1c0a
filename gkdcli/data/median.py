"""Median of 5x5 px, of many pictures at once: comparisons alone, which a GPU does in one pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def median(u: Tensor) -> Tensor:
    """Median of the 5x5 px around each pixel of (..., H, W), the border repeated outwards.

    Columns of five are sorted, then rows of five of these. Of the 25, six are surely too small then and six
    too large; the others lie on three diagonals, and the median is that of the largest on the first, of the
    median of the second, and of the smallest on the third.
    """
    height, width = u.shape[-2:]
    padded = functional.pad(u.reshape(-1, 1, height, width), (2, 2, 2, 2), mode="replicate")[:, 0]
    low, high = torch.minimum, torch.maximum
    rows = _ranks(padded, 1, 0, 5, low, high)
    a4, a3 = _ranks(rows[0], 2, 0, 2, high, low)
    b4, b3, b2 = _ranks(rows[1], 2, 0, 3, high, low)
    c1, c2, c3 = _ranks(rows[2], 2, 1, 3, low, high)
    d0, d1, d2 = _ranks(rows[3], 2, 0, 3, low, high)
    e0, e1 = _ranks(rows[4], 2, 0, 2, low, high)
    first = high(high(a3, b2), high(c1, d0))
    third = low(low(b4, c3), low(d2, e1))
    second = _middle(
        high(low(a4, b3), low(d1, e0)),
        low(high(a4, b3), high(d1, e0)),
        c2,
    )
    return _middle(first, second, third).view(u.shape)


def _middle(one: Tensor, two: Tensor, three: Tensor) -> Tensor:
    return torch.maximum(torch.minimum(one, two), torch.minimum(torch.maximum(one, two), three))


def _ranks(
    planes: Tensor, dim: int, first: int, count: int, low: Callable[..., Tensor], high: Callable[..., Tensor]
) -> list[Tensor]:
    """Some of each five neighbours along `dim`, by rank; 0 is the end that `low` picks.

    The first and the second two of five are pairs of the same kind, so pairs are compared once.
    """
    length = planes.shape[dim] - 4
    pair = planes.narrow(dim, 0, length + 3), planes.narrow(dim, 1, length + 3)
    lower, upper = low(*pair), high(*pair)
    lowers = lower.narrow(dim, 0, length), lower.narrow(dim, 2, length)
    uppers = upper.narrow(dim, 0, length), upper.narrow(dim, 2, length)
    inner = high(*lowers), low(*uppers)
    wanted = first + count
    four = [low(*lowers), low(*inner)]
    if wanted > 2:
        four.append(high(*inner))
    if wanted > 3:
        four.append(high(*uppers))
    fifth = planes.narrow(dim, 4, length)  # is put in its place from the low end on
    found = []
    for rank in range(wanted):
        if rank >= first:
            found.append(low(four[rank], fifth) if rank < 4 else fifth)
        if rank + 1 < wanted:
            fifth = high(four[rank], fifth)
    return found
