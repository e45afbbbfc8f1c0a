"""Boundary max pooling of the detector, and the segments that it pools over (METHOD.md 5).

Plain torch, one code on CPU, on CUDA and in an exported graph; shapes other than the batch are fixed there.
"""

from __future__ import annotations

import torch
from torch import Tensor


def boundary_max_pool(feature: Tensor, segments: Tensor) -> Tensor:
    """The largest value of the first half of the channels about the start, of the second about the end.

    A table holds the maxima over all windows of 1, 2, 4, ... elements; any range is the union of two of
    them. Time and memory are T log T per channel, however many and however long the segments are.

    Args:
        feature: (B, 2P, T).
        segments: (B, N, 4), places on the feature's time axis. The first P channels are pooled over
            [seg0, seg1], the others over [seg2, seg3], both ends included; ends are truncated toward zero
            and clamped to [0, T - 1]. A range that ends before it begins gives the value where it begins.

    Returns:
        (B, 2P, N). The gradient goes to the first of equal maxima, and never to the segments.
    """
    batch, channels, frames = feature.shape
    assert channels % 2 == 0, channels
    assert segments.shape[::2] == (batch, 4), segments.shape
    # minus infinity and NaN become the least integer, or 0; clamped afterwards, they are in the feature
    ends = segments.detach().clamp(max=frames - 1).long().clamp(min=0)
    ends = ends.reshape(batch, -1, 2, 2).movedim(1, 3)  # (B, start | end, left | right, N)
    left = ends[:, :, 0]
    right = torch.maximum(left, ends[:, :, 1])
    levels = _window_maxima(feature.detach())
    pooled = _range_maxima(torch.cat(levels, dim=2), frames, left, right)
    if not (feature.requires_grad and torch.is_grad_enabled()):
        return pooled
    return feature.gather(2, _first_places(levels, pooled, left))


def level_segments(distances: Tensor, priors: Tensor, frames: int) -> Tensor:
    """Pooling segments of one pyramid level, on its own time axis (METHOD.md 5).

    Around the centre round(prior * t - 0.5), with distances and length l + r scaled to the level.

    Args:
        distances: to start and end, in frames of the clip: (B, t, 2).
        priors: centres of the level as fractions of the clip: (t,); their precision is computed in.
        frames: length of the clip.

    Returns:
        (B, t, 4), whole numbers without gradient; they may lie outside the level.
    """
    steps = len(priors)
    left, right = (distances.detach().to(priors.dtype) / frames * steps).unbind(-1)  # (B, t) each
    centre = (priors * steps - 0.5).round()
    return _margins(centre - left, centre + right, left + right)


def frame_segments(distances: Tensor, priors: Tensor, frames: int) -> Tensor:
    """Pooling segments on the frame-level feature (METHOD.md 5).

    Args:
        distances: to start and end, in frames of the clip: (B, P, 2).
        priors: centres as fractions of the clip: (P,); their precision is computed in.
        frames: length of the clip.

    Returns:
        (B, P, 4), whole numbers without gradient; they may lie outside the clip.
    """
    left, right = distances.detach().to(priors.dtype).unbind(-1)  # (B, P) each
    centre = priors * frames
    return proposal_segments(torch.stack([centre - left, centre + right], dim=-1))


def proposal_segments(proposals: Tensor) -> Tensor:
    """Pooling segments of given proposals on the frame-level feature (METHOD.md 5).

    The boundary contrast divides them by 4 for the maps of level 0.

    Args:
        proposals: start and end in frames of the clip, (B, N, 2).

    Returns:
        (B, N, 4), whole numbers without gradient.
    """
    start, end = proposals.detach().unbind(-1)
    return _margins(start, end, end - start + 1)


def _margins(start: Tensor, end: Tensor, length: Tensor) -> Tensor:
    """A tenth of the length outwards and a quarter inwards, at least 1; halves go to the even number."""
    inner, outer = (length / 4).clamp(min=1), (length / 10).clamp(min=1)
    return torch.stack([start - outer, start + inner, end - inner, end + outer], dim=-1).round()


def _window_maxima(feature: Tensor) -> list[Tensor]:
    """Level k: the maxima over the windows of 2^k elements by where they begin, (B, C, T - 2^k + 1)."""
    levels = [feature]
    while (half := 1 << (len(levels) - 1)) < levels[-1].shape[2]:
        shorter = levels[-1]
        levels.append(torch.maximum(shorter[:, :, :-half], shorter[:, :, half:]))
    return levels


def _range_maxima(table: Tensor, frames: int, left: Tensor, right: Tensor) -> Tensor:
    """Maxima over [left, right], each the larger of two windows that overlap: (B, C, N).

    Args:
        table: all levels side by side, (B, C, places).
        frames: T.
        left: (B, 2, N), of the two halves of the channels.
        right: likewise.
    """
    # floor(log2(length)), in integers: a logarithm need not be exact at powers of two
    powers = 2 ** torch.arange(1, frames.bit_length(), device=left.device)
    level = ((right - left + 1).unsqueeze(-1) >= powers).sum(dim=-1)  # (B, 2, N)
    window = 2**level
    begins = level * (frames + 1) - (window - 1)  # the levels below hold T - 2^j + 1 places each
    places = torch.cat([begins + left, begins + right - window + 1], dim=2)  # (B, 2, 2N)
    halves = table.reshape(table.shape[0], 2, -1, table.shape[2])  # (B, 2, P, places)
    maxima = halves.gather(3, places.unsqueeze(2).expand(-1, -1, halves.shape[2], -1))
    return torch.maximum(*maxima.chunk(2, dim=3)).flatten(1, 2)


def _first_places(levels: list[Tensor], pooled: Tensor, left: Tensor) -> Tensor:
    """Where the feature first reaches the maximum of a range that begins at `left`: (B, C, N).

    From the longest window to the shortest, those whose maximum is less are stepped over. A window that
    would reach beyond the end is taken at the end; it holds the place, so it is never stepped over.
    """
    place = left.repeat_interleave(pooled.shape[1] // 2, dim=1)
    for level in reversed(range(len(levels))):
        maxima = levels[level]
        below = maxima.gather(2, place.clamp(max=maxima.shape[2] - 1)) < pooled
        place.add_(below, alpha=1 << level)
    return place
