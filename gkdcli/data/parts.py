"""Parts of the store: one HDF5 file per video, written in bounded memory, whole or absent.

The first 512 bytes, HDF5's user block, are a line of JSON that says where the images of a JPEG part lie in
the file. A clip is read with that, in a quarter of the time that opening the file through HDF5 takes.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import unicodedata
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
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
_HELD_BYTES = 16 << 20  # of JPEGs in memory; a longer video waits in an unnamed file
_LONGEST_NAME = 220  # bytes; a file name has 255, and temporary names add a process id
_HEAD_BYTES = 512
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
    begins. The length is known only at the end, so images wait in memory, or beyond 16 MB in an
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
        self._held: list[bytes] = []
        self._spilled = 0
        self._pending: list[Bytes] = []
        self._stack = ExitStack()

    def __enter__(self) -> PartWriter:
        with ExitStack() as stack:
            self._temporary = stack.enter_context(atomic_path(self.path))
            file = h5py.File(self._temporary, "w", locking=False, userblock_size=_HEAD_BYTES)
            self._file = stack.enter_context(file)
            self._stack = stack.pop_all()
        return self

    def update(self, **attributes: Any) -> None:
        """Adds attributes that are known only once the video was read."""
        self._attributes |= attributes

    def append(self, frame: bytes | Bytes) -> None:
        """One more frame."""
        if self.storage == "jpeg":
            assert isinstance(frame, bytes)
            self._held.append(frame)
            self._offsets.append(self._offsets[-1] + len(frame))
            if self._offsets[-1] - self._spilled > _HELD_BYTES:
                self._spill()
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
            streams = {}
            if self.storage == "jpeg":
                streams["frames"] = self._write_images()
            else:
                self._write_pending()
            self._file.attrs.update({**self._attributes, "frame_count": self.frames, "schema": SCHEMA})
            self._file.close()
            self._write_head(streams)

    def _write_head(self, streams: dict[str, list[int]]) -> None:
        head = {
            "gkd": SCHEMA,
            "bytes": self._temporary.stat().st_size,
            "frames": self.frames,
            "digest": self._attributes.get("source_digest", ""),
            "streams": streams,
        }
        line = json.dumps(head).encode().ljust(_HEAD_BYTES - 1) + b"\n"
        assert len(line) == _HEAD_BYTES
        with open(self._temporary, "r+b") as file:
            file.write(line)

    def _spill(self) -> None:
        """Moves the images held to the unnamed file."""
        if not self._spilled:
            spool = TemporaryFile(dir=self.path.parent)  # noqa: SIM115
            self._spool = self._stack.enter_context(spool)
        self._spool.write(b"".join(self._held))
        self._held.clear()
        self._spilled = self._offsets[-1]

    def _write_images(self) -> list[int]:
        """Returns where images and offsets begin in the file, and the length of the images."""
        total = self._offsets[-1]
        free = os.statvfs(self.path.parent)
        if free.f_bavail * free.f_frsize < total:
            # said here, before HDF5 is caught half-way
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        frames = self._file.create_dataset("frames", (total,), np.uint8)
        if self._spilled:
            self._spill()
            self._spool.seek(0)
            for start in range(0, total, _HELD_BYTES):
                block = np.frombuffer(self._spool.read(_HELD_BYTES), np.uint8)
                frames[start : start + len(block)] = block
        else:
            frames[:] = np.frombuffer(b"".join(self._held), np.uint8)
        self._file["offsets"] = np.array(self._offsets, "<i8")
        return [frames.id.get_offset(), self._file["offsets"].id.get_offset(), total]

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


class PartReader:
    """An open part.

    Args:
        path: where it lies.
        frames: how many it should hold.
        digest: SHA-256 of the source it should come from.

    Raises:
        GkdError: it is missing, damaged, or another one.
    """

    def __init__(self, path: Path, frames: int, digest: str) -> None:
        self.path = path
        self._descriptor = -1
        self._raw: Any = None
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
            head = json.loads(os.pread(self._descriptor, _HEAD_BYTES, 0))
            if head["gkd"] != SCHEMA or head["bytes"] != os.fstat(self._descriptor).st_size:
                raise ValueError("its length is wrong, or it is of another version")
            if (head["frames"], head["digest"]) != (frames, digest):
                raise GkdError(
                    "a video of the store is not the one its index describes",
                    str(path),
                    "run the same `gkd prepare` again, and start the command after it has finished",
                )
            if head["streams"]:
                self._images_at, offsets_at, total = head["streams"]["frames"]
                self._ends = self._read(offsets_at, 8 * (frames + 1)).view("<i8")  # (T + 1,)
                if self._ends[0] != 0 or self._ends[-1] != total:
                    raise ValueError("its offsets are wrong")
            else:
                self._raw = h5py.File(path, "r", locking=False)
        except GkdError:
            self.close()
            raise
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            self.close()
            raise damaged_part(path, str(error)) from None

    def frames(self, start: int, count: int) -> list[Bytes] | Bytes:
        """Frames [start, start + count) in one read: JPEGs, views of one buffer; or (count, H, W, C)."""
        try:
            if self._raw is not None:
                raw: Bytes = self._raw["frames"][start : start + count]
                return raw
            ends = self._ends[start : start + count + 1]
            block = self._read(self._images_at + int(ends[0]), int(ends[-1] - ends[0]))
        except (OSError, RuntimeError, KeyError) as error:
            raise damaged_part(self.path, str(error)) from None
        cuts = (ends - ends[0]).tolist()
        return [block[a:b] for a, b in itertools.pairwise(cuts)]

    def _read(self, start: int, length: int) -> Bytes:
        block = np.empty(length, np.uint8)
        if os.preadv(self._descriptor, [block.data], start) != length:
            raise OSError("it ends early")
        return block

    def close(self) -> None:
        """May be called more than once."""
        if self._raw is not None:
            self._raw.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._raw = -1, None

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


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
