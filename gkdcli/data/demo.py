"""The demo's own videos: one shape over a textured ground, told apart by its motion alone.

A seed fixes shape, colours, ground, noise and the state in the middle of the video (place, size, angle); the
class decides only how that state changes with time. So the middle frame of one seed is the same picture in
every class.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

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
SIDE = 54  # px
FPS = 24
VERSION = 2  # of the drawing: raise it whenever the pixels change, and old videos are drawn again


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
        seed: decides everything that the class does not.
        frames: how many; the state is the seed's own in frame `frames // 2`.
        side: of the square picture, px.

    Returns:
        (T, H, W, 3) uint8.
    """
    assert class_name in CLASSES, class_name
    return draw_track(_track(class_name, frames, side, np.random.default_rng([seed, 1])), seed, side)


def draw_track(track: Track, seed: int, side: int = SIDE) -> NDArray[np.uint8]:
    """Draws a shape that moves as told.

    Args:
        track: (T,) each.
        seed: of shape, colours, ground, noise, and of the state that the track is relative to.
        side: of the square picture, px.

    Returns:
        (T, H, W, 3) uint8.
    """
    look = np.random.default_rng([seed, 0])
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    ground = _ground(x, y, side, look)
    pictures = _paint(ground, x, y, side, track, look)
    noise = look.integers(-6, 7, pictures.shape, dtype=np.int8)
    return np.asarray(np.clip(pictures + noise, 0, 255), np.uint8)


class Rates(NamedTuple):
    """How fast a video's motions are: px, radians and log of the size, per frame; `period` is in frames."""

    speed: float
    growth: float
    spin: float
    radius: float
    orbit: float
    swing: float
    period: float
    phase: float


def draw_rates(side: int, rng: np.random.Generator) -> Rates:
    """Random rates; every class draws the same numbers, so that seeds agree."""
    return Rates(
        speed=rng.uniform(0.022, 0.036) * side,
        growth=rng.uniform(0.05, 0.08),
        spin=rng.uniform(0.13, 0.2),
        radius=rng.uniform(0.18, 0.26) * side,
        orbit=rng.uniform(0.2, 0.32),
        swing=rng.uniform(0.2, 0.28) * side,
        period=rng.uniform(11, 16),
        phase=rng.uniform(0, 2 * np.pi),
    )


class Step(NamedTuple):
    """What one frame of a steady motion adds to the state, see `Track`."""

    x: float = 0.0
    y: float = 0.0
    log_size: float = 0.0
    angle: float = 0.0


def steady(class_name: str, rates: Rates) -> Step:
    """The step of a class whose motion is the same in every frame; none for those that orbit or swing."""
    sense = _sense(class_name)
    match class_name.partition("-")[0]:
        case "left" | "right":
            return Step(x=sense * rates.speed)
        case "up" | "down":
            return Step(y=sense * rates.speed)
        case "grow" | "shrink":
            return Step(log_size=sense * rates.growth)
        case "turn":
            return Step(angle=sense * rates.spin)
        case _:
            return Step()


def _sense(class_name: str) -> int:
    return -1 if class_name.endswith(("left", "up", "shrink", "-anticlockwise")) else 1


def _track(class_name: str, frames: int, side: int, rng: np.random.Generator) -> Track:
    """The motion of a class, at random rates."""
    t = np.arange(frames, dtype=np.float32) - frames // 2
    rates = draw_rates(side, rng)
    step, radius, phase = steady(class_name, rates), rates.radius, rates.phase
    track = Track(step.x * t, step.y * t, np.clip(step.log_size * t, -0.7, 0.7), step.angle * t)
    wave = np.sin(2 * np.pi / rates.period * t + phase) - np.sin(phase)
    swinging = (rates.swing * wave).astype(np.float32)
    match class_name.partition("-")[0]:
        case "orbit":
            turn = _sense(class_name) * rates.orbit * t + phase
            return track._replace(
                x=radius * (np.cos(turn) - np.cos(phase)), y=radius * (np.sin(turn) - np.sin(phase))
            )
        case "sway":
            return track._replace(x=swinging)
        case "bounce":
            return track._replace(y=swinging)
        case _:
            return track


def _ground(x: Floats, y: Floats, side: int, rng: np.random.Generator) -> Floats:
    """A dark colour with four faint waves, (H, W, 3)."""
    ground = np.broadcast_to(rng.uniform(20, 90, 3), (*x.shape, 3)).astype(np.float32)
    for _ in range(4):
        fx, fy = rng.integers(-3, 4, 2)
        wave = np.sin(2 * np.pi / side * (fx * x + fy * y) + rng.uniform(0, 2 * np.pi))
        ground = ground + wave[..., None] * rng.normal(0, 6, 3).astype(np.float32)
    return ground


def _paint(ground: Floats, x: Floats, y: Floats, side: int, track: Track, rng: np.random.Generator) -> Floats:
    """A bright, longish polygon with one darker half, over the ground (H, W, 3) -> (T, H, W, 3)."""
    x0, y0 = side / 2 + rng.uniform(-0.15, 0.15, 2) * side
    size, angle = rng.uniform(0.24, 0.32) * side, rng.uniform(0, 2 * np.pi)
    corners = rng.choice([3, 4, 5, 6, 10])
    normals = 2 * np.pi * (np.arange(corners) + rng.uniform(-0.2, 0.2, corners)) / corners
    widths, slimness = rng.uniform(0.7, 1.0, corners), rng.uniform(2.0, 3.0)
    bright = rng.uniform(160, 250, 3)
    dark = bright * rng.uniform(0.35, 0.6)
    middle = rng.uniform(-0.2, 0.2)

    def column(values: NDArray[np.floating[Any]]) -> Floats:
        return np.asarray(values, np.float32)[:, None, None]

    # places wrap around: what leaves on one side comes back on the other
    dx = (x - column(x0 + track.x) + side / 2) % side - side / 2  # (T, H, W)
    dy = (y - column(y0 + track.y) + side / 2) % side - side / 2
    scale = column(np.exp(track.log_size) * size)
    # clockwise on the screen, where y points down, is a growing angle
    cos, sin = column(np.cos(angle + track.angle)), column(np.sin(angle + track.angle))
    u = (cos * dx + sin * dy) / scale
    v = (cos * dy - sin * dx) / scale * np.float32(slimness)
    edges = (
        u * np.float32(np.cos(normal)) + v * np.float32(np.sin(normal)) - np.float32(width)
        for normal, width in zip(normals, widths, strict=True)
    )
    outside = functools.reduce(np.maximum, edges)
    cover = np.clip(0.5 - outside * scale, 0, 1)[..., None]  # one pixel of antialiasing
    shade = (0.5 + 0.5 * np.tanh(6 * (u + np.float32(middle))))[..., None]
    colour = bright.astype(np.float32) + shade * (dark - bright).astype(np.float32)
    return np.asarray(ground + cover * (colour - ground), np.float32)


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
        GkdError: the folder holds videos that this function has not drawn, or cannot be written to.
    """
    videos = _plan(folder, per_class, seed)
    recipe = {"seed": seed, "version": VERSION}
    return draw_missing(folder, "*/*/*.mp4", recipe, videos, _write_video, workers, progress)


class Drawable(Protocol):
    """A video to be drawn."""

    @property
    def path(self) -> Path:
        """Its file."""


Drawn = TypeVar("Drawn", bound=Drawable)


def draw_missing(
    folder: Path,
    pattern: str,
    recipe: Mapping[str, Any],
    videos: Sequence[Drawn],
    write: Callable[[Drawn], None],
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> int:
    """Draws the videos that are not there yet, and deletes those that nobody wants any more.

    Args:
        folder: is made; `drawn.json` in it keeps the recipe.
        pattern: of the paths of drawn videos in it.
        recipe: another one than that of the folder draws all of them anew.
        videos: all that are wanted.
        write: a module-level function; draws one.
        workers: processes.
        progress: called as (done, total).

    Returns:
        How many were drawn.

    Raises:
        GkdError: see `draw_videos`.
    """
    kept = _kept_recipe(folder)
    wanted = {video.path for video in videos}
    files.sweep_temporaries(folder)  # of a run that was killed
    for path in folder.glob(pattern):
        if path not in wanted or kept != recipe:
            path.unlink()
    files.write_json(folder / "drawn.json", recipe)
    missing = [video for video in videos if not video.path.exists()]
    done = len(videos) - len(missing)
    waiting = list(reversed(missing))
    with Crew(functools.partial(_try, write), min(workers, max(len(missing), 1))) as crew:
        while waiting or crew.busy:
            while waiting and crew.give(waiting[-1]):
                waiting.pop()
            for video, result in crew.collect(0.2):
                if result is not None:
                    reason = "its process was killed" if isinstance(result, Crashed) else result
                    raise GkdError(
                        f"a video of the demo could not be drawn: {reason}",
                        str(video.path),
                        "`gkd prepare` with the same words draws the missing ones",
                    )
                done += 1
                if progress:
                    progress(done, len(videos))
    return len(missing)


def _plan(folder: Path, per_class: Mapping[str, int], seed: int) -> list[_Video]:
    return [
        _Video(
            folder / subset / name / f"{name}_{subset}_{number:04d}.mp4",
            name,
            int(np.random.SeedSequence([seed, part, label, number]).generate_state(1)[0]),
        )
        for part, (subset, count) in enumerate(per_class.items())
        for label, name in enumerate(CLASSES)
        for number in range(count)
    ]


def _kept_recipe(folder: Path) -> dict[str, Any] | None:
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
        recipe: dict[str, Any] = json.loads(marker.read_text(encoding="utf-8"))
        return recipe
    except ValueError:
        return {}


def _try(write: Callable[[Drawn], None], video: Drawn) -> str | None:
    """Runs in a worker: None, or why the file could not be written (a full disk, a read-only folder)."""
    try:
        write(video)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _write_video(video: _Video) -> None:
    write_clip(video.path, video.class_name, video.seed)


def write_clip(path: Path, class_name: str, seed: int) -> None:
    """Draws a video of one class and writes it, see `write_video`."""
    write_video(path, draw_clip(class_name, seed), FPS)


def write_video(path: Path, pixels: NDArray[np.uint8], fps: int) -> None:
    """Writes (T, H, W, 3) as MP4 (H.264, MPEG-4 where FFmpeg was built without x264)."""
    coder = "libx264" if "libx264" in av.codec.codecs_available else "mpeg4"
    options = {"qscale": "3"}
    if coder == "libx264":
        # without `cpu-independent` x264's vector code gives other bytes now and then, for the same pixels
        options = {"crf": "18", "preset": "veryfast", "threads": "1", "x264-params": "cpu-independent=1"}
    with files.atomic_path(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream(coder, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = pixels.shape[2], pixels.shape[1], "yuv420p"
        for picture in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
