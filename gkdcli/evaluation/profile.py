"""What is wrong with a detector's output: the false-positive profile and recall by length of DETAD.

Source: Alwassel et al., "Diagnosing Error in Temporal Action Detectors", ECCV 2018. Both look at the best
10 G detections, G being the number of ground-truth segments, and count them by class: of a class with N
segments its first N detections by score belong to 1G, the next N to 2G, and so on, because scores of
different classes are not comparable and a common class would otherwise crowd out the others. As in the mean
average precision, detections of unknown videos or classes, and of classes without segments, do not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gkdcli.evaluation.detection import Bools, Detections, Floats, GroundTruth, Ints, pairs

KINDS = ("true_positive", "duplicate", "wrong_label", "localisation", "confusion", "background")
SLICES = 10  # of G detections each
BACKGROUND_TIOU = 0.1  # a detection that overlaps nothing by this much has seen an action where none is
THUMOS_EDGES_SEC = (3.0, 6.0, 12.0, 18.0)  # DETAD's bins of THUMOS14
RECALL_AT = (1, 10)


def what_is_wrong(truth: GroundTruth, detections: Detections) -> dict[str, Any]:
    """Both, as results call them."""
    return {
        "false_positives": false_positive_profile(truth, detections),
        "recall_by_length": recall_by_length(truth, detections),
    }


def false_positive_profile(truth: GroundTruth, detections: Detections, tiou: float = 0.5) -> dict[str, Any]:
    """How many of the best detections are right, and what is wrong with the others.

    A detection that takes a free segment of its class with at least `tiou` (by falling score, as for average
    precision) is a `true_positive`. Any other is judged by the segment of its video, of any class, that it
    overlaps most: at least `tiou`, it is a `duplicate` or a `wrong_label`; less, but at least 0.1,
    `localisation` or, in the wrong class too, `confusion`; below that `background`. Of segments overlapped
    alike one of its own class counts (DETAD takes the first of the file; THUMOS14 annotates every cliff dive
    as a dive too).

    Args:
        truth: what there is.
        detections: what was found; of equal scores the earlier one counts first.
        tiou: overlap from which a place is right, in (0, 1].

    Returns:
        `tiou`, `background_tiou`, `segments` (G), `detections` (judged, at most 10 G) and `slices`, ten of
        them: `top` ("1G" to "10G"), `detections` (those from the previous slice to here), `shares` of each
        kind among them (as DETAD draws) and `cumulative`, the shares among all detections up to here. Shares
        are None where there are no detections.
    """
    chosen, place = _within_quota(truth, detections)
    match = _match(truth, detections, chosen, tiou)
    own = match.own >= match.best
    kind = np.select(
        [match.right, match.best >= tiou, match.best >= BACKGROUND_TIOU],
        [0, np.where(own, 1, 2), np.where(own, 3, 4)],
        default=5,
    )
    counts = np.bincount(place * len(KINDS) + kind, minlength=SLICES * len(KINDS)).reshape(SLICES, -1)
    slices = [
        {
            "top": f"{number + 1}G",
            "detections": int(row.sum()),
            "shares": _shares(row),
            "cumulative": _shares(so_far),
        }
        for number, (row, so_far) in enumerate(zip(counts, np.cumsum(counts, axis=0), strict=True))
    ]
    return {
        "tiou": float(tiou),
        "background_tiou": BACKGROUND_TIOU,
        "segments": len(truth.labels),
        "detections": len(chosen),
        "slices": slices,
    }


def recall_by_length(
    truth: GroundTruth,
    detections: Detections,
    tiou: float = 0.5,
    edges: Sequence[float] = THUMOS_EDGES_SEC,
) -> dict[str, Any]:
    """Which share of the segments the best detections find, by the length of the segment.

    Args:
        truth: what there is.
        detections: what was found; of equal scores the earlier one counts first.
        tiou: overlap from which a segment is found, in (0, 1].
        edges: rising lengths in seconds that part the bins; a length equal to an edge belongs below it.

    Returns:
        `tiou`, `edges`, `segments`, `detections` and `recall` (each at "1G" and "10G": the number of
        detections looked at, and the share of all segments they find), and `bins`, short to long: `bin`
        (XS to XL where there are five), `above` and `up_to` (seconds; None: no end), `segments`, `recall`
        (at "1G" and "10G"; None without segments).
    """
    inner = [float(edge) for edge in edges]
    assert inner == sorted(set(inner)), "edges rise"
    chosen, place = _within_quota(truth, detections)
    match = _match(truth, detections, chosen, tiou)
    found_in = np.full(len(truth.labels), SLICES)  # slice of the detection that finds it
    found = match.taken_by >= 0
    found_in[found] = place[match.taken_by[found]]
    # annotations have few digits; their difference has many, and must not cross an edge by the last
    length = np.round(truth.segments[:, 1] - truth.segments[:, 0], 6)
    where = np.searchsorted(inner, length, side="left")
    names = ["XS", "S", "M", "L", "XL"] if len(inner) == 4 else [str(n + 1) for n in range(len(inner) + 1)]
    return {
        "tiou": float(tiou),
        "edges": inner,
        "segments": len(truth.labels),
        "detections": {f"{times}G": int((place < times).sum()) for times in RECALL_AT},
        "recall": _recall(found_in),
        "bins": [
            {
                "bin": name,
                "above": ([0.0, *inner])[number],
                "up_to": ([*inner, None])[number],
                "segments": int((where == number).sum()),
                "recall": _recall(found_in[where == number]),
            }
            for number, name in enumerate(names)
        ],
    }


def _shares(counts: Ints) -> dict[str, float | None]:
    total = int(counts.sum())
    return {kind: int(count) / total if total else None for kind, count in zip(KINDS, counts, strict=True)}


def _recall(found_in: Ints) -> dict[str, float | None]:
    return {f"{times}G": float((found_in < times).mean()) if len(found_in) else None for times in RECALL_AT}


def _within_quota(truth: GroundTruth, detections: Detections) -> tuple[Ints, Ints]:
    """The best 10 N detections of every class, by class and falling score, and the slice (0 to 9) of each."""
    quota = np.bincount(truth.labels, minlength=len(truth.classes))
    known = np.flatnonzero((detections.video >= 0) & (detections.labels >= 0))
    ranked = known[np.lexsort((-detections.scores[known], detections.labels[known]))]
    labels = detections.labels[ranked]
    rank = np.arange(len(ranked)) - np.searchsorted(labels, labels)
    kept = rank < SLICES * quota[labels]
    return ranked[kept], rank[kept] // quota[labels[kept]]


class _Match(NamedTuple):
    """Of the chosen detections and of the segments.

    Args:
        best: (K,) overlap with the segment of the video that it overlaps most.
        own: (K,) the same, among the segments of its class.
        right: (K,) whether it takes a segment.
        taken_by: (N,) position among the chosen of the detection that takes this segment, or -1.
    """

    best: Floats
    own: Floats
    right: Bools
    taken_by: Ints


def _match(truth: GroundTruth, detections: Detections, chosen: Ints, tiou: float) -> _Match:
    """Compares with all segments of the video; then the best take their segments first, within a class."""
    best, own = np.zeros(len(chosen)), np.zeros(len(chosen))
    right = np.zeros(len(chosen), dtype=bool)
    taken_by = np.full(len(truth.labels), -1)
    for of, segment, overlap in pairs(
        truth.video, truth.segments, detections.video[chosen], detections.segments[chosen]
    ):
        begin = np.flatnonzero(np.diff(of, prepend=-1))
        found = of[begin]
        same = truth.labels[segment] == detections.labels[chosen[of]]
        best[found] = np.maximum.reduceat(overlap, begin)
        own[found] = np.maximum.reduceat(np.where(same, overlap, 0.0), begin)
        wanted = np.flatnonzero(same & (overlap >= tiou))
        wanted = wanted[np.lexsort((-overlap[wanted], of[wanted]))]  # the most overlapped first
        for detection, target in zip(of[wanted].tolist(), segment[wanted].tolist(), strict=True):
            if not right[detection] and taken_by[target] < 0:
                right[detection], taken_by[target] = True, detection
    return _Match(best, own, right, taken_by)
