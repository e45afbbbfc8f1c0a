"""The terms of detection on boundaries (METHOD.md 5): where actions start and end, and their contrast."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class BoundaryLosses(NamedTuple):
    """The two terms of one pair of features, unweighted scalars."""

    start: Tensor
    end: Tensor


def boundary_loss(start: Tensor, end: Tensor, maps: Tensor) -> BoundaryLosses:
    """Binary cross-entropy of the mean over channels of tanh(feature), a probability, with 0/1 maps.

    Mean over clips and time (METHOD.md 5). The caller weighs the frame level by 1 and the two maps of
    level 0 by 0.1.

    Args:
        start: features that follow a ReLU, so >= 0: (B, C, T).
        end: likewise.
        maps: 1 about the starts (first) and the ends (second) of actions, else 0: (B, 2, F) with F >= T. A
            shorter feature is compared with every (F / T)-th place from the first on.
    """
    if maps.shape[2] != start.shape[2]:
        maps = F.interpolate(maps, size=start.shape[2], mode="nearest")
    starts, ends = maps.to(start.dtype).unbind(dim=1)
    return BoundaryLosses(_cross_entropy(start, starts), _cross_entropy(end, ends))


def boundary_contrast(pooled: Tensor, spliced: Tensor) -> Tensor:
    """Triplet margin loss, margin 1, 2-norm, on the three proposals of spliced clips (METHOD.md 5).

    Anchor is the end half of the channels at the first proposal, positive the start half at the second,
    negative the start half at the third. The mean over the clips that have a splice, 0 where none has; one
    clip (`official`) is the case of batch 1 (METHOD.md 8 (19)). The caller weighs the frame level by 1 and
    the two maps of level 0 by 0.1.

    Args:
        pooled: boundary-pooled feature of the spliced clips, (B, 2P, 3).
        spliced: (B,), False where there is no spliced clip and `pooled` means nothing.
    """
    pooled = torch.where(spliced[:, None, None], pooled, 0.0)
    starts, ends = pooled.chunk(2, dim=1)
    each = F.triplet_margin_loss(ends[:, :, 0], starts[:, :, 1], starts[:, :, 2], reduction="none")
    return torch.where(spliced, each, 0.0).sum() / spliced.sum().clamp(min=1)


def _cross_entropy(feature: Tensor, wanted: Tensor) -> Tensor:
    probability = feature.tanh().mean(dim=1).clamp(max=1)  # (B, T); a mean of ones may be rounded up
    # torch's refuses NaN, on CUDA by ending the process; the trainer names the term that is no number
    lost = probability.isnan()
    loss = F.binary_cross_entropy(probability.masked_fill(lost, 0.0), wanted)
    return loss.masked_fill(lost.any(), math.nan)
