"""Files are whole or absent, locks name their holder."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gkdcli.errors import GkdError
from gkdcli.files import (
    atomic_folder,
    atomic_path,
    digest,
    free_bytes,
    human_bytes,
    is_locked,
    kept_as_is,
    locked,
    sweep_temporaries,
    write_json,
    write_text,
)

HOLD = """
import sys, time
from pathlib import Path
from gkdcli.files import locked
with locked(Path(sys.argv[1]), "the test's folder"):
    print("held", flush=True)
    time.sleep(60)
"""

ASK = """
import sys
from pathlib import Path
from gkdcli.files import is_locked
while True:
    is_locked(Path(sys.argv[1]))
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A real second process that holds a lock."""
    path = tmp_path / "sub" / ".lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield path, process
        process.kill()


def test_a_written_file_replaces_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    write_text(path, "old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent
    assert path.read_text() == "new"
    assert [found.name for found in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without either a power cut can leave an empty file under a good name."""
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(handle: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def watched_replace(old: Path, new: Path) -> None:
        events.append("rename")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    write_text(tmp_path / "a.txt", "x")
    assert events == ["file", "rename", "folder"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_permissions_that_the_umask_asks_for(tmp_path: Path, umask: int) -> None:
    """safetensors writes 0600 whatever the umask: colleagues could not read a shared folder's weights."""
    before = os.umask(umask)
    try:
        write_json(tmp_path / "a.json", {})
        with atomic_path(tmp_path / "a.safetensors") as temporary:
            save_file({"x": torch.zeros(1)}, temporary)
    finally:
        os.umask(before)
    for name in ("a.json", "a.safetensors"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask


def test_json_is_read_back_and_nan_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"name": "Ä", "list": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"name": "Ä", "list": [1, None]}
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["name"] == "Ä"


def test_only_what_a_killed_run_left_is_swept(tmp_path: Path) -> None:
    stale = tmp_path / "a" / "b" / ".x.h5.123.tmp"
    kept = [tmp_path / "a" / name for name in ("x.h5", ".notes.tmp", "x.123.tmp", ".lock")]
    for path in (stale, *kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert sweep_temporaries(tmp_path) == 1
    assert not stale.exists()
    assert all(path.exists() for path in kept)
    assert sweep_temporaries(tmp_path / "none") == 0


def test_what_atomic_path_makes_is_what_sweep_finds(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "x.h5") as temporary:
        os.link(temporary, tmp_path / "aside")
        assert sweep_temporaries(tmp_path) == 1
        os.rename(tmp_path / "aside", temporary)
    assert (tmp_path / "x.h5").exists()


def test_a_second_process_is_refused_and_told_who_holds_the_lock(
    holder: tuple[Path, subprocess.Popen[str]],
) -> None:
    path, process = holder
    assert is_locked(path)
    with pytest.raises(GkdError) as caught, locked(path, "the test's folder"):
        pass
    assert caught.value.what == "another command is using the test's folder"
    assert caught.value.where.startswith(f"{path}, held by process {process.pid} on ")
    assert "since 20" in caught.value.where


def test_a_killed_holder_holds_nothing(holder: tuple[Path, subprocess.Popen[str]]) -> None:
    path, process = holder
    process.kill()
    process.wait()
    assert not is_locked(path)
    with locked(path, "it"):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_asking_whether_a_lock_is_held_does_not_get_in_the_way(tmp_path: Path) -> None:
    """`gkd evaluate` looks at the locks of runs while `gkd distill` takes one."""
    path = tmp_path / ".lock"
    path.touch()
    with subprocess.Popen([sys.executable, "-c", ASK, str(path)]) as process:
        try:
            end = time.monotonic() + 1.0
            while time.monotonic() < end:
                with locked(path, "it"):
                    pass
        finally:
            process.kill()


def test_a_lock_is_free_again_after_the_block_and_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    assert not is_locked(path)
    with locked(path, "it"):
        assert is_locked(path)
    assert not is_locked(path)
    with pytest.raises(ValueError, match="x"), locked(path, "it"):
        raise ValueError("x")
    assert not is_locked(path)


def test_a_lock_file_that_names_nobody_is_no_obstacle_to_the_message(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with locked(path, "it"):
        path.write_text("no json")
        with pytest.raises(GkdError) as caught, locked(path, "it"):
            pass
    assert caught.value.where == f"{path}, held by a process that has not said its name"


def test_free_space_is_that_of_the_nearest_folder_there_is(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "yet" / "there") == pytest.approx(free_bytes(tmp_path), rel=0.2)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KB"),
        (3 << 20, "3.0 MB"),
        (1 << 40, "1.0 TB"),
        (-2048, "-2.0 KB"),
    ],
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert human_bytes(count) == text


def test_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert digest(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_folder_takes_the_place_of_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "entry"
    for text in ("old", "new"):
        with atomic_folder(path) as folder:
            assert not path.exists() or (path / "old").is_file()
            (folder / text).touch()
    assert [found.name for found in path.iterdir()] == ["new"]
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rename = tmp_path / "entry", os.rename
    with atomic_folder(path) as folder:
        (folder / "old").touch()
    with pytest.raises(ValueError, match="halfway"), atomic_folder(path):
        raise ValueError("halfway")

    def refuses(source: Path, target: Path) -> None:
        if target == path and ".new." in source.name:
            raise OSError("no more")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuses)
    with pytest.raises(OSError, match="no more"), atomic_folder(path) as folder:
        (folder / "new").touch()
    assert [found.name for found in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_of_a_folder_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".entry.new.tmp").mkdir()
    (tmp_path / ".entry.new.tmp" / "half").touch()
    with atomic_folder(tmp_path / "entry"):
        pass
    assert list((tmp_path / "entry").iterdir()) == []


def test_readers_share_what_a_writer_may_not_take_and_write_nothing(
    holder: tuple[Path, subprocess.Popen[str]], tmp_path: Path
) -> None:
    path, process = holder
    with (
        pytest.raises(GkdError, match="another command is using the store") as refused,
        kept_as_is(path, "the store"),
    ):
        pass
    assert f"held by process {process.pid} " in refused.value.where
    process.kill()
    process.wait()
    before = path.read_bytes(), path.stat().st_mtime_ns
    with kept_as_is(path, "the store"), kept_as_is(path, "the store"):
        with pytest.raises(GkdError) as refused, locked(path, "the store"):
            pass
        # the name in the file is that of the writer before
        assert refused.value.where == f"{path}, held by a process that only reads"
        assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    with locked(path, "the store"):
        pass
    with kept_as_is(tmp_path / "none" / ".lock", "the store"):
        assert not (tmp_path / "none").exists()
