"""data.demo: only motion tells the classes apart, and the same call draws the same videos."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from gkdcli.data.demo import CLASSES, FRAMES, REVERSE, SIDE, _plan, draw_clip, draw_videos
from gkdcli.errors import GkdError

MIDDLE = FRAMES // 2
NOISE = 12  # two pictures of the same scene differ by at most this, the noise being within -6 to 6
SEEDS = range(12)


def test_names_are_safe_and_reverses_pair_up() -> None:
    assert len(set(CLASSES)) == len(CLASSES) >= 10
    assert set(REVERSE) < set(CLASSES), "classes that swing are their own reverse and are left out"
    assert all(REVERSE[REVERSE[name]] == name != REVERSE[name] for name in REVERSE)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_middle_frame_does_not_tell_the_class(seed: int) -> None:
    """Whatever a network learns from the frame in the middle, it is not the class."""
    middles = [draw_clip(name, seed)[MIDDLE] for name in CLASSES]
    for picture in middles[1:]:
        np.testing.assert_array_equal(picture, middles[0])


@pytest.mark.parametrize("name", REVERSE)
@pytest.mark.parametrize("seed", [1, 7])
def test_a_video_played_backwards_is_a_video_of_the_reverse_class(name: str, seed: int) -> None:
    clip, reverse = (draw_clip(one, seed).astype(int) for one in (name, REVERSE[name]))
    for step in range(1, FRAMES - MIDDLE):
        assert np.abs(clip[MIDDLE + step] - reverse[MIDDLE - step]).max() <= NOISE, step


def test_every_class_moves_and_moves_its_own_way() -> None:
    """Two classes of one seed differ visibly away from the middle; none stands still."""
    clips = {name: draw_clip(name, 3).astype(int) for name in CLASSES}
    for name, clip in clips.items():
        assert np.abs(clip[MIDDLE + 5] - clip[MIDDLE]).max() > 3 * NOISE, name
        for other, another in clips.items():
            if other != name:
                assert np.abs(clip - another).max() > 3 * NOISE, (name, other)


@pytest.mark.parametrize(
    ("name", "axis", "sign"), [("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1)]
)
def test_directions_are_those_of_the_screen(name: str, axis: int, sign: int) -> None:
    for seed in SEEDS:
        steps = np.diff(_path(draw_clip(name, seed)), axis=0)
        assert sign * np.median(steps[:, axis]) > 0.5, seed
        assert abs(np.median(steps[:, 1 - axis])) < 0.3, seed


def test_growing_grows_and_shrinking_shrinks() -> None:
    for seed in SEEDS:
        for name, sign in (("grow", 1), ("shrink", -1)):
            areas = _bright(draw_clip(name, seed)).sum(axis=(1, 2))
            assert sign * (areas[MIDDLE + 6] - areas[MIDDLE - 6]) > 0, (name, seed)


@pytest.mark.parametrize("kind", ["orbit", "turn"])
def test_clockwise_is_clockwise_on_the_screen(kind: str) -> None:
    """A bright spot on a circle bends to the right; in a turn that spot is the shape's bright half."""
    for name, sign in ((f"{kind}-clockwise", 1), (f"{kind}-anticlockwise", -1)):
        bends = []
        for seed in SEEDS:
            steps = np.diff(_path(draw_clip(name, seed))[::2], axis=0)
            cross = steps[:-1, 0] * steps[1:, 1] - steps[:-1, 1] * steps[1:, 0]
            bends.append(sign * np.median(cross))
        assert np.mean(np.array(bends) > 0) > 0.8, bends


@pytest.mark.parametrize(("name", "axis"), [("sway", 0), ("bounce", 1)])
def test_swinging_classes_turn_back_on_one_axis(name: str, axis: int) -> None:
    for seed in SEEDS:
        steps = np.diff(_path(draw_clip(name, seed)), axis=0)
        assert steps[:, axis].max() > 1, seed
        assert steps[:, axis].min() < -1, seed
        assert abs(np.median(steps[:, 1 - axis])) < 0.3, seed


def test_a_seed_fixes_the_pixels_and_another_changes_them() -> None:
    clip = draw_clip("left", 5)
    assert clip.shape == (FRAMES, SIDE, SIDE, 3)
    assert clip.dtype == np.uint8
    np.testing.assert_array_equal(clip, draw_clip("left", 5))
    assert np.abs(clip.astype(int) - draw_clip("left", 6)).mean() > NOISE
    assert draw_clip("left", 5, frames=16, side=40).shape == (16, 40, 40, 3)


def test_videos_are_unique_decodable_and_the_same_on_every_run(tmp_path: Path) -> None:
    """No test video repeats a training video; a second drawing, by two workers, gives the same bytes."""
    calls: list[tuple[int, int]] = []
    wanted = {"train": 2, "test": 1}
    total = 3 * len(CLASSES)
    drawn = draw_videos(tmp_path / "a", wanted, 2020, 1, lambda done, of: calls.append((done, of)))
    assert drawn == total
    assert calls == [(done, total) for done in range(1, total + 1)]

    videos = _videos(tmp_path / "a")
    assert len({path.stem for path in videos}) == total, "a name is unique across classes and subsets"
    for path in videos:
        assert path.parent.name in CLASSES
        assert path.parent.parent.name in wanted
        assert path.name.startswith(path.parent.name)
    contents = {path: path.read_bytes() for path in videos}
    assert len(set(contents.values())) == total

    with av.open(str(videos[0])) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert np.stack(pictures).shape == (FRAMES, SIDE, SIDE, 3)

    draw_videos(tmp_path / "b", wanted, 2020, 2)
    for path, content in contents.items():
        assert (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes() == content, path.name


def test_what_is_drawn_is_kept_and_what_is_missing_is_drawn(tmp_path: Path) -> None:
    wanted = {"train": 1, "test": 1}
    draw_videos(tmp_path, wanted, 1, 1)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in _videos(tmp_path)}
    assert draw_videos(tmp_path, wanted, 1, 1) == 0

    lost = min(before)
    lost.unlink()
    assert draw_videos(tmp_path, wanted, 1, 1) == 1
    assert lost.read_bytes() == before[lost][1]
    assert all(path.stat().st_mtime_ns == before[path][0] for path in before if path != lost)

    assert draw_videos(tmp_path, {"train": 1, "test": 0}, 1, 1) == 0
    assert {path.parent.parent.name for path in _videos(tmp_path)} == {"train"}, "no rest"


def test_another_seed_or_drawing_draws_everything_anew(tmp_path: Path) -> None:
    wanted = {"train": 1, "test": 0}
    draw_videos(tmp_path, wanted, 1, 1)
    first = {path.name: path.read_bytes() for path in _videos(tmp_path)}
    assert draw_videos(tmp_path, wanted, 2, 1) == len(CLASSES)
    assert all(path.read_bytes() != first[path.name] for path in _videos(tmp_path))

    marker = tmp_path / "drawn.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"version": -1}))
    assert draw_videos(tmp_path, wanted, 2, 1) == len(CLASSES)


def test_a_folder_with_foreign_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "train" / "mine.mp4"
    mine.parent.mkdir()
    mine.write_bytes(b"precious")
    with pytest.raises(GkdError, match="not drawn by gkd") as caught:
        draw_videos(tmp_path, {"train": 1, "test": 1}, 1, 1)
    assert caught.value.where == str(tmp_path)
    assert mine.read_bytes() == b"precious"
    assert list(tmp_path.rglob("*.*")) == [mine]


def test_a_video_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A full disk or a file in the way is the user's matter: said plainly, with the path."""
    draw_videos(tmp_path, {"train": 0, "test": 0}, 1, 1)  # leaves its marker, so the folder is ours
    (tmp_path / "train").write_text("in the way of a folder")
    with pytest.raises(GkdError, match="could not be drawn") as caught:
        draw_videos(tmp_path, {"train": 1, "test": 0}, 1, 1)
    assert caught.value.where.startswith(str(tmp_path / "train"))
    assert "draws the missing ones" in caught.value.hint


def test_the_training_and_test_videos_of_the_demo_share_no_seed() -> None:
    """The scheme of `draw_videos` at the demo's size: seeds of 32 bits could collide, these do not."""
    seeds = [video.seed for video in _plan(Path(), {"train": 60, "test": 20}, 2020)]
    assert len(set(seeds)) == len(seeds) == 80 * len(CLASSES)


def _videos(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.mp4"))


def _bright(clip: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where the shape's bright half is, (T, H, W): the ground is dark."""
    grey = clip.mean(axis=3)
    ground = np.median(grey, axis=(1, 2), keepdims=True)
    top = np.quantile(grey, 0.999, axis=(1, 2), keepdims=True)
    return np.asarray(grey > (ground + top) / 2)


def _path(clip: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Centre of the bright half in every frame, (T, 2) as x and y in px, unwrapped across the border."""
    bright = _bright(clip)
    turns = np.exp(2j * np.pi * np.arange(SIDE) / SIDE)
    angles = [np.angle((bright.sum(axis=axis) * turns).sum(axis=1)) for axis in (1, 2)]
    return np.stack([np.unwrap(angle) * SIDE / (2 * np.pi) for angle in angles], axis=1)
