"""data.windows: the clip lists that the published code builds from THUMOS14's annotations, entry by entry."""

from __future__ import annotations

import csv
import hashlib
import json
from typing import Any

import numpy as np
import pytest

from gkdcli.data.windows import Window, boundary_maps, test_offsets, training_windows
from tests.parity.golden import FOLDER, needs_golden

ANNOTATIONS = FOLDER.parent / "data" / "annotations" / "thumos14"
SETTINGS = ["clip256_stride30", "clip128_stride20"]
pytestmark = needs_golden


def rows(name: str) -> list[dict[str, str]]:
    with open(ANNOTATIONS / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads((FOLDER / "10_thumos_lists.json").read_text())


@pytest.fixture(scope="module")
def videos() -> dict[str, tuple[int, np.ndarray]]:
    """Name -> stored frames, and segments (n, 3) in stored frames, in the order of the annotations."""
    lines = (ANNOTATIONS / "Class Index_Detection.txt").read_text().splitlines()
    classes = {line.split()[1]: number for number, line in enumerate(lines, 1)}
    counts = {
        row["video"]: (float(row["count"]), float(row["sample_count"])) for row in rows("val_video_info.csv")
    }
    segments: dict[str, list[list[float]]] = {}
    for row in rows("val_Annotation_ours.csv"):
        count, stored = counts[row["video"]]
        # the quotient first: multiplied the other way, some boundaries round to another frame
        ends = [float(row[key]) * (stored / count) for key in ("startFrame", "endFrame")]
        segments.setdefault(row["video"], []).append([*ends, classes[row["type"]]])
    return {name: (int(counts[name][1]), np.array(found)) for name, found in segments.items()}


def entry(video: str, window: Window, length: int) -> list[Any]:
    maps = boundary_maps(window.segments, length)
    assert set(np.unique(maps)) <= {0, 1}
    pieces = [[f"{first:.6f}", f"{last:.6f}", int(number)] for first, last, number in window.segments]
    return [video, window.offset, pieces, *(np.flatnonzero(row).tolist() for row in maps)]


@pytest.mark.parametrize("setting", SETTINGS)
def test_training_lists_are_the_recorded_ones(setting, recorded, videos):
    wanted = recorded[setting]
    length, stride = wanted["clip_length"], wanted["train_stride"]
    lists = {name: training_windows(*video, length, stride) for name, video in videos.items()}
    assert len(lists) == wanted["n_videos_annotated"] == 200
    assert {name: shortest for name, (_, shortest) in lists.items()} == wanted["min_anno_dict"]
    assert {name: len(found) for name, (found, _) in lists.items() if found} == wanted["per_video_counts"]

    windows = [(name, window) for name, (found, _) in lists.items() for window in found]
    assert len(windows) == wanted["n_samples"]
    entries = [entry(name, window, length) for name, window in windows]
    lines = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in entries)
    assert hashlib.sha256(lines.encode()).hexdigest() == wanted["sha256"]

    assert len(wanted["sampled"]) == 50
    for one in wanted["sampled"]:
        name, offset, _, starts, ends = entries[one["index"]]
        assert (name, offset) == (one["video_name"], one["offset"])
        assert (starts, ends) == (one["start"], one["end"])
        np.testing.assert_allclose(windows[one["index"]][1].segments, one["annos"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("setting", SETTINGS)
def test_windows_of_the_test_videos_are_the_recorded_ones(setting, recorded):
    wanted = recorded[setting]
    counts = {row["video"]: int(float(row["sample_count"])) for row in rows("test_video_info.csv")}
    offsets = {
        name: test_offsets(count, wanted["clip_length"], wanted["test_stride"])
        for name, count in counts.items()
    }
    assert len(offsets) == 212
    assert offsets == wanted["test_offsets"]
    assert sum(map(len, offsets.values())) == wanted["n_test_windows"]
