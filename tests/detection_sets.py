"""Small detection sets that tests lay out: annotation files of the published kinds, drawn videos, arrays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.videos import draw, write_video

CLASSES = ("BaseballPitch", "Diving")
# video -> rows (class, start, end), in seconds; videos of 4 s at 30 frames/s
TRAIN = {
    "video_validation_0000001": [("Diving", 0.5, 1.5), ("BaseballPitch", 2.0, 3.0)],
    "video_validation_0000002": [("BaseballPitch", 1.0, 2.2)],
}
TEST = {"video_test_0000001": [("Diving", 1.0, 2.0)], "video_test_0000002": [("BaseballPitch", 0.3, 0.9)]}
INFO = "video,fps,sample_fps,count,sample_count\n"
ACTIONS = "video,type,type_idx,start,end,startFrame,endFrame\n"
Rows = dict[str, list[tuple[str, float, float]]]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def csv_row(video: str, name: str, start: float, end: float) -> str:
    return f"{video},{name},{7 + 19 * CLASSES.index(name)},{start},{end},{start * 30:g},{end * 30:g}\n"


def write_csvs(folder: Path, frames: int = 120) -> Path:
    """The official code's files, with the counts of videos of so many frames at 30 frames/s."""
    write(folder / "Class Index_Detection.txt", "7 BaseballPitch\n26 Diving\n")
    for word, rows in (("val", TRAIN), ("test", TEST)):
        info = "".join(f"{video},30.0,10.0,{frames}.0,{frames // 3}\n" for video in rows)
        write(folder / f"{word}_video_info.csv", INFO + info)
        text = "".join(csv_row(video, *row) for video, found in rows.items() for row in found)
        write(folder / f"{word}_Annotation_ours.csv", ACTIONS + text)
    return folder


def write_json(path: Path, subsets: dict[str, Rows]) -> Path:
    """ActivityNet's form, segments as text, as `thumos_gt.json` has them."""
    database = {
        video: {
            "subset": subset,
            "annotations": [{"segment": [str(start), str(end)], "label": name} for name, start, end in found],
        }
        for subset, rows in subsets.items()
        for video, found in rows.items()
    }
    return write(path, json.dumps({"database": database}))


def write_texts(folder: Path) -> Path:
    """The original files of one class each; two blanks, and one blank, stand between cells."""
    for word, rows in (("val", TRAIN), ("test", TEST)):
        for name in CLASSES:
            lines = [
                f"{v}  {start} {end}\n" for v, found in rows.items() for n, start, end in found if n == name
            ]
            write(folder / f"{name}_{word}.txt", "".join(lines))
    write(folder / "Ambiguous_val.txt", "video_validation_0000001  0.1 0.4\n")
    return folder


def draw_videos(root: Path, frames: int = 120, fps: float = 30) -> Path:
    """`validation/` and `test/` with the four videos."""
    for folder, rows in (("validation", TRAIN), ("test", TEST)):
        for place, video in enumerate(rows):
            write_video(root / folder / f"{video}.mp4", draw(frames, seed=place), fps)
    return root


def write_array(path: Path, array: NDArray[np.generic]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)
    return path
