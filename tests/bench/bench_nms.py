"""Soft-NMS against the obvious NumPy loop: one call of 5000 candidates, and a test set like THUMOS14's.

    python tests/bench/bench_nms.py [--videos 213] [--every 12] [--sigma 0.1] [--recipe official]

The test set: as many windows per video as there (log-normal, 16 on average; at least 8, so that every class
of every video has thousands of candidates), 126 priors a window, 20 classes. The loop would take minutes
for all of it, so it runs on every twelfth video, from short to long, and the ratio is of these. Both run in
float64 and one thread, processor time is taken, and they must agree in what stays, in which order, and in
the scores to 1e-9. The loop below is the published one, line by line, in NumPy.
"""

from __future__ import annotations

import argparse
import itertools
import time

import numpy as np

from gkdcli.evaluation.nms import soft_nms

CLIP, STRIDE, LEVELS = 25.6, 12.8, (64, 32, 16, 8, 4, 2)  # seconds, seconds, priors
CLASSES = 20
FLOOR, TOP_K = 0.001, 5000


def obvious(
    segments: np.ndarray, scores: np.ndarray, sigma: float, recipe: str
) -> tuple[np.ndarray, np.ndarray]:
    """One pick at a time."""
    scores, (start, end) = scores.copy(), segments.T
    done, open_ = np.zeros(len(scores), bool), scores >= FLOOR
    order = []
    while open_.sum() > (recipe == "official") and done.sum() < TOP_K:
        best = np.nonzero(open_)[0][scores[open_].argmax()]
        open_[best], done[best] = False, True
        order.append(best)
        starts, ends = start[open_], end[open_]
        common = np.clip(np.minimum(ends, end[best]) - np.maximum(starts, start[best]), 0, None)
        iou = common / (max(end[best] - start[best], 1e-5) + (ends - starts) - common)
        scores[open_] = scores[open_] * np.exp(-(iou**2) / sigma)
        open_[scores < FLOOR] = False
    kept = np.array(sorted(order) if recipe == "official" else order, dtype=int)
    return kept, scores[kept]


def draw_video(rng: np.random.Generator, windows: int) -> tuple[np.ndarray, np.ndarray]:
    """Segments (N, 2) that all classes share, and scores (classes, N), most of them low."""
    parts = []
    for first in np.arange(windows) * STRIDE:
        for count in LEVELS:
            centre = (np.arange(count) + 0.5) / count * CLIP
            left, right = rng.lognormal(np.log(2 * CLIP / count), 0.6, (2, count))
            parts.append(first + np.clip(np.stack([centre - left, centre + right], axis=1), 0, CLIP))
    segments = np.concatenate(parts)
    return segments, rng.beta(0.5, 4, (CLASSES, len(segments))).clip(0.0101)


Given = tuple[np.ndarray, np.ndarray, np.ndarray]  # segments, scores and groups: classes of videos


def as_groups(videos: list[tuple[np.ndarray, np.ndarray]]) -> Given:
    """All classes of all videos, one after the other."""
    segments = np.concatenate([np.tile(segments, (len(scores), 1)) for segments, scores in videos])
    sizes = [len(each) for _, scores in videos for each in scores]
    scores = np.concatenate([scores.ravel() for _, scores in videos])
    return segments, scores, np.repeat(np.arange(len(sizes)), sizes)


def fast(given: Given, sigma: float, recipe: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Everything in one call, and its seconds."""
    segments, scores, groups = given
    began = time.process_time()
    kept, new = soft_nms(
        segments, scores, sigma=sigma, floor=FLOOR, top_k=TOP_K, recipe=recipe, groups=groups
    )
    return kept, new, time.process_time() - began


def compare(given: Given, sigma: float, recipe: str) -> tuple[float, float, int]:
    """Seconds of the loop, seconds of ours, and how many stay."""
    kept, new, quick = fast(given, sigma, recipe)
    segments, scores, groups = given
    edges = np.searchsorted(groups, np.arange(groups[-1] + 2))
    parts = [slice(*edge) for edge in itertools.pairwise(edges)]
    began = time.process_time()
    found = [obvious(segments[part], scores[part], sigma, recipe) for part in parts]
    slow = time.process_time() - began
    assert np.array_equal(
        np.concatenate([each[0] + part.start for each, part in zip(found, parts, strict=True)]), kept
    )
    np.testing.assert_allclose(np.concatenate([each[1] for each in found]), new, rtol=1e-9)
    return slow, quick, len(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--videos", type=int, default=213)
    parser.add_argument("--every", type=int, default=12, help="the loop runs on every so-many-th video")
    parser.add_argument("--sigma", type=float, default=0.1)
    parser.add_argument("--recipe", default="official", choices=["official", "corrected"])
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    segments = draw_video(rng, 120)[0]
    some = segments[rng.permutation(len(segments))[:5000]]
    fast(as_groups([(some[:99], np.full((1, 99), 0.5))]), given.sigma, given.recipe)  # first touches
    for sigma in (0.1, 0.5):
        scores = rng.beta(0.5, 4, (1, 5000)).clip(0.0101)
        slow, quick, kept = compare(as_groups([(some, scores)]), sigma, given.recipe)
        print(f"one call of 5000, sigma {sigma}, {kept} stay: loop {slow:.3f} s, ours {quick:.4f} s")
        print(f"  ratio {slow / quick:.1f}")
    windows = np.sort(np.exp(rng.normal(2.41, 0.89, given.videos)).round().clip(8, 130).astype(int))
    chosen = windows[given.every // 2 :: given.every]
    slow, quick, _ = compare(
        as_groups([draw_video(rng, count) for count in chosen]), given.sigma, given.recipe
    )
    total, candidates = 0.0, 0
    for first in range(0, len(windows), 20):
        groups = as_groups([draw_video(rng, count) for count in windows[first : first + 20]])
        candidates += len(groups[1])
        total += fast(groups, given.sigma, given.recipe)[2]
    each = candidates / given.videos / CLASSES
    print(f"{given.videos} videos x {CLASSES} classes, {each:.0f} candidates each: ours {total:.1f} s")
    print(f"  {len(chosen)} videos of them: loop {slow:.1f} s, ours {quick:.2f} s")
    print(f"  ratio {slow / quick:.1f}")


if __name__ == "__main__":
    main()
