"""THUMOS14's published annotation files through our reader: the known counts, and the recorded frames."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gkdcli.data.detection_files import Annotations, find_annotations, read_annotations
from gkdcli.data.index import placed
from gkdcli.data.segments import Segment
from gkdcli.data.sources import Source
from tests.parity.golden import FOLDER as GOLDEN
from tests.parity.golden import needs_golden

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data" / "annotations" / "thumos14"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"the published annotations are not in {FOLDER}")


@pytest.fixture(scope="module")
def read() -> Annotations:
    return read_annotations(find_annotations(None, [FOLDER]))


def _segments(read: Annotations, video: str) -> list[Segment]:
    """As the index places them in a part that has as many frames as the file says."""
    stated = read.listed["train"][video]
    part = {"frame_count": stated.sample_count, "fps": 10.0, "source_frames": stated.count, "codec": "h264"}
    source = Source(
        Path(), "validation", video, {}, segments=tuple(read.actions["train"][video]), stated=stated
    )
    return placed(source, part, {name: label for label, name in enumerate(read.classes)})


def test_the_counts_that_everybody_reports(read: Annotations) -> None:
    assert (len(read.classes), read.classes[0], read.classes[-1]) == (
        20,
        "BaseballPitch",
        "VolleyballSpiking",
    )
    assert (len(read.listed["train"]), len(read.listed["test"])) == (200, 212)
    train, test = read.ground_truth["train"], read.ground_truth["test"]
    assert (train.file, train.videos, train.segments) == ("val_Annotation_ours.csv", 200, 3007)
    assert (test.file, test.videos, test.segments) == ("thumos_gt.json", 210, 3311)
    assert test.without == ("video_test_0000270", "video_test_0001496")
    assert (train.duplicates, test.duplicates, read.problems) == (0, 0, [])


def test_the_csv_with_ambiguous_rows_and_the_json_agree() -> None:
    every = read_annotations(find_annotations(FOLDER / "val_Annotation.csv", []))
    document = read_annotations(find_annotations(FOLDER / "thumos_gt.json", []))
    assert len(every.problems) == 89
    assert all(problem.reason.startswith("ambiguous") and problem.line for problem in every.problems)
    assert every.classes == document.classes

    def rows(read: Annotations) -> set[tuple[object, ...]]:
        found = read.actions["train"].items()
        return {(video, *action[:3]) for video, actions in found for action in actions}

    assert len(rows(every)) == 3007
    assert rows(every) == rows(document)


@needs_golden
def test_segments_in_frames_are_those_behind_the_recorded_clips(read: Annotations) -> None:
    """Windows are [offset + 1, offset + 256]; what of an action lies in one is kept in it."""
    record = json.loads((GOLDEN / "10_thumos_lists.json").read_text())["clip256_stride30"]
    compared = 0
    for entry in record["sampled"]:
        offset = entry["offset"]
        inside = []
        for segment in _segments(read, entry["video_name"]):
            first, last = max(segment.first - offset, 1), min(segment.last - offset, 256)
            if last - first >= 0.5 * (segment.last - segment.first):
                inside.append([first, last, segment.label + 1])
        np.testing.assert_allclose(sorted(inside), sorted(entry["annos"]), rtol=0, atol=1e-9)
        compared += len(inside)
    assert compared > 100


@needs_golden
def test_lengths_of_videos_are_those_of_the_recorded_windows(read: Annotations) -> None:
    record = json.loads((GOLDEN / "10_thumos_lists.json").read_text())["clip256_stride30"]
    assert len(record["per_video_counts"]) == 196  # the others are too short, or their actions too long
    assert record["per_video_counts"].keys() <= read.listed["train"].keys()
    assert record["test_offsets"].keys() == read.listed["test"].keys()
    for video, offsets in record["test_offsets"].items():
        assert offsets[-1] == max(read.listed["test"][video].sample_count - 256, 0)
