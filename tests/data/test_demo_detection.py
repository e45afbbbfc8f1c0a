"""data.demo_detection: several actions a video, motion inside them and rest between, the same every time."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from gkdcli.data import demo
from gkdcli.data.demo import SIDE, draw_track
from gkdcli.data.demo_detection import (
    ACTION_FRAMES,
    ACTIONS,
    DETECTION_CLASSES,
    FPS,
    FRAMES,
    LOG_SIZE,
    REST,
    _plan,
    draw_untrimmed,
    plot_of,
)
from gkdcli.errors import GkdError

SEEDS = range(150)


def test_classes_are_those_of_the_demo_and_come_with_their_reverses() -> None:
    assert set(DETECTION_CLASSES) <= set(demo.CLASSES)
    assert all(demo.REVERSE[name] in DETECTION_CLASSES for name in DETECTION_CLASSES)


@pytest.mark.parametrize("seed", SEEDS)
def test_actions_lie_inside_the_video_with_rest_between(seed: int) -> None:
    plot = plot_of(seed)
    assert FRAMES[0] <= plot.frames <= FRAMES[1]
    assert ACTIONS[0] <= len(plot.acts) <= ACTIONS[1]
    assert len({act.class_name for act in plot.acts}) == len(plot.acts)
    ends = [0]
    for act in plot.acts:
        assert act.class_name in DETECTION_CLASSES
        assert act.first - ends[-1] >= REST
        assert ACTION_FRAMES[0] <= act.last - act.first <= ACTION_FRAMES[1]
        ends.append(act.last)
    assert plot.frames - 1 - ends[-1] >= REST


@pytest.mark.parametrize("seed", SEEDS)
def test_the_state_changes_in_actions_alone_and_as_their_class_says(seed: int) -> None:
    """Steady within an action; nothing but a tremble of the place outside; the shape stays visible."""
    plot = plot_of(seed)
    steps = np.diff(np.stack(plot.track), axis=1).T  # (T - 1, 4)
    resting = np.ones(len(steps), bool)
    for act in plot.acts:
        resting[act.first : act.last] = False
        axis, sense = {
            "left": (0, -1),
            "right": (0, 1),
            "grow": (2, 1),
            "shrink": (2, -1),
            "turn-clockwise": (3, 1),
            "turn-anticlockwise": (3, -1),
        }[act.class_name]
        inside = steps[act.first : act.last]
        mean = sense * inside[:, axis].mean()
        assert mean > (0.02 * SIDE, 0, 0.0299, 0.12)[axis]
        others = np.delete(inside, axis, axis=1)
        assert np.abs(others).max() < 1
        assert np.abs(others.mean(axis=0)).max() < 0.1
        if axis in (2, 3):
            np.testing.assert_allclose(inside[:, axis], sense * mean, rtol=1e-3)
    assert np.abs(steps[resting]).max() < 1
    assert np.abs(steps[resting][:, 2:]).max() == 0
    assert LOG_SIZE[0] - 1e-5 <= plot.track.log_size.min() <= plot.track.log_size.max() <= LOG_SIZE[1] + 1e-5


def test_classes_are_about_equally_frequent() -> None:
    counts = Counter(act.class_name for seed in SEEDS for act in plot_of(seed).acts)
    assert set(counts) == set(DETECTION_CLASSES)
    assert max(counts.values()) < 1.4 * min(counts.values())


def energy(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """How much changes from each frame to the next, (T - 1,): the strongest smoothed differences."""
    smooth = np.stack([cv2.GaussianBlur(frame.astype(np.float32), (0, 0), 1) for frame in pixels])
    return np.quantile(np.abs(np.diff(smooth.mean(axis=3), axis=0)), 0.99, axis=(1, 2))


@pytest.mark.parametrize("seed", range(8))
def test_pixels_move_inside_actions_and_hardly_outside(seed: int) -> None:
    plot = plot_of(seed)
    found = energy(draw_track(plot.track, seed))
    resting = np.ones(len(found), bool)
    for act in plot.acts:
        resting[act.first : act.last] = False
    rest = np.median(found[resting])
    assert np.quantile(found[resting], 0.95) < np.median(found[~resting])
    for act in plot.acts:
        assert np.median(found[act.first : act.last]) > 2 * rest, act


def test_a_seed_fixes_the_pixels_and_another_changes_them() -> None:
    first, again, other = (draw_track(plot_of(seed).track, seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (plot_of(5).frames, SIDE, SIDE, 3)
    count = min(len(first), len(other))
    assert np.abs(first[:count].astype(int) - other[:count]).mean() > 12


def test_both_subsets_are_written_with_their_annotations_the_same_on_every_run(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    wanted = {"train": 2, "test": 1}
    drawn = draw_untrimmed(tmp_path / "a", wanted, 2020, 1, lambda done, of: calls.append((done, of)))
    assert drawn == 3
    assert calls == [(1, 3), (2, 3), (3, 3)]
    paths = sorted((tmp_path / "a").rglob("*.mp4"))
    assert [path.parent.name for path in paths] == ["test", "train", "train"]

    document = json.loads((tmp_path / "a" / "annotations.json").read_text())
    assert set(document["database"]) == {path.stem for path in paths}
    for path in paths:
        about = document["database"][path.stem]
        assert about["subset"] == path.parent.name
        with av.open(str(path)) as container:
            assert container.streams.video[0].average_rate == FPS
            frames = sum(1 for _ in container.decode(video=0))
        assert about["duration"] == frames / FPS
        assert len(about["annotations"]) >= 3
        for one in about["annotations"]:
            assert one["label"] in DETECTION_CLASSES
            start, end = one["segment"]
            assert 0 < start < end < about["duration"]
            assert 1.2 <= end - start + 1e-9 <= 4.1

    assert draw_untrimmed(tmp_path / "b", wanted, 2020, 2) == 3
    for path in [*paths, tmp_path / "a" / "annotations.json"]:
        assert (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes() == path.read_bytes()


def test_what_is_drawn_is_kept_another_set_is_drawn_anew(tmp_path: Path) -> None:
    draw_untrimmed(tmp_path, {"train": 1, "test": 1}, 1, 1)
    (train,) = (tmp_path / "train").iterdir()
    before = train.stat().st_mtime_ns
    assert draw_untrimmed(tmp_path, {"train": 2, "test": 0}, 1, 1) == 1
    assert train.stat().st_mtime_ns == before
    assert not list((tmp_path / "test").glob("*.mp4"))
    assert len(json.loads((tmp_path / "annotations.json").read_text())["database"]) == 2
    assert draw_untrimmed(tmp_path, {"train": 1, "test": 0}, 2, 1) == 1


def test_a_folder_with_foreign_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "train" / "mine.mp4"
    mine.parent.mkdir()
    mine.write_bytes(b"precious")
    with pytest.raises(GkdError, match="not drawn by gkd"):
        draw_untrimmed(tmp_path, {"train": 1, "test": 1}, 1, 1)
    assert list(tmp_path.rglob("*.*")) == [mine]


def test_no_two_videos_of_the_demo_share_a_seed() -> None:
    seeds = [video.seed for video in _plan(Path(), {"train": 60, "test": 20}, 2020)]
    assert len(set(seeds)) == len(seeds) == 80
