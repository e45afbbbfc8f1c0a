"""Temporary: to be replaced."""

import torch
from torch import Tensor


def boundary_max_pool(feature: Tensor, segments: Tensor) -> Tensor:
    b, c, t = feature.shape
    seg = segments.long().clamp(0, t - 1)
    at = torch.arange(t)
    outs = []
    for half, (i, j) in zip(feature.chunk(2, 1), ((0, 1), (2, 3))):
        l, r = seg[..., i], torch.maximum(seg[..., i], seg[..., j])
        mask = (at >= l[..., None]) & (at <= r[..., None])
        outs.append(half[:, :, None].masked_fill(~mask[:, None], float("-inf")).max(-1).values)
    return torch.cat(outs, 1)


def _seg(start, end, length, inner=None):
    plen = length
    i, o = torch.clamp_min(plen / 4, 1), torch.clamp_min(plen / 10, 1)
    return torch.round(torch.stack([start - o, start + i, end - i, end + o], -1))


@torch.no_grad()
def level_segments(loc, centres, frames):
    t = len(centres)
    c = torch.round(centres * t - 0.5)
    d = loc / frames * t
    l, r = d.unbind(-1)
    return _seg(c - l, c + r, l + r)


@torch.no_grad()
def frame_segments(loc, centres, frames):
    l, r = loc.unbind(-1)
    start, end = centres * frames - l, centres * frames + r
    return _seg(start, end, end - start + 1)
