"""Mean AP against the obvious loops, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkdcli.errors import ExitCode, GkdError
from gkdcli.evaluation import detection
from gkdcli.evaluation.detection import (
    Detections,
    GroundTruth,
    beyond_end,
    class_priors,
    detection_scores,
    mean_ap,
    remarks,
    shuffled,
    tiou,
)
from tests.evaluation.plain_map import plain_mean_ap

THRESHOLDS = [0.1, 0.3, 0.5, 0.7, 0.9, 1.0]
SEGMENTS = st.tuples(st.integers(0, 8), st.integers(0, 5)).map(lambda pair: (pair[0], pair[0] + pair[1]))
# few videos, classes, places and scores: overlaps, duplicates and ties are the rule
TRUTHS = st.lists(st.tuples(st.integers(0, 2), SEGMENTS, st.integers(0, 2)), max_size=12)
FOUND = st.lists(st.tuples(st.integers(-1, 2), SEGMENTS, st.integers(-1, 2), st.integers(0, 3)), max_size=25)


def truth_of(rows: list[tuple[int, tuple[float, float], int]]) -> GroundTruth:
    """Rows of video, segment, label; three videos and classes."""
    return GroundTruth(
        ["a", "b", "c"],
        ["one", "two", "three"],
        np.array([row[0] for row in rows], dtype=np.int64),
        np.array([row[1] for row in rows], dtype=np.float64).reshape(-1, 2),
        np.array([row[2] for row in rows], dtype=np.int64),
    )


def found_of(rows: list[tuple[int, tuple[float, float], int, float]]) -> Detections:
    """Rows of video, segment, label, score."""
    return Detections(
        *truth_of([row[:3] for row in rows])[2:], np.array([row[3] for row in rows], dtype=float)
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(TRUTHS, FOUND)
def test_equals_the_obvious_loops(rows, found) -> None:
    truth, detections = truth_of(rows), found_of(found)
    ours = mean_ap(truth, detections, THRESHOLDS)
    np.testing.assert_allclose(ours, plain_mean_ap(truth, detections, THRESHOLDS), rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_obvious_loops_where_many_compete(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(seed)

    def segments(count: int) -> np.ndarray:
        start = random.uniform(0, 30, count)
        return np.stack([start, start + random.uniform(0.1, 9, count)], axis=1)

    truth = GroundTruth(
        ["a", "b"], ["one", "two"], random.integers(0, 2, 60), segments(60), random.integers(0, 2, 60)
    )
    detections = Detections(
        random.integers(-1, 2, 500), segments(500), random.integers(-1, 2, 500), random.random(500).round(2)
    )
    ours = mean_ap(truth, detections, THRESHOLDS)
    assert ours[0].min() > 0.1
    monkeypatch.setattr(detection, "_PAIRS", 50)  # a few detections at a time
    np.testing.assert_array_equal(mean_ap(truth, detections, THRESHOLDS), ours)
    np.testing.assert_allclose(ours, plain_mean_ap(truth, detections, THRESHOLDS), rtol=0, atol=1e-12)


def test_segments_beyond_the_end_are_counted_where_the_end_is_known() -> None:
    truth = truth_of([(0, (0, 5), 0), (0, (4, 9), 0), (0, (5, 9), 0), (1, (90, 95), 1)])
    assert beyond_end(truth, np.array([5.0, 0.0, 1.0])) == 1  # one that begins where the video ends
    said = {"beyond_end": 1, "source": "gt.json"}
    assert remarks({"ground_truth": said})[0][0].startswith("1 segment lies wholly beyond the end")
    assert remarks({"ground_truth": said | {"beyond_end": 0}}) == []


@settings(max_examples=100, deadline=None, derandomize=True)
@given(TRUTHS, FOUND)
def test_a_higher_threshold_never_helps_and_unknown_ones_do_not_count(rows, found) -> None:
    truth, detections = truth_of(rows), found_of(found)
    ap = mean_ap(truth, detections, THRESHOLDS)
    absent = [label not in truth.labels for label in range(3)]
    assert np.isnan(ap).any(axis=0).tolist() == np.isnan(ap).all(axis=0).tolist() == absent
    scored = ap[:, ~np.isnan(ap[0])]
    assert ((scored >= 0) & (scored <= 1)).all()
    known = found_of([row for row in found if row[0] >= 0 and row[2] >= 0])
    np.testing.assert_array_equal(mean_ap(truth, known, THRESHOLDS), ap)


def test_a_perfect_detector_and_each_way_to_be_wrong() -> None:
    rows = [(0, (0, 4), 0), (0, (6, 8), 0), (1, (1, 5), 0)]
    right = [(*row, 0.9 - 0.1 * place) for place, row in enumerate(rows)]
    truth = truth_of(rows)

    def ap(*found, at: float = 0.5) -> float:
        return float(mean_ap(truth, found_of(list(found)), [at])[0, 0])

    assert ap(*right, at=1.0) == 1
    assert ap(*right, (0, (6, 8), 0, 0.1)) == 1  # a duplicate after all are found costs nothing
    assert ap((0, (6, 8), 0, 1.0), *right) == pytest.approx((1 + 1 + 3 / 4) / 3)  # one before costs
    assert ap((1, (0, 4), 1, 1.0), *right) == 1  # of another class, another list
    assert ap((2, (0, 4), 0, 1.0), *right) == pytest.approx(3 / 4)  # a known video that shows nothing
    assert ap((0, (0, 8), 0, 0.95), right[1], at=0.5) == pytest.approx(2 / 3)  # tIoU of exactly 0.5 is enough
    assert ap() == 0


def test_the_earlier_of_two_equal_scores_counts_first() -> None:
    truth = truth_of([(0, (0, 4), 0)])
    right, wrong = (0, (0, 4), 0, 0.5), (0, (6, 8), 0, 0.5)
    assert mean_ap(truth, found_of([right, wrong]), [0.5])[0, 0] == 1
    assert mean_ap(truth, found_of([wrong, right]), [0.5])[0, 0] == 0.5


def test_overlap() -> None:
    one = np.array([[0.0, 4.0], [0.0, 4.0], [0.0, 4.0], [2.0, 2.0], [2.0, 2.0]])
    other = np.array([[2.0, 6.0], [4.0, 6.0], [0.0, 4.0], [0.0, 4.0], [2.0, 2.0]])
    np.testing.assert_array_equal(tiou(one, other), [1 / 3, 0, 1, 0, 0])


def test_the_document() -> None:
    truth = truth_of([(0, (0, 10), 0), (0, (0, 10), 0), (1, (0, 10), 1)])
    found = found_of(
        [
            (0, (0, 6), 0, 0.9),
            (1, (0, 10), 1, 0.8),
            (-1, (0, 1), 0, 1),
            (1, (0, 1), -1, 1),
            (-1, (0, 1), -1, 1),
        ]
    )
    scores = detection_scores(truth, found, source="gt.json")
    assert list(scores["map"]) == ["0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7"]
    assert scores["map"]["0.6"] == 0.75  # half of class a, all of b; c has no segment and no part in it
    assert scores["map"]["0.7"] == 0.5
    assert scores["average_map"] == pytest.approx((4 * 0.75 + 0.5) / 5)
    assert scores["average_map_official"] == 0.75
    first, _, last = scores["per_class"]
    assert (first["class"], first["segments"], first["ap"]["0.5"]) == ("a", 2, 0.5)
    assert first["average"] == pytest.approx(0.4)
    assert (last["segments"], math.isnan(last["average"])) == (0, True)
    assert scores["ground_truth"] == {
        "source": "gt.json",
        "videos": 3,
        "segments": 3,
        "duplicates": 1,
        "classes": 3,
        "detections": 5,
        "detections_used": 2,
        "of_unknown_videos": 2,
        "of_unknown_labels": 2,
    }


def test_given_thresholds_are_averaged_over_and_the_official_ones_stay() -> None:
    truth, found = truth_of([(0, (0, 10), 0)]), found_of([(0, (0, 6), 0, 0.9)])
    scores = detection_scores(truth, found, [0.55, 0.95])
    assert scores["map"] == {"0.55": 1.0, "0.95": 0.0}
    assert (scores["average_map"], scores["average_map_official"]) == (0.5, 1.0)
    assert scores["per_class"][0]["average"] == 0.5


@pytest.mark.parametrize("thresholds", [[0.5, 0.5], [0.0], [1.1], [math.nan], [-0.5]])
def test_thresholds_out_of_place_are_refused(thresholds: list[float]) -> None:
    with pytest.raises(GkdError, match="thresholds of tIoU") as caught:
        detection_scores(truth_of([]), found_of([]), thresholds)
    assert caught.value.code is ExitCode.USAGE


def test_nothing_to_find_has_no_score() -> None:
    scores = detection_scores(truth_of([]), found_of([(0, (0, 1), 0, 1)]))
    assert math.isnan(scores["average_map"])
    assert math.isnan(scores["map"]["0.5"])


def test_shuffled_scores_change_the_ranking_and_nothing_else() -> None:
    found = found_of([(0, (place, place + 1), 0, place) for place in range(30)])
    other = shuffled(found, 1)
    assert sorted(other.scores) == found.scores.tolist()
    assert other.scores.tolist() != found.scores.tolist()
    assert other.scores.tolist() == shuffled(found, 1).scores.tolist() != shuffled(found, 2).scores.tolist()
    for ours, theirs in zip(other[:3], found[:3], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_class_priors_know_lengths_and_frequencies_only() -> None:
    labels, lengths = np.array([0, 0, 0, 2]), np.array([2.0, 3.0, 4.0, 10.0])
    found = class_priors(labels, lengths, np.array([7.0, 2.0]))
    rows = [
        (int(video), *segment, int(label), score)
        for video, segment, label, score in zip(*(column.tolist() for column in found), strict=True)
    ]
    assert rows == [
        (0, 0.0, 3.0, 0, 0.75),
        (0, 3.0, 6.0, 0, 0.75),
        (0, 6.0, 7.0, 0, 0.75),
        (1, 0.0, 2.0, 0, 0.75),
        (0, 0.0, 7.0, 2, 0.25),
        (1, 0.0, 2.0, 2, 0.25),
    ]
    nothing = class_priors(np.zeros(0, np.int64), np.zeros(0), np.array([7.0]))
    assert nothing.segments.shape == (0, 2)
