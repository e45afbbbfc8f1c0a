"""The demo's own videos: textured shapes over textured grounds, told apart by their motion alone.

A seed fixes shape, colours, ground, noise and the state in the middle of the video (place, size, angle); the
class decides only how that state changes with time. So the middle frame of one seed is the same picture in
every class, and places wrap around at the border, which keeps every other frame as uninformative.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from gkdcli import files
from gkdcli.data.workers import Crashed, Crew
from gkdcli.errors import GkdError

Floats = NDArray[np.float32]

# class -> what the same video played backwards shows.
REVERSE = {
    "left": "right",
    "right": "left",
    "up": "down",
    "down": "up",
    "grow": "shrink",
    "shrink": "grow",
    "turn-clockwise": "turn-anticlockwise",
    "turn-anticlockwise": "turn-clockwise",
    "orbit-clockwise": "orbit-anticlockwise",
    "orbit-anticlockwise": "orbit-clockwise",
}
# The last two swing to and fro: backwards they are themselves.
CLASSES = (*REVERSE, "sway", "bounce")

FRAMES = 24  # a little longer than the demo's clips of 16, so that there are windows to choose from
SIDE = 72  # px
FPS = 24
VERSION = 1  # of the drawing: raise it whenever the pixels change, and old videos are drawn again


class Track(NamedTuple):
    """Motion relative to the middle frame: offset in px, log of the size, angle in radians; each (T,)."""

    x: Floats
    y: Floats
    log_size: Floats
    angle: Floats


def draw_clip(class_name: str, seed: int, frames: int = FRAMES, side: int = SIDE) -> NDArray[np.uint8]:
    """Draws one video, the same for the same arguments.

    Args:
        class_name: one of `CLASSES`.
        seed: of everything but the motion's kind.
        frames: how many.
        side: of the square picture in px; sizes and speeds scale with it.

    Returns:
        (T, H, W, 3) uint8, rgb.
    """
    assert class_name in CLASSES, class_name
    look = np.random.default_rng([seed, 0])
    track = _track(class_name, frames, side, np.random.default_rng([seed, 1]))
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)

    ground = _ground(x, y, side, look)  # (H, W, 3)
    still = Track(*(np.zeros(1, np.float32),) * 4)
    for _ in range(2):  # shapes that stay where they are
        ground = _paint(ground, x, y, side, still, look)[0]

    tremble = look.normal(0, 0.004 * side, (2, frames)).astype(np.float32)
    picture = _paint(ground, x, y, side, track._replace(x=track.x + tremble[0], y=track.y + tremble[1]), look)
    grain = look.integers(-5, 6, picture.shape, dtype=np.int8)
    return np.clip(picture + grain, 0, 255).astype(np.uint8)


def _track(class_name: str, frames: int, side: int, rng: np.random.Generator) -> Track:
    """How the state moves away from that of the middle frame, where all four tracks are zero."""
    t = (np.arange(frames) - frames // 2).astype(np.float32)
    rest = np.zeros_like(t)
    speed, phase, radius = rng.uniform(size=3)
    phase *= 2 * np.pi
    along = (0.022 + 0.020 * speed) * side * t  # 1.6 to 3 px a frame at 72 px
    slope = rng.uniform(-0.12, 0.12) * along  # nobody walks a perfectly straight line
    match class_name:
        case "left":
            track = (-along, slope, rest, rest)
        case "right":
            track = (along, slope, rest, rest)
        case "up":
            track = (slope, -along, rest, rest)
        case "down":
            track = (slope, along, rest, rest)
        case "grow" | "shrink":
            rate = (0.035 + 0.025 * speed) * t
            track = (rest, rest, rate if class_name == "grow" else -rate, rest)
        case "turn-clockwise" | "turn-anticlockwise":
            rate = (0.10 + 0.10 * speed) * t
            track = (rest, rest, rest, rate if class_name == "turn-clockwise" else -rate)
        case "orbit-clockwise" | "orbit-anticlockwise":
            turn = (0.30 + 0.15 * speed) * t * (1 if class_name == "orbit-clockwise" else -1)
            reach = (0.11 + 0.06 * radius) * side
            x = reach * (np.cos(turn + phase) - np.cos(phase))
            track = (x, reach * (np.sin(turn + phase) - np.sin(phase)), rest, rest)
        case _:
            reach = (0.10 + 0.06 * radius) * side
            swing = reach * (np.sin((0.45 + 0.25 * speed) * t + phase) - np.sin(phase))
            track = (swing, rest, rest, rest) if class_name == "sway" else (rest, swing, rest, rest)
    return Track(*(values.astype(np.float32) for values in track))


def _ground(x: Floats, y: Floats, side: int, rng: np.random.Generator) -> Floats:
    """A smooth, cloudy picture (H, W, 3), seamless at the border."""
    base = rng.uniform(60, 195, 3)
    wave = np.zeros((*x.shape, 3), np.float32)
    for _ in range(4):
        fx, fy = rng.integers(-3, 4, 2)
        pattern = np.sin(2 * np.pi / side * (fx * x + fy * y) + rng.uniform(0, 2 * np.pi))
        wave += pattern[..., None] * rng.normal(0, 14, 3).astype(np.float32)
    return (base + wave).astype(np.float32)


def _paint(ground: Floats, x: Floats, y: Floats, side: int, track: Track, rng: np.random.Generator) -> Floats:
    """Draws a convex, striped polygon over the ground (H, W, 3) or (T, H, W, 3) -> (T, H, W, 3)."""
    x0, y0 = rng.uniform(0, side, 2)
    size = rng.uniform(0.13, 0.19) * side
    angle0 = rng.uniform(0, 2 * np.pi)
    corners = rng.choice([3, 4, 5, 6, 10])
    normals = 2 * np.pi * (np.arange(corners) + rng.uniform(-0.2, 0.2, corners)) / corners
    widths = rng.uniform(0.6, 1.0, corners)
    stripe, stripe_phase = rng.uniform(2.5, 5.5), rng.uniform(0, 2 * np.pi)
    colours = _colours(ground.mean(axis=tuple(range(ground.ndim - 1))), rng)

    def column(values: Floats) -> Floats:
        return values[:, None, None]

    # Places wrap around: what leaves on one side comes back on the other.
    dx = (x - column(x0 + track.x) + side / 2) % side - side / 2  # (T, H, W)
    dy = (y - column(y0 + track.y) + side / 2) % side - side / 2
    scale = column(np.exp(track.log_size) * np.float32(size))
    # Clockwise on the screen, where y points down, is a growing angle.
    cos, sin = column(np.cos(angle0 + track.angle)), column(np.sin(angle0 + track.angle))
    u = (cos * dx + sin * dy) / scale
    v = (cos * dy - sin * dx) / scale
    outside = functools.reduce(
        np.maximum,
        (
            u * np.float32(np.cos(a)) + v * np.float32(np.sin(a)) - np.float32(w)
            for a, w in zip(normals, widths, strict=True)
        ),
    )
    cover = np.clip(0.5 - outside * scale, 0, 1)[..., None]  # one pixel of antialiasing
    stripes = (0.5 + 0.5 * np.tanh(2.5 * np.sin(np.float32(stripe) * u + np.float32(stripe_phase))))[
        ..., None
    ]
    colour = colours[0] + stripes * (colours[1] - colours[0])
    return (ground + cover * (colour - ground)).astype(np.float32)


def _colours(ground: Floats, rng: np.random.Generator) -> Floats:
    """Two colours (2, 3), one brighter and one darker than the ground's mean."""
    bright = ground + rng.uniform(35, 100) * rng.uniform(0.5, 1.0, 3)
    dark = ground - rng.uniform(35, 100) * rng.uniform(0.5, 1.0, 3)
    return np.clip(np.stack([bright, dark]), 5, 250).astype(np.float32)


@dataclass(frozen=True)
class _Video:
    path: Path
    class_name: str
    seed: int


def draw_videos(
    folder: Path,
    per_class: Mapping[str, int],
    seed: int,
    workers: int,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Writes `folder/{train,test}/<class>/<class>_<subset>_<number>.mp4`; videos that are there are kept.

    Args:
        folder: is made. `drawn.json` in it says how its videos were drawn; another seed or another version
            of the drawing draws them anew.
        per_class: how many of each class, for `train` and `test`. No two videos share a seed.
        seed: of the whole set.
        workers: processes.
        progress: called as (done, total).

    Returns:
        How many were drawn.

    Raises:
        GkdError: the folder holds videos that this function has not drawn.
    """
    recipe = {"seed": seed, "version": VERSION}
    kept = _kept_recipe(folder)
    videos = [
        _Video(
            folder / subset / name / f"{name}_{subset}_{number:04d}.mp4",
            name,
            int(np.random.SeedSequence([seed, part, label, number]).generate_state(1)[0]),
        )
        for part, (subset, count) in enumerate(per_class.items())
        for label, name in enumerate(CLASSES)
        for number in range(count)
    ]
    if kept is not None and kept != recipe:
        for subset in per_class:
            shutil.rmtree(folder / subset, ignore_errors=True)
    files.write_json(folder / "drawn.json", recipe)
    wanted = {video.path for video in videos}
    for path in folder.glob("*/*/*.mp4"):  # a smaller set was asked for
        if path not in wanted:
            path.unlink()
    missing = [video for video in videos if not video.path.exists()]
    done = len(videos) - len(missing)
    waiting = list(reversed(missing))
    with Crew(_write_video, min(workers, max(len(missing), 1))) as crew:
        while waiting or crew.busy:
            while waiting and crew.give(waiting[-1]):
                waiting.pop()
            for _, result in crew.collect(0.2):
                assert not isinstance(result, Crashed), "drawing does not crash"
                done += 1
                if progress:
                    progress(done, len(videos))
    return len(missing)


def _kept_recipe(folder: Path) -> dict[str, int] | None:
    marker = folder / "drawn.json"
    if not marker.is_file():
        if any(folder.glob("*/*")):
            raise GkdError(
                "this folder holds files that were not drawn by gkd",
                str(folder),
                "the demo draws its own videos: name an empty folder, or move those away",
            )
        return None
    try:
        recipe: dict[str, int] = json.loads(marker.read_text(encoding="utf-8"))
        return recipe
    except ValueError:
        return {}


def _write_video(video: _Video) -> None:
    write_clip(video.path, video.class_name, video.seed)


def write_clip(path: Path, class_name: str, seed: int) -> None:
    """Draws a video and writes it as MP4 (H.264, MPEG-4 where FFmpeg was built without x264)."""
    pixels = draw_clip(class_name, seed)
    coder = "libx264" if "libx264" in av.codec.codecs_available else "mpeg4"
    options = {"crf": "18", "preset": "veryfast", "threads": "1"} if coder == "libx264" else {"qscale": "3"}
    with files.atomic_path(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream(coder, rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = pixels.shape[2], pixels.shape[1], "yuv420p"
        for picture in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
