"""The published lists of UCF101 and of the two-stream networks: as many videos as their papers say."""

from __future__ import annotations

from pathlib import Path

import pytest

from gkdcli.data.lists import read_split_lists

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data" / "annotations" / "ucf101"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"the published lists are not in {FOLDER}")
COUNTS = {1: (9537, 3783), 2: (9586, 3734), 3: (9624, 3696)}


def test_published_lists_are_read_and_agree(tmp_path: Path) -> None:
    lists = {}
    for name in ("ucfTrainTestlist", "two_stream_lists"):
        parsed = read_split_lists(FOLDER / name, tmp_path / "absent")
        assert len(parsed.classes) == 101
        assert len(parsed.rejects) == 13320
        (tmp_path / name).mkdir()
        for path, _ in parsed.rejects:  # the videos, drawn as files without content
            class_name, video = Path(path).parts[-2:]
            (tmp_path / name / class_name).mkdir(exist_ok=True)
            (tmp_path / name / class_name / f"{Path(video).stem}.avi").touch()
        lists[name] = read_split_lists(FOLDER / name, tmp_path / name)
        assert lists[name].rejects == []
    official, bare = lists.values()
    for split, counts in COUNTS.items():
        assert (official.count(split, "train"), official.count(split, "test")) == counts
    assert bare.classes == official.classes
    assert {s.name: s.splits[1] for s in bare.sources} == {s.name: s.splits[1] for s in official.sources}
    # 25 recording sessions per class, none of them in both subsets of a split
    assert len({source.group for source in official.sources}) == 101 * 25
    for split in COUNTS:
        sides = [{s.group for s in official.sources if s.splits[split] == side} for side in ("train", "test")]
        assert not sides[0] & sides[1]
