"""report_detection: pictures of whatever a detector finds, much or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from gkdcli import report_detection
from gkdcli.evaluation.detection import Detections, GroundTruth
from gkdcli.evaluation.profile import KINDS, false_positive_profile, recall_by_length
from gkdcli.report_detection import Timeline, draw_profile, draw_timelines


def picture(path: Path) -> np.ndarray:
    found = cv2.imread(str(path))
    assert found is not None, "no picture"
    assert list(path.parent.glob(".*.tmp")) == []
    return found


def share(image: np.ndarray, colour: str) -> float:
    """Of the dots that have just this colour."""
    wanted = [int(colour[place : place + 2], 16) for place in (5, 3, 1)]  # blue first
    return float((image == wanted).all(axis=2).mean())


def results(detections: int) -> tuple[dict[str, Any], dict[str, Any]]:
    draw = np.random.default_rng(0)
    start = draw.uniform(0, 100, 30)
    segments = np.stack([start, start + draw.uniform(1, 30, 30)], axis=1)
    truth = GroundTruth(["a", "b"], ["v", "w"], draw.integers(0, 2, 30), segments, draw.integers(0, 2, 30))
    near = draw.integers(0, 30, detections)
    found = Detections(
        truth.video[near],
        segments[near] + draw.uniform(-3, 3, (detections, 2)),
        draw.integers(0, 2, detections),
        draw.random(detections),
    )
    return false_positive_profile(truth, found), recall_by_length(truth, found)


@pytest.mark.parametrize("detections", [0, 5, 500])
def test_a_profile_is_drawn_of_many_and_of_no_detections(tmp_path, detections):
    profile, recall = results(detections)
    draw_profile(profile, recall, tmp_path / "deep" / "profile.png")
    image = picture(tmp_path / "deep" / "profile.png")
    assert min(image.shape[:2]) > 300
    right = share(image, report_detection._KINDS["true_positive"][1])
    assert right > (0.005 if detections == 500 else 0)


def test_bars_are_as_high_as_the_shares(tmp_path):
    profile, recall = results(0)
    shares = dict.fromkeys(KINDS, 0.0) | {"background": 0.75, "confusion": 0.25}
    for row in profile["slices"]:
        row.update(detections=4, shares=shares)
    draw_profile(profile, recall, tmp_path / "profile.png")
    image = picture(tmp_path / "profile.png")[:, :600]  # without the legend
    ratio = share(image, report_detection._KINDS["background"][1]) / share(
        image, report_detection._KINDS["confusion"][1]
    )
    assert ratio == pytest.approx(3, abs=0.1)


def test_every_kind_has_a_name_and_a_colour_of_its_own():
    assert tuple(report_detection._KINDS) == KINDS
    assert len({colour for _, colour in report_detection._KINDS.values()}) == len(KINDS)
    assert len(set(report_detection._COLOURS)) == 20


def test_a_recall_of_other_bins_is_drawn(tmp_path):
    profile, recall = results(50)
    recall["bins"] = recall["bins"][:1]
    draw_profile(profile, recall, tmp_path / "profile.png")
    assert picture(tmp_path / "profile.png").std() > 1


TRUE = [(2.0, 4.0, "dive"), (3.0, 6.0, "kick")]
FOUND = [(2.1, 4.0, "dive", 0.9), (2.0, 4.2, "dive", 0.4), (8.0, 9.0, "kick", 0.1)]


def timeline(path: Path, *videos: Timeline) -> np.ndarray:
    draw_timelines(videos, path)
    return picture(path)


def test_timelines_show_truth_and_detections_in_the_colour_of_the_class(tmp_path):
    dive, kick = report_detection._COLOURS[:2]
    bare = timeline(tmp_path / "a.png", Timeline("v", [], [], 10.0))
    true = timeline(tmp_path / "b.png", Timeline("v", TRUE, [], 10.0))
    both = timeline(tmp_path / "c.png", Timeline("v", TRUE, FOUND, 10.0))
    assert share(bare, dive) == share(bare, kick) == 0
    assert share(true, kick) > share(true, dive) > 0.001
    dots = [share(image, dive) * image.shape[0] * image.shape[1] for image in (true, both)]
    assert dots[1] > 1.3 * dots[0], "the best detection is as strong as the truth"


def test_an_unsure_detection_is_paler(tmp_path):
    dive = report_detection._COLOURS[0]
    rows = [(1.0, 4.0, "dive", 1.0), (6.0, 9.0, "dive", 0.2)]
    one = timeline(tmp_path / "a.png", Timeline("v", [], rows[:1], 10.0))
    two = timeline(tmp_path / "b.png", Timeline("v", [], rows, 10.0))
    assert share(two, dive) == pytest.approx(share(one, dive), rel=0.01)
    assert (two != one).any()


@pytest.mark.parametrize("classes", [1, 20, 21, 60])
def test_any_number_of_classes_and_videos(tmp_path, classes):
    names = [f"$class_{n}^" for n in range(classes)]
    rows = [(float(n), n + 1.5, name) for n, name in enumerate(names)]
    videos = [Timeline(f"$\\frac{{ {n}", rows, [(*row, 0.5) for row in rows]) for n in range(4)]
    image = timeline(tmp_path / "t.png", *videos)
    assert min(image.shape[:2]) > 300
    assert max(image.shape[:2]) < 4000


@pytest.mark.parametrize(
    "video",
    [
        Timeline("", [], []),
        Timeline("x" * 500, [(0.0, 0.0, "")], []),
        Timeline("日本語 \udc80", [], [(0.0, 5.0, "b\udc80d", 0.0), (0.0, 5.0, "a", -1.0)]),
        Timeline("cut", TRUE, FOUND, 3.0),
    ],
    ids=["empty", "long", "letters", "cut"],
)
def test_odd_videos_are_drawn(tmp_path, video):
    assert max(timeline(tmp_path / "t.png", video).shape) < 3000


def test_without_videos_there_is_nothing_to_draw(tmp_path):
    draw_timelines([], tmp_path / "t.png")
    assert not (tmp_path / "t.png").exists()


def test_lanes_hold_no_overlap_and_the_best_come_first():
    draw = np.random.default_rng(0)
    start = draw.integers(0, 50, 200).astype(float)
    found = [
        (s, s + w, "a", score)
        for s, w, score in zip(start, draw.integers(0, 9, 200), draw.random(200), strict=True)
    ]
    lanes, kept = report_detection._best_lanes(Timeline("v", [], found))
    assert len(lanes) == len(kept) < 200
    assert max(lanes) == report_detection._LANES - 1
    assert [row[3] for row in kept] == sorted((row[3] for row in kept), reverse=True)
    assert kept[0] == max(found, key=lambda row: row[3])
    for one, a in zip(lanes, kept, strict=True):
        shared = [b for other, b in zip(lanes, kept, strict=True) if other == one and b is not a]
        assert all(a[1] <= b[0] or b[1] <= a[0] for b in shared)
