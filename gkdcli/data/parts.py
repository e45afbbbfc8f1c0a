"""Parts of the store: one HDF5 file per video, written in bounded memory, whole or absent."""

from __future__ import annotations

import errno
import os
import unicodedata
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import SpooledTemporaryFile
from types import TracebackType
from typing import Any, Literal
from urllib.parse import unquote_to_bytes

import h5py
import numpy as np
from numpy.typing import NDArray

from gkdcli.errors import GkdError
from gkdcli.files import atomic_path

SCHEMA = 1
Storage = Literal["jpeg", "raw"]
Bytes = NDArray[np.uint8]
_HELD_BYTES = 32 << 20  # of one video's JPEGs; what is beyond waits in an unnamed file
_COPY_BYTES = 8 << 20
_LONGEST_NAME = 220  # bytes; a file name has 255, and temporary names add a process id
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 _-.,!#&'()+;=@[]^{}~$")


def escape(name: str) -> str:
    """A name that file systems and HDF5 take, readable where it can be; `unescape` undoes it.

    Raises:
        ValueError: it is empty, or too long for a file name.
    """
    text = "".join(
        char if _plain(char) and not (place == 0 and char in ".-") else _percent(char)
        for place, char in enumerate(name)
    )
    if not text:
        raise ValueError("the name is empty")
    if len(text.encode()) > _LONGEST_NAME:
        raise ValueError(f"the name is too long: {len(text.encode())} bytes, the store takes {_LONGEST_NAME}")
    return text


def unescape(text: str) -> str:
    """The name that `escape` was given."""
    return unquote_to_bytes(text).decode("utf-8", "surrogateescape")


def _plain(char: str) -> bool:
    # combining marks are escaped: some file systems would compose them with the letter before
    return char in _PLAIN if char.isascii() else char.isprintable() and not unicodedata.combining(char)


def _percent(char: str) -> str:
    return "".join(f"%{byte:02X}" for byte in char.encode("utf-8", "surrogateescape"))


def part_path(modality_folder: Path, class_name: str, name: str) -> Path:
    """Where the part of a video lies below `stores/<dataset>/<modality>`.

    Raises:
        ValueError: see `escape`.
    """
    return modality_folder / escape(class_name) / f"{escape(name)}.h5"


class PartWriter:
    """Writes one part, frame by frame, in bounded memory; it gets its name when the block ends well.

    JPEG: `/frames` is all images back to back and contiguous in the file, `/offsets` says where each
    begins. The length is known only at the end, so images wait in memory, or beyond 32 MB in an
    unnamed file. Raw: `/frames` (T, H, W, C), in chunks of whole frames.

    Args:
        path: the part's final name.
        storage: "jpeg" (append bytes) or "raw" (append (H, W, C) uint8).
        attributes: of the file; `update` adds more while writing.

    Raises:
        OSError: the disk is full, or does not work.
    """

    def __init__(self, path: Path, storage: Storage, attributes: Mapping[str, Any]) -> None:
        self.path = path
        self.storage = storage
        self.frames = 0
        self._attributes = dict(attributes)
        self._offsets = [0]
        self._pending: list[Bytes] = []
        self._stack = ExitStack()

    def __enter__(self) -> PartWriter:
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_path(self.path))
            self._file = stack.enter_context(h5py.File(temporary, "w", locking=False))
            if self.storage == "jpeg":
                folder = str(self.path.parent)
                self._spool = stack.enter_context(SpooledTemporaryFile(_HELD_BYTES, dir=folder))
            self._stack = stack.pop_all()
        return self

    def update(self, **attributes: Any) -> None:
        """Adds attributes that are known only once the video was read."""
        self._attributes |= attributes

    def append(self, frame: bytes | Bytes) -> None:
        """One more frame."""
        if self.storage == "jpeg":
            assert isinstance(frame, bytes)
            self._spool.write(frame)
            self._offsets.append(self._offsets[-1] + len(frame))
        else:
            self._pending.append(np.asarray(frame, np.uint8))
            if len(self._pending) == _chunk_frames(self._pending[0].nbytes):
                self._write_pending()
        self.frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if kind is not None:
                self._stack.__exit__(kind, error, trace)
                return
            assert self.frames, "a part holds at least one frame"
            if self.storage == "jpeg":
                self._write_spooled()
            else:
                self._write_pending()
            self._file.attrs.update({**self._attributes, "frame_count": self.frames, "schema": SCHEMA})

    def _write_spooled(self) -> None:
        total = self._offsets[-1]
        free = os.statvfs(self.path.parent)
        if free.f_bavail * free.f_frsize < total:
            # said here, before HDF5 is caught half-way
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        frames = self._file.create_dataset("frames", (total,), np.uint8)
        self._spool.seek(0)
        for start in range(0, total, _COPY_BYTES):
            block = np.frombuffer(self._spool.read(_COPY_BYTES), np.uint8)
            frames[start : start + len(block)] = block
        self._file["offsets"] = np.array(self._offsets, np.int64)

    def _write_pending(self) -> None:
        if not self._pending:
            return
        block = np.stack(self._pending)  # (T, H, W, C)
        self._pending.clear()
        if "frames" not in self._file:
            chunk = (_chunk_frames(block[0].nbytes), *block.shape[1:])
            self._file.create_dataset(
                "frames", (0, *block.shape[1:]), np.uint8, maxshape=(None, *block.shape[1:]), chunks=chunk
            )
        frames = self._file["frames"]
        frames.resize(len(frames) + len(block), axis=0)
        frames[-len(block) :] = block


def _chunk_frames(frame_bytes: int) -> int:
    return max(1, min(16, (1 << 20) // frame_bytes))


def read_attributes(path: Path) -> dict[str, Any]:
    """The attributes of a part.

    Raises:
        OSError: it is not a whole part of this schema.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            attributes = {key: plain_value(value) for key, value in file.attrs.items()}
    except RuntimeError as error:  # h5py's other way to say that a file is damaged
        raise OSError(str(error)) from None
    if attributes.get("schema") != SCHEMA:
        raise OSError(f"schema {attributes.get('schema')}, not {SCHEMA}")
    return attributes


def plain_value(value: Any) -> Any:
    """An attribute as int, float or str."""
    return value.item() if isinstance(value, np.generic) else value


def damaged_part(part: Path, why: str) -> GkdError:
    """What a reader says about a part it cannot use."""
    return GkdError(
        "a video of the store is damaged or missing",
        f"{part}: {why}",
        "delete that file and run the same `gkd prepare` again; only this video is prepared anew",
    )
