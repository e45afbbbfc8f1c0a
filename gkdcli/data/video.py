"""Video files: what they are, and their frames one by one, scaled and, for JPEG stores, encoded."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import av
import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gkdcli.settings import DataSettings

Bytes = NDArray[np.uint8]
Frame = TypeVar("Frame")
_LONGEST_SIDE_PX = 16384
_AHEAD_BYTES = 8 << 20  # of pictures that are decoded before the first of them is handed on
_TOLERATED = 0.1  # share of frames that may be damaged or missing
_TURNS = {90: cv2.ROTATE_90_COUNTERCLOCKWISE, 180: cv2.ROTATE_180, 270: cv2.ROTATE_90_CLOCKWISE}


class BadVideo(Exception):
    """A file that gives no usable frames; the text is the reason, in one line."""


class BadFlow(BadVideo):
    """No usable flow, although the frames may be good: the reason holds for this attempt alone."""


@dataclass(frozen=True)
class VideoInfo:
    """What a file says it is.

    Args:
        codec: as FFmpeg names it.
        width: of the upright picture, in px.
        height: likewise.
        fps: mean frame rate; 0 where unknown.
        frames: estimate from the container; 0 where it says nothing.
        duration_sec: 0 where unknown.
        rotation: degrees counterclockwise by which stored pictures are turned for display.
    """

    codec: str
    width: int
    height: int
    fps: float
    frames: int
    duration_sec: float
    rotation: int


class Picture:
    """One upright frame of the stored size.

    Args:
        bgr: (H, W, 3) uint8; None where `jpeg` was not decoded.
        jpeg: the frame as a JPEG file, where there is one that can be kept as it is.
    """

    def __init__(self, bgr: Bytes | None, jpeg: bytes | None = None) -> None:
        self._bgr = bgr
        self._jpeg = jpeg

    def stored(self, data: DataSettings) -> bytes | Bytes:
        """As an rgb store keeps it: a JPEG file, or (H, W, 3) uint8 RGB."""
        if data.storage == "raw":
            return self.rgb()
        return self._jpeg if self._jpeg is not None else encode(self.bgr(), data)

    def bgr(self) -> Bytes:
        """(H, W, 3) uint8."""
        if self._bgr is None:
            assert self._jpeg is not None
            self._bgr = decode(self._jpeg)
        return self._bgr

    def rgb(self) -> Bytes:
        """(H, W, 3) uint8."""
        return np.ascontiguousarray(self.bgr()[:, :, ::-1])

    def grey(self) -> Bytes:
        """(H, W) uint8, as optical flow takes it."""
        return np.asarray(cv2.cvtColor(self.bgr(), cv2.COLOR_BGR2GRAY), np.uint8)


def encode(picture: Bytes, data: DataSettings) -> bytes:
    """(H, W, 3) BGR or (H, W) grey -> a JPEG file."""
    return bytes(cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, data.jpeg_quality])[1])


def encode_flow(flow: Bytes, data: DataSettings) -> tuple[bytes, ...] | Bytes:
    """(H, W, 2) uint8 as a store keeps it: as it is, or (JPEG of x, JPEG of y)."""
    if data.storage == "raw":
        return flow
    return tuple(encode(np.ascontiguousarray(flow[:, :, axis]), data) for axis in (0, 1))


def decode(jpeg: bytes, grey: bool = False) -> Bytes:
    """A JPEG file -> (H, W, 3) BGR or (H, W) grey.

    Raises:
        BadVideo: it is damaged.
    """
    # the file's own orientation tag is ignored, as by everyone who reads extracted frames
    mode = cv2.IMREAD_GRAYSCALE if grey else cv2.IMREAD_COLOR
    return _imdecode(jpeg, mode | cv2.IMREAD_IGNORE_ORIENTATION)


def require_decodable(jpeg: bytes) -> None:
    """Decodes at an eighth of the size, which is quick.

    Raises:
        BadVideo: it is damaged.
    """
    _imdecode(jpeg, cv2.IMREAD_REDUCED_GRAYSCALE_8)


def _imdecode(jpeg: bytes, mode: int) -> Bytes:
    try:
        found = cv2.imdecode(np.frombuffer(jpeg, np.uint8), mode)
    except cv2.error:  # more pixels than OpenCV accepts
        found = None
    if found is None:
        raise BadVideo("an image of it cannot be decoded")
    return np.asarray(found, np.uint8)


def rescale(picture: Bytes, width: int, height: int, data: DataSettings) -> Bytes:
    """(H, W, 3) or (H, W) to (height, width), by the method that `scaler` names."""
    if picture.shape[:2] == (height, width):
        return picture
    if data.size:
        return np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC), np.uint8)
    return np.asarray(cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def probe(path: Path) -> VideoInfo:
    """Opens a file and decodes its first frame.

    Raises:
        BadVideo: there is no video in it.
    """
    with VideoReader(path) as video:
        return video.info


def read_frames(path: Path, data: DataSettings) -> Iterator[bytes | Bytes]:
    """Frames in the form that the store keeps, see `VideoReader.pictures` and `Picture.stored`.

    Raises:
        BadVideo: there is no video in it, or too much of it is damaged or missing.
    """
    with VideoReader(path) as video:
        for picture in video.pictures(data):
            yield picture.stored(data)


def stored_size(width: int, height: int, data: DataSettings) -> tuple[int, int]:
    """Width and height of stored frames, in px; a long side that follows from the short one is even.

    Raises:
        BadVideo: the picture is too elongated.
    """
    if data.size:
        return data.size[0], data.size[1]
    short, long = sorted((width, height))
    if data.short_side and short != data.short_side:
        long = data.short_side if long == short else 2 * round(long * data.short_side / short / 2)
        long = max(long, data.short_side)
        short = data.short_side
    if long > _LONGEST_SIDE_PX:
        raise BadVideo(f"frames of {width}x{height} would be stored {short}x{long}, more than fits")
    return (short, long) if width < height else (long, short)


def sampled(frames: Iterable[Frame], step: float) -> Iterator[Frame]:
    """Keeps a frame whenever the count of frames since the last kept one reaches `step` (METHOD.md 7).

    The remainder is carried; a step of 1 keeps all.
    """
    since_kept = 0.0
    for frame in frames:
        since_kept += 1
        if since_kept >= step:
            since_kept -= step
            yield frame


def scaler(data: DataSettings) -> str:
    """What scales frames that need it, in words; other libraries' bicubic gives other pixels."""
    return "PIL bicubic" if data.size else "area"


def scaling_of(info: VideoInfo, data: DataSettings) -> tuple[str, int, int]:
    """How frames are scaled for the store, in words, and their width and height there, in px.

    Raises:
        BadVideo: see `stored_size`.
    """
    width, height = stored_size(info.width, info.height, data)
    if (width, height) == (info.width, info.height):
        return "not", width, height
    return scaler(data), width, height


class VideoReader:
    """An open video; one thread, a few frames in memory at a time.

    Attributes:
        info: what it is.
        read: frames decoded so far.
        damaged: frames that could not be decoded well, so far.
    """

    def __init__(self, path: Path) -> None:
        self.read = 0
        self.damaged = 0
        self._packets = 0
        self._end = 0  # of the last packet, in ticks
        self._error = ""
        cv2.setNumThreads(1)  # the processes of `gkd prepare` share the cores already
        try:
            # "file" only: a playlist in disguise must not reach for the network
            self._container: Any = av.open(
                f"file:{path}", metadata_errors="ignore", options={"protocol_whitelist": "file"}
            )
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise BadVideo(_open_error(path, error)) from None
        try:
            self._stream = _video_stream(self._container)
            self._stream.thread_type = "SLICE"
            self._stream.codec_context.thread_count = 1
            self._decoded = self._decode()
            self._first = next(self._decoded, None)
            if self._first is None:
                raise BadVideo(f"no frame can be decoded{self._error and ': ' + self._error}")
            self.info = _describe(self._container, self._stream, self._first)
        except BaseException:
            self._container.close()
            raise

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._decoded.close()
        self._container.close()

    def sampling(self, data: DataSettings) -> tuple[str, float]:
        """Which frames `frames` keeps, in words, and how many of them there are per second."""
        fps = self.info.fps
        if not data.fps:
            return "every frame", fps
        if fps <= data.fps:
            return f"every frame: the video has {fps:g} frames/s, {data.fps:g} were asked for", fps
        return f"one frame in {fps / data.fps:g}", data.fps

    def scaling(self, data: DataSettings) -> tuple[str, int, int]:
        """How `frames` scales, in words, and the width and height of what it yields, in px.

        Raises:
            BadVideo: see `stored_size`.
        """
        return scaling_of(self.info, data)

    def pictures(self, data: DataSettings) -> Iterator[Picture]:
        """Yields upright, scaled frames, once.

        With `data.fps` below the video's rate, `sampled` chooses. `data.size` scales as the published arrays
        were: whole pictures in RGB, by Pillow's bicubic filter; `data.short_side` by area.

        Raises:
            BadVideo: more than a tenth of the video is damaged or missing. It is known at the end.
        """
        assert self._first is not None, "the frames of a video are read once"
        if data.fps and not self.info.fps:
            raise BadVideo("the frame rate is unknown, so frames cannot be chosen by it")
        _, width, height = self.scaling(data)
        scaled = (width, height) if self.info.rotation % 180 == 0 else (height, width)
        turn = _TURNS.get(self.info.rotation)
        step = max(self.info.fps / data.fps, 1.0) if data.fps else 1.0
        reformatter = av.video.reformatter.VideoReformatter()
        kept = 0
        block: list[Picture] = []  # coder after decoder, frame by frame, would take a tenth longer
        for frame in sampled(self._all_frames(), step):
            try:
                size = (frame.width, frame.height) if data.size else scaled
                picture: Bytes = reformatter.reformat(
                    frame, *size, "bgr24", interpolation="AREA", threads=1
                ).to_ndarray()
            except (av.error.FFmpegError, ValueError) as error:
                raise BadVideo(f"frames of format {frame.format.name} cannot be scaled: {error}") from None
            if turn is not None:
                picture = np.asarray(cv2.rotate(picture, turn), np.uint8)
            kept += 1
            block.append(Picture(rescale(picture, width, height, data)))
            if len(block) * picture.nbytes >= _AHEAD_BYTES:
                yield from block
                block.clear()
        yield from block
        self._check_whole()
        if not kept:
            raise BadVideo(f"too short: not one frame at {data.fps:g} frames/s")

    def _all_frames(self) -> Iterator[Any]:
        first, self._first = self._first, None
        yield first
        yield from self._decoded

    def _decode(self) -> Generator[Any, None, None]:
        """Every frame; what cannot be read or decoded is counted in `damaged` and remembered."""
        try:
            for packet in self._container.demux(self._stream):
                if packet.size:
                    self._packets += 1
                    if packet.pts is not None:
                        self._end = max(self._end, packet.pts + (packet.duration or 0))
                try:
                    frames = packet.decode()
                except av.error.FFmpegError as error:
                    self._note(error)
                    continue
                for frame in frames:
                    self.read += 1
                    self.damaged += frame.is_corrupt
                    yield frame
        except av.error.FFmpegError as error:
            self._note(error)

    def _note(self, error: Exception) -> None:
        self.damaged += 1
        self._error = self._error or getattr(error, "strerror", None) or str(error)

    def _check_whole(self) -> None:
        stated = self._stream.frames
        if self._packets < stated * (1 - _TOLERATED):
            raise BadVideo(f"truncated: {self._packets} of {stated} frames are there")
        alone = len(self._container.streams) == 1 and self._container.duration
        if alone and not stated:
            seconds = self._container.duration / av.time_base
            there = float(self._end * self._stream.time_base)
            there -= (self._container.start_time or 0) / av.time_base
            if there < seconds * (1 - _TOLERATED):
                raise BadVideo(f"truncated: {there:.1f} of {seconds:.1f} s are there")
        if self.damaged > self._packets * _TOLERATED:
            raise BadVideo(
                f"damaged: {self.damaged} of {self._packets} frames{self._error and ': ' + self._error}"
            )


def _video_stream(container: Any) -> Any:
    streams = [stream for stream in container.streams.video if not _is_cover(stream)]
    if not streams:
        raise BadVideo("no video stream in it")
    if streams[0].codec_context is None:
        raise BadVideo("its codec is unknown")
    return streams[0]


def _is_cover(stream: Any) -> bool:
    """The picture of an album, as music files carry it."""
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _describe(container: Any, stream: Any, first: Any) -> VideoInfo:
    rate = stream.average_rate or stream.guessed_rate
    fps = float(rate) if rate else 0.0
    if stream.duration:
        seconds = float(stream.duration * stream.time_base)
    else:
        seconds = (container.duration or 0) / av.time_base
    rotation = round(first.rotation / 90) * 90 % 360
    width, height = (first.width, first.height) if rotation % 180 == 0 else (first.height, first.width)
    frames = stream.frames or round(seconds * fps)
    return VideoInfo(stream.codec_context.name, width, height, fps, frames, seconds, rotation)


def _open_error(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file has disappeared"
    try:
        empty = path.stat().st_size == 0
    except OSError as stat_error:
        return f"cannot be read: {stat_error.strerror}"
    return "an empty file" if empty else f"not a video: {getattr(error, 'strerror', None) or error}"
