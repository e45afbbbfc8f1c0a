"""The demo's untrimmed videos: one shape that rests, and now and then does what a class of the demo does.

The state of the shape (place, size, angle) goes on from one action to the next, so that no single frame tells
whether something happens, and what.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gkdcli import files
from gkdcli.data.demo import SIDE, Track, draw_missing, draw_rates, draw_track, steady, write_video

# of `demo.CLASSES` those of steady motion that show least of it in a single frame
DETECTION_CLASSES = ("left", "right", "grow", "shrink", "turn-clockwise", "turn-anticlockwise")

FPS = 10
FRAMES = (200, 320)  # of a video
ACTIONS = (3, 5)  # in a video, each of another class
ACTION_FRAMES = (12, 40)
REST = 10  # frames between actions, before the first and behind the last, at least
# where growing and shrinking end: the shape stays visible, and smaller than the picture
LOG_SIZE = (-0.6, 0.4)
SLOWEST_GROWTH = 0.03  # of the log size, per frame, where there is little room
TREMBLE = 0.08  # px, standard deviation of the place in every frame
VERSION = 1  # of the drawing: raise it whenever pixels or annotations change, and old videos are drawn again


class Act(NamedTuple):
    """One action: the shape moves from frame `first` to frame `last`."""

    class_name: str
    first: int
    last: int


class Plot(NamedTuple):
    """What happens in a video, and the shape's state in each of its `frames` frames."""

    frames: int
    acts: list[Act]
    track: Track


def plot_of(seed: int, side: int = SIDE) -> Plot:
    """What happens in the video of a seed.

    Args:
        seed: decides everything.
        side: of the square picture, px.
    """
    rng = np.random.default_rng([seed, 1])
    names = [DETECTION_CLASSES[label] for label in rng.permutation(len(DETECTION_CLASSES))]
    names = names[: rng.integers(ACTIONS[0], ACTIONS[1] + 1)]
    low, high = LOG_SIZE
    # whichever of growing and shrinking comes first has room for it, and makes room for the other
    sizing = [name for name in names if name in ("grow", "shrink")]
    room = {"grow": (low, -0.2), "shrink": (0.0, high)}
    size = start = float(rng.uniform(*(room[sizing[0]] if sizing else LOG_SIZE)))
    moves = []  # name, frames, and what each frame adds
    for name in names:
        step = np.array(steady(name, draw_rates(side, rng)))
        frames = int(rng.integers(ACTION_FRAMES[0], ACTION_FRAMES[1] + 1))
        if growth := step[2]:
            space = high - size if growth > 0 else size - low
            step[2] = growth = np.sign(growth) * min(abs(growth), max(space / frames, SLOWEST_GROWTH))
            frames = min(frames, int(space / abs(growth) + 1e-6))
            size += growth * frames
        moves.append((name, frames, step))

    least = sum(frames for _, frames, _ in moves) + REST * (len(moves) + 1)
    total = max(int(rng.integers(FRAMES[0], FRAMES[1] + 1)), least + 1)
    rests = REST + rng.multinomial(total - 1 - least, rng.dirichlet(np.ones(len(moves) + 1)))
    steps = np.zeros((total, 4))
    acts, now = [], 0
    for rest, (name, frames, step) in zip(rests, moves, strict=False):
        first = now + int(rest)
        now = first + frames
        steps[first + 1 : now + 1] = step
        acts.append(Act(name, first, now))
    states = steps.cumsum(axis=0)
    states[:, :2] += rng.normal(0, TREMBLE, (total, 2))
    states[:, 2] += start
    return Plot(total, acts, Track(*states.astype(np.float32).T))


@dataclass(frozen=True)
class _Video:
    path: Path
    seed: int


def draw_untrimmed(
    folder: Path,
    counts: Mapping[str, int],
    seed: int,
    workers: int,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Writes `folder/{train,test}/<name>.mp4` and `folder/annotations.json`; videos that are there are kept.

    The annotations have the form of ActivityNet: `database`, name -> subset, duration and annotations, each a
    segment in seconds and a label.

    Args:
        folder: is made. `drawn.json` in it says how its videos were drawn, see `draw_videos`.
        counts: how many videos, for `train` and `test`. No two share a seed.
        seed: of the whole set.
        workers: processes.
        progress: called as (done, total).

    Returns:
        How many were drawn.

    Raises:
        GkdError: the folder holds videos that this function has not drawn, or cannot be written to.
    """
    videos = _plan(folder, counts, seed)
    recipe = {"kind": "untrimmed", "seed": seed, "version": VERSION}
    drawn = draw_missing(folder, "*/*.mp4", recipe, videos, _write_video, workers, progress)
    database = {video.path.stem: _annotation(video) for video in videos}
    files.write_json(folder / "annotations.json", {"version": f"drawn {VERSION}", "database": database})
    return drawn


def _plan(folder: Path, counts: Mapping[str, int], seed: int) -> list[_Video]:
    return [
        _Video(
            folder / subset / f"untrimmed_{subset}_{number:04d}.mp4",
            int(np.random.SeedSequence([seed, part, number]).generate_state(1)[0]),
        )
        for part, (subset, count) in enumerate(counts.items())
        for number in range(count)
    ]


def _annotation(video: _Video) -> dict[str, Any]:
    plot = plot_of(video.seed)
    return {
        "subset": video.path.parent.name,
        "duration": plot.frames / FPS,
        "annotations": [
            {"segment": [act.first / FPS, act.last / FPS], "label": act.class_name} for act in plot.acts
        ],
    }


def _write_video(video: _Video) -> None:
    write_video(video.path, draw_track(plot_of(video.seed).track, video.seed), FPS)
