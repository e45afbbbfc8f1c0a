"""Untrimmed video -> lists: which clips, their segments, boundary maps and spliced background (METHOD.md 5).

Time is counted in frames. A clip of `length` frames that starts at `offset` spans [offset + 1, offset +
length] of its video, as the published lists have it; relative to the clip that is [1, length]. Segments are
rows [first, last, class], where class 0 is background.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Segments = NDArray[np.float64]  # (n, 3)
Interval = tuple[float, float]


class Window(NamedTuple):
    """A training clip: where it starts, and its segments (m, 3), cut to it and relative to it."""

    offset: int
    segments: Segments


class Splice(NamedTuple):
    """A clip with background inside an action.

    Args:
        frames: (T,) int64: frame t of the spliced clip is frame `frames[t]` of the clip.
        proposals: (3, 2) float32: what is left of the action before and after the piece, and the piece.
    """

    frames: NDArray[np.int64]
    proposals: NDArray[np.float32]


def training_windows(frames: int, segments: Segments, length: int, stride: int) -> tuple[list[Window], int]:
    """The training clips of a video (METHOD.md 5), in order.

    A segment belongs to a clip where at least half of it lies inside; a clip is kept where a segment lies
    wholly inside. Segments without length belong nowhere.

    Args:
        frames: of the video.
        segments: (n, 3), relative to the video.
        length: of a clip, frames.
        stride: from one clip to the next, frames.

    Returns:
        The clips that are kept, and the shortest piece of a segment in any of the video's clips, dropped ones
        too: rounded up, at most `length`.
    """
    segments = segments[segments[:, 1] > segments[:, 0]]
    first, last = segments[:, 0], segments[:, 1]
    shortest = float(length)
    if frames <= length and len(segments):
        shortest = min(shortest, float((last - first).min()))
    kept = []
    for offset in test_offsets(frames, length, stride):
        inside = np.minimum(last, offset + length) - np.maximum(first, offset + 1)
        share = inside / (last - first)
        pieces = segments[share >= 0.5]
        if not len(pieces):
            continue
        pieces[:, 0] = np.maximum(pieces[:, 0] - offset, 1)
        pieces[:, 1] = np.minimum(pieces[:, 1] - offset, length)
        shortest = min(shortest, float((pieces[:, 1] - pieces[:, 0]).min()))
        if share.max() >= 1:
            kept.append(Window(offset, pieces))
    return kept, math.ceil(shortest)


def test_offsets(frames: int, length: int, stride: int) -> list[int]:
    """Where windows start: 0, `stride`, ... and the last full one; a video no longer than one has one."""
    if frames <= length:
        return [0]
    offsets = list(range(0, frames - length + 1, stride))
    return offsets if offsets[-1] == frames - length else [*offsets, frames - length]


test_offsets.__test__ = False  # type: ignore[attr-defined]  # not a test, whatever pytest thinks of its name


def boundary_maps(segments: Segments, length: int) -> NDArray[np.float32]:
    """Where actions start and where they end (METHOD.md 5, boundary losses).

    Args:
        segments: (m, 3), relative to the clip.
        length: of the clip, frames.

    Returns:
        (2, length), 1 within a twentieth of the segment's length, at least one frame, of its start (row 0) or
        end (row 1), rounded half to even and clipped to the clip; 0 elsewhere.
    """
    maps = np.zeros((2, length), np.float32)
    for first, last, _ in segments:
        reach = max((last - first) / 10, 2) / 2
        for row, boundary in zip(maps, (first, last), strict=True):
            low, high = np.clip(np.rint([boundary - reach, boundary + reach]), 0, length - 1).astype(int)
            row[low : high + 1] = 1
    return maps


def background(segments: Segments, length: int, recipe: str) -> list[Interval]:
    """The gaps between the actions of a clip.

    Args:
        segments: (m, 3), relative to the clip.
        length: of the clip, frames.
        recipe: `official` takes all neighbours among the sorted ends that are not a segment themselves: parts
            of segments that overlap, or that reach beyond frame `length - 1`, pass for background;
            `corrected` leaves out whatever a segment covers (METHOD.md 8 (13)).
    """
    ends = [(float(first), float(last)) for first, last, _ in segments]
    if recipe == "official":
        times = sorted([time for pair in ends for time in pair] + [0.0, length - 1.0])
        return [pair for pair in itertools.pairwise(times) if pair not in ends]
    gaps, covered = [], 0.0
    for first, last in [*sorted(ends), (length - 1.0, length - 1.0)]:
        if covered < min(first, length - 1):
            gaps.append((covered, min(first, length - 1.0)))
        covered = max(covered, last)
    return gaps


def splice(
    segments: Segments, shortest: int, length: int, rng: np.random.Generator, recipe: str
) -> Splice | None:
    """Puts a piece of background inside an action (METHOD.md 5, boundary contrast); one try.

    Background from behind the action goes to where the action is cut, and what lies between moves back in
    time; other background goes right before the cut, and what lies between moves forward.

    Args:
        segments: (m, 3), relative to the clip.
        shortest: `training_windows`' second value, the length of the piece, frames.
        length: of the clip, frames.
        rng: draws the action, the cut, the background and the piece of it, in this order.
        recipe: see `background`.

    Returns:
        None where no action is longer than two pieces, or no background longer than one.
    """
    actions = [(float(first), float(last)) for first, last, _ in segments if last - first > 2 * shortest]
    if not actions:
        return None
    first, last = actions[rng.integers(len(actions))]
    cut = math.ceil(first) + int(rng.integers(shortest, math.ceil(last - first - shortest)))
    gaps = [(math.ceil(low), math.floor(high)) for low, high in background(segments, length, recipe)]
    gaps = [(low, high) for low, high in gaps if high - low > shortest]
    if not gaps:
        return None
    low, high = gaps[rng.integers(len(gaps))]
    piece = int(rng.integers(low, high - shortest))
    frames = np.arange(length)
    if last < piece:
        frames[cut : cut + shortest] = np.arange(piece, piece + shortest)
        frames[cut + shortest : piece + shortest] = np.arange(cut, piece)
        parts = [(first, cut), (cut + shortest, last + shortest), (cut + 1, cut + shortest - 1)]
    else:
        frames[piece : cut - shortest] = np.arange(piece + shortest, cut)
        frames[cut - shortest : cut] = np.arange(piece, piece + shortest)
        parts = [(first - shortest, cut - shortest), (cut, last), (cut - shortest + 1, cut - 1)]
    return Splice(frames, np.array(parts, np.float32))
