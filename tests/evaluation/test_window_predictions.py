"""evaluation.windows: however windows are grouped, each is predicted as if alone; files come back."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from gkdcli.data.clips import normalise
from gkdcli.data.store import Store
from gkdcli.data.windows import test_offsets
from gkdcli.errors import GkdError
from gkdcli.evaluation import windows
from gkdcli.evaluation.decode import Heads
from gkdcli.evaluation.windows import (
    VideoWindows,
    WindowFile,
    count_windows,
    predict_windows,
    save_windows,
)
from gkdcli.models.detector import Detector
from tests.stores import Frames, Video, make_store, picture
from tests.training.detection_jobs import networks, page

SETTINGS = page()
STRIDE = 48
LENGTHS = {"long": 300, "short": 70, "exact": 128, "other": 200}


@pytest.fixture(scope="module")
def videos() -> dict[str, Frames]:
    return {name: picture(n, frames) for n, (name, frames) in enumerate(LENGTHS.items())}


@pytest.fixture(scope="module")
def store(videos, tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("store")
    return make_store(folder, [Video("test", name, frames, "test") for name, frames in videos.items()], "raw")


@pytest.fixture(scope="module")
def network() -> Detector:
    return networks(SETTINGS, 3).student.eval().double()  # what remains of a difference is not rounding


def run(store, network, rows=None, batch=4, workers=0, ticks=None, forward=None) -> Iterator[VideoWindows]:
    return predict_windows(
        store,
        range(len(LENGTHS)) if rows is None else rows,
        forward or (lambda clips: network(clips.double())),
        SETTINGS.clips,
        stride=STRIDE,
        batch_size=batch,
        workers=workers,
        device=torch.device("cpu"),
        tick=lambda done, text="": ticks.append(done) if ticks is not None else None,
    )


@pytest.fixture(scope="module")
def predicted(store, network) -> dict[str, VideoWindows]:
    return {video.name: video for video in run(store, network)}


def alone(network: Detector, frames: Frames, offset: int) -> list[np.ndarray]:
    """One window by hand: the middle of each frame, 0 after normalisation where the video has ended."""
    top, left = round((36 - 32) / 2), round((40 - 32) / 2)
    clip = np.zeros((128, 32, 32, 3), np.uint8)
    taken = frames[offset : offset + 128, top : top + 32, left : left + 32]
    clip[: len(taken)] = taken
    pixels = normalise(torch.from_numpy(clip).permute(3, 0, 1, 2)[None], SETTINGS.clips)
    pixels[:, :, len(taken) :] = 0
    with torch.no_grad():
        return [output[0].numpy() for output in network(pixels.double())]


def assert_same(one: VideoWindows, other: VideoWindows, tolerance: float = 0.0) -> None:
    assert (one.name, one.fps, one.offsets.tolist()) == (other.name, other.fps, other.offsets.tolist())
    for ours, theirs in zip(one.heads, other.heads, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def test_windows_are_what_one_at_a_time_gives(predicted, network, videos):
    """Also those of a short video, and the last full one that the stride does not meet."""
    assert list(predicted) == sorted(LENGTHS)
    assert predicted["long"].offsets.tolist() == [0, 48, 96, 144, 172]
    assert predicted["short"].offsets.tolist() == predicted["exact"].offsets.tolist() == [0]
    for name, video in predicted.items():
        assert video.fps == 25.0
        assert all(output.dtype == np.float32 for output in video.heads)
        for place, offset in enumerate(video.offsets):
            for ours, expected in zip(video.heads, alone(network, videos[name], offset), strict=True):
                np.testing.assert_allclose(ours[place], expected, rtol=1e-5, atol=1e-5)
    long = predicted["long"].heads
    assert np.ptp(long.loc, axis=0).max() > 1e-4  # windows do differ


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True)])
def test_windows_for_a_gpu_are_read_into_page_locked_memory(store, monkeypatch, device, pinned):
    asked = []

    def nothing(*_, pin=False, **__):
        asked.append(pin)
        yield from ()

    monkeypatch.setattr(windows, "window_blocks", nothing)
    options = {"stride": STRIDE, "batch_size": 4, "workers": 0, "tick": lambda *_: None}
    device = torch.device(device)
    assert not list(predict_windows(store, [0], lambda _: [], SETTINGS.clips, device=device, **options))
    assert asked == [pinned]


@pytest.mark.parametrize("batch", [1, 2, 3, 64])
def test_the_size_of_a_pass_does_not_matter(store, network, predicted, batch):
    found = list(run(store, network, batch=batch))
    assert [video.name for video in found] == sorted(LENGTHS)
    for video in found:
        assert_same(video, predicted[video.name], 1e-5)


@pytest.mark.parametrize("workers", [1, 2])
def test_reading_processes_change_nothing(store, network, predicted, workers):
    found = list(run(store, network, workers=workers))
    assert sorted(video.name for video in found) == sorted(LENGTHS)
    if workers == 1:
        assert [video.name for video in found] == list(predicted)
    for video in found:
        assert_same(video, predicted[video.name])


def test_chosen_videos_come_in_the_order_asked_for(store, network):
    names = [video.name for video in store.videos]
    assert [video.name for video in run(store, network, rows=[3, 0])] == [names[3], names[0]]


def test_progress_counts_windows(store, network):
    ticks: list[int] = []
    list(run(store, network, batch=2, ticks=ticks))
    total = sum(len(test_offsets(frames, 128, STRIDE)) for frames in LENGTHS.values())
    assert ticks == sorted(set(ticks))
    assert ticks[-1] == total == count_windows(store, range(len(LENGTHS)), 128, STRIDE)


def test_no_video_is_read_before_the_one_before_it_is_done(store, network, monkeypatch):
    read: list[int] = []
    frames = Store.frames
    monkeypatch.setattr(Store, "frames", lambda *given: (read.append(given[1]), frames(*given))[1])
    predictions = run(store, network, batch=1)
    for row in range(len(LENGTHS)):
        next(predictions)
        assert set(read) == set(range(row + 1))


def test_little_memory_is_said_with_what_helps(store):
    def forward(clips: torch.Tensor) -> list[torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(GkdError, match="batch 4 of") as caught:
        list(run(store, None, forward=forward))
    assert "eval.batch_size=2" in caught.value.hint


# ---- files ----


def made_up(name: str, windows: int = 2, seed: int = 0) -> VideoWindows:
    rng = np.random.default_rng(seed)
    sizes = {"loc": 2, "conf": 4, "prop_loc": 2, "prop_conf": 4, "center": 1}
    heads = Heads(*(rng.random((windows, 63, size)).astype(np.float32) for size in sizes.values()))
    return VideoWindows(name, 10.0 + seed, np.arange(windows) * 64, heads)


def test_a_file_gives_back_every_video_to_the_bit(tmp_path: Path, predicted):
    path = tmp_path / "predictions.h5"
    save_windows(path, predicted.values(), {"fingerprint": "abc", "stride": "48"})
    found = WindowFile(path)
    assert len(found) == len(predicted)
    assert found.names == list(predicted)
    assert found.made_with == {"fingerprint": "abc", "stride": "48"}
    for place, name in reversed(list(enumerate(found.names))):  # any order
        assert_same(found[place], predicted[name])


def test_names_of_any_kind_come_back(tmp_path: Path):
    names = ["a/b", "../c", "Größe 1", "\udcff broken", ""]
    save_windows(tmp_path / "p.h5", (made_up(name, seed=n) for n, name in enumerate(names)), {})
    found = WindowFile(tmp_path / "p.h5")
    assert found.names == [video.name for video in (found[n] for n in range(5))] == names
    assert [found[n].fps for n in range(5)] == [10.0, 11.0, 12.0, 13.0, 14.0]


def test_videos_are_written_as_they_come_and_let_go_of(tmp_path: Path):
    alive: list[weakref.ref[VideoWindows]] = []
    most = 0

    def stream() -> Iterator[VideoWindows]:
        nonlocal most
        for number in range(6):
            gc.collect()
            most = max(most, sum(one() is not None for one in alive))
            video = made_up(f"v{number}", seed=number)
            alive.append(weakref.ref(video))
            yield video
            del video

    save_windows(tmp_path / "p.h5", stream(), {})
    assert most <= 1  # the one before
    assert len(WindowFile(tmp_path / "p.h5")) == 6


def test_a_file_gets_its_name_when_all_is_in_it(tmp_path: Path):
    def failing() -> Iterator[VideoWindows]:
        yield made_up("v0")
        raise GkdError("a video is damaged", "v1", "prepare it again")

    path = tmp_path / "p.h5"
    save_windows(path, [made_up("before")], {})
    with pytest.raises(GkdError, match="a video is damaged"):
        save_windows(path, failing(), {})
    assert WindowFile(path).names == ["before"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.h5"]


def test_a_file_is_open_only_while_it_is_read(tmp_path: Path):
    path = tmp_path / "p.h5"
    save_windows(path, [made_up("v0"), made_up("v1")], {})
    found = WindowFile(path)
    assert found[1].name == "v1"
    with h5py.File(path, "a") as file:  # refused as long as this process has it open for reading
        assert "videos/1" in file
    assert found[0].name == "v0"


@pytest.mark.parametrize("others", [(["v1", "v0"], {"stride": "64"}), (["v0", "v1"], {"stride": "32"})])
def test_a_file_that_another_command_replaced_is_not_taken_for_the_first(tmp_path: Path, others):
    """Readers in several processes finish in any order, so a place may be another video's."""
    path = tmp_path / "p.h5"
    save_windows(path, map(made_up, ["v0", "v1"]), {"stride": "64"})
    found = WindowFile(path)
    names, made_with = others
    save_windows(path, map(made_up, names), made_with)
    with pytest.raises(GkdError, match="have changed"):
        found[0]


def test_a_missing_or_damaged_file_is_said_with_what_to_do(tmp_path: Path):
    path = tmp_path / "p.h5"
    with pytest.raises(GkdError, match="no saved predictions") as caught:
        WindowFile(path)
    assert "--rescore" in caught.value.hint
    save_windows(path, [made_up(f"v{n}", windows=40, seed=n) for n in range(3)], {})
    whole = path.read_bytes()
    for damaged in (b"", b"nothing of the kind", whole[: len(whole) // 2], whole[:-100]):
        path.write_bytes(damaged)
        with pytest.raises(GkdError, match="damaged") as caught:
            WindowFile(path)
        assert str(path) in caught.value.where
        assert "--rescore" in caught.value.hint


@pytest.mark.parametrize("lost", ["names", "videos/1", "videos/1/conf", "videos/1/offsets"])
def test_what_is_missing_in_a_file_is_damage(tmp_path: Path, lost: str):
    path = tmp_path / "p.h5"
    save_windows(path, [made_up("v0"), made_up("v1")], {})
    with h5py.File(path, "a") as file:
        del file[lost]
    with pytest.raises(GkdError, match="damaged"):
        WindowFile(path)[1]
    if lost != "names":
        assert WindowFile(path)[0].name == "v0"


def test_bytes_that_went_bad_are_damage_or_other_numbers_never_a_crash(tmp_path: Path):
    path = tmp_path / "p.h5"
    save_windows(path, [made_up("v0"), made_up("v1")], {"fingerprint": "abc"})
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refused: list[str] = []
    for place in itertools.chain(range(0, 96, 8), rng.integers(0, len(whole), 60)):
        bad = bytearray(whole)
        bad[place : place + 8] = rng.integers(0, 256, len(bad[place : place + 8]), np.uint8).tobytes()
        path.write_bytes(bad)
        try:
            found = WindowFile(path)
            for number in range(len(found)):
                found[number]
        except GkdError as error:
            refused.append(error.what)
    assert len(refused) > 5
    assert all("damaged" in what for what in refused)
