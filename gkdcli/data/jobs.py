"""One video of `gkd prepare`, from file to parts: what a worker process does."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from gkdcli.data.annotations import Source
from gkdcli.data.arrays import ArrayVideo
from gkdcli.data.flow import FlowEstimator
from gkdcli.data.images import FrameFolder
from gkdcli.data.parts import Bytes, PartWriter, Stored, read_about
from gkdcli.data.video import BadFlow, BadVideo, VideoReader, encode_flow, stored_size
from gkdcli.data.workers import beat
from gkdcli.errors import GkdError
from gkdcli.files import digest, disk_is_full, put_in_place, stamp
from gkdcli.runs import version
from gkdcli.settings import MODALITIES, DataSettings

Frame = TypeVar("Frame")


class Cut(NamedTuple):
    """How much of a video that is only measured is prepared: so many frames, and not for longer than that."""

    frames: int
    seconds: float


@dataclass(frozen=True)
class Job:
    """One video to prepare.

    Args:
        source: the video, a folder of its images, or its arrays.
        parts: where each modality goes.
        data: how.
        size: of the file, or of all images, in bytes.
        known: digest of the source of a part that is there, by modality; where all are the same as the
            source's, nothing is done.
        beside: the part of the other modality, where it is not among `parts`; of the same video it must be
            equally long.
        probe_only: only estimate frames and bytes.
        cut: prepare the beginning alone, to see what it costs.
        device: where flow is computed that runs in PyTorch, "cpu" or "cuda".
    """

    source: Source
    parts: Mapping[str, Path]
    data: DataSettings
    size: int
    known: Mapping[str, str] = field(default_factory=dict)
    beside: Path | None = None
    probe_only: bool = False
    cut: Cut | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Result:
    """What became of it.

    Args:
        frames: in the part.
        bytes: of the part.
        reason: of a reject; "" otherwise.
        again: the reason may pass although the source does not change.
        unchanged: the part that is there serves.
        failure: the store cannot be written, and why.
        full: because the disk is full.
        frame_sec: seconds that its frames took, from the first to the last, without opening and closing.
        note: what the user should know.
        error: what ends the whole run, for it would be the same with every video.
        drafts: whole parts under temporary names, and the names that `settle` gives them.
    """

    frames: int = 0
    bytes: int = 0
    reason: str = ""
    again: bool = False
    unchanged: bool = False
    failure: str = ""
    full: bool = False
    frame_sec: float = 0.0
    note: str = ""
    error: GkdError | None = None
    drafts: tuple[tuple[Path, Path], ...] = ()


def work(job: Job) -> Result:
    """Prepares or probes one video; a bad one is a result too."""
    return settle(draft(job))


def settle(result: Result) -> Result:
    """Gives the parts of a result their names, once the disk has them."""
    try:
        with ExitStack() as undo:  # where one fails, of those after it
            for temporary, _ in result.drafts:
                undo.callback(temporary.unlink, missing_ok=True)
            for temporary, part in result.drafts:
                put_in_place(temporary, part)
    except OSError as error:
        return Result(failure=str(error), full=disk_is_full(error))
    return replace(result, drafts=())


def draft(job: Job) -> Result:
    """`work` up to the point where only the disk is waited for."""
    try:
        return _probe(job) if job.probe_only else _prepare(job)
    except BadVideo as error:
        return Result(reason=" ".join(str(error).split()), again=isinstance(error, BadFlow | _Changed))
    except GkdError as error:
        return Result(error=error)
    except MemoryError:
        return Result(reason="needs more memory than there is")


class _Changed(BadVideo):
    """The reason holds for the file that was there; nobody has tried the one that is there now."""


_Video = VideoReader | FrameFolder | ArrayVideo


def _open(source: Source, modalities: Collection[str]) -> _Video:
    if source.path.suffix == ".npy":
        if set(modalities) == {"flow"} and source.flow is not None:
            try:
                return ArrayVideo(source.flow, stated=source.stated)
            except BadVideo as error:
                raise BadFlow(str(error)) from None  # the frames may be good
        return ArrayVideo(source.path, source.flow if "flow" in modalities else None, source.stated)
    return FrameFolder(source.path) if source.path.is_dir() else VideoReader(source.path)


def _probe(job: Job) -> Result:
    data = job.data
    with _open(job.source, job.parts) as video:
        info = video.info
    width, height = stored_size(info.width, info.height, data)
    sampled = 0 < data.fps < info.fps and not isinstance(video, ArrayVideo)
    frames = round(info.frames * data.fps / info.fps) if sampled else info.frames
    finer = (5 / max(100 - data.jpeg_quality, 2)) ** 0.6
    # JPEG: rather low, for it decides on a refusal; measured 0.2 to 0.34 byte/px at quality 95, flow 0.06
    per_px = (
        {"rgb": 0.15 * finer, "flow": 0.03 * finer} if data.storage == "jpeg" else {"rgb": 3.0, "flow": 2.0}
    )
    return Result(frames, round(frames * width * height * sum(per_px[modality] for modality in job.parts)))


def _prepare(job: Job) -> Result:
    data, files = job.data, {modality: job.source.file(modality) for modality in job.parts}
    before: dict[Path, tuple[int, int]] = {}
    found: dict[Path, str] = {}
    for path in files.values():
        try:
            before[path] = stamp(path)
            found[path] = found[path] if path in found else digest(path, beat)
        except OSError as error:
            raise BadVideo(f"cannot be read: {error.strerror}") from None
    if all(job.known.get(modality) == found[path] for modality, path in files.items()):
        return Result(unchanged=True)
    attributes = {
        modality: {
            "source": _source_name(path),
            "source_size": before[path][0],
            "source_mtime_ns": before[path][1],
            "source_digest": found[path],
            "storage": data.storage,
            "version": version(),
        }
        for modality, path in files.items()
    }
    try:
        with ExitStack() as undo:
            with _open(job.source, job.parts) as video, ExitStack() as stack:
                parts: dict[str, PartWriter] = {}
                for modality, path in job.parts.items():
                    part = PartWriter(path, data.storage, attributes[modality], modality, draft=True)
                    parts[modality] = stack.enter_context(part)
                    undo.callback(part.temporary.unlink, missing_ok=True)
                beside = _frames_beside(job.beside, next(iter(attributes.values())))
                started = time.perf_counter()
                note = _write(video, parts, job, beside)
                frame_sec = time.perf_counter() - started
                if job.cut is None:
                    _require_equal_length(parts, beside)
                read = _attributes(video, data)
                for modality, part in parts.items():
                    part.update(settings=json.dumps(data.stored(modality), sort_keys=True), **read)
                if any(_stamp(path) != stamped for path, stamped in before.items()):
                    raise _Changed("it changed while it was read")
            drafts = tuple((part.temporary, part.path) for part in parts.values())
            written = sum(temporary.stat().st_size for temporary, _ in drafts)
            undo.pop_all()
        frames = max(part.frames for part in parts.values())
        return Result(frames, written, frame_sec=frame_sec, note=note, drafts=drafts)
    except (OSError, RuntimeError) as error:  # RuntimeError is h5py's other voice
        return Result(failure=str(error), full=disk_is_full(error))


def _attributes(video: _Video, data: DataSettings) -> dict[str, Any]:
    """What is known of a video, and of what was made of it, once it was read."""
    sampling, fps = video.sampling(data)
    scaling, width, height = video.scaling(data)
    return {
        "codec": video.info.codec,
        "source_fps": video.info.fps,
        "source_frames": video.read,
        "source_width": video.info.width,
        "source_height": video.info.height,
        "rotation": video.info.rotation,
        "damaged_frames": video.damaged,
        "sampling": sampling,
        "scaling": scaling,
        "fps": fps,
        "width": width,
        "height": height,
    }


def _source_name(path: Path) -> str:
    """As attributes keep it; arrays of frames and of flow have one name in two folders."""
    name = f"{path.parent.name}/{path.name}" if path.suffix == ".npy" else path.name
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _write(video: _Video, parts: Mapping[str, PartWriter], job: Job, beside: int | None) -> str:
    """All frames into all parts, in one pass over the video; `beside` frames are in the other stream.

    Returns what the user should know; "" for nothing.
    """
    data, rgb, flow = job.data, parts.get("rgb"), parts.get("flow")
    if flow is not None and not isinstance(video, VideoReader) and video.has_flow:
        _write_given_flow(video, flow, data, beside, job.cut)
        flow = None
    if flow is None:
        if rgb is not None:
            for picture in _beginning(video.pictures(data), job.cut):
                rgb.append(picture.stored(data))
        return ""
    estimator = FlowEstimator(
        data.flow, data.flow_bound, device=job.device, batch=data.flow_batch, weights=data.flow_weights
    )
    block: list[Bytes] = []  # consecutive frames; the last one begins the next block
    motion = None
    for picture in _beginning(video.pictures(data), job.cut):
        if rgb is not None:
            rgb.append(picture.stored(data))
        block.append(picture.rgb() if estimator.colour else picture.grey())
        if len(block) == estimator.frames:
            motion = _append_flow(flow, estimator, block, data)
            del block[:-1]
    if len(block) > 1:
        motion = _append_flow(flow, estimator, block, data)
    if motion is None:
        raise BadFlow("one frame only, so there is no motion between frames")
    flow.append(motion)  # the last is repeated: as many as frames
    flow.update(
        flow_method=data.flow,
        flow_bound=data.flow_bound,
        flow_parameters=json.dumps(estimator.parameters, sort_keys=True),
    )
    return estimator.note


def _append_flow(
    flow: PartWriter, estimator: FlowEstimator, block: Sequence[Bytes], data: DataSettings
) -> Stored:
    """Stores the flow between the frames of a block; returns the last."""
    for pair in estimator.block(block):
        motion = encode_flow(pair, data)
        flow.append(motion)
    return motion


def _write_given_flow(
    video: FrameFolder | ArrayVideo,
    flow: PartWriter,
    data: DataSettings,
    beside: int | None,
    cut: Cut | None,
) -> None:
    """Flow that was extracted before."""
    images: Stored | None = None
    for images in _beginning(video.flows(data), cut):
        flow.append(images)
    if images is not None and not video.has_frames and beside == flow.frames + 1:
        flow.append(images)  # one image fewer than frames is usual
    flow.update(flow_method=data.flow, flow_bound=data.flow_bound, flow_parameters="as the images were given")


def _beginning(frames: Iterable[Frame], cut: Cut | None) -> Iterator[Frame]:
    """All frames, or those up to the cut; two at least, between which there is motion."""
    started = time.perf_counter()
    for place, frame in enumerate(frames):
        beat()
        over = cut and (place >= cut.frames or time.perf_counter() - started > cut.seconds)
        if over and place >= 2:
            return
        yield frame


def _frames_beside(part: Path | None, attributes: Mapping[str, Any]) -> int | None:
    """Length of the other stream; None where there is none, or one of an older version of the file."""
    if part is None or not part.exists():
        return None
    try:
        found = read_about(part)
    except OSError:
        return None  # a damaged one is found where it is used
    stale = found["source"] == attributes["source"] and found["source_digest"] != attributes["source_digest"]
    return None if stale else int(found["frame_count"])


def _require_equal_length(parts: Mapping[str, PartWriter], beside: int | None) -> None:
    """Both streams of a video show the same moments, or fusion would mean nothing."""
    lengths = {modality: part.frames for modality, part in parts.items()}
    if beside is not None:
        lengths[next(modality for modality in MODALITIES if modality not in parts)] = beside
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{modality} has {frames} frames" for modality, frames in sorted(lengths.items()))
        raise BadFlow(f"the two streams differ in length: {told}")


def _stamp(path: Path) -> tuple[int, int]:
    try:
        return stamp(path)
    except OSError:
        raise BadVideo("the file has disappeared") from None
