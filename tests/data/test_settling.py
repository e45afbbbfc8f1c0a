"""data.settling: a video counts as done once the disk has its parts; until then it has no name."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from gkdcli.data.annotations import Source
from gkdcli.data.jobs import Job, Result, draft, settle, work
from gkdcli.data.settling import Settling
from gkdcli.data.workers import Crashed, Crew
from gkdcli.settings import DataSettings
from tests.videos import draw, write_video

WAIT_SEC = 60.0


@pytest.fixture
def job(tmp_path: Path) -> Job:
    video = write_video(tmp_path / "v.mp4", draw(6))
    source = Source(video, "a", "v", {1: "train"})
    parts = {modality: tmp_path / modality / "v.h5" for modality in ("rgb", "flow")}
    return Job(source, parts, DataSettings(flow="farneback"), video.stat().st_size)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.suffix in (".h5", ".tmp")}


def collected(crew: Settling) -> list[tuple[Job, Result | Crashed]]:
    while crew.busy:
        if finished := crew.collect(WAIT_SEC):
            return finished
    return []


def test_a_draft_has_no_name_until_it_is_settled(job: Job, tmp_path: Path) -> None:
    result = draft(job)
    assert {name.startswith(".v.h5.") for name in files(tmp_path)} == {True}
    assert [part for _, part in result.drafts] == list(job.parts.values())
    assert settle(result).drafts == ()
    assert files(tmp_path) == {"v.h5"}


def test_a_process_goes_on_while_the_disk_is_waited_for(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = threading.Event()
    fsync = os.fsync

    def slow(handle: int) -> None:
        assert disk.wait(WAIT_SEC)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", slow)
    with Settling(Crew(draft, 1)) as crew:
        assert crew.give(job)
        while crew._crew.busy:
            assert crew.collect(WAIT_SEC) == []
        assert crew.busy == 1  # not done: no part has its name
        assert "v.h5" not in files(tmp_path)
        assert crew.give(Job(job.source, {"rgb": tmp_path / "second.h5"}, job.data, job.size))
        disk.set()
        outcomes = [outcome for _ in range(2) for _, outcome in collected(crew)]
    assert [outcome.frames for outcome in outcomes if isinstance(outcome, Result)] == [6, 6]
    assert files(tmp_path) == {"v.h5", "second.h5"}


def test_where_the_disk_is_the_slowest_all_wait_for_it(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a kill could lose any number of videos."""
    disk = threading.Event()
    monkeypatch.setattr(os, "fsync", lambda handle: disk.wait(WAIT_SEC))
    with Settling(Crew(draft, 1)) as crew:
        for number in range(2):
            assert crew.give(Job(job.source, {"rgb": tmp_path / f"{number}.h5"}, job.data, job.size))
            while crew._crew.busy:
                crew.collect(WAIT_SEC)
        assert not crew.give(job)
        disk.set()
        assert collected(crew)
        assert crew.give(job)


def test_a_disk_that_fails_at_the_last_moment_leaves_nothing(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    result = work(job)
    assert result.failure
    assert result.full
    assert files(tmp_path) == set()


def test_a_disk_that_turns_read_only_at_the_last_moment_is_a_result_too(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be removed from it either; on a cluster a worker that raises would be a mistake of ours."""
    result = draft(job)

    def frozen(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "fsync", frozen)
    monkeypatch.setattr(Path, "unlink", frozen)
    settled = settle(result)
    assert "Read-only" in settled.failure
    assert not settled.full


def test_leaving_waits_for_parts_on_their_way(job: Job, tmp_path: Path) -> None:
    with Settling(Crew(draft, 1)) as crew:
        assert crew.give(job)
        while crew._crew.busy:
            crew.collect(WAIT_SEC)
    assert files(tmp_path) == {"v.h5"}
