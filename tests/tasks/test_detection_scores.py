"""tasks.detection: scores of what networks said of windows, of one stream and of two, in any order."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gkdcli.data.segments import Segment
from gkdcli.data.store import Store
from gkdcli.errors import GkdError
from gkdcli.evaluation.decode import Heads
from gkdcli.evaluation.windows import VideoWindows, WindowFile, save_windows
from gkdcli.tasks import detection, detection_scores
from tests.stores import Video, make_store, picture
from tests.training.detection_jobs import page

CLASSES = 3


def heads(rng, windows: int) -> Heads:
    shapes = {"loc": 2, "conf": CLASSES + 1, "prop_loc": 2, "prop_conf": CLASSES + 1, "center": 1}
    found = {name: rng.normal(size=(windows, 63, last)) for name, last in shapes.items()}
    return Heads(
        **{name: np.float32(value if name != "loc" else 9 * abs(value)) for name, value in found.items()}
    )


def saved(path: Path, names: str, offsets=(0, 64), seed: int = 0) -> WindowFile:
    """What a network said of some videos, in the order in which they were finished."""
    offsets = np.array(offsets)
    all_heads = {name: heads(np.random.default_rng([seed, ord(name)]), len(offsets)) for name in "abc"}
    save_windows(path, (VideoWindows(name, 10.0, offsets, all_heads[name]) for name in names), {})
    return WindowFile(path)


@pytest.fixture
def tested(tmp_path: Path) -> Store:
    store = make_store(tmp_path, [Video("test", name, picture(1, 192), "test") for name in "abc"], "raw")
    store.classes = ["x", "y", "z"]
    store.segments = [
        (Segment(1.0, 6.0, n, 10.0, 60.0), Segment(8.0, 15.0, 0, 80.0, 150.0)) for n in range(3)
    ]
    return store


def scored(streams, store, *sets):
    run = SimpleNamespace(settings=page(*sets))
    return detection.score(streams, store, [0, 1, 2], page(*sets), run)


def test_streams_are_fused_by_video_however_many_processes_read_them(tested, tmp_path) -> None:
    """Several readers finish videos in another order than one."""
    rgb, flow = saved(tmp_path / "rgb.h5", "abc"), saved(tmp_path / "flow.h5", "abc", seed=1)
    turned = saved(tmp_path / "turned.h5", "cab", seed=1)
    scores, found = scored([rgb, flow], tested)
    others, same = scored([rgb, turned], tested)
    assert scores["average_map"] > 0
    assert others == scores
    for ours, theirs in zip(found, same, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert len(set(found.video.tolist())) == 3


def test_segments_beyond_the_end_of_their_video_count_and_are_said(tested, tmp_path) -> None:
    """As in the published evaluation; 192 frames at 25 a second end before the second action of each."""
    assert {row.frames / row.fps for row in tested.videos} == {7.68}
    counts = scored([saved(tmp_path / "rgb.h5", "abc")], tested)[0]["ground_truth"]
    assert (counts["segments"], counts["beyond_end"]) == (6, 3)


def test_detections_are_in_the_order_of_the_videos_however_they_were_finished(tested, tmp_path) -> None:
    """Of equal scores the earlier one counts first, so the order is part of the score."""
    one = scored([saved(tmp_path / "one.h5", "abc")], tested)[1]
    other = scored([saved(tmp_path / "other.h5", "bca")], tested)[1]
    assert len(one.scores) > 30
    for ours, theirs in zip(one, other, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_streams_of_other_videos_or_windows_are_refused(tested, tmp_path) -> None:
    rgb = saved(tmp_path / "rgb.h5", "abc")
    with pytest.raises(GkdError, match="of other videos: 3 and 2"):
        scored([rgb, saved(tmp_path / "fewer.h5", "ab")], tested)
    for offsets in ((0, 32), (0, 32, 64)):
        with pytest.raises(GkdError, match="see other windows of video a") as caught:
            scored([rgb, saved(tmp_path / f"{len(offsets)}.h5", "abc", offsets)], tested)
        assert "eval.stride" in caught.value.hint


def test_the_limit_of_a_trial_is_in_windows_and_whole_videos_are_taken(tested, monkeypatch) -> None:
    """Untrimmed videos are long: as many videos as a batch has clips would take minutes before step 1."""
    settings = page("eval.stride=32")  # 192 frames: 3 windows of a video
    seen: list[list[int]] = []

    def windows(network, store, videos, *_):
        seen.append(list(videos))
        return iter(saved_windows[: len(seen[-1])])

    file = saved(tested.path.parent / "some.h5", "abc")
    saved_windows = [file[n] for n in range(3)]
    monkeypatch.setattr(detection_scores, "_windows", windows)
    network = torch.nn.Linear(1, 1)
    for limit in (1, 3, 4, 99, None):
        detection.held_out_score(network, tested, [0, 1, 2], settings, torch.device("cpu"), limit)
    assert seen == [[0], [0], [0, 1], [0, 1, 2], [0, 1, 2]]
