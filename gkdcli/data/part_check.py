"""One part of a store, read from end to end: what a worker process of `gkd prepare --audit` does."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gkdcli.data.images import jpeg_size
from gkdcli.data.parts import STREAMS, Bytes, OtherSchema, PartReader, read_attributes, sum_of
from gkdcli.data.video import BadVideo, require_decodable
from gkdcli.errors import GkdError
from gkdcli.files import digest, stamp

_BLOCK = 16  # frames
_ATTRIBUTES = {
    "source", "source_size", "source_mtime_ns", "source_digest", "source_fps", "source_frames",
    "source_width", "source_height", "storage", "settings", "version", "codec", "rotation",
    "damaged_frames", "sampling", "scaling", "fps", "width", "height", "frame_count",
}  # fmt: skip
_OF_FLOW = {"flow_method", "flow_bound", "flow_parameters"}


@dataclass(frozen=True)
class Look:
    """A part to be read.

    Args:
        modality: "rgb" or "flow".
        part: where it lies.
        source: what it was made of, where that is still listed.
    """

    modality: str
    part: Path
    source: Path | None


@dataclass(frozen=True)
class Seen:
    """What was found.

    Args:
        attributes: of the part; empty where they cannot be read.
        damage: the first; "" where the part is whole.
        other_schema: it is of another version, which is not read.
        change: what the source is now that it was not when it was prepared; "" where it is the same.
    """

    attributes: Mapping[str, Any] = field(default_factory=dict)
    damage: str = ""
    other_schema: str = ""
    change: str = ""


def check(look: Look) -> Seen:
    """Reads all of a part: head line, offsets, attributes, each image; and compares it with its source.

    Each JPEG has to begin and end as one and to say the size that the attributes say, and all of them have
    to have the SHA-256 that was kept when they were written. Where none was kept, each is decoded, at an
    eighth of its size, which takes its whole code through the decoder: what still makes a picture then is
    not noticed. Of a source whose size and time of change are those of the part nothing more is read.
    """
    try:
        attributes = read_attributes(look.part)
    except OtherSchema as error:
        return Seen(other_schema=str(error))
    except OSError as error:
        return Seen(damage=_line(error))
    return Seen(attributes, _damage(look, attributes), change=_change(look, attributes))


def _damage(look: Look, attributes: Mapping[str, Any]) -> str:
    needed = _ATTRIBUTES | (_OF_FLOW if look.modality == "flow" else set())
    if lacking := sorted(needed - attributes.keys()):
        return f"it lacks the attribute {', '.join(lacking)}"
    try:
        reader = PartReader(look.part, attributes["frame_count"], attributes["source_digest"])
    except GkdError as error:
        return _reason(error, look.part)
    with contextlib.closing(reader):
        try:
            if attributes["storage"] == "raw":
                return _raw_damage(reader, attributes, 2 if look.modality == "flow" else 3)
            return _jpeg_damage(reader, attributes, STREAMS[look.modality])
        except GkdError as error:
            return _reason(error, look.part)


def _reason(error: GkdError, part: Path) -> str:
    """What a reader found; it was given the part's own length and source, so another part it cannot be."""
    if error.where == str(part):
        return "its head line and its attributes differ"
    return error.where.removeprefix(f"{part}: ")


def _raw_damage(reader: PartReader, attributes: Mapping[str, Any], channels: int) -> str:
    frames = int(attributes["frame_count"])
    found = hashlib.sha256()
    for start in range(0, frames, _BLOCK):
        count = min(_BLOCK, frames - start)
        block: Any = reader.frames(start, count)
        wanted = (count, attributes["height"], attributes["width"], channels)
        if not isinstance(block, np.ndarray) or block.shape != wanted or block.dtype != np.uint8:
            return f"its frames from {start} on are not {wanted[2]}x{wanted[1]} px of {channels} bytes"
        found.update(np.ascontiguousarray(block).data)
    return _changed({"frames": found}, attributes)


def _changed(found: Mapping[str, Any], attributes: Mapping[str, Any]) -> str:
    """Whether streams have the sums that were kept."""
    for name, summed in found.items():
        if attributes.get(sum_of(name), summed.hexdigest()) != summed.hexdigest():
            return f"its {name} are not the bytes that were written"
    return ""


def _jpeg_damage(reader: PartReader, attributes: Mapping[str, Any], streams: tuple[str, ...]) -> str:
    frames = int(attributes["frame_count"])
    offsets = reader.offsets()
    if len(offsets) != len(streams):
        return f"it holds {len(offsets)} streams of images, not {len(streams)}"
    for name, ends in zip(streams, offsets, strict=True):
        backwards = np.flatnonzero(np.diff(ends) <= 0)
        if len(backwards):
            return f"its offsets are wrong: image {backwards[0]} of {name} ends before it begins"
    wrong: list[str] = []
    sums = {name: hashlib.sha256() for name in streams}
    summed = all(sum_of(name) in attributes for name in streams)
    with contextlib.nullcontext() if summed else _complaints() as complaints:
        for start in range(0, frames, _BLOCK):
            count = min(_BLOCK, frames - start)
            for place, jpeg in enumerate(reader.frames(start, count)):
                name = f"image {start + place % count}"
                name += f" of {streams[place // count]}" if len(streams) > 1 else ""
                sums[streams[place // count]].update(jpeg)
                if found := _wrong(jpeg, name, attributes, complaints):
                    wrong.append(found)
    more = f" (and {len(wrong) - 1} other images)" if len(wrong) > 1 else ""
    return f"{wrong[0]}{more}" if wrong else _changed(sums, attributes)


def _wrong(jpeg: Bytes, name: str, attributes: Mapping[str, Any], complaints: Complaints | None) -> str:
    """What is wrong with an image; without `complaints` it is not decoded."""
    try:
        data = jpeg.tobytes()
        width, height, _ = jpeg_size(data, name)
        if (width, height) != (attributes["width"], attributes["height"]):
            return f"{name} is {width}x{height}, not {attributes['width']}x{attributes['height']}"
        if complaints is not None:
            require_decodable(data)
    except BadVideo as error:
        return str(error) if name in str(error) else f"{name} cannot be decoded"
    said = complaints.heard() if complaints is not None else ""
    return f"{name}: {said}" if said else ""


class Complaints:
    """What was written to stderr, at its end of a pipe."""

    def __init__(self, end: int) -> None:
        self._end = end

    def heard(self) -> str:
        """The first line since the last call."""
        try:
            lines = os.read(self._end, 1 << 16).decode("utf-8", "replace").split("\n")
        except BlockingIOError:
            return ""
        return lines[0].strip()


@contextlib.contextmanager
def _complaints() -> Iterator[Complaints]:
    """Listens to stderr: there alone libjpeg says what is wrong with an image that it fills up with grey."""
    stderr = os.dup(2)
    hear, say = os.pipe()
    os.set_blocking(hear, False)
    os.dup2(say, 2)
    try:
        yield Complaints(hear)
    finally:
        os.dup2(stderr, 2)
        for handle in (stderr, hear, say):
            os.close(handle)


def _change(look: Look, attributes: Mapping[str, Any]) -> str:
    """How the source differs from what the part was made of."""
    if look.source is None or not attributes.keys() >= _ATTRIBUTES:
        return ""
    try:
        size, mtime_ns = stamp(look.source)
        if size != attributes["source_size"]:
            return f"{look.source} has {size} bytes, it had {attributes['source_size']} when it was prepared"
        if mtime_ns != attributes["source_mtime_ns"] and digest(look.source) != attributes["source_digest"]:
            return f"{look.source} has another content than when it was prepared"
    except OSError as error:
        return f"{look.source} cannot be read: {error.strerror}"
    return ""


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
