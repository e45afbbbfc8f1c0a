"""Parts of the store: one HDF5 file per video, written in bounded memory, whole or absent.

Before the HDF5 file, in its user block, are two lines of JSON. The first, of 512 bytes, says where the
images of a JPEG part lie: a clip is read with that, in a quarter of the time that opening the file through
HDF5 takes. The second repeats the attributes, for `read_about`, which looks through a hundred thousand parts.
Parts without it, which are older or have very long names, are read through HDF5.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import unquote_to_bytes

import h5py
import numpy as np
from numpy.typing import NDArray

from gkdcli.data.spool import Spool
from gkdcli.errors import GkdError
from gkdcli.files import atomic_path, draft_path

SCHEMA = 1
Storage = Literal["jpeg", "raw"]
Bytes = NDArray[np.uint8]
Stored = bytes | tuple[bytes, ...] | Bytes  # one frame: JPEG, JPEGs of x and y, or pixels
_LONGEST_NAME = 220  # bytes; a file name has 255, and temporary names add a process id
_HEAD_BYTES = 512  # the first line
_BLOCK_BYTES = 2048  # both; HDF5 takes powers of two
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 _-.,!#&'()+;=@[]^{}~$")
_SIMPLE = re.compile(f"[a-zA-Z0-9_][a-zA-Z0-9 _.-]{{,{_LONGEST_NAME - 1}}}")


def escape(name: str) -> str:
    """A name that file systems and HDF5 take, readable where it can be; `unescape` undoes it.

    Raises:
        ValueError: it is empty, or too long for a file name.
    """
    if _SIMPLE.fullmatch(name):
        return name
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
    return unquote_to_bytes(text).decode("utf-8", "surrogateescape") if "%" in text else text


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
    return Path(part_file(str(modality_folder), class_name, name))


def part_file(modality_folder: str, class_name: str, name: str) -> str:
    """The same as text, for those who ask for a hundred thousand."""
    return f"{modality_folder}/{escape(class_name)}/{escape(name)}.h5"


def sum_of(stream: str) -> str:
    """The attribute with the SHA-256 of all images of a stream; older parts have none."""
    return f"{stream}_sha256"


STREAMS = {"rgb": ("frames",), "flow": ("flow_x", "flow_y")}  # of JPEGs, by modality


class PartWriter:
    """Writes one part, frame by frame, in bounded memory; it gets its name when the block ends well.

    JPEG: `/frames` is all images back to back and contiguous in the file, `/offsets` says where each
    begins; flow is two such streams of grey images, `/flow_x` with `/flow_x_offsets` and `/flow_y`. The
    length is known only at the end, so images wait in memory, or beyond 16 MB in an unnamed file. Raw:
    `/frames` (T, H, W, C), in chunks of whole frames. An attribute
    `<stream>_sha256` sums up what was written.

    Args:
        path: the part's final name.
        storage: "jpeg" (append bytes, of flow a pair) or "raw" (append (H, W, C) uint8).
        attributes: of the file; `update` adds more while writing.
        modality: "rgb" or "flow".
        draft: it keeps its temporary name, for `files.put_in_place`.

    Attributes:
        temporary: its name within the block; of a draft, after it too.

    Raises:
        OSError: the disk is full, or does not work.
    """

    temporary: Path

    def __init__(
        self,
        path: Path,
        storage: Storage,
        attributes: Mapping[str, Any],
        modality: str = "rgb",
        *,
        draft: bool = False,
    ) -> None:
        self.path = path
        self._named = draft_path if draft else atomic_path
        self.storage = storage
        self.frames = 0
        self._attributes = dict(attributes)
        self._streams = {name: Spool(path.parent) for name in STREAMS[modality]} if storage == "jpeg" else {}
        self._pending: list[Bytes] = []
        self._sum = hashlib.sha256()  # of raw frames
        self._stack = ExitStack()

    def __enter__(self) -> PartWriter:
        with ExitStack() as stack:
            self.temporary = stack.enter_context(self._named(self.path))
            for stream in self._streams.values():
                stack.callback(stream.close)
            file = h5py.File(self.temporary, "w", locking=False, userblock_size=_BLOCK_BYTES)
            self._file = stack.enter_context(file)
            self._stack = stack.pop_all()
        return self

    def update(self, **attributes: Any) -> None:
        """Adds attributes that are known only once the video was read."""
        self._attributes |= attributes

    def append(self, frame: Stored) -> None:
        """One more frame."""
        if self.storage == "jpeg":
            images = frame if isinstance(frame, tuple) else (frame,)
            for stream, image in zip(self._streams.values(), images, strict=True):
                assert isinstance(image, bytes)
                stream.append(image)
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
            if self._streams:
                self._check_space()
            else:
                self._write_pending()
            streams = {name: self._write_stream(name, stream) for name, stream in self._streams.items()}
            sums = {name: stream.sum for name, stream in self._streams.items()} or {"frames": self._sum}
            self._attributes |= {sum_of(name): found.hexdigest() for name, found in sums.items()}
            self._attributes |= {"frame_count": self.frames, "schema": SCHEMA}
            self._file.attrs.update(self._attributes)
            self._file.close()
            self._write_head(streams)

    def _write_head(self, streams: dict[str, list[int]]) -> None:
        head = {
            "gkd": SCHEMA,
            "bytes": self.temporary.stat().st_size,
            "frames": self.frames,
            "digest": self._attributes.get("source_digest", ""),
            "streams": streams,
        }
        line = json.dumps(head).encode().ljust(_HEAD_BYTES - 1) + b"\n"
        assert len(line) == _HEAD_BYTES
        about = json.dumps(self._attributes, ensure_ascii=False).encode()
        if len(about) >= _BLOCK_BYTES - _HEAD_BYTES:
            about = b""  # a very long name
        with open(self.temporary, "r+b") as file:
            file.write(line + about.ljust(_BLOCK_BYTES - _HEAD_BYTES - 1) + b"\n")

    def _check_space(self) -> None:
        free = os.statvfs(self.path.parent)
        if free.f_bavail * free.f_frsize < sum(stream.offsets[-1] for stream in self._streams.values()):
            # said here, before HDF5 is caught half-way
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def _write_stream(self, name: str, stream: Spool) -> list[int]:
        """Returns where images and offsets begin in the file, and the length of the images."""
        frames = self._file.create_dataset(name, (stream.offsets[-1],), np.uint8)
        stream.write(frames)
        offsets = "offsets" if name == "frames" else f"{name}_offsets"
        self._file[offsets] = np.array(stream.offsets, "<i8")
        return [frames.id.get_offset(), self._file[offsets].id.get_offset(), stream.offsets[-1]]

    def _write_pending(self) -> None:
        if not self._pending:
            return
        # np.stack keeps the order of planar images
        block = np.ascontiguousarray(np.stack(self._pending))  # (T, H, W, C)
        self._pending.clear()
        self._sum.update(block.data)
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
        self._streams: list[tuple[int, Any]] = []  # where the images lie, and where each ends
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
            for images_at, offsets_at, total in head["streams"].values():
                ends = self._read(offsets_at, 8 * (frames + 1)).view("<i8")  # (T + 1,)
                if ends[0] != 0 or ends[-1] != total:
                    raise ValueError("its offsets are wrong")
                self._streams.append((images_at, ends))
            if not self._streams:
                self._raw = h5py.File(path, "r", locking=False)
        except GkdError:
            self.close()
            raise
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            self.close()
            raise damaged_part(path, str(error)) from None

    def offsets(self) -> list[NDArray[np.int64]]:
        """Of each stream of JPEGs, where its images begin and where the last one ends: (T + 1,)."""
        return [ends for _, ends in self._streams]

    def frames(self, start: int, count: int) -> list[Bytes] | Bytes:
        """Frames [start, start + count): (count, H, W, C), or JPEGs in one read per stream.

        Flow in JPEG is `count` pictures of x and then `count` of y.
        """
        images: list[Bytes] = []
        try:
            if self._raw is not None:
                raw: Bytes = self._raw["frames"][start : start + count]
                return raw
            for images_at, all_ends in self._streams:
                ends = all_ends[start : start + count + 1]
                block = self._read(images_at + int(ends[0]), int(ends[-1] - ends[0]))
                cuts = (ends - ends[0]).tolist()
                images += [block[a:b] for a, b in itertools.pairwise(cuts)]
        except (OSError, RuntimeError, KeyError) as error:
            raise damaged_part(self.path, str(error)) from None
        return images

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


class OtherSchema(OSError):
    """A whole file that another version of gkd wrote."""


def read_attributes(path: str | Path, schema: int = SCHEMA) -> dict[str, Any]:
    """The attributes of a part, or of another file of the store and its schema.

    Raises:
        OSError: it is damaged, or (`OtherSchema`) of another version.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            attributes = {key: plain_value(value) for key, value in file.attrs.items()}
    except RuntimeError as error:  # h5py's other way to say that a file is damaged
        raise OSError(str(error)) from None
    if attributes.get("schema") != schema:
        raise OtherSchema(f"schema {attributes.get('schema')}, not {schema}")
    return attributes


def jpeg_bytes(path: Path) -> int:
    """What the images of a whole part take, without offsets, attributes and padding; 0 of a raw one."""
    with open(path, "rb") as file:
        head = json.loads(file.read(_HEAD_BYTES))
    return sum(total for _, _, total in head["streams"].values())


def read_about(path: str | Path) -> dict[str, Any]:
    """The attributes of a part, from its second line where it has one; see `read_attributes`.

    Raises:
        OSError: there is none, or it is not a whole part of this schema.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        block = os.read(handle, _BLOCK_BYTES)
        size = os.fstat(handle).st_size
    finally:
        os.close(handle)
    try:
        head = json.loads(block[:_HEAD_BYTES])
        if head["gkd"] != SCHEMA or head["bytes"] != size:
            raise ValueError("its length is wrong, or it is of another version")
        second = block[_HEAD_BYTES:]
        return dict(json.loads(second)) if second.startswith(b"{") else read_attributes(path)
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"{path}: {error}") from None


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
