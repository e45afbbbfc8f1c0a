"""Scores of detection: interpolated average precision as ActivityNet defines it (METHOD.md 5)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gkdcli.console import counted
from gkdcli.errors import usage_error

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

USUAL_TIOU = (0.3, 0.4, 0.5, 0.6, 0.7)  # what the field averages over
OFFICIAL_TIOU = (0.1, 0.2, 0.3, 0.4, 0.5)  # what the released code averages over
DEFAULT_TIOU = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
_PAIRS = 1 << 20  # of detection and segment at once, which bounds the memory


class GroundTruth(NamedTuple):
    """Annotated actions of the videos that are scored.

    Args:
        classes: names; the position is the label.
        videos: names, also of videos that show no action.
        video: (N,) position among `videos`.
        segments: (N, 2) start and end in seconds.
        labels: (N,) from 0.
    """

    classes: list[str]
    videos: list[str]
    video: Ints
    segments: Floats
    labels: Ints


class Detections(NamedTuple):
    """What a detector found, in the order of its file: of equal scores the earlier one counts first.

    Args:
        video: (M,) position among the videos of the ground truth; -1 for a video it does not know.
        segments: (M, 2) start and end in seconds.
        labels: (M,) from 0; -1 for a class that the ground truth does not know.
        scores: (M,).
    """

    video: Ints
    segments: Floats
    labels: Ints
    scores: Floats


def tiou(one: Floats, other: Floats) -> Floats:
    """Temporal intersection over union of (..., 2) and (..., 2), which broadcast; 0 where both are points."""
    shared = np.minimum(one[..., 1], other[..., 1]) - np.maximum(one[..., 0], other[..., 0])
    shared = np.maximum(shared, 0.0)
    union = (one[..., 1] - one[..., 0]) + (other[..., 1] - other[..., 0]) - shared
    result: Floats = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return result


def mean_ap(truth: GroundTruth, detections: Detections, thresholds: Sequence[float]) -> Floats:
    """Average precision (thresholds, classes); NaN for a class without segments.

    Within a class the detections come by falling score, ties in the order of the file. Each takes the segment
    of its video that it overlaps most among those still free with a tIoU of at least the threshold, and is
    right if there is one. Precision at a recall is the best at that or any higher recall. Detections of
    unknown videos or classes do not count.
    """
    tious = np.asarray(thresholds, dtype=np.float64)
    ap = np.full((len(tious), len(truth.classes)), np.nan)
    known = np.flatnonzero((detections.video >= 0) & (detections.labels >= 0))
    ranked = known[np.lexsort((-detections.scores[known], detections.labels[known]))]  # stable
    labels = detections.labels[ranked]
    right = _right(
        truth.labels * len(truth.videos) + truth.video,
        truth.segments,
        labels * len(truth.videos) + detections.video[ranked],
        detections.segments[ranked],
        tious,
    )
    edges = np.searchsorted(labels, np.arange(len(truth.classes) + 1))
    for label, positives in enumerate(np.bincount(truth.labels, minlength=len(truth.classes))):
        if positives:
            ap[:, label] = average_precision(right[:, edges[label] : edges[label + 1]], int(positives))
    return ap


def average_precision(right: Bools, positives: int) -> Floats:
    """(thresholds, M) whether a detection is right, by falling score -> (thresholds,) interpolated AP."""
    precision = np.cumsum(right, axis=1) / np.arange(1, right.shape[1] + 1)
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    # recall moves by one over the positives at each right detection, and nowhere else
    result: Floats = np.where(right, best, 0.0).sum(axis=1) / positives
    return result


def _right(truth_group: Ints, truth: Floats, group: Ints, segments: Floats, tious: Floats) -> Bools:
    """Which detections are right: (thresholds, M); a group is a class in a video, the best first.

    Choosing in turn, the best first, is what offers and refusals settle at: each detection asks for the
    segment it overlaps most, a segment keeps the best that asked, the refused ask for their next one. So all
    groups and thresholds go on together, in about as many rounds as detections compete for a segment.
    """
    right = np.zeros((len(tious), len(group)), dtype=bool)
    detection, segment, overlap = _ranked(truth_group, truth, group, segments, tious.min(initial=np.inf))
    # the pairs of a detection are neighbours, most overlap first; a threshold cuts each list short
    begin = np.flatnonzero(np.diff(detection, prepend=-1))
    able = detection[begin]  # those that overlap with any
    enough = np.cumsum(overlap >= tious[:, None], axis=1)
    enough = np.concatenate([np.zeros((len(tious), 1), np.int64), enough], axis=1)
    end = (begin + enough[:, np.append(begin[1:], len(detection))] - enough[:, begin]).ravel()
    asked = np.tile(begin, len(tious))  # by threshold and detection: the pair it has come to
    nobody = len(able)
    holder = np.full(len(tious) * len(truth), nobody)  # by threshold and segment: the detection that has it
    asking = np.flatnonzero(asked < end)
    while len(asking):
        level, who = np.divmod(asking, len(able))
        wanted = level * len(truth) + segment[asked[asking]]
        before = holder[wanted]
        np.minimum.at(holder, wanted, who)
        after = holder[wanted]
        ousted = (level * len(able) + before)[(after < before) & (before < nobody)]
        refused = np.unique(np.concatenate([asking[after != who], ousted]))
        asked[refused] += 1
        asking = refused[asked[refused] < end[refused]]
    level, taken = np.divmod(np.flatnonzero(holder < nobody), max(len(truth), 1))
    right[level, able[holder[level * len(truth) + taken]]] = True
    return right


def _ranked(
    truth_group: Ints, truth: Floats, group: Ints, segments: Floats, least: float
) -> tuple[Ints, Ints, Floats]:
    """The pairs that overlap enough: by detection, most overlap first."""
    parts = []
    for portion in pairs(truth_group, truth, group, segments):
        kept = np.flatnonzero(portion[2] >= least)
        parts.append([column[kept] for column in portion])
    detection, segment, overlap = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((-overlap, detection))  # stable: ties in the order of the file
    return detection[order], segment[order], overlap[order]


def pairs(
    truth_group: Ints, truth: Floats, group: Ints, segments: Floats
) -> Iterator[tuple[Ints, Ints, Floats]]:
    """Every detection beside every segment of its group, in portions; a detection is in one portion only.

    Yields:
        (P,) detections in their order, (P,) segments of each in the order of the file, (P,) their tIoU.
    """
    by_group = np.argsort(truth_group, kind="stable")
    sorted_group = truth_group[by_group]
    # rows of two numbers are slow to gather
    sorted_truth, columns = np.ascontiguousarray(truth[by_group].T), np.ascontiguousarray(segments.T)
    first = np.searchsorted(sorted_group, group)
    count = np.searchsorted(sorted_group, group, side="right") - first
    some = np.flatnonzero(count)
    portion = np.cumsum(count[some]) // _PAIRS
    for found in np.split(some, np.flatnonzero(np.diff(portion)) + 1):
        many = count[found]
        detection = np.repeat(found, many)
        # number of the pair, less that of the detection's first one, plus where its group begins
        place = np.arange(len(detection)) + np.repeat(first[found] - np.cumsum(many) + many, many)
        overlap = tiou(sorted_truth.take(place, axis=1).T, columns.take(detection, axis=1).T)
        yield detection, by_group[place], overlap


def tiou_text(value: float) -> str:
    """0.5 -> "0.5": how a threshold is called in results."""
    return f"{value:.6g}"


def detection_scores(
    truth: GroundTruth, detections: Detections, thresholds: Sequence[float] | None = None, source: str = ""
) -> dict[str, Any]:
    """Mean AP by tIoU, its averages, and AP by class; NaN where there is nothing to find.

    Args:
        truth: what there is.
        detections: what was found.
        thresholds: tIoU in (0, 1]; None or none for 0.1 to 0.7.
        source: name of the file the ground truth comes from.

    Returns:
        `map` by the text of the tIoU, `average_map` (over 0.3 to 0.7, or over the given ones),
        `average_map_official` (over 0.1 to 0.5, always), `per_class` (class, segments, ap by tIoU,
        average) and `ground_truth` (what was scored against what).

    Raises:
        GkdError: a threshold outside (0, 1] or there twice (exit code 2).
    """
    asked = list(thresholds if thresholds else DEFAULT_TIOU)
    names = [tiou_text(value) for value in asked]
    if len(set(names)) < len(names) or any(not 0 < value <= 1 for value in asked):
        raise usage_error(
            "thresholds of tIoU are above 0, at most 1, and each is there once",
            f"eval.tiou = {', '.join(names)}",
            "for example `--tiou 0.1:0.9:0.1`",
        )
    every = sorted({*asked, *OFFICIAL_TIOU})
    ap = mean_ap(truth, detections, every)
    row = {value: ap[place] for place, value in enumerate(every)}
    averaged = asked if thresholds else USUAL_TIOU
    shown = np.stack([row[value] for value in asked])
    each = np.stack([row[value] for value in averaged])
    known = (detections.video >= 0) & (detections.labels >= 0)
    segments = np.bincount(truth.labels, minlength=len(truth.classes))
    return {
        "map": {name: _mean(values) for name, values in zip(names, shown, strict=True)},
        "average_map": _mean(each),
        "average_map_official": _mean(np.stack([row[value] for value in OFFICIAL_TIOU])),
        "per_class": [
            {
                "class": name,
                "segments": int(segments[label]),
                "ap": dict(zip(names, shown[:, label].tolist(), strict=True)),
                "average": float(each[:, label].mean()),
            }
            for label, name in enumerate(truth.classes)
        ],
        "ground_truth": {
            "source": source,
            "videos": len(truth.videos),
            "segments": len(truth.labels),
            "duplicates": _duplicates(truth),
            "classes": len(truth.classes),
            "detections": len(detections.scores),
            "detections_used": int(known.sum()),
            "of_unknown_videos": int((detections.video < 0).sum()),
            "of_unknown_labels": int((detections.labels < 0).sum()),
        },
    }


def _mean(ap: Floats) -> float:
    """Over thresholds and the classes that have segments."""
    scored = ap[..., ~np.isnan(ap.reshape(-1, ap.shape[-1])).any(axis=0)]
    return float(scored.mean()) if scored.size else float("nan")


def _duplicates(truth: GroundTruth) -> int:
    """Segments that repeat video, class, start and end of another."""
    rows = np.column_stack([truth.video, truth.labels, truth.segments])
    return len(rows) - len(np.unique(rows, axis=0))


def beyond_end(truth: GroundTruth, durations: Floats) -> int:
    """Segments that lie wholly beyond the end of their video; they count, as in the published evaluation.

    Args:
        truth: what there is.
        durations: (V,) seconds, of its videos; 0 where unknown.
    """
    end = np.where(durations > 0, durations, np.inf)
    return int((truth.segments[:, 0] >= end[truth.video]).sum())


def remarks(scores: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What the user should know of these scores: what, where, hint."""
    truth = scores["ground_truth"]
    if not truth["beyond_end"]:
        return []
    segments = counted(truth["beyond_end"], "segment lies", "segments lie")
    return [
        (
            f"{segments} wholly beyond the end of the video, so nothing can find them",
            f"ground truth {truth['source']}",
            "they count as missed, as in the published evaluation",
        )
    ]


def shuffled(detections: Detections, seed: int) -> Detections:
    """The same segments and classes with their scores dealt out at random: what mAP is without a ranking."""
    order = np.random.default_rng(seed).permutation(len(detections.scores))
    return detections._replace(scores=detections.scores[order])


def class_priors(labels: Ints, lengths: Floats, durations: Floats) -> Detections:
    """What one can say of videos without looking at them.

    Each video is cut, for every class, into windows of the usual length of its actions; the score is how
    common the class is.

    Args:
        labels: (N,) of the actions trained on, from 0.
        lengths: (N,) seconds, likewise.
        durations: (V,) seconds, of the videos of the ground truth, in its order.
    """
    parts = []
    for label in np.unique(labels):
        usual = float(lengths[labels == label].mean())
        count = np.maximum(np.ceil(durations / usual), 1).astype(np.int64)
        video = np.repeat(np.arange(len(durations)), count)
        start = (np.arange(len(video)) - np.repeat(np.cumsum(count) - count, count)) * usual
        segments = np.stack([start, np.minimum(start + usual, durations[video])], axis=1)
        frequency = np.full(len(video), (labels == label).mean())
        parts.append(Detections(video, segments, np.full(len(video), label), frequency))
    if not parts:
        nothing = np.zeros(0, np.int64)
        return Detections(nothing, np.zeros((0, 2)), nothing, np.zeros(0))
    return Detections(*(np.concatenate(column) for column in zip(*parts, strict=True)))
