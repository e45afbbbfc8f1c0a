"""data.window_clips: training clips are named by (seed, epoch, part, window); whole videos are read once."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from gkdcli.data.clips import working_size
from gkdcli.data.loader import load, training_order
from gkdcli.data.parts import PartWriter, part_path
from gkdcli.data.segments import Segment
from gkdcli.data.store import Store
from gkdcli.data.window_clips import Block, WindowDataset, WindowItem, segment_rows, window_blocks
from gkdcli.data.windows import boundary_maps, test_offsets, training_windows
from gkdcli.errors import GkdError
from gkdcli.settings import ClipSettings
from tests.stores import Video, jpeg, make_store, picture

CLIPS = ClipSettings(length=32, crop=32, mean=[0.5], std=[0.5], stride=12)
LONG, SHORT = 0, 1  # rows of the store


def action(first: float, last: float, label: int) -> Segment:
    return Segment(first / 10, last / 10, label, first, last)


SEGMENTS = [
    [action(3.5, 14.25, 0), action(40, 52, 2)],
    [action(4, 15, 1)],
    [action(2, 20, 1)],
    [action(20, 40, 2), action(10, 15, 0), action(42.5, 48, 1)],
    [],
]


@pytest.fixture(scope="module")
def videos() -> list[Video]:
    return [
        Video("train", "a_long", picture(1, 75)),
        Video("train", "b_short", picture(2, 20)),
        Video("train", "c_whole", picture(3, 32)),
        Video("train", "d_wide", picture(4, 50, 40, 60)),
        Video("train", "e_small", picture(5, 40, 20, 24)),
    ]


@pytest.fixture(scope="module")
def raw(videos: list[Video], tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("raw"), videos, "raw")


@pytest.fixture(scope="module")
def compressed(videos: list[Video], tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("jpeg"), videos, "jpeg")


def dataset(store: Store, recipe: str = "corrected", seed: int | None = 7) -> WindowDataset:
    return WindowDataset(store, range(5), SEGMENTS, CLIPS, recipe, seed)


def same(one: WindowItem, other: WindowItem) -> bool:
    splices = [None if item.splice is None else item.splice.frames.tolist() for item in (one, other)]
    return bool(torch.equal(one.clip, other.clip)) and splices[0] == splices[1]


# ---- training clips ----


def test_the_clips_are_those_of_the_lists(raw):
    found = dataset(raw)
    expected = []
    for video, actions in enumerate(SEGMENTS):
        rows = np.array([(one.first, one.last, one.label + 1) for one in actions]).reshape(-1, 3)
        windows, shortest = training_windows(raw.videos[video].frames, rows, 32, 12)
        expected += [(video, window.offset, window.segments.tolist(), shortest) for window in windows]
    assert len(found) == len(expected) > 6
    assert [(v, w.offset, w.segments.tolist(), s) for v, w, s in found.windows] == expected
    assert segment_rows([]).shape == (0, 3)


def crops_of(item: WindowItem, offset: int, frames: np.ndarray) -> set[tuple[int, int, bool]]:
    """Every (top, left, mirrored) that explains the pixels of a clip."""
    ours = item.clip.permute(1, 2, 3, 0).numpy()
    window = frames[offset : offset + 32]
    return {
        (top, left, flip)
        for top in range(frames.shape[1] - 31)
        for left in range(frames.shape[2] - 31)
        for flip in (False, True)
        for seen in [window[:, top : top + 32, left : left + 32][:, :, :: -1 if flip else 1]]
        if np.array_equal(ours[0], seen[0]) and np.array_equal(ours[: len(window)], seen)
    }


def test_crops_are_random_and_uniform_and_half_are_mirrored(raw, videos):
    found = dataset(raw)
    seen: Counter[tuple[int, int, bool]] = Counter()
    for epoch in range(200):
        (crop,) = crops_of(found[0, epoch, 1], found.windows[0][1].offset, videos[LONG].frames)
        seen[crop] += 1
    tops, lefts, flips = (Counter(crop[i] for crop in seen.elements()) for i in range(3))
    assert set(tops) == set(range(36 - 32 + 1))
    assert set(lefts) == set(range(40 - 32 + 1))
    assert min(tops.values()) > 20
    assert min(lefts.values()) > 8
    assert 70 < flips[True] < 130


def test_without_a_seed_crops_are_central_and_nothing_is_drawn(raw, videos):
    found = dataset(raw, seed=None)
    for position in range(len(found)):
        item = found[position, 3, 1]
        frames = videos[found.windows[position][0]].frames
        centre = (round((frames.shape[1] - 32) / 2), round((frames.shape[2] - 32) / 2), False)
        assert crops_of(item, found.windows[position][1].offset, frames) == {centre}
        assert item.splice is None


def test_flow_is_mirrored_in_value_too_where_corrected(raw, videos, monkeypatch):
    """The pictures stand for flow: channel 0 is x (METHOD.md 8 (18))."""
    clips = {}
    for recipe in ("official", "corrected"):
        found = dataset(raw, recipe)
        plain = [found[0, epoch, 1].clip for epoch in range(8)]
        flips = [
            next(iter(crops_of(found[0, epoch, 1], found.windows[0][1].offset, videos[LONG].frames)))[2]
            for epoch in range(8)
        ]
        with monkeypatch.context() as patch:
            patch.setattr(raw, "modality", "flow")
            patch.setattr("gkdcli.data.window_clips.CHANNELS", {"flow": 3})
            clips[recipe] = [found[0, epoch, 1].clip for epoch in range(8)]
        assert any(flips)
        assert not all(flips)
        for before, after, flip in zip(plain, clips[recipe], flips, strict=True):
            expected = before.clone()
            if flip and recipe == "corrected":
                expected[0] = 255 - expected[0]
            assert torch.equal(after, expected)


def test_what_follows_a_short_video_is_black_or_to_be_zeroed(raw):
    for recipe, real in (("official", 32), ("corrected", 20)):
        found = dataset(raw, recipe)
        (position,) = [p for p, (video, _, _) in enumerate(found.windows) if video == SHORT]
        item = found[position, 1, 1]
        assert item.frames == real
        assert not item.clip[:, 20:].any()
        assert item.clip[:, :20].float().mean() > 60
        assert all(found[p, 1, 1].frames == 32 for p in range(len(found)) if p != position)


def test_a_clip_depends_on_seed_epoch_part_and_window_only(raw):
    first, again = dataset(raw), dataset(raw)
    again[3, 9, 0]
    assert same(first[0, 2, 1], again[0, 2, 1])
    clips = [first[0, epoch, part].clip for epoch in (1, 2, 3) for part in (0, 1)]
    clips.append(dataset(raw, seed=8)[0, 1, 0].clip)
    assert sum(torch.equal(a, b) for a in clips for b in clips) == len(clips)


def test_two_windows_of_the_same_frames_draw_differently(raw):
    twice = WindowDataset(raw, [LONG, LONG], SEGMENTS, CLIPS, "corrected", 7)
    half = len(twice) // 2
    assert twice.name_of(0) == twice.name_of(half)
    assert any(not same(twice[0, epoch, 1], twice[half, epoch, 1]) for epoch in range(3))


def test_small_frames_are_scaled_up_to_the_crop(raw):
    clips = WindowDataset(raw, [4], [[]] * 4 + [[action(3, 20, 0)]], CLIPS, "corrected", 7)
    assert working_size(20, 24, CLIPS) == (32, 38)
    item = clips[0, 1, 1]
    assert item.clip.shape == (3, 32, 32, 32)
    assert item.clip.float().std() > 30


def test_jpeg_and_raw_stores_give_the_same_clips(raw, compressed):
    ours, theirs = dataset(raw), dataset(compressed)
    for position in range(len(ours)):
        one, other = ours[position, 1, 1], theirs[position, 1, 1]
        assert (one.clip.float() - other.clip.float()).abs().mean() < 6
        assert one.segments.tolist() == other.segments.tolist()
        assert one[4:] == other[4:]


# ---- batches ----


def test_a_batch_holds_its_clips_padded_where_segments_are_fewer(raw):
    found = dataset(raw)
    keys = [(position, 1, 1) for position in range(len(found))]
    items = [found[key] for key in keys]
    (batch,) = load(found, [keys], workers=0)
    most = max(len(item.segments) for item in items)
    assert min(len(item.segments) for item in items) < most
    assert batch.clips.shape == (len(items), 3, 32, 32, 32)
    assert batch.targets["segments"].shape == (len(items), most, 2)
    kinds = {name: batch.targets[name].dtype for name in ("segments", "labels", "valid", "maps")}
    assert kinds == {
        "segments": torch.float32,
        "labels": torch.int64,
        "valid": torch.bool,
        "maps": torch.float32,
    }
    for row, item in enumerate(items):
        count = len(item.segments)
        assert torch.equal(batch.clips[row], item.clip)
        np.testing.assert_allclose(batch.targets["segments"][row, :count], item.segments[:, :2], rtol=1e-6)
        assert batch.targets["labels"][row].tolist() == [
            *item.segments[:, 2].astype(int),
            *[0] * (most - count),
        ]
        assert batch.targets["valid"][row].tolist() == [True] * count + [False] * (most - count)
        assert not batch.targets["segments"][row, count:].any()
        np.testing.assert_array_equal(batch.targets["maps"][row], boundary_maps(item.segments, 32))
        assert batch.targets["spliced"][row] == (item.splice is not None)
        frames = np.arange(32) if item.splice is None else item.splice.frames
        assert batch.targets["splices"][row].tolist() == frames.tolist()
        parts = np.zeros((3, 2)) if item.splice is None else item.splice.proposals
        np.testing.assert_array_equal(batch.targets["proposals"][row], parts)
    assert batch.targets["spliced"].any()
    assert not batch.targets["spliced"].all()
    assert batch.targets["frames"].tolist() == [item.frames for item in items]
    assert batch.samples == list(range(len(items)))
    assert found.name_of(0).endswith("a_long@0")


def test_workers_read_the_same_batches(raw):
    found = dataset(raw)
    keys = training_order(len(found), 3, 1, 1, 1)
    alone, shared = (list(load(found, keys, workers)) for workers in (0, 1))
    assert [batch.samples for batch in alone] == [batch.samples for batch in shared]
    for ours, theirs in zip(alone, shared, strict=True):
        assert torch.equal(ours.clips, theirs.clips)
        assert ours.targets.keys() == theirs.targets.keys()
        assert all(torch.equal(value, theirs.targets[name]) for name, value in ours.targets.items())
    assert multiprocessing.active_children() == []


def test_a_damaged_video_is_named(tmp_path: Path):
    store = make_store(tmp_path, [Video("train", "v_1", picture(1, 40))])
    part = part_path(tmp_path / "stores/drawn/rgb", "train", "v_1")
    part.unlink()
    about = {"source_digest": "v_1", "fps": 25.0, "width": 40, "height": 36}
    with PartWriter(part, "jpeg", about) as writer:
        for number in range(40):
            writer.append(b"no picture" if number == 35 else jpeg(picture(1, 40)[number]))
    found = WindowDataset(store, [0], [[action(10, 20, 0)]], CLIPS, "corrected", 1)
    with pytest.raises(GkdError, match="cannot be decoded") as caught:
        list(load(found, training_order(len(found), 4, 1, 1, 1), workers=0))
    assert "train/v_1" in caught.value.where
    with pytest.raises(GkdError, match="cannot be decoded"):
        list(window_blocks(store, [0], CLIPS, stride=16, batch=2, workers=0))


# ---- whole videos ----


def blocks(store: Store, stride: int, batch: int, workers: int = 0) -> list[Block]:
    return list(window_blocks(store, range(5), CLIPS, stride=stride, batch=batch, workers=workers))


def expected_window(frames: np.ndarray, offset: int) -> np.ndarray:
    """(C, T, crop, crop): the window alone, centre crop, zeros behind it."""
    height, width = frames.shape[1:3]
    top, left = round((height - 32) / 2), round((width - 32) / 2)
    window = np.zeros((32, 32, 32, 3), np.uint8)
    part = frames[offset : offset + 32, top : top + 32, left : left + 32]
    window[: len(part)] = part
    return window.transpose(3, 0, 1, 2)


@pytest.mark.parametrize("stride", [1, 12, 31, 32, 40])
@pytest.mark.parametrize("batch", [1, 3, 100])
def test_blocks_hold_the_windows_of_every_video_in_order(raw, videos, stride, batch):
    found = blocks(raw, stride, batch)
    assert [block.video for block in found] == sorted(block.video for block in found)
    for video in range(4):  # the fifth is scaled
        ours = [block for block in found if block.video == video]
        frames = videos[video].frames
        offsets = test_offsets(len(frames), 32, stride)
        assert [offset for block in ours for offset in block.offsets.tolist()] == offsets
        assert [block.last for block in ours] == [False] * (len(ours) - 1) + [True]
        assert all(len(block.offsets) == batch for block in ours[:-1])
        for block in ours:
            for offset, clip, real in zip(block.offsets.tolist(), block.clips, block.frames, strict=True):
                np.testing.assert_array_equal(clip, expected_window(frames, offset))
                assert real == min(len(frames), 32)


def test_a_block_is_its_receivers_own(raw, videos):
    """The next one overlaps with it, but is not read out of it: a worker's is being moved by then."""
    offsets = test_offsets(len(videos[LONG].frames), 32, 12)
    found = window_blocks(raw, [LONG], CLIPS, stride=12, batch=2, workers=0)
    seen = []
    for block in found:
        seen += [clip.clone() for clip in block.clips]
        block.clips.fill_(7)
    assert len(seen) == len(offsets) > 4
    for clip, offset in zip(seen, offsets, strict=True):
        np.testing.assert_array_equal(clip, expected_window(videos[LONG].frames, offset))


@pytest.mark.parametrize("stride", [1, 12, 32, 40])
def test_every_frame_is_read_once(compressed, monkeypatch, stride):
    reads: Counter[tuple[int, int]] = Counter()
    read = Store.frames

    def counted(self: Store, video: int, start: int, count: int):
        reads.update((video, frame) for frame in range(start, start + count))
        return read(self, video, start, count)

    monkeypatch.setattr(Store, "frames", counted)
    blocks(compressed, stride, 2)
    needed = {
        (video, frame)
        for video, row in enumerate(compressed.videos)
        for offset in test_offsets(row.frames, 32, stride)
        for frame in range(offset, min(offset + 32, row.frames))
    }
    assert set(reads) == needed, "a stride beyond the window leaves frames out"
    assert set(reads.values()) == {1}
    if stride <= 32:
        assert len(needed) == sum(row.frames for row in compressed.videos)


def test_no_read_is_longer_than_a_window(raw, monkeypatch):
    """So memory does not grow with a video: only the blocks in work are held."""
    counts = []
    read = Store.frames

    def counted(self: Store, video: int, start: int, count: int):
        counts.append(count)
        return read(self, video, start, count)

    monkeypatch.setattr(Store, "frames", counted)
    blocks(raw, 12, 4)
    assert max(counts) == 32


def test_workers_share_videos_and_keep_their_blocks_in_order(raw):
    alone, shared = blocks(raw, 12, 2), blocks(raw, 12, 2, workers=2)
    assert len(alone) == len(shared)
    for video in range(5):
        ours, theirs = ([block for block in found if block.video == video] for found in (alone, shared))
        for one, other in zip(ours, theirs, strict=True):
            assert one.last == other.last
            assert all(torch.equal(a, b) for a, b in zip(one[1:4], other[1:4], strict=True))
    assert multiprocessing.active_children() == []


def test_an_error_in_a_worker_arrives_as_it_is(tmp_path: Path):
    store = make_store(tmp_path, [Video("test", f"v{seed}", picture(seed, 40)) for seed in range(3)])
    part = part_path(tmp_path / "stores/drawn/rgb", "test", "v1")
    part.write_bytes(part.read_bytes()[:2000])
    found = window_blocks(store, range(3), CLIPS, stride=16, batch=4, workers=1)
    assert next(found).video == 0
    with pytest.raises(GkdError, match="damaged") as caught:
        list(found)
    assert "v1" in caught.value.where
    assert multiprocessing.active_children() == []
