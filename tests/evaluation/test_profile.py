"""profile: each kind of error by hand, the slow and obvious way, and what must not change the answer."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gkdcli.evaluation import detection, profile
from gkdcli.evaluation.detection import Detections, GroundTruth, average_precision, mean_ap
from gkdcli.evaluation.profile import KINDS, false_positive_profile, recall_by_length

CLASSES = ["dive", "kick"]


def truth_of(*rows: tuple[int, float, float, int], classes: int = 2, videos: int = 3) -> GroundTruth:
    """Rows (video, start, end, label)."""
    table = np.array(rows, dtype=float).reshape(-1, 4)
    names = [*CLASSES, *(f"class {n}" for n in range(2, classes))][:classes]
    return GroundTruth(
        names,
        [f"v{n}" for n in range(videos)],
        table[:, 0].astype(int),
        table[:, 1:3],
        table[:, 3].astype(int),
    )


def found_of(*rows: tuple[int, float, float, int, float]) -> Detections:
    """Rows (video, start, end, label, score)."""
    table = np.array(rows, dtype=float).reshape(-1, 5)
    return Detections(table[:, 0].astype(int), table[:, 1:3], table[:, 3].astype(int), table[:, 4])


TRUTH = truth_of((0, 10, 20, 0), (0, 40, 50, 1), (1, 0, 4, 0))


@pytest.mark.parametrize(
    ("detection", "kind"),
    [
        ((0, 10, 20, 0), "true_positive"),
        ((0, 10, 15, 0), "true_positive"),  # a tIoU of just 0.5
        ((0, 10, 20, 1), "wrong_label"),
        ((0, 10, 15, 1), "wrong_label"),
        ((0, 10, 14.9, 0), "localisation"),
        ((0, 10, 11, 0), "localisation"),  # just 0.1
        ((0, 10, 14.9, 1), "confusion"),
        ((0, 10, 10.9, 0), "background"),
        ((0, 10, 10.9, 1), "background"),
        ((0, 25, 35, 0), "background"),
        ((1, 40, 50, 1), "background"),  # the place of a segment of another video
        ((2, 10, 20, 0), "background"),  # a video without segments
        ((0, 30, 30, 0), "background"),  # no length
    ],
)
def test_a_single_detection_is_of_one_kind(detection, kind):
    result = false_positive_profile(TRUTH, found_of((*detection, 0.9)))
    assert result["slices"][0]["shares"] == {name: float(name == kind) for name in KINDS}
    assert result["detections"] == 1
    assert result["segments"] == 3


def kinds(truth: GroundTruth, detections: Detections, tiou: float = 0.5) -> dict[str, int]:
    """Counts over all slices."""
    result = false_positive_profile(truth, detections, tiou)
    last = result["slices"][-1]["cumulative"]
    return {name: round(share * result["detections"]) for name, share in last.items() if share}


def test_the_second_to_find_a_segment_is_a_duplicate_however_well_it_fits():
    assert kinds(TRUTH, found_of((0, 10, 20, 0, 0.5), (0, 10, 16, 0, 0.9))) == {
        "true_positive": 1,
        "duplicate": 1,
    }
    first = false_positive_profile(TRUTH, found_of((0, 10, 20, 0, 0.5), (0, 10, 13, 0, 0.9)))
    assert first["slices"][0]["shares"]["true_positive"] == 0.5, "one that misses leaves the segment free"


def test_a_detection_takes_the_next_segment_when_its_best_is_taken():
    truth = truth_of((0, 0, 10, 0), (0, 2, 12, 0))
    assert kinds(truth, found_of((0, 0, 10, 0, 0.9), (0, 0, 11, 0, 0.8))) == {"true_positive": 2}


def test_the_segment_overlapped_most_decides_and_of_equals_the_one_of_the_same_class():
    both = [(0, 0, 10, 1), (0, 0, 10, 0)]  # the same moments in two classes
    for rows in (both, both[::-1]):
        assert kinds(truth_of(*rows), found_of((0, 0, 10, 0, 0.9), (0, 0, 10, 0, 0.8))) == {
            "true_positive": 1,
            "duplicate": 1,
        }
    nearer = truth_of((0, 0, 10, 1), (0, 0, 30, 0))
    assert kinds(nearer, found_of((0, 0, 9, 0, 0.9))) == {"wrong_label": 1}


def test_what_average_precision_does_not_count_does_not_count_here():
    truth = truth_of((0, 0, 10, 0), classes=3)
    strange = found_of((-1, 0, 10, 0, 0.9), (0, 0, 10, -1, 0.9), (0, 0, 10, 2, 0.9), (0, 0, 10, 0, 0.1))
    assert kinds(truth, strange) == {"true_positive": 1}


def test_every_class_has_its_own_quota():
    """Sure detections of one class do not push out unsure ones of another."""
    truth = truth_of((0, 0, 10, 0), (0, 20, 30, 1), (0, 40, 50, 1))
    rows = [(0, 100.0, 110.0, 0, 0.9)] * 30 + [(0, 20.0, 30.0, 1, 0.2), (0, 40.0, 50.0, 1, 0.1)]
    result = false_positive_profile(truth, found_of(*rows))
    assert [row["top"] for row in result["slices"]] == [f"{n}G" for n in range(1, 11)]
    assert [row["detections"] for row in result["slices"]] == [3] + [1] * 9
    assert result["slices"][0]["shares"]["true_positive"] == pytest.approx(2 / 3)
    assert result["slices"][9]["cumulative"]["true_positive"] == pytest.approx(2 / 12)


def test_ties_of_scores_go_by_the_order_of_the_file():
    truth = truth_of((0, 0, 10, 0))
    rows = [(0, 50.0, 60.0, 0, 0.5), (0, 0.0, 10.0, 0, 0.5)]
    assert false_positive_profile(truth, found_of(*rows))["slices"][1]["shares"]["true_positive"] == 1
    assert false_positive_profile(truth, found_of(*rows[::-1]))["slices"][0]["shares"]["true_positive"] == 1


@pytest.mark.parametrize("truth", [TRUTH, truth_of()], ids=["truth", "no truth"])
@pytest.mark.parametrize("found", [found_of(), found_of((0, 0, 10, 0, 0.5))], ids=["nothing", "one"])
def test_nothing_found_or_nothing_there(truth, found):
    profiled, recalled = false_positive_profile(truth, found), recall_by_length(truth, found)
    json.dumps([profiled, recalled], allow_nan=False)
    assert profiled["detections"] == min(len(truth.labels), len(found.scores))
    assert profiled["slices"][9]["shares"] == dict.fromkeys(KINDS)
    assert recalled["recall"]["10G"] == (0 if len(truth.labels) else None)


def drawn(seed: int, detections: int = 400) -> tuple[GroundTruth, Detections]:
    """Crowded videos, some without segments; detections around segments and elsewhere; tied scores."""
    draw = np.random.default_rng(seed)
    start = draw.integers(0, 60, 40).astype(float)
    segments = np.stack([start, start + draw.integers(1, 25, 40)], axis=1)
    truth = GroundTruth(
        ["a", "b", "c", "unseen"],
        [f"v{n}" for n in range(8)],
        draw.integers(0, 6, 40),
        segments,
        draw.integers(0, 3, 40),
    )
    near = draw.integers(0, 40, detections)
    moved = segments[near] + draw.integers(-4, 5, (detections, 2))
    kept = draw.random(detections) < 0.7
    return truth, Detections(
        np.where(kept, truth.video[near], draw.integers(-1, 8, detections)),
        np.sort(moved, axis=1),
        np.where(draw.random(detections) < 0.7, truth.labels[near], draw.integers(-1, 4, detections)),
        draw.integers(0, 50, detections) / 50,
    )


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    shared = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    union = (a[1] - a[0]) + (b[1] - b[0]) - shared
    return shared / union if union > 0 else 0.0


def slowly(
    truth: GroundTruth, found: Detections, tiou: float
) -> tuple[list[tuple[int, str]], dict[int, int]]:
    """(slice, kind) of each detection judged, and the slice in which each segment is found."""
    judged, taken = [], {}
    for label in range(len(truth.classes)):
        quota = int((truth.labels == label).sum())
        mine = [d for d in range(len(found.scores)) if found.labels[d] == label and found.video[d] >= 0]
        for rank, d in enumerate(sorted(mine, key=lambda d: (-found.scores[d], d))[: 10 * quota]):
            there = [
                (-overlap(found.segments[d], truth.segments[s]), truth.labels[s] != label, s)
                for s in range(len(truth.labels))
                if truth.video[s] == found.video[d]
            ]
            there.sort()
            free = [s for below, other, s in there if -below >= tiou and not other and s not in taken]
            best, other = (-there[0][0], there[0][1]) if there else (0.0, True)
            if free:
                kind, taken[free[0]] = "true_positive", rank // quota
            elif best >= tiou:
                kind = "wrong_label" if other else "duplicate"
            elif best >= 0.1:
                kind = "confusion" if other else "localisation"
            else:
                kind = "background"
            judged.append((rank // quota, kind))
    return judged, taken


@pytest.mark.parametrize("portion", [1, 50, 1 << 21])
@pytest.mark.parametrize("tiou", [0.3, 0.5, 0.7])
def test_equals_the_slow_way(monkeypatch, tiou, portion):
    monkeypatch.setattr(detection, "_PAIRS", portion)
    seen: set[str] = set()
    for seed in range(4):
        truth, found = drawn(seed)
        judged, taken = slowly(truth, found, tiou)
        result = false_positive_profile(truth, found, tiou)
        assert result["detections"] == len(judged)
        for number, row in enumerate(result["slices"]):
            here = [kind for place, kind in judged if place == number]
            so_far = [kind for place, kind in judged if place <= number]
            assert row["detections"] == len(here)
            for kind in KINDS:
                assert row["shares"][kind] == (here.count(kind) / len(here) if here else None)
                assert row["cumulative"][kind] == so_far.count(kind) / len(so_far)
        seen |= {kind for _, kind in judged}
        length = truth.segments[:, 1] - truth.segments[:, 0]
        recalled = recall_by_length(truth, found, tiou)
        for row in recalled["bins"]:
            upto = np.inf if row["up_to"] is None else row["up_to"]
            inside = [s for s in range(len(length)) if row["above"] < length[s] <= upto]
            assert row["segments"] == len(inside)
            for at, times in (("1G", 1), ("10G", 10)):
                hits = sum(s in taken and taken[s] < times for s in inside)
                assert row["recall"][at] == (hits / len(inside) if inside else None)
    assert seen == set(KINDS), "the drawn sets show every kind"


def test_shares_sum_to_one_and_agree_with_recall_and_average_precision():
    truth, found = drawn(1)
    result, recalled = false_positive_profile(truth, found), recall_by_length(truth, found)
    for row in result["slices"]:
        assert sum(row["shares"].values()) == pytest.approx(1)
        assert sum(row["cumulative"].values()) == pytest.approx(1)
    hits = result["slices"][9]["cumulative"]["true_positive"] * result["detections"]
    assert recalled["recall"]["10G"] * len(truth.labels) == pytest.approx(hits)
    counted = sum(row["segments"] * (row["recall"]["10G"] or 0) for row in recalled["bins"])
    assert counted == pytest.approx(hits)
    assert recalled["detections"]["10G"] == result["detections"]


def test_what_is_right_is_what_average_precision_calls_right():
    """One class, as many segments as detections: every slice and order of the truth is in the curve."""
    draw = np.random.default_rng(5)
    start = np.arange(60.0) * 3
    truth = GroundTruth(
        ["a"], ["v"], np.zeros(60, int), np.stack([start, start + 5], axis=1), np.zeros(60, int)
    )
    near = draw.integers(0, 60, 50)
    found = Detections(
        np.zeros(50, int),
        truth.segments[near] + draw.uniform(-1, 1, (50, 2)),
        np.zeros(50, int),
        draw.permutation(50) / 50,
    )
    chosen, _ = profile._within_quota(truth, found)
    right = profile._match(truth, found, chosen, 0.5).right
    assert 10 < right.sum() < 50
    assert average_precision(right[None], 60)[0] == mean_ap(truth, found, [0.5])[0, 0]


def test_neither_the_order_of_files_nor_names_of_classes_matter():
    truth, found = drawn(2)
    found = found._replace(scores=np.random.default_rng(0).permutation(len(found.scores)) / 1000)  # no ties
    wanted = false_positive_profile(truth, found), recall_by_length(truth, found)
    turn = np.random.default_rng(1).permutation(len(found.scores))
    turned = Detections(found.video[turn], found.segments[turn], found.labels[turn], found.scores[turn])
    assert (false_positive_profile(truth, turned), recall_by_length(truth, turned)) == wanted
    label = np.array([2, 0, 3, 1, -1])  # the last for unknown classes
    renamed = truth._replace(labels=label[truth.labels]), found._replace(labels=label[found.labels])
    assert (false_positive_profile(*renamed), recall_by_length(*renamed)) == wanted
    later = truth._replace(segments=truth.segments + 512), found._replace(segments=found.segments + 512)
    assert (false_positive_profile(*later), recall_by_length(*later)) == wanted
    surer = found._replace(scores=found.scores**3 * 7 - 1)
    assert (false_positive_profile(truth, surer), recall_by_length(truth, surer)) == wanted


def test_bins_hold_their_upper_edge_in_spite_of_rounding():
    truth = truth_of((0, 1.4, 4.4, 0), (0, 20, 23.01, 0), (0, 40, 46, 0), (0, 60, 90, 0))
    assert truth.segments[0, 1] - truth.segments[0, 0] > 3, "the example needs a difference that is not exact"
    found = found_of((0, 1.4, 4.4, 0, 0.9), (0, 60, 90, 0, 0.8))
    result = recall_by_length(truth, found)
    assert [row["bin"] for row in result["bins"]] == ["XS", "S", "M", "L", "XL"]
    assert [(row["above"], row["up_to"]) for row in result["bins"]] == [
        (0, 3),
        (3, 6),
        (6, 12),
        (12, 18),
        (18, None),
    ]
    assert [row["segments"] for row in result["bins"]] == [1, 2, 0, 0, 1]
    assert [row["recall"]["1G"] for row in result["bins"]] == [1, 0, None, None, 1]
    assert result["detections"] == {"1G": 2, "10G": 2}
    own = recall_by_length(truth, found, edges=(5,))
    assert [(row["bin"], row["segments"]) for row in own["bins"]] == [("1", 2), ("2", 2)]


def test_recall_says_at_how_many_detections():
    truth = truth_of((0, 0, 2, 0))
    result = recall_by_length(truth, found_of((0, 30, 40, 0, 0.9), (0, 0, 2, 0, 0.8), (0, 0, 2, 0, 0.7)))
    assert result["detections"] == {"1G": 1, "10G": 3}
    assert result["recall"] == {"1G": 0, "10G": 1}
