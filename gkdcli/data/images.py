"""Videos that others have already extracted: folders of numbered JPEG images, rgb and flow."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from gkdcli.data.video import (
    BadFlow,
    BadVideo,
    Bytes,
    Picture,
    VideoInfo,
    decode,
    encode,
    require_decodable,
    rescale,
    scaling_of,
)
from gkdcli.settings import DataSettings

# the seed's `image_00001.jpg`, the two-stream repository's `img_00001.jpg`, `flow_x_00001.jpg`
_IMAGE = re.compile(r"(image|img|flow_x|flow_y)_(\d+)\.jpe?g", re.IGNORECASE)
_RGB = ("image", "img")


class FrameFolder:
    """The images of one video, in the order of their numbers.

    Args:
        path: holds `image_%05d.jpg` with or without a file `n_frames`, or `img_%05d.jpg`, and perhaps
            `flow_x_%05d.jpg` and `flow_y_%05d.jpg`; numbered from 0 or 1.

    Attributes:
        info: what they are; the frame rate is unknown, 0.
        read: images read so far.
        damaged: always 0, a damaged image is a `BadVideo`.

    Raises:
        BadVideo: images are missing, or none is there.
    """

    def __init__(self, path: Path) -> None:
        self.read = 0
        self.damaged = 0
        kinds: dict[str, dict[int, Path]] = {}
        try:
            for entry in sorted(path.iterdir()):
                if match := _IMAGE.fullmatch(entry.name):
                    images = kinds.setdefault(match[1].lower(), {})
                    if int(match[2]) in images:
                        raise BadVideo(f"two images have the number {int(match[2])}: {entry.name}")
                    images[int(match[2])] = entry
        except OSError as error:
            raise BadVideo(f"cannot be read: {error.strerror}") from None
        rgb = [kind for kind in _RGB if kind in kinds]
        if len(rgb) > 1:
            raise BadVideo("it holds images of two layouts, image_%05d.jpg and img_%05d.jpg")
        self._rgb = _consecutive(kinds[rgb[0]]) if rgb else []
        self._flow = [_consecutive(kinds.get(kind, {})) for kind in ("flow_x", "flow_y")]
        if not self._rgb and not any(self._flow):
            raise BadVideo("no image_%05d.jpg, img_%05d.jpg or flow_x_%05d.jpg in it")
        numbers = [set(kinds.get(kind, {})) for kind in ("flow_x", "flow_y")]
        if numbers[0] != numbers[1]:
            odd = min(numbers[0] ^ numbers[1])
            raise BadFlow(
                f"{len(numbers[0])} images of flow x, {len(numbers[1])} of flow y: only one has number {odd}"
            )
        self._check_counts(path / "n_frames")
        width, height, _ = _read(self._rgb[0] if self._rgb else self._flow[0][0])[1]
        self.info = VideoInfo("jpeg", width, height, 0.0, len(self._rgb or self._flow[0]), 0.0, 0)

    def __enter__(self) -> FrameFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    @property
    def has_frames(self) -> bool:
        """Whether there are frames, and not flow alone."""
        return bool(self._rgb)

    @property
    def has_flow(self) -> bool:
        """Whether flow was extracted too; otherwise it is computed from the images."""
        return bool(self._flow[0])

    def _check_counts(self, n_frames: Path) -> None:
        frames, flow = len(self._rgb), len(self._flow[0])
        if frames and flow and flow not in (frames, frames - 1):
            raise BadFlow(f"{flow} images of flow for {frames} frames")
        if n_frames.is_file():
            stated = _bytes(n_frames).decode("utf-8", "replace").strip()
            if stated != str(frames or flow):
                raise BadVideo(f"n_frames says {stated[:20]!r}, {frames or flow} images are there")

    def sampling(self, data: DataSettings) -> tuple[str, float]:
        """See `VideoReader.sampling`."""
        return "every image of a folder", 0.0

    def scaling(self, data: DataSettings) -> tuple[str, int, int]:
        """See `VideoReader.scaling`."""
        return scaling_of(self.info, data)

    def pictures(self, data: DataSettings) -> Iterator[Picture]:
        """Yields the frames; an image that has the stored size already is kept byte for byte.

        Raises:
            BadVideo: an image is damaged or of another size than the first.
        """
        if not self._rgb:
            raise BadVideo("it holds flow and no frames")
        _check_rate(data)
        _, width, height = self.scaling(data)
        for path in self._rgb:
            jpeg, channels = self._image(path)
            self.read += 1
            if (width, height) == (self.info.width, self.info.height) and channels in (1, 3):
                require_decodable(jpeg)
                yield Picture(None, jpeg)
            else:
                yield Picture(rescale(decode(jpeg), width, height, data))

    def flows(self, data: DataSettings) -> Iterator[tuple[bytes, ...] | Bytes]:
        """Yields the extracted flow as a store keeps it: (JPEG of x, JPEG of y), or (H, W, 2) uint8.

        One image fewer than frames is usual: the last is repeated. Where pictures are scaled, so is the
        speed that they show.

        Raises:
            BadVideo: an image is damaged or of another size than the first.
        """
        _check_rate(data)
        pair: tuple[bytes, ...] | Bytes | None = None
        for paths in zip(*self._flow, strict=True):
            pair = self._pair(paths, data)
            self.read += not self._rgb
            yield pair
        if pair is not None and len(self._flow[0]) == len(self._rgb) - 1:
            yield pair

    def _pair(self, paths: tuple[Path, ...], data: DataSettings) -> tuple[bytes, ...] | Bytes:
        _, width, height = self.scaling(data)
        found = [self._image(path) for path in paths]
        asis = (width, height) == (self.info.width, self.info.height)
        if data.storage == "jpeg" and asis and all(channels == 1 for _, channels in found):
            for jpeg, _ in found:
                require_decodable(jpeg)
            return tuple(jpeg for jpeg, _ in found)
        planes = [rescale(decode(jpeg, grey=True), width, height, data) for jpeg, _ in found]
        ratios = width / self.info.width, height / self.info.height
        planes = [_faster(plane, ratio) for plane, ratio in zip(planes, ratios, strict=True)]
        if data.storage == "raw":
            return np.stack(planes, axis=2)
        return tuple(encode(plane, data) for plane in planes)

    def _image(self, path: Path) -> tuple[bytes, int]:
        """The file, and its number of channels."""
        jpeg, (width, height, channels) = _read(path)
        if (width, height) != (self.info.width, self.info.height):
            raise BadVideo(
                f"{path.name} is {width}x{height}, the first image {self.info.width}x{self.info.height}"
            )
        return jpeg, channels


def _consecutive(images: dict[int, Path]) -> list[Path]:
    """In order of number, from 0 or 1, without a gap."""
    numbers = sorted(images)
    if numbers and numbers[0] > 1:
        raise BadVideo(f"image {numbers[0] - 1} is missing: the first is {images[numbers[0]].name}")
    for before, number in itertools.pairwise(numbers):
        if number != before + 1:
            raise BadVideo(f"image {before + 1} is missing after {images[before].name}")
    return [images[number] for number in numbers]


def _check_rate(data: DataSettings) -> None:
    if data.fps:
        raise BadVideo("the frame rate of images is unknown, so frames cannot be chosen by it")


def _faster(plane: Bytes, ratio: float) -> Bytes:
    """One component of flow in a picture that was scaled by `ratio`: 127.5 stands for no motion."""
    if ratio == 1:
        return plane
    return np.asarray(np.clip(np.rint((plane - 127.5) * ratio + 127.5), 0, 255), np.uint8)


def _read(path: Path) -> tuple[bytes, tuple[int, int, int]]:
    jpeg = _bytes(path)
    return jpeg, jpeg_size(jpeg, path.name)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadVideo(f"{path.name} cannot be read: {error.strerror}") from None


def jpeg_size(jpeg: bytes, name: str) -> tuple[int, int, int]:
    """Width, height and channels of a JPEG file, from its headers.

    Raises:
        BadVideo: it is no JPEG file, or it is cut off.
    """
    if not jpeg.startswith(b"\xff\xd8"):
        raise BadVideo(f"{name} is {'empty' if not jpeg else 'no JPEG file'}")
    if b"\xff\xd9" not in jpeg[-64:]:  # some writers add a few bytes behind the end
        raise BadVideo(f"{name} is truncated")
    place = 2
    while place + 9 < len(jpeg) and jpeg[place] == 0xFF:
        marker, length = jpeg[place + 1], int.from_bytes(jpeg[place + 2 : place + 4])
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a start of frame
            height, width = (int.from_bytes(jpeg[place + a : place + a + 2]) for a in (5, 7))
            if not width or not height:
                break
            return width, height, jpeg[place + 9]
        place += 1 if marker == 0xFF else 2 + length
    raise BadVideo(f"{name} has no size")
