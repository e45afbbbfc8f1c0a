"""Mean AP against the plain loops over detections, thresholds and segments.

    python tests/bench/bench_map.py [--predictions FILE --ground-truth FILE] [--repeats 7]

Without files a set of THUMOS14's size is drawn: 210 videos, 3,311 segments of 20 classes, 18,500 detections.
Reading files is left out. Plain ways are timed: data frames, where pandas is there (it is no dependency), row
by row as evaluation scripts do it; the same with arrays; and Python numbers only. Each takes one detection
after another, its overlaps with the video's segments, ranked, and one threshold after another.
All must agree to 1e-9 in each class and threshold; processor time, the best of the repeats.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from gkdcli.evaluation.detection import Detections, GroundTruth, mean_ap
from gkdcli.evaluation.submission import read_ground_truth, read_submission
from tests.evaluation.plain_map import plain_mean_ap

THRESHOLDS = [round(0.1 * step, 1) for step in range(1, 10)]


def frames(truth: GroundTruth, found: Detections, thresholds: list[float]) -> np.ndarray:
    """(thresholds, classes), over the rows of data frames."""
    import pandas

    def table(video: np.ndarray, segments: np.ndarray, labels: np.ndarray) -> pandas.DataFrame:
        start, end = segments.T
        return pandas.DataFrame({"video": video, "start": start, "end": end, "label": labels})

    every = table(*truth[2:])
    detections = table(*found[:3]).assign(score=found.scores)
    detections = detections[detections.video >= 0]
    ap = np.full((len(thresholds), len(truth.classes)), np.nan)
    for label in range(len(truth.classes)):
        own = every[every.label == label].reset_index(drop=True)
        chosen = detections[detections.label == label].sort_values("score", ascending=False, kind="stable")
        if own.empty:
            continue
        videos = own.groupby("video")
        free = np.ones((len(thresholds), len(own)), dtype=bool)
        right = np.zeros((len(thresholds), len(chosen)))
        for place, (_, row) in enumerate(chosen.iterrows()):
            if row.video in videos.groups:
                its = videos.get_group(row.video)
                overlap = _overlap(its[["start", "end"]].to_numpy(), row.start, row.end)
                _take(overlap, its.index.to_numpy(), free, right[:, place], thresholds)
        ap[:, label] = [_area(hits, len(own)) for hits in right]
    return ap


def arrays(truth: GroundTruth, found: Detections, thresholds: list[float]) -> np.ndarray:
    """(thresholds, classes), over the places in arrays."""
    ap = np.full((len(thresholds), len(truth.classes)), np.nan)
    for label in range(len(truth.classes)):
        own = np.flatnonzero(truth.labels == label)
        if not len(own):
            continue
        segments = truth.segments[own]
        in_video = {int(video): np.flatnonzero(truth.video[own] == video) for video in truth.video[own]}
        chosen = np.flatnonzero((found.labels == label) & (found.video >= 0))
        chosen = chosen[np.argsort(-found.scores[chosen], kind="stable")]
        free = np.ones((len(thresholds), len(own)), dtype=bool)
        right = np.zeros((len(thresholds), len(chosen)))
        for place, detection in enumerate(chosen):
            candidates = in_video.get(int(found.video[detection]))
            if candidates is not None:
                overlap = _overlap(segments[candidates], *found.segments[detection])
                _take(overlap, candidates, free, right[:, place], thresholds)
        ap[:, label] = [_area(hits, len(own)) for hits in right]
    return ap


def _overlap(segments: np.ndarray, start: float, end: float) -> np.ndarray:
    shared = (np.minimum(segments[:, 1], end) - np.maximum(segments[:, 0], start)).clip(0)
    return shared / ((segments[:, 1] - segments[:, 0]) + (end - start) - shared)


def _take(
    overlap: np.ndarray, numbers: np.ndarray, free: np.ndarray, right: np.ndarray, thresholds: list[float]
) -> None:
    """Gives a detection, at each threshold, the free segment that it overlaps most."""
    ranked = np.argsort(-overlap, kind="stable")
    for level, threshold in enumerate(thresholds):
        for best in ranked:
            if overlap[best] < threshold:
                break
            if free[level, numbers[best]]:
                free[level, numbers[best]] = False
                right[level] = 1
                break


def _area(right: np.ndarray, positives: int) -> float:
    hits = np.cumsum(right)
    precision = np.concatenate([[0], hits / np.arange(1, len(hits) + 1), [0]])
    recall = np.concatenate([[0], hits / positives, [1]])
    for place in range(len(precision) - 2, -1, -1):
        precision[place] = max(precision[place], precision[place + 1])
    steps = np.flatnonzero(recall[1:] != recall[:-1]) + 1
    return float(np.sum((recall[steps] - recall[steps - 1]) * precision[steps]))


def drawn() -> tuple[GroundTruth, Detections]:
    """Jittered actions, several times each, and false alarms, as a detector finds them."""
    random = np.random.default_rng(0)
    video = np.sort(random.integers(0, 210, 3311))
    labels = (video + (random.random(3311) < 0.1)) % 20  # most videos show one class
    start = random.uniform(0, 200, 3311)
    segments = np.stack([start, start + random.lognormal(1.2, 0.6, 3311)], axis=1)
    source = random.integers(0, 3311, 18500)
    moved = segments[source] + random.normal(0, 1.0, (18500, 2))
    moved[:, 1] = np.maximum(moved[:, 1], moved[:, 0] + 0.1)
    names = [f"class {label}" for label in range(20)]
    truth = GroundTruth(names, [f"video {number}" for number in range(210)], video, segments, labels)
    return truth, Detections(video[source], moved, labels[source], random.random(18500))


def seconds(work: Callable[[], np.ndarray], repeats: int) -> tuple[float, np.ndarray]:
    """Least processor time, and the outcome."""
    times = []
    for _ in range(repeats):
        began = time.process_time()
        outcome = work()
        times.append(time.process_time() - began)
    return min(times), outcome


def main() -> None:
    """Measures and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--predictions", type=Path)
    parser.add_argument("--ground-truth", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    if given.predictions:
        truth = read_ground_truth(given.ground_truth).truth
        found = read_submission(given.predictions, truth)
    else:
        truth, found = drawn()
    ours, ap = seconds(lambda: mean_ap(truth, found, THRESHOLDS), given.repeats)
    report = {"detections": len(found.scores), "ours_ms": round(1e3 * ours, 1), "load": os.getloadavg()}
    ways = {"arrays": arrays, "python": plain_mean_ap}
    if importlib.util.find_spec("pandas"):
        ways = {"frames": frames, **ways}
    for name, way in ways.items():
        theirs, wanted = seconds(lambda way=way: way(truth, found, THRESHOLDS), 1)
        np.testing.assert_allclose(ap, wanted, rtol=0, atol=1e-9)
        report |= {f"{name}_ms": round(1e3 * theirs, 1), f"{name}_ratio": round(theirs / ours, 1)}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
