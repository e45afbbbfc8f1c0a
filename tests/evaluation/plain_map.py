"""Mean AP as one would write it down: loops over classes, detections, thresholds and segments."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gkdcli.evaluation.detection import Detections, GroundTruth


def plain_mean_ap(truth: GroundTruth, found: Detections, thresholds: Sequence[float]) -> np.ndarray:
    """(thresholds, classes), as `mean_ap`."""
    ap = np.full((len(thresholds), len(truth.classes)), np.nan)
    segments = list(zip(*(column.tolist() for column in truth[2:]), strict=True))
    rows = list(zip(*(column.tolist() for column in found), strict=True))
    for label in range(len(truth.classes)):
        by_video: dict[int, list[tuple[int, float, float]]] = {}
        own = [(video, segment) for video, segment, its_label in segments if its_label == label]
        for number, (video, (start, end)) in enumerate(own):
            by_video.setdefault(video, []).append((number, start, end))
        if not own:
            continue
        ranked = sorted(
            (row for row in rows if row[2] == label and row[0] >= 0), key=lambda row: -row[3]
        )  # sorted() is stable
        for level, threshold in enumerate(thresholds):
            taken: set[int] = set()
            right = []
            for video, (start, end), _, _ in ranked:
                best, chosen = -1.0, None
                for number, its_start, its_end in by_video.get(video, []):
                    shared = max(min(end, its_end) - max(start, its_start), 0.0)
                    union = (its_end - its_start) + (end - start) - shared
                    overlap = shared / union if union > 0 else 0.0
                    if number not in taken and overlap >= threshold and overlap > best:
                        best, chosen = overlap, number
                if chosen is not None:
                    taken.add(chosen)
                right.append(chosen is not None)
            ap[level, label] = _interpolated(right, len(own))
    return ap


def _interpolated(right: list[bool], positives: int) -> float:
    """Area under the precision that is reached at each recall or beyond it."""
    precisions, recalls, hits = [], [], 0
    for place, hit in enumerate(right, 1):
        hits += hit
        precisions.append(hits / place)
        recalls.append(hits / positives)
    area, before = 0.0, 0.0
    best = 0.0
    envelope = []
    for precision in reversed(precisions):
        best = max(best, precision)
        envelope.append(best)
    for recall, height in zip(recalls, reversed(envelope), strict=True):
        area += (recall - before) * height
        before = recall
    return area
