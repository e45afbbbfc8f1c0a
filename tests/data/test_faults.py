"""data.extract when something breaks in the middle: the store comes out as if nothing had happened."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from gkdcli.data import extract, jobs
from gkdcli.data.annotations import scan_folder
from gkdcli.data.extract import Progress, Report, prepare_parts
from gkdcli.data.jobs import Job, Result
from gkdcli.data.store import Store
from gkdcli.data.workers import Crew
from gkdcli.errors import GkdError
from gkdcli.settings import DataSettings
from tests.data.test_extract import small_disk
from tests.videos import draw, write_video

__all__ = ["small_disk"]
DATA = DataSettings(short_side=0, flow="farneback", timeout=2.0)
BOTH = ("rgb", "flow")


def write_videos(folder: Path, count: int = 4) -> Path:
    for place in range(count):
        write_video(folder / "videos" / "ab"[place % 2] / f"v{place}.mp4", draw(12, seed=place))
    return folder


def prepare(
    root: Path, progress: Progress | None = None, retry: bool = False, videos: Path | None = None
) -> Report:
    listing = scan_folder(videos or root / "videos", 0.5)
    return prepare_parts(
        listing, root / "mine", "mine", BOTH, DATA, workers=1, progress=progress, retry=retry
    )


def content(folder: Path, modalities: Sequence[str] = BOTH) -> dict[str, bytes]:
    """Every byte of the parts and indexes, hidden files too; equal stores are equal files."""
    names = (*modalities, *(f"{modality}.h5" for modality in modalities))
    files = [path for name in names for path in (folder / name, *(folder / name).rglob("*"))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with four videos and their store of both streams; for reading only."""
    root = write_videos(tmp_path_factory.mktemp("undisturbed"))
    assert prepare(root).prepared == 4
    return root


@pytest.fixture
def root(tmp_path: Path, undisturbed: Path) -> Path:
    """The same videos, not yet prepared."""
    shutil.copytree(undisturbed / "videos", tmp_path / "videos")
    return tmp_path


def _once(action: Callable[[], Any]) -> Progress:
    """Something that happens when the first video is done."""
    return lambda done, *_: action() if done == 1 else None


def videos_in(found: Mapping[str, Any]) -> set[str]:
    """Those of which both parts are there."""
    rgb, flow = ({name.removeprefix(f"{s}/") for name in found if name.startswith(f"{s}/")} for s in BOTH)
    return rgb & flow


def crash_on_v2(job: Job) -> Result:
    """As a decoder that follows a wild pointer."""
    if job.source.name == "v2" and not job.probe_only:
        ctypes.string_at(0)
    return jobs.work(job)


def hang_on_v2(job: Job) -> Result:
    """As a decoder that never returns, and never gives Python a chance."""
    if job.source.name == "v2" and not job.probe_only:
        ctypes.PyDLL(None).pause()
    return jobs.work(job)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (crash_on_v2, "the decoder crashed (signal 11)"),
        (hang_on_v2, "not one more frame in 2 s, the limit that data.timeout sets"),
    ],
)
def test_a_video_that_takes_its_process_along_is_rejected_and_the_rest_is_done(
    root: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Any], reason: str
) -> None:
    monkeypatch.setattr(extract, "draft", fault)
    report = prepare(root)
    assert report.rejected == [(str(root / "videos" / "a" / "v2.mp4"), reason)]
    whole = content(undisturbed / "mine")
    there = content(root / "mine")
    assert {name for name in whole if name not in there} == {"rgb/a/v2.h5", "flow/a/v2.h5"}
    assert {name for name in there if there[name] != whole.get(name)} == {"rgb.h5", "flow.h5"}
    assert [row.name for row in Store.open(report.indexes["flow"]).videos] == ["v0", "v1", "v3"]
    calls: list[Any] = []
    assert prepare(root, progress=lambda *call: calls.append(call)).rejected == report.rejected
    assert calls == []  # the file is the same, so it is not tried
    monkeypatch.undo()
    assert prepare(root, retry=True).prepared == 1
    assert content(root / "mine") == whole


def test_a_store_that_turns_read_only_is_continued(root: Path, undisturbed: Path) -> None:
    """As file systems do when their disk fails."""
    folder = root / "mine" / "rgb"

    def freeze() -> None:
        for options in (["--bind", str(folder)], ["-o", "remount,bind,ro"]):
            mounted = subprocess.run(["mount", *options, str(folder)], capture_output=True, check=False)
            if mounted.returncode:
                pytest.skip(f"mounting is not allowed here: {mounted.stderr.decode().strip()}")

    try:
        with pytest.raises(GkdError, match="the store cannot be written") as caught:
            prepare(root, _once(freeze))
    finally:
        subprocess.run(["umount", str(folder)], capture_output=True, check=False)
    assert str(folder) in caught.value.where
    assert "Read-only" in caught.value.where
    done = content(root / "mine")
    assert "rgb/a/v0.h5" in done
    finished = videos_in(done)  # the second may be one of them
    assert len(finished) <= 2
    report = prepare(root)
    assert (report.prepared, report.skipped) == (4 - len(finished), len(finished))
    assert content(root / "mine") == content(undisturbed / "mine")


@pytest.fixture
def filled(small_disk: Path) -> Iterator[Callable[..., Any]]:
    """Fills the small disk, but for so many bytes."""
    ballast = small_disk / "ballast"

    def fill(left: int = 0) -> None:
        ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - left))

    yield fill
    ballast.unlink(missing_ok=True)


@pytest.mark.parametrize("moment", ["videos", "index"])
def test_a_disk_that_fills_up_is_continued_once_there_is_space(
    small_disk: Path,
    filled: Callable[[], Any],
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    build = extract.build_index

    def fill_and_build(*given: Any) -> Path:
        filled()
        return build(*given)

    if moment == "index":
        monkeypatch.setattr(extract, "build_index", fill_and_build)
    videos = undisturbed / "videos"
    with pytest.raises(GkdError, match="the disk is full"):
        prepare(small_disk, _once(filled) if moment == "videos" else None, videos=videos)
    monkeypatch.undo()
    (small_disk / "ballast").unlink()
    whole = content(undisturbed / "mine")
    there = content(small_disk / "mine")
    parts = [name for name in there if name.count("/") > 0]
    assert [name for name in parts if there[name] != whole[name]] == []
    finished = videos_in(there)  # the second may be one of them
    assert len(finished) in ((1, 2) if moment == "videos" else (4,))
    report = prepare(small_disk, videos=videos)
    assert report.skipped * 2 == len(finished) * 2 == len(parts)
    assert content(small_disk / "mine") == whole


def test_a_crash_on_a_full_disk_is_not_held_against_the_video(
    small_disk: Path, filled: Callable[..., Any], undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HDF5 may crash where a file cannot be closed. Here the disk is full as soon as the process is gone."""
    bury = Crew._bury

    def fill_and_bury(*given: Any) -> Any:
        filled(left=40_000)  # the table of rejects would fit
        return bury(*given)

    videos = undisturbed / "videos"
    with monkeypatch.context() as patch:
        patch.setattr(extract, "draft", crash_on_v2)
        patch.setattr(Crew, "_bury", fill_and_bury)
        with pytest.raises(GkdError, match="the disk is full"):
            prepare(small_disk, videos=videos)
    (small_disk / "ballast").unlink()
    assert prepare(small_disk, videos=videos).rejected == []
    assert content(small_disk / "mine") == content(undisturbed / "mine")


def test_a_video_that_is_taken_away_and_brought_back(root: Path, undisturbed: Path) -> None:
    video = root / "videos" / "b" / "v3.mp4"
    report = prepare(root, _once(lambda: video.rename(root / "v3.mp4")))
    assert report.rejected == [(str(video), "the file has disappeared")]
    (root / "v3.mp4").rename(video)
    again = prepare(root)
    assert (again.prepared, again.skipped, again.rejected) == (1, 3, [])
    assert content(root / "mine") == content(undisturbed / "mine")


def test_a_video_that_is_replaced_before_its_turn(root: Path, undisturbed: Path) -> None:
    """What is in the store is of the file that is there at the end."""
    video = root / "videos" / "b" / "v3.mp4"
    kept = root / "videos.before"
    shutil.copytree(root / "videos", kept)
    write_video(root / "other.mp4", draw(9, seed=40))
    report = prepare(root, _once(lambda: (root / "other.mp4").replace(video)))
    assert (report.prepared, report.rejected) == (4, [])
    assert [row.frames for row in Store.open(report.indexes["flow"]).videos] == [12, 12, 12, 9]
    assert prepare(root).skipped == 4
    shutil.copy2(kept / "b" / "v3.mp4", video)  # and the old one again
    assert prepare(root).prepared == 1
    assert content(root / "mine") == content(undisturbed / "mine")


def replace_v2_while_it_is_read(job: Job) -> Result:
    """The file changes between its first and its last frame."""
    write = jobs._write

    def write_and_replace(*given: Any) -> None:
        write(*given)
        other = job.source.path.parents[2] / "other.mp4"
        if job.source.name == "v2" and other.exists():
            os.replace(other, job.source.path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "_write", write_and_replace)
        return jobs.work(job)


def test_a_video_that_is_replaced_while_it_is_read_gives_no_part_of_both(
    root: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = root / "videos" / "a" / "v2.mp4"
    before = video.read_bytes(), video.stat()
    write_video(root / "other.mp4", draw(9, seed=40))
    with monkeypatch.context() as patch:
        patch.setattr(extract, "draft", replace_v2_while_it_is_read)
        report = prepare(root)
    assert report.rejected == [(str(video), "it changed while it was read")]
    assert not (root / "mine" / "rgb" / "a" / "v2.h5").exists()
    assert prepare(root).prepared == 1  # the new file was never tried
    video.write_bytes(before[0])
    os.utime(video, ns=(0, before[1].st_mtime_ns))
    assert prepare(root).rejected == []
    assert content(root / "mine") == content(undisturbed / "mine")
