"""Videos that tests draw: small, real files."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]


def write_video(
    path: Path,
    frames: Frames,
    fps: float | Fraction = 25,
    codec: str = "libx264",
    *,
    rotation: int = 0,
    durations: list[int] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Encodes (T, H, W, 3) uint8 RGB frames; the container follows from the extension.

    Args:
        path: where to; folders are made.
        frames: the pictures.
        fps: frames per second.
        codec: an FFmpeg encoder.
        rotation: degrees counterclockwise by which players turn the pictures.
        durations: of each frame, in units of 1/fps: a variable frame rate.
        options: of the encoder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = frames.shape[1:3]
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv420p" if width % 2 == height % 2 == 0 else "yuv444p"
        stream.codec_context.time_base = 1 / rate
        stream.codec_context.thread_count = 1
        sharp = {"libx264": {"preset": "ultrafast", "crf": "12"}, "mpeg4": {"qmin": "2", "qmax": "2"}}
        stream.options = sharp.get(codec, {}) | (options or {})
        if rotation:
            stream.set_display_rotation(rotation)
        tick = 0
        for place, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = tick, 1 / rate
            tick += durations[place] if durations else 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_sound(path: Path) -> Path:
    """A file with sound and no picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def draw(count: int = 20, width: int = 64, height: int = 48, seed: int = 0) -> Frames:
    """A bright square that wanders over a slope of colours; (count, height, width, 3) RGB.

    No two frames are equal, no frame looks the same mirrored or turned.
    """
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    slope = np.stack([rows * 160 // height, columns * 160 // width, np.full_like(rows, 60)], -1)
    frames = np.repeat(slope[None].astype(np.uint8), count, 0)
    side = max(2, min(width, height) // 4)
    top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
    for place, frame in enumerate(frames):
        row, column = (top + place) % (height - side + 1), (left + 2 * place) % (width - side + 1)
        frame[row : row + side, column : column + side] = (255, 230 - seed % 100, 200)
    return frames


def psnr(a: Frames, b: Frames) -> float:
    """Peak signal-to-noise ratio of two pictures of one size, in dB."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return 99.0 if error == 0 else 10 * float(np.log10(255**2 / error))
