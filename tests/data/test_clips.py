"""data.clips: which frames and pixels a clip consists of, and that nothing else has a say in it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gkdcli.data.clips import (
    ClipDataset,
    View,
    hold_out,
    normalise,
    test_view,
    training_view,
    working_size,
)
from gkdcli.data.loader import training_order
from gkdcli.data.parts import PartWriter, part_path
from gkdcli.data.store import Store, VideoRow
from gkdcli.errors import GkdError
from gkdcli.settings import ClipSettings
from tests.stores import Video, jpeg, make_store, picture

CLIPS = ClipSettings(length=16, crop=32, mean=[0.45], std=[0.225])


def draw(
    count: int, recipe: str, clips: ClipSettings = CLIPS, size: tuple[int, int] = (64, 80)
) -> list[View]:
    rng = np.random.default_rng(0)
    return [training_view(rng, 40, *size, clips, recipe) for _ in range(count)]


# ---- views ----


def published_views(height: int, width: int, clips: ClipSettings, recipe: str) -> set[tuple[int, ...]]:
    """Every (top, left, height, width) of the two-stream multi-scale crop, written out plainly."""
    views = set()
    base = min(height, width)
    for i, first in enumerate(clips.scales):
        for j, second in enumerate(clips.scales):
            if abs(i - j) > 1:
                continue
            h, w = int(base * first), int(base * second)
            grid_h, grid_w = (clips.crop, clips.crop) if recipe == "official" else (h, w)
            y, x = int((height - grid_h) / 4), int((width - grid_w) / 4)
            corners = [(0, 0), (0, 4 * x), (4 * y, 0), (4 * y, 4 * x), (2 * y, 2 * x)]
            edges = [(0, 2 * x), (4 * y, 2 * x), (2 * y, 0), (2 * y, 4 * x)]
            inner = [(y, x), (y, 3 * x), (3 * y, x), (3 * y, 3 * x)]
            for top, left in corners + edges + inner:
                views.add((top, left, min(h, height - top), min(w, width - left)))
    return views


@pytest.mark.parametrize("recipe", ["official", "corrected"])
@pytest.mark.parametrize("size", [(64, 80), (240, 320), (37, 33)])
def test_crops_are_those_of_the_published_grid_and_all_of_them(recipe, size):
    drawn = {(v.top, v.left, v.height, v.width) for v in draw(6000, recipe, size=size)}
    assert drawn == published_views(*size, CLIPS, recipe)


def test_the_corrected_grid_never_cuts_a_crop_the_official_one_does():
    sides = {int(64 * scale) for scale in CLIPS.scales}
    assert all(view.height in sides and view.width in sides for view in draw(1000, "corrected"))
    assert any(view.height not in sides for view in draw(1000, "official"))


def test_crops_of_one_pair_are_at_most_one_scale_apart():
    order = {int(64 * scale): place for place, scale in enumerate(CLIPS.scales)}
    assert {abs(order[v.height] - order[v.width]) for v in draw(1000, "corrected")} == {0, 1}


def test_windows_are_uniform_and_stay_within_the_video():
    starts = Counter(view.start for view in draw(5000, "corrected"))
    assert set(starts) == set(range(40 - 16 + 1))
    assert 150 < min(starts.values()) <= max(starts.values()) < 250  # 200 expected of each
    assert {
        training_view(np.random.default_rng(1), n, 64, 64, CLIPS, "corrected").start for n in (3, 16)
    } == {0}


def test_half_of_the_clips_are_mirrored_or_none():
    flips = sum(view.flip for view in draw(2000, "corrected"))
    assert 900 < flips < 1100
    still = ClipSettings(**{**CLIPS.model_dump(), "flip": False})
    assert not any(view.flip for view in draw(200, "corrected", still))
    # the other decisions do not depend on it
    assert [v.top for v in draw(50, "corrected", still)] == [v.top for v in draw(50, "corrected")]


@pytest.mark.parametrize("frames", [1, 15, 16, 17, 18, 40, 41, 300])
def test_the_test_view_is_the_middle_window_and_the_centre(frames):
    view = test_view(frames, 47, 81, CLIPS)
    assert view.start == max(int((frames - (16 - 1)) / 2), 0)
    assert view.start + 16 <= max(frames, 16)
    assert (view.top, view.left, view.height, view.width) == (round(15 / 2), round(49 / 2), 32, 32)
    assert not view.flip


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((240, 320), 0, (240, 320)),  # official presets keep the size
        ((240, 320), 48, (48, 64)),
        ((320, 240), 48, (64, 48)),
        ((100, 151), 50, (50, 76)),  # 75.5 to the even number
        ((20, 24), 0, (32, 38)),  # scaled up to the crop
        ((20, 24), 16, (32, 38)),  # never under the crop
        ((64, 64), 32, (32, 32)),
    ],
)
def test_working_size_follows_the_short_side_but_never_under_the_crop(size, short_side, expected):
    clips = ClipSettings(**{**CLIPS.model_dump(), "short_side": short_side})
    assert working_size(*size, clips) == expected


# ---- clips ----


@pytest.fixture(scope="module")
def videos() -> list[Video]:
    return [
        Video("a", "long", picture(1, 40)),
        Video("a", "short", picture(2, 10)),
        Video("b", "small", picture(3, 20, 20, 24)),
        Video("b", "wide", picture(4, 20, 48, 90)),
    ]


@pytest.fixture(scope="module")
def raw(videos: list[Video], tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("raw"), videos, "raw")


@pytest.fixture(scope="module")
def compressed(videos: list[Video], tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("jpeg"), videos, "jpeg")


def by_hand(frames: np.ndarray, view: View) -> torch.Tensor:
    """(T, H, W, 3) -> (3, 16, 32, 32): padded, scaled up, cut, scaled, mirrored, in floating point."""
    window = list(frames[view.start : view.start + 16])
    window += [window[-1]] * (16 - len(window))
    clip = torch.from_numpy(np.stack(window)).permute(0, 3, 1, 2).float()
    size = working_size(*clip.shape[2:], CLIPS)
    clip = F.interpolate(clip, size=size, mode="bilinear", align_corners=False)
    clip = clip[:, :, view.top : view.top + view.height, view.left : view.left + view.width]
    clip = F.interpolate(clip, size=(32, 32), mode="bilinear", align_corners=False)
    return (clip.flip(3) if view.flip else clip).transpose(0, 1)


@pytest.mark.parametrize("recipe", ["official", "corrected"])
def test_training_clips_are_what_their_views_say(raw, videos, recipe):
    dataset = ClipDataset(raw, range(4), CLIPS, recipe, seed=7)
    for key in [(video, epoch, 1) for video in range(4) for epoch in range(1, 5)]:
        clip, label, number = dataset[key]
        row = raw.videos[number]
        size = working_size(row.height, row.width, CLIPS)
        rng = np.random.default_rng([1, 7, key[1], 1, number])
        view = training_view(rng, row.frames, *size, CLIPS, recipe)
        assert clip.shape == (3, 16, 32, 32)
        assert clip.dtype == torch.uint8
        assert clip.is_contiguous()
        assert label == row.label
        # two roundings to 8 bit on the way
        assert (clip.float() - by_hand(videos[number].frames, view)).abs().max() <= 2


def test_test_clips_are_the_centre_pixels_untouched(raw, videos):
    clip, _, _ = ClipDataset(raw, [0], CLIPS, "corrected", seed=None)[0, 0, 0]
    expected = videos[0].frames[12:28, 2:34, 4:36]
    assert np.array_equal(clip.permute(1, 2, 3, 0).numpy(), expected)


def test_one_decision_serves_all_frames_of_a_clip(tmp_path):
    still = np.repeat(picture(5, 1), 30, axis=0)
    dataset = ClipDataset(
        make_store(tmp_path, [Video("a", "still", still)], "raw"), [0], CLIPS, "corrected", 3
    )
    for epoch in range(20):
        clip = dataset[0, epoch, 1][0]
        assert torch.equal(clip, clip[:, :1].expand_as(clip))


def test_a_short_video_repeats_its_last_frame(raw, videos):
    clip, _, _ = ClipDataset(raw, [1], CLIPS, "corrected", seed=None)[0, 0, 0]
    assert torch.equal(clip[:, 9:], clip[:, 9:10].expand(-1, 7, -1, -1))
    assert np.array_equal(clip[:, 9].permute(1, 2, 0).numpy(), videos[1].frames[9, 2:34, 4:36])


def test_jpeg_and_raw_stores_give_the_same_clips(raw, compressed):
    for seed in (None, 5):
        ours, theirs = (ClipDataset(store, range(4), CLIPS, "corrected", seed) for store in (raw, compressed))
        for key in [(video, 1, 1) for video in range(4)]:
            difference = (ours[key][0].float() - theirs[key][0].float()).abs()
            assert difference.mean() < 6  # colour is stored at half the resolution; another frame is 60 off
            assert ours[key][1:] == theirs[key][1:]


def test_a_clip_depends_on_seed_epoch_part_and_video_only(raw):
    whole = ClipDataset(raw, [0, 1, 2, 3], CLIPS, "corrected", seed=7)
    partial = ClipDataset(raw, [3, 0], CLIPS, "corrected", seed=7)
    assert torch.equal(whole[3, 2, 1][0], partial[0, 2, 1][0])
    assert torch.equal(whole[0, 2, 1][0], partial[1, 2, 1][0])
    clips = [whole[0, epoch, part][0] for epoch in (1, 2, 3) for part in (0, 1)]
    clips.append(ClipDataset(raw, [0], CLIPS, "corrected", seed=8)[0, 1, 0][0])
    assert sum(torch.equal(a, b) for a in clips for b in clips) == len(clips)


def test_orders_and_views_draw_from_different_streams(raw):
    """A seed of four numbers whose last is 0 equals one of three: video 0 must not follow the order."""
    order = np.random.default_rng([7, 1, 1]).permutation(1000)
    mine = [key[0] for batch in training_order(1000, 10, 7, 1, 1) for key in batch]
    assert mine != order.tolist()


def test_a_damaged_frame_is_named(tmp_path):
    store = make_store(tmp_path, [Video("run", "v_1", picture(1, 20))])
    part = part_path(tmp_path / "stores/drawn/rgb", "run", "v_1")
    about = {"source_digest": "v_1", "fps": 25.0, "width": 40, "height": 36}
    part.unlink()
    with PartWriter(part, "jpeg", about) as writer:
        for number in range(20):
            writer.append(b"no picture" if number == 9 else jpeg(picture(1, 20)[number]))
    with pytest.raises(GkdError, match="cannot be decoded") as caught:
        ClipDataset(store, [0], CLIPS, "corrected", None)[0, 0, 0]
    assert caught.value.where == "run/v_1, frames 2 to 17"
    assert "gkd prepare" in caught.value.hint


# ---- normalise ----


@pytest.mark.parametrize(("mean", "std"), [([0.45], [0.225]), ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
def test_normalise_is_the_formula(mean, std):
    clips = torch.randint(0, 256, (2, 3, 4, 5, 6), dtype=torch.uint8)
    settings = ClipSettings(mean=mean, std=std)
    m, s = (torch.tensor(v * (3 // len(v)), dtype=torch.float64).view(1, 3, 1, 1, 1) for v in (mean, std))
    expected = (clips.double() / 255 - m) / s
    found = normalise(clips, settings)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)


def test_normalise_refuses_means_for_other_channels():
    flow = torch.zeros(1, 2, 16, 4, 4, dtype=torch.uint8)
    with pytest.raises(GkdError, match="2 channels"):
        normalise(flow, ClipSettings())
    assert normalise(flow, ClipSettings(mean=[0.5], std=[0.226])).shape == flow.shape


# ---- hold_out ----


def rows(groups: int, per_group: int, classes: int = 3) -> list[VideoRow]:
    return [
        VideoRow(f"v{g}_{i}", f"c{c}", c, 30, 25.0, 40, 36, f"g{g}" if per_group > 1 else "", "")
        for c in range(classes)
        for g in range(groups)
        for i in range(per_group)
    ]


@pytest.mark.parametrize(("groups", "per_group"), [(10, 1), (25, 4), (5, 2)])
def test_hold_out_takes_whole_groups_of_every_class(groups, per_group):
    videos = rows(groups, per_group)
    kept, held = hold_out(videos, range(len(videos)), 0.1)
    assert sorted(kept + held) == list(range(len(videos)))
    for label in range(3):
        ours = [videos[v] for v in held if videos[v].label == label]
        assert len(ours) == max(1, round(0.1 * groups)) * per_group
        names = {(row.group or row.name) for row in ours}
        assert not any((videos[v].group or videos[v].name) in names for v in kept if videos[v].label == label)


def test_hold_out_hangs_on_names_not_on_order():
    videos = rows(10, 2)
    shuffled = np.random.default_rng(0).permutation(len(videos)).tolist()
    _, held = hold_out(videos, range(len(videos)), 0.2)
    _, again = hold_out(videos, shuffled, 0.2)
    moved = [videos[v] for v in shuffled]
    _, elsewhere = hold_out(moved, range(len(moved)), 0.2)
    assert sorted(again) == held
    assert {moved[v] for v in elsewhere} == {videos[v] for v in held}


def test_hold_out_spares_small_classes_and_can_be_off():
    videos = rows(4, 5)
    assert hold_out(videos, range(len(videos)), 0.5)[1] == []
    many = rows(10, 1)
    assert hold_out(many, range(len(many)), 0) == (list(range(30)), [])
