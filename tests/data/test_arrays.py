"""data.arrays: published arrays become the parts that videos become, mapped and never loaded, or rejects."""

from __future__ import annotations

import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from gkdcli.data import arrays
from gkdcli.data.arrays import ArrayVideo
from gkdcli.data.detection_files import find_annotations, read_annotations
from gkdcli.data.detection_videos import list_arrays, list_videos
from gkdcli.data.extract import Report, prepare_parts
from gkdcli.data.parts import read_attributes
from gkdcli.data.sources import Stated
from gkdcli.data.store import Store
from gkdcli.data.video import BadFlow, BadVideo
from gkdcli.settings import DataSettings
from tests.detection_sets import TEST, TRAIN, draw_videos, write_array, write_csvs

DATA = DataSettings(storage="raw", size=[112, 112], fps=10.0, flow="farneback")


def _frames(count: int = 40, channels: int = 3, side: int = 112, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, channels), np.uint8)


def _prepare(root: Path, folder: Path, modalities: tuple[str, ...], name: str = "set") -> Report:
    found = read_annotations(find_annotations(root / "lists", []))
    has_arrays = any(folder.rglob("*.npy"))
    listing = list_arrays(found, folder, modalities) if has_arrays else list_videos(found, folder)
    return prepare_parts(listing, root / name, name, modalities, DATA, workers=1)


def _content(store: Path, modality: str) -> dict[str, bytes]:
    content = {}
    for path in sorted((store / modality).rglob("*.h5")):
        with h5py.File(path) as file:
            content[str(path.relative_to(store))] = file["frames"][:].tobytes()
    return content


def _publish(root: Path, store: Path) -> Path:
    """The stored frames and flow as arrays, in the published layout."""
    for modality, infix in (("rgb", ""), ("flow", "_flow")):
        for path in (store / modality).rglob("*.h5"):
            with h5py.File(path) as file:
                write_array(root / f"{path.parent.name}{infix}_npy" / f"{path.stem}.npy", file["frames"][:])
    return root


def test_arrays_give_the_store_that_their_videos_give(tmp_path: Path) -> None:
    write_csvs(tmp_path / "lists")
    draw_videos(tmp_path / "videos")
    report = _prepare(tmp_path, tmp_path / "videos", ("rgb", "flow"))
    assert (report.rejected, report.problems) == ([], [])
    _publish(tmp_path / "npy", tmp_path / "set")
    report = _prepare(tmp_path, tmp_path / "npy", ("rgb", "flow"), "from")
    assert (report.prepared, report.rejected, report.problems) == (4, [], [])
    for modality in ("rgb", "flow"):
        wanted, got = (_content(tmp_path / name, modality) for name in ("set", "from"))
        assert len(wanted) == 4
        assert got == wanted
        ours, theirs = (Store.open(tmp_path / name / f"{modality}.h5") for name in ("from", "set"))
        assert ours.segments == theirs.segments
        assert [(v.name, v.label, v.frames, v.fps) for v in ours.videos] == [
            (v.name, -1, 40, 10.0) for v in theirs.videos
        ]
    # one stream after the other: nothing is done again, and each part knows its own file
    assert _prepare(tmp_path, tmp_path / "npy", ("flow",), "from").skipped == 4
    sources = [
        read_attributes(tmp_path / "from" / modality / "test" / "video_test_0000001.h5")["source"]
        for modality in ("rgb", "flow")
    ]
    assert sources == ["test_npy/video_test_0000001.npy", "test_flow_npy/video_test_0000001.npy"]


def test_flow_is_computed_where_no_array_of_it_is(tmp_path: Path) -> None:
    write_csvs(tmp_path / "lists")
    draw_videos(tmp_path / "videos")
    _prepare(tmp_path, tmp_path / "videos", ("rgb", "flow"))
    _publish(tmp_path / "npy", tmp_path / "set")
    for path in (tmp_path / "npy").glob("*_flow_npy/*.npy"):
        path.unlink()
    report = _prepare(tmp_path, tmp_path / "npy", ("rgb", "flow"), "from")
    assert report.rejected == []
    assert _content(tmp_path / "from", "flow") == _content(tmp_path / "set", "flow")


def test_the_rate_is_the_stated_one_else_the_one_asked_for(tmp_path: Path) -> None:
    path = write_array(tmp_path / "a.npy", _frames(3))
    with ArrayVideo(path, stated=Stated(30.0, 9, 12.5, 3)) as video:
        assert video.sampling(DATA)[1] == 12.5
        assert video.info.fps == 30.0
    assert ArrayVideo(path).sampling(DATA)[1] == 10.0
    with pytest.raises(BadVideo, match=r"set data\.fps"):
        ArrayVideo(path).sampling(DATA.model_copy(update={"fps": 0.0}))


def test_flow_of_one_frame_fewer_repeats_its_last(tmp_path: Path) -> None:
    rgb, flow = _frames(5), _frames(4, 2)
    video = ArrayVideo(write_array(tmp_path / "a.npy", rgb), write_array(tmp_path / "flow" / "a.npy", flow))
    assert (video.has_frames, video.has_flow) == (True, True)
    stored = np.stack(list(video.flows(DATA)))
    np.testing.assert_array_equal(stored, flow[[0, 1, 2, 3, 3]])
    np.testing.assert_array_equal(np.stack([p.stored(DATA) for p in video.pictures(DATA)]), rgb)
    assert len(list(ArrayVideo(tmp_path / "flow" / "a.npy").flows(DATA))) == 4


def _pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"frames": [1]}))


def _objects(path: Path) -> None:
    np.save(path, np.array([{"a": 1}], object), allow_pickle=True)


def _cut(path: Path) -> None:
    np.save(path, _frames(4))
    path.write_bytes(path.read_bytes()[:-1000])


def _archive(path: Path) -> None:
    with open(path, "wb") as file:
        np.savez(file, frames=_frames(2))


def _saved(array: Any) -> Callable[[Path], None]:
    return lambda path: np.save(path, array)


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickle": (_pickled, "pickled objects, which are never read"),
    "objects": (_objects, "pickled objects, which are never read"),
    "cut": (_cut, "truncated"),
    "empty": (lambda path: path.touch(), "truncated"),
    "text": (lambda path: path.write_text("no array") and None, "no .npy file"),
    "archive": (_archive, "an .npz archive"),
    "float": (_saved(np.zeros((2, 112, 112, 3), np.float32)), "float32 of shape"),
    "flat": (_saved(np.zeros((112, 112, 3), np.uint8)), "not uint8"),
    "channels": (_saved(np.zeros((2, 112, 112, 4), np.uint8)), "not .T, H, W, 3."),
    "no frames": (_saved(np.zeros((0, 112, 112, 3), np.uint8)), "shape .0, 112"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_array_of_frames_is_refused(tmp_path: Path, kind: str) -> None:
    make, reason = BAD[kind]
    make(tmp_path / "a.npy")
    with pytest.raises(BadVideo, match=reason) as caught:
        ArrayVideo(tmp_path / "a.npy")
    assert "allow_pickle" not in str(caught.value)


def test_another_size_and_flow_that_does_not_fit(tmp_path: Path) -> None:
    path = write_array(tmp_path / "a.npy", _frames(5))
    small = ArrayVideo(write_array(tmp_path / "small.npy", _frames(2, side=64)))
    with pytest.raises(BadVideo, match="frames are 64x64, the store takes 112x112"):
        small.scaling(DATA)
    for array, reason in ((_frames(3, 2), "flow is 3x112x112"), (_frames(5), "3 channels, flow has 2")):
        with pytest.raises(BadFlow, match=reason):
            ArrayVideo(path, write_array(tmp_path / "flow.npy", array))


def test_bad_arrays_are_rejects_and_the_others_are_stored(tmp_path: Path) -> None:
    write_csvs(tmp_path / "lists")
    for folder, rows in (("validation", TRAIN), ("test", TEST)):
        for video in rows:
            write_array(tmp_path / f"{folder}_npy" / f"{video}.npy", _frames())
    _cut(tmp_path / "test_npy" / "video_test_0000001.npy")
    (tmp_path / "validation_npy" / "video_validation_0000002.npy").unlink()
    report = _prepare(tmp_path, tmp_path, ("rgb",))
    assert report.prepared == 2
    assert [(Path(path).name, reason.partition(":")[0]) for path, reason in report.rejected] == [
        ("video_validation_0000002.npy", "there is no such file; it is annotated"),
        ("video_test_0000001.npy", "video_test_0000001.npy"),
    ]
    write_array(tmp_path / "test_npy" / "video_test_0000001.npy", _frames())
    assert _prepare(tmp_path, tmp_path, ("rgb",)).prepared == 1


def test_a_long_array_is_never_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    load = np.load

    def watched(*words: Any, **options: Any) -> Any:
        modes.append((options.get("mmap_mode"), options.get("allow_pickle")))
        return load(*words, **options)

    monkeypatch.setattr(arrays.np, "load", watched)
    count, frame_bytes = 1500, 112 * 112 * 3
    path = tmp_path / "a.npy"
    file = np.lib.format.open_memmap(path, "w+", np.uint8, (count, 112, 112, 3))
    file[:: count // 10] = 7
    file.flush()
    del file
    tracemalloc.start()
    seen = sum(1 for _ in ArrayVideo(path).pictures(DATA))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == count
    assert set(modes) == {("r", False)}
    assert peak < count * frame_bytes / 5, peak
