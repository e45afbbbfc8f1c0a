"""Two streams -> one prediction (METHOD.md 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from gkdcli.errors import GkdError
from gkdcli.evaluation.predict import Predictions


def fuse(streams: Sequence[Predictions], weights: Sequence[float]) -> Predictions:
    """Adds the weighted logits of the same videos per time step; one stream alone is returned as it is.

    Args:
        streams: rgb and flow, logits (N, classes, T' - 1) each.
        weights: of each; how logits become scores is `scores.class_scores`'s matter.

    Raises:
        GkdError: the streams predict other videos, labels, classes or time steps.
    """
    first = streams[0]
    if len(streams) == 1:
        return first
    for other in streams[1:]:
        if other.videos != first.videos or (other.labels != first.labels).any():
            odd = sorted(set(first.videos) ^ set(other.videos))
            there = odd and ("the first" if odd[0] in first.videos else "the second")
            raise GkdError(
                f"the two streams are of other videos: {len(first.videos)} and {len(other.videos)}",
                f"{odd[0]} is only in {there}" if odd else "their labels differ",
                "prepare both together: `gkd prepare ... --modality both`",
            )
        if other.logits.shape != first.logits.shape:
            shapes = " and ".join("x".join(map(str, stream.logits.shape[1:])) for stream in (first, other))
            raise GkdError(
                f"the two streams predict unlike things: {shapes} (classes x time steps)",
                "their clips have other lengths",
                "train both with the same clips.length",
            )
    total = np.zeros_like(first.logits)
    for weight, stream in zip(weights, streams, strict=True):
        total += np.float32(weight) * stream.logits
    return replace(first, logits=total)
