"""data.windows: every rule of METHOD.md 5 about clips, boundary maps and splices, against slow plain code."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from gkdcli.data.windows import (
    Splice,
    background,
    boundary_maps,
    splice,
    test_offsets,
    training_windows,
)

RECIPES = ["official", "corrected"]


def rows(*pairs: tuple[float, float]) -> np.ndarray:
    return np.array([(*pair, 1 + number % 3) for number, pair in enumerate(pairs)], float).reshape(-1, 3)


# ---- which clips ----


@pytest.mark.parametrize(
    ("frames", "stride", "expected"),
    [
        (1, 30, [0]),
        (64, 30, [0]),
        (65, 30, [0, 1]),
        (94, 30, [0, 30]),  # the last full window is one of the stride's
        (100, 30, [0, 30, 36]),
        (200, 100, [0, 100, 136]),  # frames between windows belong to none
    ],
)
def test_offsets_are_multiples_of_the_stride_and_the_last_full_window(frames, stride, expected):
    assert test_offsets(frames, 64, stride) == expected


def test_a_segment_belongs_to_a_clip_by_half_and_keeps_it_by_its_whole():
    # clips [1, 64], [31, 94], [37, 100]
    segments = rows((50, 78), (2, 20), (51, 79.5))
    windows, shortest = training_windows(100, segments, 64, 30)
    assert [window.offset for window in windows] == [0, 30, 36]
    np.testing.assert_array_equal(
        windows[0].segments, [[50, 64, 1], [2, 20, 2]]
    )  # half of (50, 78), less of (51, 79.5)
    np.testing.assert_array_equal(windows[1].segments, [[20, 48, 1], [21, 49.5, 3]])
    np.testing.assert_array_equal(windows[2].segments, [[14, 42, 1], [15, 43.5, 3]])
    assert shortest == 14


def test_the_shortest_piece_counts_clips_that_are_dropped():
    # (30, 60.5) lies whole in none of [1, 40], [31, 70], but 29.5 of 30.5 frames do in the second
    windows, shortest = training_windows(70, rows((30, 60.5)), 40, 30)
    assert windows == []
    assert shortest == 30


def test_a_short_video_counts_its_whole_segments_and_they_are_cut_to_the_clip():
    windows, shortest = training_windows(50, rows((0.2, 3.1), (20, 40)), 64, 30)
    np.testing.assert_array_equal(windows[0].segments, [[1, 3.1, 1], [20, 40, 2]])
    assert shortest == 3  # 2.1 that is kept of 2.9
    assert training_windows(64, rows((0, 0.9)), 64, 30) == ([], 1)  # of a segment that no clip has


def test_without_segments_there_are_no_clips():
    assert training_windows(300, rows(), 64, 30) == ([], 64)
    assert training_windows(300, rows((70, 70), (90, 80)), 64, 30) == ([], 64)


def test_clips_follow_the_rules_on_random_segments():
    rng = np.random.default_rng(0)
    kept = 0
    for _ in range(200):
        frames, length, stride = int(rng.integers(1, 300)), 64, int(rng.integers(1, 80))
        starts = rng.uniform(0, frames, rng.integers(0, 6))
        segments = rows(*((start, start + rng.uniform(0.5, 90)) for start in starts))
        expected, pieces = [], [64.0]
        if frames <= length:
            pieces += [last - first for first, last, _ in segments]
        for offset in sorted({*range(0, max(frames - length, 0) + 1, stride), max(frames - length, 0)}):
            found, whole = [], False
            for first, last, number in segments:
                low, high = max(first, offset + 1), min(last, offset + length)
                if (high - low) / (last - first) >= 0.5:
                    found.append([max(first - offset, 1), min(last - offset, length), number])
                    whole |= (low, high) == (first, last)
            pieces += [last - first for first, last, _ in found]
            if whole:
                expected.append((offset, found))
        windows, shortest = training_windows(frames, segments, length, stride)
        assert [(window.offset, window.segments.tolist()) for window in windows] == expected
        assert shortest == math.ceil(min(pieces))
        kept += len(windows)
    assert kept > 300


def test_the_segments_of_the_video_are_left_alone():
    segments = rows((0.5, 20), (30, 90))
    before = segments.copy()
    training_windows(100, segments, 64, 30)
    np.testing.assert_array_equal(segments, before)


# ---- boundary maps ----


def test_boundary_maps_are_one_around_starts_and_ends():
    maps = boundary_maps(rows((10, 15), (20, 60)), 64)
    assert maps.dtype == np.float32
    assert np.flatnonzero(maps[0]).tolist() == [9, 10, 11, 18, 19, 20, 21, 22]  # 2 frames; a tenth of 40
    assert np.flatnonzero(maps[1]).tolist() == [14, 15, 16, 58, 59, 60, 61, 62]
    assert set(np.unique(maps)) == {0, 1}


def test_boundary_maps_round_half_to_even_and_end_with_the_clip():
    maps = boundary_maps(rows((10.5, 13.5), (1, 64)), 64)
    assert np.flatnonzero(maps[0]).tolist() == [0, 1, 2, 3, 4, 10, 11, 12]  # 9.5 to 10, 11.5 to 12
    assert np.flatnonzero(maps[1]).tolist() == [12, 13, 14, 61, 62, 63]  # 60.85 and 67.15
    assert not boundary_maps(rows(), 64).any()


# ---- splices ----


def test_background_of_overlapping_segments_differs_by_recipe():
    overlapping = rows((30, 60), (10, 40), (70, 80.5), (70, 80.5))
    assert background(overlapping, 128, "official") == [
        (0, 10), (10, 30), (30, 40), (40, 60), (60, 70), (70, 70), (80.5, 80.5), (80.5, 127),
    ]  # fmt: skip
    assert background(overlapping, 128, "corrected") == [(0, 10), (60, 70), (80.5, 127)]


def test_background_at_the_end_of_a_clip_differs_by_recipe():
    assert background(rows((100, 128)), 128, "official") == [(0, 100), (100, 127), (127, 128)]
    assert background(rows((100, 128)), 128, "corrected") == [(0, 100)]
    assert background(rows((0, 128)), 128, "corrected") == []
    assert background(rows(), 128, "official") == background(rows(), 128, "corrected") == [(0, 127)]


def allowed(segments: np.ndarray, th: int, length: int, recipe: str) -> set[tuple[float, float, int, int]]:
    """Every (start, end, cut t, start of the piece s) that METHOD.md 5 permits."""
    annotations = [(first, last) for first, last, _ in segments]
    times = sorted([time for pair in annotations for time in pair] + [0, length - 1])
    gaps = [pair for pair in itertools.pairwise(times) if pair not in annotations]
    if recipe == "corrected":
        gaps = [
            (low, high)
            for low, high in gaps
            if not any(first < high and low < last for first, last in annotations)
        ]
    found = set()
    for start, end in annotations:
        if end - start <= 2 * th:
            continue
        for t in range(math.ceil(start) + th, math.ceil(start) + math.ceil(end - start - th)):
            for low, high in gaps:
                if math.floor(high) - math.ceil(low) > th:
                    for s in range(math.ceil(low), math.floor(high) - th):
                        found.add((start, end, t, s))
    return found


def spliced_by_hand(
    start: float, end: float, t: int, s: int, th: int, length: int
) -> tuple[list[int], list[list[float]]]:
    """The same splice frame by frame."""
    frames = list(range(length))
    if end < s:
        for k in range(th):
            frames[t + k] = s + k
        for old in range(t, s):
            frames[old + th] = old
        return frames, [[start, t], [t + th, end + th], [t + 1, t + th - 1]]
    for old in range(s + th, t):
        frames[old - th] = old
    for k in range(th):
        frames[t - th + k] = s + k
    return frames, [[start - th, t - th], [t, end], [t - th + 1, t - 1]]


def key(found: Splice) -> tuple[tuple[int, ...], tuple[float, ...]]:
    return tuple(found.frames.tolist()), tuple(found.proposals.ravel().tolist())


CASES = {
    "one action": (rows((20.3, 31.7)), 3),
    "background behind only": (rows((0, 12)), 3),
    "background before only": (rows((45, 63)), 4),
    "two actions": (rows((8, 18.5), (30.2, 44)), 4),
    "overlap": (rows((25, 40), (10, 30)), 3),
    "to the last frame": (rows((40, 64), (5, 9)), 4),
    "piece of one frame": (rows((30, 33)), 1),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("case", CASES)
def test_splices_are_those_that_the_method_permits_and_all_of_them(case, recipe):
    segments, th = CASES[case]
    permitted = {
        key(Splice(np.array(frames), np.array(parts, np.float32)))
        for start, end, t, s in allowed(segments, th, 64, recipe)
        for frames, parts in [spliced_by_hand(start, end, t, s, th, 64)]
    }
    assert permitted
    rng = np.random.default_rng(0)
    found = {
        key(drawn) for _ in range(12 * len(permitted)) if (drawn := splice(segments, th, 64, rng, recipe))
    }
    assert found <= permitted
    assert len(found) > 0.97 * len(permitted)


@pytest.mark.parametrize("recipe", RECIPES)
def test_random_splices_are_permitted_ones(recipe):
    rng = np.random.default_rng(1)
    made = none = 0
    for _ in range(400):
        starts = rng.uniform(0, 55, rng.integers(1, 5))
        segments = rows(*((start, min(start + rng.uniform(4, 40), 64)) for start in starts))
        th = int(rng.integers(1, 12))
        permitted = allowed(segments, th, 64, recipe)
        found = splice(segments, th, 64, rng, recipe)
        if found is None:
            none += 1
            assert not permitted
            continue
        made += 1
        assert found.frames.dtype == np.int64
        assert found.proposals.dtype == np.float32
        assert key(found) in {
            key(Splice(np.array(frames), np.array(parts, np.float32)))
            for start, end, t, s in permitted
            for frames, parts in [spliced_by_hand(start, end, t, s, th, 64)]
        }
    assert made > 150
    assert none > 20


def test_the_corrected_piece_shows_no_action():
    """The official neighbours among sorted ends let some in where segments overlap (METHOD.md 8 (13))."""
    segments = rows((25, 40), (10, 30))
    shown = dict.fromkeys(RECIPES, 0)
    for recipe in RECIPES:
        rng = np.random.default_rng(2)
        for _ in range(200):
            found = splice(segments, 3, 64, rng, recipe)
            assert found is not None
            piece = int(found.proposals[2, 0]) - 1  # it starts one frame before its proposal
            source = found.frames[piece : piece + 3]
            assert np.all(np.diff(source) == 1)
            shown[recipe] += bool(((source > 10) & (source < 40)).any())
    assert shown["corrected"] == 0
    assert shown["official"] > 50


def test_no_splice_where_no_action_or_no_background_fits():
    rng = np.random.default_rng(0)
    for recipe in RECIPES:
        assert splice(rows((10, 16)), 3, 64, rng, recipe) is None, "not longer than two pieces"
        assert splice(rows((10, 16.1)), 3, 64, rng, recipe) is not None
        assert splice(rows((3, 60)), 3, 64, rng, recipe) is None, "gaps of 3 frames, a piece of 3"
        assert splice(rows((3, 59)), 3, 64, rng, recipe) is not None
        assert splice(rows(), 3, 64, rng, recipe) is None


def test_a_splice_is_its_generators():
    segments = rows((8, 18.5), (30.2, 44))
    drawn = [key(splice(segments, 4, 64, np.random.default_rng(seed), "corrected")) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
