"""Videos published as arrays, `<video>.npy`: sampled, scaled frames, or flow; read through a memory map."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from gkdcli.data.sources import Stated
from gkdcli.data.video import BadFlow, BadVideo, Bytes, Picture, VideoInfo, encode_flow, stored_size
from gkdcli.settings import CHANNELS, DataSettings

_BLOCK = 64  # frames mapped at a time: pages of blocks that were read are given back


class ArrayVideo:
    """Frames (T, H, W, 3) uint8 RGB, or flow (T, H, W, 2) uint8, taken as they are.

    Args:
        path: a .npy file of frames, or of flow.
        flow: one of flow beside frames.
        stated: what the annotation files say about the video.

    Attributes:
        info: of the arrays; the frame rate of the source, 0 where it is unknown.
        read: frames read so far.
        damaged: always 0.

    Raises:
        BadVideo: a file is none of these; pickled objects are never read.
    """

    def __init__(self, path: Path, flow: Path | None = None, stated: Stated | None = None) -> None:
        self.read = 0
        self.damaged = 0
        self.stated = stated or Stated()
        channels, shape = _shape(path)
        self._rgb = path if channels == CHANNELS["rgb"] else None
        self._flow = flow if self._rgb else path
        if self._flow is not None and self._rgb is not None:
            try:
                found, other = _shape(self._flow)
            except BadVideo as error:
                raise BadFlow(str(error)) from None
            if found != CHANNELS["flow"]:
                raise BadFlow(f"{self._flow.name}: {found} channels, flow has 2")
            if other[0] not in (shape[0], shape[0] - 1) or other[1:] != shape[1:]:
                raise BadFlow(f"flow is {_sizes(other)}, frames are {_sizes(shape)}")
        frames, height, width = shape
        self.info = VideoInfo("npy", width, height, self.stated.fps, frames, 0.0, 0)

    def __enter__(self) -> ArrayVideo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    @property
    def has_frames(self) -> bool:
        """Whether there are frames, and not flow alone."""
        return self._rgb is not None

    @property
    def has_flow(self) -> bool:
        """Whether there is flow; otherwise it is computed from the frames."""
        return self._flow is not None

    def sampling(self, data: DataSettings) -> tuple[str, float]:
        """See `VideoReader.sampling`: the rate is the one stated, else the one asked for."""
        fps = self.stated.sample_fps or data.fps
        if not fps:
            raise BadVideo("the frame rate of arrays is unknown: set data.fps")
        return "every frame of an array", fps

    def scaling(self, data: DataSettings) -> tuple[str, int, int]:
        """See `VideoReader.scaling`.

        Raises:
            BadVideo: frames of this size would have to be scaled.
        """
        width, height = stored_size(self.info.width, self.info.height, data)
        if (width, height) != (self.info.width, self.info.height):
            raise BadVideo(
                f"frames are {self.info.width}x{self.info.height}, the store takes {width}x{height};"
                " arrays are not scaled"
            )
        return "not", width, height

    def pictures(self, data: DataSettings) -> Iterator[Picture]:
        """Yields the frames.

        Raises:
            BadVideo: the file was cut off since it was opened.
        """
        if self._rgb is None:
            raise BadVideo("it holds flow and no frames")
        self.scaling(data)
        for frame in _frames(self._rgb):
            self.read += 1
            yield Picture(np.ascontiguousarray(frame[:, :, ::-1]))

    def flows(self, data: DataSettings) -> Iterator[tuple[bytes, ...] | Bytes]:
        """Yields the flow as a store keeps it: (H, W, 2) uint8, or (JPEG of x, JPEG of y).

        Where there is one fewer than frames, the last is repeated.

        Raises:
            BadVideo: the file was cut off since it was opened.
        """
        assert self._flow is not None
        self.scaling(data)
        motion: tuple[bytes, ...] | Bytes | None = None
        count = 0
        for frame in _frames(self._flow):
            motion = encode_flow(frame, data)
            count += 1
            self.read += self._rgb is None
            yield motion
        if motion is not None and self._rgb is not None and count == self.info.frames - 1:
            yield motion


def _open(path: Path) -> Any:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise BadVideo("the file has disappeared") from None
    except Exception as error:  # of a damaged header: almost anything
        # numpy's own messages advise to load pickles
        pickled = "pickle" in str(error) or "Python objects" in str(error)
        reason = "no .npy file, or pickled objects, which are never read" if pickled else "truncated"
        raise BadVideo(f"{path.name}: {reason}") from None
    if not isinstance(array, np.ndarray):
        array.close()  # an archive of several
        raise BadVideo(f"{path.name}: an .npz archive, not a .npy file")
    return array


def _shape(path: Path) -> tuple[int, tuple[int, int, int]]:
    """Channels, and (T, H, W), of an array that can be used."""
    array = _open(path)
    if array.dtype != np.uint8 or array.ndim != 4:
        raise BadVideo(
            f"{path.name}: {array.dtype} of shape {array.shape}, not uint8 (T, H, W, 3) or (T, H, W, 2)"
        )
    frames, height, width, channels = array.shape
    if channels not in CHANNELS.values() or min(array.shape) == 0:
        raise BadVideo(f"{path.name}: shape {array.shape}, not (T, H, W, 3) or (T, H, W, 2)")
    return channels, (frames, height, width)


def _frames(path: Path) -> Iterator[Bytes]:
    """Copies of the frames; the file is mapped anew for each block, so that memory stays small."""
    total = len(_open(path))
    for start in range(0, total, _BLOCK):
        block = np.array(_open(path)[start : start + _BLOCK], np.uint8)  # (T, H, W, C)
        yield from block


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
