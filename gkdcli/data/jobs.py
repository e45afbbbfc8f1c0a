"""One video of `gkd prepare`, from file to part: what a worker process does."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from gkdcli.data.annotations import Source
from gkdcli.data.parts import PartWriter
from gkdcli.data.video import BadVideo, VideoReader, stored_size
from gkdcli.files import disk_is_full
from gkdcli.runs import version
from gkdcli.settings import DataSettings


@dataclass(frozen=True)
class Job:
    """One video to prepare.

    Args:
        source: the video.
        part: where it goes.
        data: how.
        size: of the file, in bytes.
        known_digest: of the source of the part that is there; nothing is done where it is the same.
        probe_only: only estimate frames and bytes.
    """

    source: Source
    part: Path
    data: DataSettings
    size: int
    known_digest: str = ""
    probe_only: bool = False


@dataclass(frozen=True)
class Result:
    """What became of it.

    Args:
        frames: in the part.
        bytes: of the part.
        reason: of a reject; "" otherwise.
        unchanged: the part that is there serves.
        failure: the store cannot be written, and why.
        full: because the disk is full.
    """

    frames: int = 0
    bytes: int = 0
    reason: str = ""
    unchanged: bool = False
    failure: str = ""
    full: bool = False


def work(job: Job) -> Result:
    """Prepares or probes one video; a bad one is a result too."""
    try:
        return _probe(job) if job.probe_only else _prepare(job)
    except BadVideo as error:
        return Result(reason=" ".join(str(error).split()))
    except MemoryError:
        return Result(reason="needs more memory than there is")


def _probe(job: Job) -> Result:
    data = job.data
    with VideoReader(job.source.path) as video:
        info = video.info
    width, height = stored_size(info.width, info.height, data)
    frames = round(info.frames * data.fps / info.fps) if 0 < data.fps < info.fps else info.frames
    # JPEG: rather low, for it decides on a refusal; measured 0.2 to 0.34 byte/px at quality 95
    per_px = 3.0 if data.storage == "raw" else 0.15 * (5 / max(100 - data.jpeg_quality, 2)) ** 0.6
    return Result(frames, round(frames * width * height * per_px))


def _prepare(job: Job) -> Result:
    path, data = job.source.path, job.data
    try:
        before = path.stat()
        digest = _digest(path)
    except OSError as error:
        raise BadVideo(f"cannot be read: {error.strerror}") from None
    if digest == job.known_digest:
        return Result(unchanged=True)
    attributes = {
        "source": path.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"),
        "source_size": before.st_size,
        "source_mtime_ns": before.st_mtime_ns,
        "source_digest": digest,
        "settings": json.dumps(data.stored(), sort_keys=True),
        "storage": data.storage,
        "version": version(),
    }
    try:
        with VideoReader(path) as video, PartWriter(job.part, data.storage, attributes) as part:
            sampling, fps = video.sampling(data)
            scaling, width, height = video.scaling(data)
            for frame in video.frames(data):
                part.append(frame)
            part.update(
                codec=video.info.codec,
                source_fps=video.info.fps,
                source_frames=video.read,
                source_width=video.info.width,
                source_height=video.info.height,
                rotation=video.info.rotation,
                damaged_frames=video.damaged,
                sampling=sampling,
                scaling=scaling,
                fps=fps,
                width=width,
                height=height,
            )
            if _stamp(path) != (before.st_size, before.st_mtime_ns):
                raise BadVideo("it changed while it was read")
        return Result(part.frames, job.part.stat().st_size)
    except (OSError, RuntimeError) as error:  # RuntimeError is h5py's other voice
        return Result(failure=str(error), full=disk_is_full(error))


def _stamp(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:
        raise BadVideo("the file has disappeared") from None
    return stat.st_size, stat.st_mtime_ns


def _digest(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
