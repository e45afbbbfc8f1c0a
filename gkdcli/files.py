"""Files that are whole or absent: atomic writes, locks that name their holder, free space."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from stat import S_ISDIR

from gkdcli.errors import GkdError

_PATIENCE_SEC = 0.5  # `is_locked` of another process may hold a lock for a moment
_BLOCK_BYTES = 4 << 20  # read at a time for a digest


@contextlib.contextmanager
def draft_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder; on success the file stays there, for `put_in_place`.

    A failure leaves nothing behind. Names look like `.NAME.NUMBER.tmp`, so that a later run can sweep
    what a kill -9 left (see `sweep_temporaries`); no two writers have one number, on whatever machine of a
    shared folder they run. The file gets the permissions that the umask asks for, whatever the library that
    writes it does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # containers on many machines share their few process ids
    temporary = path.parent / f".{path.name}.{os.getpid()}{secrets.randbelow(10**9):09}.tmp"
    try:
        temporary.touch()
        mode = temporary.stat().st_mode & 0o777
        yield temporary
        temporary.chmod(mode)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def put_in_place(temporary: Path, path: Path) -> None:
    """Gives a finished draft its name, once the disk has it; a failure removes it."""
    try:
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path as `draft_path` does; on success it is fsynced and renamed to `path`."""
    with draft_path(path) as temporary:
        yield temporary
    put_in_place(temporary, path)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; on success it takes the place of `path` and all in it.

    A failure leaves `path` as it was. One process at a time: the caller holds a lock, and what a kill -9
    left is swept here.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{path.name}.*.tmp"):
        shutil.rmtree(stale)
    temporary, before = (path.parent / f".{path.name}.{word}.tmp" for word in ("new", "old"))
    try:
        temporary.mkdir()
        yield temporary
        if path.exists():  # a folder cannot be renamed over another
            os.rename(path, before)
        os.rename(temporary, path)
        _sync_folder(path.parent)
    finally:
        if before.exists() and not path.exists():
            os.rename(before, path)
        for rest in (temporary, before):
            shutil.rmtree(rest, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        # what no UTF-8 can hold (names of files that are no text) becomes an escape that JSON reads back
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, document: object) -> None:
    """Writes indented JSON atomically; NaN is refused (the caller turns it into null)."""
    write_text(path, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def temporaries(folder: Path, of: Container[Path] | None = None) -> list[Path]:
    """Temporary files below `folder`: of a run at work, or left by a killed one.

    Args:
        folder: is searched.
        of: only what was to become one of these files.
    """
    found = []
    for inside, _, names in os.walk(folder):
        for name in names:
            named = name.endswith(".tmp") and re.fullmatch(r"\.(.+)\.\d+\.tmp", name, re.DOTALL)
            if named and (of is None or Path(inside, named[1]) in of):
                found.append(Path(inside, name))
    return sorted(found)


def sweep_temporaries(folder: Path, of: Container[Path] | None = None) -> int:
    """Removes temporary files that a killed run left, those of files in `of` alone where others are at work.

    Returns:
        How many.
    """
    stale = temporaries(folder, of)
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)


@contextlib.contextmanager
def locked(
    path: Path, purpose: str, *, shared: bool = False, patience_sec: float = _PATIENCE_SEC
) -> Iterator[None]:
    """Holds a lock for as long as the block runs; the kernel drops it if the process dies.

    Args:
        path: the lock file; flock works on a folder that several machines share, too.
        purpose: what it protects, for the message.
        shared: others may share it. Each of them also holds a lock `<path>.<name>` of its own, which says who
            it is.
        patience_sec: how long to wait for it.

    Raises:
        GkdError: another process holds it; the message names that process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _take(handle, shared, patience_sec):
            raise _held(path, purpose)
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "command": " ".join(sys.argv)[:300],
        }
        if not shared:
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(holder).encode(), 0)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def kept_as_is(path: Path, purpose: str) -> Iterator[None]:
    """Keeps `locked` from being taken for as long as the block runs, and writes nothing; readers share it.

    Where there is no lock file, or it cannot be opened or locked, the block runs all the same.

    Raises:
        GkdError: another process holds the lock; the message names that process.
    """
    handle = -1
    try:
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY)
        shared = any(map(is_locked, path.parent.glob(f"{path.name}.*")))  # by writers, see `locked`
        if shared or (handle >= 0 and not _take(handle, shared=True)):
            raise _held(path, purpose)
        yield
    finally:
        if handle >= 0:
            os.close(handle)


def _held(path: Path, purpose: str) -> GkdError:
    return GkdError(
        f"another command is using {purpose}",
        f"{path}, held by {lock_holder(path)}",
        "wait for it, or stop it, and run the same command again",
    )


def _take(handle: int, shared: bool, patience_sec: float = _PATIENCE_SEC) -> bool:
    """Locks the file, at the latest when so much time has gone by."""
    deadline = time.monotonic() + patience_sec
    while True:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        else:
            return True


def is_locked(path: Path) -> bool:
    """Whether some live process holds the lock file `path`."""
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:  # none was ever made, or nothing here can be written to
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def lock_holder(path: Path) -> str:
    """Who holds a lock, in words; of those who share it the first."""
    sharers = sorted(path.parent.glob(f"{path.name}.*"))
    path = next((sharer for sharer in sharers if is_locked(sharer)), path)
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if held["host"] == socket.gethostname() and not _lives(int(held["pid"])):
            return "a process that only reads"  # it does not write its name
        return f"process {held['pid']} on {held['host']} since {held['since']}: {held['command']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that has not said its name"


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True


def free_bytes(folder: Path) -> int:
    """Free space of the file system that holds `folder` or its nearest existing parent, in bytes."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def disk_is_full(error: BaseException) -> bool:
    """Whether a failed write failed for want of space; HDF5 and safetensors put that into their text."""
    text = str(error)
    return (
        getattr(error, "errno", None) == errno.ENOSPC
        or f"errno = {errno.ENOSPC}" in text
        or "No space" in text
    )


def human_bytes(count: float) -> str:
    """1536 -> '1.5 KB' (powers of 1024)."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TB"


def digest(path: Path, tick: Callable[[], None] = lambda: None) -> str:
    """SHA-256 in hexadecimal: of a file's bytes, or of names and digests of the files in a folder.

    Args:
        path: of the file or folder.
        tick: called after every few MB.
    """
    if path.is_dir():
        lines = [f"{digest(path / name, tick)} {name}\n" for name in sorted(_files(path))]
        return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
    found = hashlib.sha256()
    with open(path, "rb", buffering=0) as handle:
        while block := handle.read(_BLOCK_BYTES):
            found.update(block)
            tick()
    return found.hexdigest()


def stamp(path: Path) -> tuple[int, int]:
    """Size in bytes and time of change in ns; of a folder the sum and the newest of the files in it.

    Raises:
        OSError: there is nothing there, or it cannot be read.
    """
    found = path.stat()
    if not S_ISDIR(found.st_mode):
        return found.st_size, found.st_mtime_ns
    stats = [entry.stat() for entry in _files(path).values()]
    return sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0)


def _files(folder: Path) -> dict[str, os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return {entry.name: entry for entry in entries if entry.is_file()}
