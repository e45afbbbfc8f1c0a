"""Actions in untrimmed videos: the words that annotations, store, windows and scores share."""

from __future__ import annotations

from typing import NamedTuple


class Segment(NamedTuple):
    """One action of a video.

    Args:
        start: seconds.
        end: seconds.
        label: position among the classes, from 0.
        first: where it starts, in frames of the store; not rounded.
        last: where it ends, likewise.
    """

    start: float
    end: float
    label: int
    first: float
    last: float
