"""How far the flow of a store lies from OpenCV's TV-L1, on some pairs of its frames."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gkdcli.data.audit import Stream
from gkdcli.data.flow import flow_difference
from gkdcli.data.parts import Bytes, PartReader
from gkdcli.data.video import BadVideo, Picture, decode
from gkdcli.errors import GkdError

_BIN_PX = 0.01  # differences are counted in steps of this


@dataclass(frozen=True)
class Pair:
    """Two neighbouring frames, and the stored flow from the first to the second.

    Args:
        rgb: part of the frames.
        flow: part of the flow.
        frames: of both parts.
        digests: of the sources of both parts.
        start: number of the first frame.
        method: by which the flow was computed.
        bound: of the stored flow, in px per frame.
    """

    rgb: Path
    flow: Path
    frames: int
    digests: tuple[str, str]
    start: int
    method: str
    bound: float


@dataclass(frozen=True)
class Measured:
    """End-point differences over the pixels of a pair.

    Args:
        counts: pixels by difference, in steps of 0.01 px.
        total_px: sum of the differences.
        reason: why nothing was measured; "" otherwise.
    """

    counts: NDArray[np.int64]
    total_px: float = 0.0
    reason: str = ""

    @classmethod
    def failed(cls, reason: str) -> Measured:
        """Nothing, and why."""
        return cls(np.zeros(0, np.int64), reason=reason)


def draw_pairs(rgb: Stream, flow: Stream, number: int, seed: int) -> list[Pair]:
    """So many different pairs, each as likely as any other; all there are, where there are fewer.

    Videos whose streams differ in length have none; nor has the last frame, whose flow is that of the one
    before.

    Args:
        rgb: the frames; its parts need not have been opened.
        flow: beside them, with the attributes of its parts.
        number: of pairs.
        seed: of the draw.
    """
    frames, motions = rgb.rows, flow.rows
    videos = [
        key
        for key in sorted(frames.keys() & motions.keys() & flow.seen.keys())
        if frames[key].frames == motions[key].frames and "flow_method" in flow.seen[key].attributes
    ]
    ends = list(accumulate(frames[key].frames - 1 for key in videos))
    total = ends[-1] if ends else 0
    pairs = []
    for place in sorted(random.Random(seed).sample(range(total), min(number, total))):
        video = bisect_right(ends, place)
        key = videos[video]
        made = flow.seen[key].attributes
        given = "" if str(made["flow_parameters"]).startswith("{") else " (as given)"
        pairs.append(
            Pair(
                rgb.part(key),
                flow.part(key),
                frames[key].frames,
                (frames[key].digest, motions[key].digest),
                place - (ends[video - 1] if video else 0),
                f"{made['flow_method']}{given}",
                float(made["flow_bound"]),
            )
        )
    return pairs


def measure(pair: Pair) -> Measured:
    """Computes TV-L1 between two stored frames, grey as `gkd prepare` makes them, and compares."""
    try:
        with closing(PartReader(pair.rgb, pair.frames, pair.digests[0])) as reader:
            before, after = (_grey(frame) for frame in reader.frames(pair.start, 2))
        with closing(PartReader(pair.flow, pair.frames, pair.digests[1])) as reader:
            stored = _flow(reader.frames(pair.start, 1))
        if stored.shape[:2] != before.shape:
            sizes = " and ".join(f"{shape[1]}x{shape[0]} px" for shape in (before.shape, stored.shape))
            return Measured.failed(f"{pair.flow}: frames and flow are of {sizes}")
        far = flow_difference(before, after, stored, pair.bound)
    except (BadVideo, GkdError) as error:
        where = error.where if isinstance(error, GkdError) else f"{pair.flow}: {error}"
        return Measured.failed(where)
    counts = np.bincount(np.rint(far.ravel() / _BIN_PX).astype(np.int64))
    return Measured(counts, float(far.sum(dtype=np.float64)))


def summary(results: Iterable[tuple[Pair, Measured]]) -> list[dict[str, Any]]:
    """For each method mean, median and 95th percentile in px, over all pixels of all pairs."""
    by_method: dict[str, list[tuple[Pair, Measured]]] = defaultdict(list)
    for pair, found in results:
        by_method[pair.method].append((pair, found))
    rows = []
    for method, pairs in sorted(by_method.items()):
        good = [(pair, found) for pair, found in pairs if not found.reason]
        counts = np.zeros(max((len(found.counts) for _, found in good), default=0), np.int64)
        for _, found in good:
            counts[: len(found.counts)] += found.counts
        pixels = int(counts.sum())
        rows.append(
            {
                "method": method,
                "pairs": len(good),
                "videos": len({pair.flow for pair, _ in good}),
                "mean_px": sum(found.total_px for _, found in good) / pixels if pixels else None,
                "median_px": _quantile(counts, 0.5),
                "p95_px": _quantile(counts, 0.95),
                "failed": len(pairs) - len(good),
                "first_failure": next((found.reason for _, found in pairs if found.reason), None),
            }
        )
    return rows


def _quantile(counts: NDArray[np.int64], share: float) -> float | None:
    """The least difference that this share of the pixels does not exceed, to half a step."""
    if not len(counts):
        return None
    return int(np.searchsorted(counts.cumsum(), share * counts.sum())) * _BIN_PX


def _grey(frame: Bytes) -> Bytes:
    """(H, W) of a stored frame: a JPEG, or (H, W, 3) RGB."""
    if frame.ndim == 1:
        return Picture(None, frame.tobytes()).grey()
    return Picture(np.ascontiguousarray(frame[:, :, ::-1])).grey()


def _flow(stored: Sequence[Bytes] | Bytes) -> Bytes:
    """(H, W, 2) of one frame's flow: a JPEG of x and one of y, or as it is."""
    if isinstance(stored, np.ndarray):
        return np.asarray(stored[0], np.uint8)
    return np.stack([decode(plane.tobytes(), grey=True) for plane in stored], axis=2)
