"""data.extract: whatever happens to a run, the same call continues and the store comes out equal."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from gkdcli.data.annotations import scan_folder
from gkdcli.data.extract import Progress, Report, prepare_parts
from gkdcli.data.parts import read_attributes
from gkdcli.data.store import Store
from gkdcli.data.video import read_frames
from gkdcli.errors import ExitCode, GkdError
from gkdcli.files import locked
from gkdcli.settings import DataSettings
from tests.videos import draw, write_sound, write_video

DATA = DataSettings(short_side=32)


def _videos(
    folder: Path, classes: tuple[str, ...] = ("jump", "walk"), each: int = 2, frames: int = 20
) -> Path:
    for number, class_name in enumerate(classes):
        for place in range(each):
            drawn = draw(frames, seed=10 * number + place)
            write_video(folder / class_name / f"{class_name}_{place}.mp4", drawn)
    return folder


def _prepare(
    root: Path,
    data: DataSettings = DATA,
    workers: int = 1,
    retry: bool = False,
    progress: Progress | None = None,
) -> Report:
    listing = scan_folder(root / "videos", 0.5)
    return prepare_parts(
        listing, root / "mine", "mine", ("rgb",), data, workers=workers, progress=progress, retry=retry
    )


def _content(folder: Path) -> dict[str, Any]:
    """Everything in the parts, and the index's fingerprint."""
    content: dict[str, Any] = {}
    for path in sorted((folder / "rgb").rglob("*")):
        if path.is_file():
            with h5py.File(path) as file:
                data = {name: file[name][:].tobytes() for name in file}
                attributes = {key: str(value) for key, value in file.attrs.items()}
            content[str(path.relative_to(folder))] = (data, attributes)
    return content | {"fingerprint": Store.open(folder / "rgb.h5").fingerprint}


def test_a_folder_becomes_a_store(tmp_path: Path) -> None:
    _videos(tmp_path / "videos")
    calls: list[tuple[int, int, str, int]] = []
    report = _prepare(tmp_path, workers=2, progress=lambda *call: calls.append(call))
    assert (report.prepared, report.skipped, report.rejected, report.unlisted) == (4, 0, [], 0)
    assert report.frames == 80
    assert [call[:2] for call in calls] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert sum(call[3] for call in calls) == 80
    parts = list((tmp_path / "mine" / "rgb").rglob("*.h5"))
    assert report.bytes_written == sum(path.stat().st_size for path in parts)
    store = Store.open(report.indexes["rgb"])
    assert store.classes == ["jump", "walk"]
    assert [(row.name, row.frames, row.fps, row.width, row.height) for row in store.videos][:2] == [
        ("jump_0", 20, 25.0, 42, 32),
        ("jump_1", 20, 25.0, 42, 32),
    ]
    assert len(store.split(1, "train")) == len(store.split(1, "test")) == 2
    direct = list(read_frames(tmp_path / "videos" / "jump" / "jump_1.mp4", DATA))
    assert [frame.tobytes() for frame in store.frames(1, 0, 20)] == direct
    assert store.settings == DATA.stored("rgb")
    assert not (tmp_path / "mine" / "rgb.rejected.tsv").exists()


def test_a_part_says_where_it_comes_from(tmp_path: Path) -> None:
    _videos(tmp_path / "videos", ("jump",), 1)
    _prepare(tmp_path, DataSettings(size=[32, 32], fps=10, storage="raw"))
    found = read_attributes(tmp_path / "mine" / "rgb" / "jump" / "jump_0.h5")
    source = tmp_path / "videos" / "jump" / "jump_0.mp4"
    assert found["source"] == "jump_0.mp4"
    assert found["source_size"] == source.stat().st_size
    assert len(found["source_digest"]) == 64
    assert (found["fps"], found["source_fps"], found["frame_count"], found["source_frames"]) == (
        10,
        25,
        8,
        20,
    )
    assert (found["width"], found["height"], found["source_width"], found["source_height"]) == (
        32,
        32,
        64,
        48,
    )
    assert (found["sampling"], found["scaling"], found["storage"]) == (
        "one frame in 2.5",
        "PIL bicubic",
        "raw",
    )
    assert (found["schema"], found["codec"], found["damaged_frames"]) == (1, "h264", 0)
    assert found["version"]
    assert Store.open(tmp_path / "mine" / "rgb.h5").frames(0, 2, 3).shape == (3, 32, 32, 3)  # type: ignore[union-attr]


def test_a_second_run_does_nothing_and_changed_videos_are_redone(tmp_path: Path) -> None:
    folder = _videos(tmp_path / "videos")
    first = _prepare(tmp_path)
    before = _content(tmp_path / "mine")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "mine" / "rgb").rglob("*.h5")}
    os.utime(folder / "jump" / "jump_0.mp4")  # a new time, the same content
    again = _prepare(tmp_path)
    assert (again.prepared, again.skipped) == (0, 4)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert _content(tmp_path / "mine") == before
    write_video(folder / "jump" / "jump_0.mp4", draw(12, seed=77))
    write_video(folder / "walk" / "walk_2.mp4", draw(13, seed=78))
    (folder / "walk" / "walk_1.mp4").unlink()
    changed = _prepare(tmp_path)
    assert (changed.prepared, changed.skipped, changed.unlisted) == (2, 2, 1)
    store = Store.open(changed.indexes["rgb"])
    assert [row.frames for row in store.videos] == [12, 20, 20, 13]
    assert store.fingerprint != before["fingerprint"]
    assert first.indexes == changed.indexes


def test_other_settings_are_refused_with_both_values(tmp_path: Path) -> None:
    _videos(tmp_path / "videos", ("jump",), 2)
    _prepare(tmp_path)
    for _ in range(2):  # by the index, and without it by the parts
        with pytest.raises(GkdError) as caught:
            _prepare(tmp_path, DataSettings(short_side=48, fps=10))
        assert "data.short_side 32 -> 48" in caught.value.what
        assert "data.fps 0.0 -> 10.0" in caught.value.what
        assert "another" in caught.value.hint
        (tmp_path / "mine" / "rgb.h5").unlink(missing_ok=True)
    assert _prepare(tmp_path, DataSettings(short_side=32, workers=2, holdout=0.3)).skipped == 2


def test_a_store_whose_frames_were_scaled_by_another_library_is_not_continued(tmp_path: Path) -> None:
    """swscale's bicubic is about a grey level off Pillow's: not a difference to have within one store."""
    folder, data = _videos(tmp_path / "videos", ("jump",), 1), DataSettings(size=[32, 32])
    _prepare(tmp_path, data)
    part = tmp_path / "mine" / "rgb" / "jump" / "jump_0.h5"
    with h5py.File(part, "a") as file:
        file.attrs["scaling"] = "bicubic"
    with open(part, "r+b") as bare:  # parts of that time have no second line, and their length is right
        head = json.loads(bare.read(512)) | {"bytes": part.stat().st_size}
        bare.seek(0)
        bare.write(json.dumps(head).encode().ljust(2048))
    write_video(folder / "jump" / "more.mp4", draw(20))
    with pytest.raises(GkdError, match="scaled otherwise: bicubic, now PIL bicubic"):
        _prepare(tmp_path, data)


def test_bad_videos_are_recorded_and_tried_again_when_they_change(tmp_path: Path) -> None:
    folder = _videos(tmp_path / "videos", ("jump",), 2)
    bad = folder / "jump" / "bad é.mp4"
    bad.write_bytes(b"no video")
    (folder / "jump" / "empty.mp4").touch()
    write_sound(folder / "hum" / "sound.mp4")
    (folder / "jump" / ("x" * 240 + ".mp4")).write_bytes(bad.read_bytes())
    report = _prepare(tmp_path)
    reasons = {Path(path).name: reason for path, reason in report.rejected}
    assert report.prepared == 2
    assert "not a video" in reasons["bad é.mp4"]
    assert reasons["empty.mp4"] == "an empty file"
    assert "no video stream" in reasons["sound.mp4"]
    assert "too long" in reasons["x" * 240 + ".mp4"]
    lines = (tmp_path / "mine" / "rgb.rejected.tsv").read_text().splitlines()
    assert lines[0].split("\t")[:2] == ["path", "reason"]
    assert {line.split("\t")[0]: line.split("\t")[1] for line in lines[1:]} == dict(report.rejected)
    assert Store.open(report.indexes["rgb"]).classes == ["hum", "jump"]  # labels do not depend on rejects

    calls: list[Any] = []
    again = _prepare(tmp_path, progress=lambda *call: calls.append(call))
    assert (again.skipped, sorted(again.rejected), calls) == (2, sorted(report.rejected), [])
    retried = _prepare(tmp_path, retry=True, progress=lambda *call: calls.append(call))
    assert (len(calls), sorted(retried.rejected)) == (3, sorted(report.rejected))
    write_video(bad, draw(5))
    mended = _prepare(tmp_path)
    assert (mended.prepared, len(mended.rejected)) == (1, 3)


def test_a_video_that_went_bad_leaves_the_index(tmp_path: Path) -> None:
    """Its old part must not pass for the new file."""
    folder = _videos(tmp_path / "videos", ("jump",), 3)
    _prepare(tmp_path)
    (folder / "jump" / "jump_1.mp4").write_bytes(b"no video")
    report = _prepare(tmp_path)
    assert len(report.rejected) == 1
    assert [row.name for row in Store.open(report.indexes["rgb"]).videos] == ["jump_0", "jump_2"]


def test_a_file_that_disappears_during_the_run_is_a_reject(tmp_path: Path) -> None:
    folder = _videos(tmp_path / "videos", ("jump",), 3)
    listing = scan_folder(folder, 0.5)
    gone = folder / "jump" / "jump_2.mp4"
    report = prepare_parts(
        listing,
        tmp_path / "mine",
        "mine",
        ("rgb",),
        DATA,
        workers=1,
        progress=lambda *_: gone.unlink(missing_ok=True),
    )
    assert report.prepared == 2
    assert report.rejected == [(str(gone), "the file has disappeared")]


def test_awkward_names_make_a_store(tmp_path: Path) -> None:
    names = ["-dash", "with space", "100%", "ünï", "日本", "a.b.c", "(x)[y]!#&+;=", "tab\there"]
    for name in names:
        write_video(tmp_path / "draw.mp4", draw(2))
        (tmp_path / "videos" / "-é c").mkdir(parents=True, exist_ok=True)
        (tmp_path / "draw.mp4").rename(tmp_path / "videos" / "-é c" / f"{name}.mp4")
    raw = os.path.join(os.fsencode(tmp_path / "videos" / "-é c"), b"\xff\xfe.mp4")
    shutil.copy(os.fsencode(tmp_path / "videos" / "-é c" / "ünï.mp4"), raw)
    bad = os.path.join(os.fsencode(tmp_path / "videos" / "-é c"), b"\xff\tbad.mp4")
    Path(os.fsdecode(bad)).write_bytes(b"x")
    report = _prepare(tmp_path, workers=2)
    store = Store.open(report.indexes["rgb"])
    assert {row.name for row in store.videos} == {*names, os.fsdecode(b"\xff\xfe")}
    assert all(len(store.frames(place, 0, 2)) == 2 for place in range(len(names) + 1))
    assert len(report.rejected) == 1
    assert r"\xff\tbad.mp4" in (tmp_path / "mine" / "rgb.rejected.tsv").read_text()
    calls: list[Any] = []
    _prepare(tmp_path, progress=lambda *call: calls.append(call))
    assert calls == []


def test_all_bad_is_an_error_not_an_empty_store(tmp_path: Path) -> None:
    (tmp_path / "videos" / "jump").mkdir(parents=True)
    (tmp_path / "videos" / "jump" / "a.mp4").write_bytes(b"x")
    with pytest.raises(GkdError, match="every video was rejected"):
        _prepare(tmp_path)
    assert "not a video" in (tmp_path / "mine" / "rgb.rejected.tsv").read_text()


def test_two_runs_on_one_store_are_refused(tmp_path: Path) -> None:
    _videos(tmp_path / "videos", ("jump",), 2)
    with (
        locked(tmp_path / "mine" / ".lock", "it"),
        pytest.raises(GkdError, match="another command") as caught,
    ):
        _prepare(tmp_path)
    assert f"process {os.getpid()}" in caught.value.where


def test_what_a_killed_run_left_is_swept(tmp_path: Path) -> None:
    _videos(tmp_path / "videos", ("jump",), 2)
    left = tmp_path / "mine" / "rgb" / "jump" / ".jump_0.h5.123.tmp"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    _prepare(tmp_path)
    assert not left.exists()


@pytest.mark.parametrize("damage", ["index", "part"])
def test_damage_is_mended_by_the_same_call(tmp_path: Path, damage: str) -> None:
    _videos(tmp_path / "videos", ("jump",), 2)
    _prepare(tmp_path)
    before = _content(tmp_path / "mine")
    path = tmp_path / "mine" / ("rgb.h5" if damage == "index" else "rgb/jump/jump_1.h5")
    os.truncate(path, path.stat().st_size // 2)
    report = _prepare(tmp_path)
    assert report.prepared == (damage == "part")
    assert _content(tmp_path / "mine") == before


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Videos that take a while, and the content of their store when nothing disturbs."""
    root = tmp_path_factory.mktemp("long")
    _videos(root / "videos", ("jump",), 10, frames=80)
    _prepare(root, workers=2)
    return root / "videos", _content(root / "mine")


def test_a_killed_worker_costs_the_videos_in_work_and_the_next_run_has_them(
    tmp_path: Path, long: tuple[Path, dict[str, Any]]
) -> None:
    (tmp_path / "videos").symlink_to(long[0])

    def kill(done: int, total: int, name: str, frames: int) -> None:
        if done == 1:
            for child in multiprocessing.active_children():
                os.kill(child.pid or 0, signal.SIGKILL)

    report = _prepare(tmp_path, workers=2, progress=kill)
    assert len(report.rejected) <= 2
    assert all("signal 9" in reason for _, reason in report.rejected)
    assert report.prepared == 10 - len(report.rejected)
    assert list((tmp_path / "mine").rglob("*.tmp")) == []
    again = _prepare(tmp_path)
    assert (again.rejected, again.prepared + again.skipped) == ([], 10)
    assert _content(tmp_path / "mine") == long[1]


SCRIPT = """
import sys
from pathlib import Path
from tests.data.test_extract import _prepare
from gkdcli.errors import GkdError
if __name__ == "__main__":
    try:
        _prepare(Path(sys.argv[1]), workers=2, progress=lambda *call: print(*call, flush=True))
    except GkdError as error:
        print(error.what, "|", error.hint, flush=True)
        sys.exit(error.code)
"""


def _start(root: Path) -> subprocess.Popen[str]:
    here = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(root)],
        cwd=here,
        env=os.environ | {"PYTHONPATH": str(here)},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_stopped_run_is_continued_to_an_equal_store(
    tmp_path: Path, number: signal.Signals, long: tuple[Path, dict[str, Any]]
) -> None:
    (tmp_path / "videos").symlink_to(long[0])
    with _start(tmp_path) as run:
        assert run.stdout
        assert run.stdout.readline().startswith("1 10 ")
        run.send_signal(number)
        rest = run.stdout.read()
    if number != signal.SIGKILL:
        assert run.returncode == ExitCode.INTERRUPTED
        assert "stopped after" in rest
        assert "the same command continues" in rest
        assert list((tmp_path / "mine").rglob("*.tmp")) == []
    time.sleep(0.3)  # workers of a killed parent notice
    done = len(list((tmp_path / "mine" / "rgb").rglob("*.h5")))
    assert 0 < done < 10
    with pytest.raises(GkdError, match=f"unfinished: {done} of 10"):
        Store.open(tmp_path / "mine" / "rgb.h5")
    report = _prepare(tmp_path, workers=2)
    assert (report.skipped, report.prepared, report.rejected) == (done, 10 - done, [])
    assert list((tmp_path / "mine").rglob(".*.tmp")) == []
    assert _content(tmp_path / "mine") == long[1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """4 MB of file system; the tests run as root, so permissions would not stop them."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    ("storage", "left", "modalities"),
    [
        ("jpeg", 40_000, ("rgb",)),
        ("jpeg", 140_000, ("rgb",)),
        ("raw", 140_000, ("rgb",)),
        ("jpeg", 140_000, ("rgb", "flow")),
    ],
)
def test_a_full_disk_ends_the_run_and_leaves_whole_parts(
    tmp_path: Path, small_disk: Path, storage: str, left: int, modalities: tuple[str, ...]
) -> None:
    """Seen by the parent in time (40 KB are under a fiftieth of the disk), or by a worker that fails."""
    folder = tmp_path / "videos" / "jump"
    noise = np.random.default_rng(0).integers(0, 256, (12, 96, 128, 3), np.uint8)
    for place in range(4):
        write_video(folder / f"{place}.mp4", noise)
    listing = scan_folder(tmp_path / "videos", 0.5)
    given = {"short_side": 0, "storage": storage, "jpeg_quality": 100, "flow": "farneback"}
    data = DataSettings.model_validate(given)
    ballast = small_disk / "ballast"

    def fill(done: int, total: int, name: str, frames: int) -> None:
        if not ballast.exists():
            ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - left))

    with pytest.raises(GkdError) as caught:
        prepare_parts(listing, small_disk / "mine", "mine", modalities, data, workers=1, progress=fill)
    assert caught.value.what == "the disk is full"
    assert "continues" in caught.value.hint
    parts = list((small_disk / "mine" / "rgb").rglob("*.h5"))
    assert parts
    assert all(read_attributes(part)["frame_count"] == 12 for part in parts)
    assert list((small_disk / "mine").rglob(".*.tmp")) == []
    ballast.unlink()
    report = prepare_parts(listing, small_disk / "mine", "mine", modalities, data, workers=1)
    assert (report.skipped, report.prepared, report.rejected) == (len(parts), 4 - len(parts), [])


def test_what_will_not_fit_is_refused_before_anything_is_written(tmp_path: Path, small_disk: Path) -> None:
    _videos(tmp_path / "videos", ("jump",), 1, frames=200)
    (small_disk / "ballast").write_bytes(bytes(3_000_000))
    listing = scan_folder(tmp_path / "videos", 0.5)
    data = DataSettings(short_side=0, storage="raw")
    with pytest.raises(GkdError, match=r"the disk is too small: about 1\.8 MB are needed") as caught:
        prepare_parts(listing, small_disk / "mine", "mine", ("rgb",), data)
    assert "--root" in caught.value.hint
    assert list((small_disk / "mine").rglob("*.h5")) == []


def test_a_disk_that_cannot_be_written_is_refused_in_words(tmp_path: Path, small_disk: Path) -> None:
    _videos(tmp_path / "videos", ("jump",), 1, frames=2)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(GkdError, match="the store cannot be written") as caught:
        prepare_parts(scan_folder(tmp_path / "videos", 0.5), small_disk / "mine", "mine", ("rgb",), DATA)
    assert str(small_disk) in caught.value.where
