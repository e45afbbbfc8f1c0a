"""Stores that tests make: a few small videos, without the detour over video files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from gkdcli.data.annotations import Listing, Source
from gkdcli.data.parts import PartWriter, part_path
from gkdcli.data.store import Store, build_index
from gkdcli.settings import DataSettings

Frames = NDArray[np.uint8]


class Video(NamedTuple):
    """One video of a store: frames (T, H, W, 3) uint8."""

    class_name: str
    name: str
    frames: Frames
    subset: Literal["train", "test"] = "train"
    group: str = ""


def picture(seed: int, frames: int = 20, height: int = 36, width: int = 40) -> Frames:
    """Smooth moving patterns: they survive JPEG, and every frame differs."""
    rng = np.random.default_rng(seed)
    t, y, x = np.mgrid[0:frames, 0:height, 0:width].astype(np.float32)
    waves = [
        np.sin(rng.uniform(0.1, 0.4) * x + rng.uniform(0.1, 0.4) * y + rng.uniform(-0.5, 0.5) * t + phase)
        for phase in rng.uniform(0, 6, 3)
    ]
    return (127 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)


def make_store(
    root: Path, videos: Iterable[Video], storage: Literal["jpeg", "raw"] = "jpeg", name: str = "drawn"
) -> Store:
    """Writes `stores/<name>/rgb.h5` below `root` and opens it."""
    folder = root / "stores" / name
    sources = []
    for video in videos:
        about = {
            "source_digest": video.name,
            "fps": 25.0,
            "width": video.frames.shape[2],
            "height": video.frames.shape[1],
        }
        with PartWriter(part_path(folder / "rgb", video.class_name, video.name), storage, about) as writer:
            for frame in video.frames:
                writer.append(frame if storage == "raw" else jpeg(frame))
        sources.append(Source(Path(video.name), video.class_name, video.name, {1: video.subset}, video.group))
    listing = Listing(sorted({source.class_name for source in sources}), sources)
    settings = DataSettings(storage=storage, short_side=0).stored("rgb")
    return Store.open(build_index(folder, name, "rgb", listing, settings))


def jpeg(frame: Frames) -> bytes:
    """An RGB picture as JPEG bytes."""
    _, encoded = cv2.imencode(".jpg", frame[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 98])
    return encoded.tobytes()
