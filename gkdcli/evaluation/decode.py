"""The detector's outputs -> candidates in seconds (METHOD.md 5, inference). NumPy alone.

An exported graph returns the same five outputs: this module and `nms` are all that its users need besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]


class Heads(NamedTuple):
    """What the detector says of W windows of a video, with P priors each.

    Args:
        loc: (W, P, 2), distances from the prior to start and end, in frames.
        conf: (W, P, 1 + classes), logits; 0 is background.
        prop_loc: (W, P, 2), refinement of `loc`, in halves of the coarse length.
        prop_conf: (W, P, 1 + classes), logits of the refined segment.
        center: (W, P, 1), logit of its quality.
    """

    loc: Array
    conf: Array
    prop_loc: Array
    prop_conf: Array
    center: Array


class Candidates(NamedTuple):
    """Segments of one video, by class, then window, then prior: the order of the published code.

    Args:
        segments: (N, 2), start and end in seconds.
        scores: (N,).
        labels: (N,), from 0, ascending.
    """

    segments: Array
    scores: Array
    labels: NDArray[np.int64]


def fuse_heads(streams: Sequence[Heads], weights: Sequence[float]) -> Heads:
    """Weighted average of what two streams say of the same windows (METHOD.md 5).

    Args:
        streams: rgb and flow.
        weights: of each; only their ratio matters.

    Raises:
        ValueError: the streams are of other windows, priors or classes, or no weight is positive.
    """
    for name, *arrays in zip(Heads._fields, *streams, strict=True):
        if len({array.shape for array in arrays}) > 1:
            shapes = " and ".join("x".join(map(str, array.shape)) for array in arrays)
            raise ValueError(f"`{name}` of the streams is {shapes}")
    if len(weights) != len(streams) or min(weights) < 0 or not sum(weights) > 0:
        raise ValueError(f"{weights} are no weights of {len(streams)} streams")
    # of 1:1 this is (a + b) / 2 to the last bit
    shares = [np.float32(weight / sum(weights)) for weight in weights]
    parts = zip(*streams, strict=True)
    return Heads(*(sum(share * part for share, part in zip(shares, each, strict=True)) for each in parts))


def decode(
    heads: Heads,
    offsets: NDArray[np.integer[Any]],
    priors: Array,
    *,
    clip_frames: int,
    fps: float,
    threshold: float,
) -> Candidates:
    """Candidates of all windows of one video and all classes at once.

    Distances are `0.5 (l + r) refinement + coarse`, segments are clamped to their window, scores are the mean
    of both softmaxes times the sigmoid of the centre; what scores above `threshold` stays. A segment that its
    refinement turns around, so that it ends before it starts, is none.

    Args:
        heads: of the W windows.
        offsets: (W,), first frame of each window.
        priors: (P,) or (P, 1), centres as fractions of the window.
        clip_frames: length of a window.
        fps: of the frames that the network saw.
        threshold: candidates need a higher score.
    """
    loc, width = heads.loc, heads.loc.sum(axis=-1, keepdims=True)
    distances = 0.5 * width * heads.prop_loc + loc  # (W, P, 2)
    centres = np.asarray(priors, loc.dtype).reshape(1, -1) * clip_frames
    ends = np.stack([centres - distances[..., 0], centres + distances[..., 1]], axis=-1)
    ends = np.clip(ends, 0, clip_frames) + np.asarray(offsets, loc.dtype)[:, None, None]
    quality = 0.5 + 0.5 * np.tanh(0.5 * heads.center)  # the sigmoid, without overflow
    scores = (_softmax(heads.conf) + _softmax(heads.prop_conf)) / 2 * quality  # (W, P, 1 + classes)
    good = (scores[..., 1:] > threshold) & (ends[..., 1:] >= ends[..., :1])
    labels, windows, places = np.nonzero(np.moveaxis(good, -1, 0))
    return Candidates(ends[windows, places] / fps, scores[windows, places, labels + 1], labels)


def _softmax(logits: Array) -> Array:
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: Array = shifted / shifted.sum(axis=-1, keepdims=True)
    return result
