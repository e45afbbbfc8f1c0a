"""data.audit: a store is damaged in one way per test, and that is what is found, and nothing else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from gkdcli.data.annotations import read_list, scan_folder
from gkdcli.data.audit import (
    KINDS,
    Finding,
    Presence,
    Stream,
    label_findings,
    open_stream,
    part_findings,
    settings_findings,
    temporary_findings,
)
from gkdcli.data.audit_across import (
    annotation_findings,
    count,
    duplicates,
    short_videos,
    stream_findings,
)
from gkdcli.data.detection_files import find_annotations, read_annotations
from gkdcli.data.detection_videos import list_videos
from gkdcli.data.flow_sample import draw_pairs, measure, summary
from gkdcli.data.jobs import Job, work
from gkdcli.data.part_check import Look, check
from gkdcli.data.parts import part_path
from gkdcli.data.rejects import Reject, write_rejects
from gkdcli.data.sources import Listing
from gkdcli.data.store import build_index, mark_unfinished
from gkdcli.errors import GkdError
from gkdcli.settings import DataSettings
from tests.detection_sets import write_json
from tests.videos import draw, write_video

DATA = DataSettings(short_side=32, flow="farneback", flow_bound=8.0)
BOTH = ("rgb", "flow")
FRAMES = 20


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`videos/` of two classes, divided by folders, and a store of both modalities; read only."""
    root = tmp_path_factory.mktemp("prepared")
    for number, name in enumerate(("jump", "walk")):
        for place, subset in enumerate(("train", "train", "test")):
            drawn = draw(FRAMES, seed=10 * number + place)
            write_video(root / "videos" / subset / name / f"{name}_{place}.mp4", drawn)
    _prepare(root)
    return root


@pytest.fixture
def root(prepared: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(prepared, tmp_path / "root"))


def _prepare(
    root: Path,
    data: DataSettings = DATA,
    modalities: tuple[str, ...] = BOTH,
    listing: Listing | None = None,
) -> None:
    """`gkd prepare` of what is not there yet, within this process."""
    listing = listing or scan_folder(root / "videos", 0.5)
    folder, rejects = root / "mine", {}
    for source in listing.sources:
        parts = {name: part_path(folder / name, source.class_name, source.name) for name in modalities}
        if not all(part.exists() for part in parts.values()):
            result = work(Job(source, parts, data, 0))
            assert not result.failure
            if result.reason:
                rejects[str(source.path)] = Reject.of(source.path, result.reason)
    good = [source for source in listing.sources if str(source.path) not in rejects]
    for name in modalities:
        write_rejects(folder / f"{name}.rejected.tsv", list(rejects.items()))
        build_index(folder, "mine", name, replace(listing, sources=good), data.stored(name))


def _streams(root: Path, listing: Listing | None, modalities: Iterable[str] = BOTH) -> list[Stream]:
    streams = []
    for modality in modalities:
        stream, _ = open_stream(root / "mine" / f"{modality}.h5")
        stream.seen |= {key: check(look) for key, look in stream.looks(listing)}
        streams.append(stream)
    return streams


def _audit(
    root: Path,
    listing: Listing | None = None,
    *,
    data: DataSettings = DATA,
    length: int = 16,
    modalities: Iterable[str] = BOTH,
) -> list[Finding]:
    """All findings, in the order in which the command puts them together."""
    scanned = listing is None
    listing = listing or scan_folder(root / "videos", 0.5)
    untrimmed = listing.ground_truth is not None
    presence = Presence(listing, scanned)
    streams = _streams(root, listing, modalities)
    found: list[Finding] = []
    for stream in streams:
        found += open_stream(stream.index)[1]
        found += settings_findings(stream, data.stored(stream.modality))
        found += part_findings(stream)
        found += presence.findings(stream)
        found += label_findings(stream, listing)
    found += presence.rejects()
    if untrimmed:
        found += annotation_findings(streams[0], listing, data)
    found += duplicates(streams, listing, untrimmed)
    found += short_videos(streams[0], length, untrimmed)
    found += temporary_findings(root / "mine")
    if len(streams) == 2:
        found += stream_findings(streams[0], streams[1])
    return found


def _told(findings: Iterable[Finding]) -> list[tuple[str, str, str]]:
    return sorted((found.kind, found.modality, found.video) for found in findings)


def _part(root: Path, name: str, modality: str = "rgb") -> Path:
    return root / "mine" / modality / name.partition("_")[0] / f"{name}.h5"


def _video(root: Path, name: str, subset: str = "train") -> Path:
    return root / "videos" / subset / name.partition("_")[0] / f"{name}.mp4"


def test_a_sound_store_has_no_findings(root: Path) -> None:
    assert _audit(root) == []


def test_every_kind_says_what_to_do() -> None:
    assert all(level in ("defect", "notice") and hint for level, hint in KINDS.values())


# the parts


def test_a_part_that_ends_early(root: Path) -> None:
    os.truncate(_part(root, "jump_0"), _part(root, "jump_0").stat().st_size - 50)
    assert _told(_audit(root)) == [("damaged_part", "rgb", "jump/jump_0")]


def test_a_part_whose_tail_is_longer_is_not_the_one_that_was_written(root: Path) -> None:
    with open(_part(root, "jump_0"), "ab") as file:
        file.write(b"more")
    (found,) = _audit(root)
    assert (found.kind, found.what) == ("damaged_part", "its length is wrong, or it is of another version")


@pytest.mark.parametrize("modality", BOTH)
@pytest.mark.parametrize("kept", [True, False], ids=["summed", "older"])
def test_bytes_flipped_inside_an_image(root: Path, modality: str, kept: bool) -> None:
    """No reader would ever notice: libjpeg fills such an image up, and says so on stderr alone.

    One bit is enough where the part has a sum of its images. Older parts have none, and are decoded.
    """
    path = _part(root, "walk_1", modality)
    stream = "frames" if modality == "rgb" else "flow_y"
    with h5py.File(path, "r+") as file:
        start = file[stream].id.get_offset()
        ends = file["offsets" if modality == "rgb" else "flow_y_offsets"][:]
        if not kept:
            for name in [name for name in file.attrs if name.endswith("_sha256")]:
                del file.attrs[name]
    if not kept:
        assert _audit(root) == []
    place = start + int(ends[8]) - 60  # its codes are there
    content = bytearray(path.read_bytes())
    if kept:
        content[place] ^= 1
    else:
        content[place : place + 8] = b"\xff\x00" * 4  # ones alone are no code
    path.write_bytes(content)
    (found,) = _audit(root)
    assert (found.kind, found.video, found.path) == ("damaged_part", "walk/walk_1", str(path))
    image = "image 7" + (" of flow_y" if modality == "flow" else "")
    what = f"its {stream} are not the bytes that were written" if kept else f"{image}: Corrupt JPEG data"
    assert found.what.startswith(what)


@pytest.mark.parametrize(
    ("place", "new", "what"),
    [
        (0, b"\x00\x00", "image 4 is no JPEG file"),
        (-2, b"\x00\x00", "image 4 is truncated"),
    ],
)
def test_an_image_without_its_marks(root: Path, place: int, new: bytes, what: str) -> None:
    path = _part(root, "walk_1")
    with h5py.File(path) as file:
        begin, end = (file["frames"].id.get_offset() + int(at) for at in file["offsets"][4:6])
    content = bytearray(path.read_bytes())
    at = end + place if place < 0 else begin
    content[at : at + 2] = new
    path.write_bytes(content)
    assert [(found.kind, found.what) for found in _audit(root)] == [("damaged_part", what)]


def test_offsets_that_go_backwards(root: Path) -> None:
    path = _part(root, "walk_1")
    with h5py.File(path, "r+") as file:
        file["offsets"][5] = file["offsets"][3]
    (found,) = _audit(root)
    assert found.what == "its offsets are wrong: image 4 of frames ends before it begins"


def test_images_of_another_size_than_the_attributes_say(root: Path) -> None:
    with h5py.File(_part(root, "walk_1"), "r+") as file:
        file.attrs["width"] = 50
    found = _audit(root)
    assert [row.what for row in found] == ["image 0 is 42x32, not 50x32 (and 19 other images)"]


def test_a_part_without_an_attribute(root: Path) -> None:
    path = _part(root, "walk_1", "flow")
    with h5py.File(path, "r+") as file:
        del file.attrs["flow_bound"]
    head = path.read_bytes()[:512]
    assert b'"bytes"' in head
    assert ("damaged_part", "flow", "walk/walk_1") in _told(_audit(root))


def test_a_part_of_another_version(root: Path) -> None:
    with h5py.File(_part(root, "walk_1"), "r+") as file:
        file.attrs["schema"] = 99
    assert _told(_audit(root)) == [("other_schema", "rgb", "walk/walk_1")]


def test_raw_frames_are_read_to_their_end(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_video(tmp_path / "videos" / name / f"{name}.mp4", draw(40, seed=ord(name)))
        write_video(tmp_path / "videos" / name / f"{name}_2.mp4", draw(40, seed=ord(name) + 10))
    data = DataSettings(storage="raw", size=[16, 16])
    _prepare(tmp_path, data, ("rgb",))
    assert _audit(tmp_path, data=data, modalities=["rgb"]) == []
    path = tmp_path / "mine" / "rgb" / "a" / "a.h5"
    with h5py.File(path, "r+") as file:
        file["frames"].resize(39, axis=0)
    (found,) = _audit(tmp_path, data=data, modalities=["rgb"])
    assert (found.kind, found.what) == ("damaged_part", "its frames from 32 on are not 16x16 px of 3 bytes")


# who is there


def test_a_part_that_is_gone(root: Path) -> None:
    _part(root, "jump_0", "flow").unlink()
    assert _told(_audit(root)) == [("part_missing", "flow", "jump/jump_0")]


def test_a_source_that_is_gone(root: Path) -> None:
    _video(root, "jump_1").unlink()
    assert _told(_audit(root)) == [(("source_missing"), name, "jump/jump_1") for name in ("flow", "rgb")]


def test_a_listed_source_that_is_gone_is_named_once_with_the_reason(root: Path) -> None:
    path = _write_list(root)
    _relist(root, path)
    _video(root, "jump_1").unlink()
    found = _audit(root, read_list(path, root / "videos", 0.5))
    assert _told(found) == [("source_missing", name, "jump/train/jump/jump_1") for name in ("flow", "rgb")]
    assert {row.what for row in found} == {"train/jump/jump_1.mp4: there is no such file"}


def test_a_video_that_no_list_names_any_more(root: Path) -> None:
    path = _write_list(root)
    _relist(root, path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if "jump_1" not in line))
    found = _audit(root, read_list(path, root / "videos", 0.5))
    assert _told(found) == [("not_listed", name, "jump/train/jump/jump_1") for name in ("flow", "rgb")]


def test_new_videos_are_missing_and_bad_ones_are_named_with_their_reason(root: Path) -> None:
    write_video(_video(root, "jump_7"), draw(FRAMES, seed=77))
    _video(root, "jump_8").write_bytes(b"no video")
    _prepare(root, modalities=("rgb",))
    found = _audit(root)
    assert _told(found) == [
        ("missing", "flow", "jump/jump_7"),
        ("missing", "flow", "jump/jump_8"),
        ("rejected", "rgb", "jump/jump_8"),
        ("stream_missing", "flow", "jump/jump_7"),
    ]
    assert next(row.what for row in found if row.kind == "rejected").startswith("not a video")


def test_what_the_walk_over_the_folders_refuses(root: Path) -> None:
    (root / "videos" / "train" / "jump" / "stray").mkdir()
    (found,) = _audit(root)
    assert (found.kind, Path(found.path).name) == ("rejected", "stray")
    assert found.what == "a folder within the folder of a class is not read"


def test_a_part_without_a_row(root: Path) -> None:
    """As after a kill between the last part and the index, or where a part was copied in."""
    write_video(_video(root, "jump_7"), draw(FRAMES, seed=77))
    indexes = {name: (root / "mine" / f"{name}.h5").read_bytes() for name in BOTH}
    _prepare(root)
    for name, content in indexes.items():
        (root / "mine" / f"{name}.h5").write_bytes(content)
    assert _told(_audit(root)) == [("not_in_index", name, "jump/jump_7") for name in ("flow", "rgb")]


def test_parts_that_nobody_lists_and_files_of_killed_runs_are_notices(root: Path) -> None:
    shutil.copy(_part(root, "jump_0"), _part(root, "jump_9"))
    (root / "mine" / "rgb" / ".a.h5.123.tmp").touch()
    found = _audit(root)
    assert [(row.kind, row.level) for row in found] == [
        ("unlisted_part", "notice"),
        ("temporary_file", "notice"),
    ]


# the same content


@pytest.mark.parametrize("again", [False, True], ids=["not yet prepared", "prepared"])
@pytest.mark.parametrize(
    ("subset", "name", "kind"),
    [
        ("train", "jump_5", "duplicate"),
        ("test", "jump_5", "duplicate_across_subsets"),
        ("train", "walk_5", "duplicate_across_classes"),
    ],
)
def test_a_copy_under_a_second_name(root: Path, subset: str, name: str, kind: str, again: bool) -> None:
    shutil.copy(_video(root, "jump_0"), _video(root, name, subset))
    if again:
        _prepare(root)
    (found,) = [row for row in _audit(root) if row.kind != "missing"]
    assert (found.kind, found.level) == (kind, "notice" if kind == "duplicate" else "defect")
    assert {found.video} | {"jump/jump_0"} == {"jump/jump_0"}
    assert name in found.what


# what changed


def test_a_source_replaced_by_another_video(root: Path) -> None:
    write_video(_video(root, "walk_0"), draw(FRAMES, seed=99))
    assert _told(_audit(root)) == [("source_changed", name, "walk/walk_0") for name in ("flow", "rgb")]


def test_a_source_of_the_same_size_is_told_by_its_content(root: Path) -> None:
    path = _video(root, "walk_0")
    content = path.read_bytes()
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    assert _audit(root) == []
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(1, 1))
    assert {row.kind for row in _audit(root)} == {"source_changed"}


def test_a_video_moved_into_another_class(root: Path) -> None:
    shutil.move(_video(root, "jump_0"), root / "videos" / "train" / "walk" / "jump_0.mp4")
    found = _audit(root)
    assert _told(found) == [("label_changed", name, "jump/jump_0") for name in ("flow", "rgb")]
    assert found[0].what.startswith("its video is of `walk` now: ")


def test_a_class_changed_in_the_list(root: Path) -> None:
    path = _write_list(root)
    _relist(root, path)
    path.write_text(path.read_text().replace("jump_1.mp4,jump", "jump_1.mp4,walk"))
    found = _audit(root, read_list(path, root / "videos", 0.5))
    assert _told(found) == [("label_changed", name, "jump/train/jump/jump_1") for name in ("flow", "rgb")]


def test_a_renamed_video_and_one_moved_to_the_other_subset(root: Path) -> None:
    _video(root, "jump_0").rename(_video(root, "jump_6"))
    _video(root, "walk_1").rename(_video(root, "walk_1", "test"))
    found = _audit(root, modalities=["rgb"])
    assert _told(found) == [("renamed", "rgb", "jump/jump_0"), ("split_changed", "rgb", "walk/walk_1")]
    assert found[-1].what == "split 1: train in the index, test now"


def test_classes_that_are_new(root: Path) -> None:
    for subset in ("train", "test"):
        write_video(_video(root, "fly_0", subset), draw(FRAMES, seed=len(subset)))
    found = _audit(root, modalities=["rgb"])
    told = [row.what for row in found if row.kind == "classes_changed"]
    assert told == ["2 classes in the index, 3 in the annotations: fly is new"]


# settings, index, streams


def test_a_store_of_other_settings(root: Path) -> None:
    found = _audit(root, data=DATA.model_copy(update={"fps": 5.0, "flow_bound": 20.0}))
    assert [(row.kind, row.modality) for row in found] == [
        ("settings_differ", "rgb"),
        ("settings_differ", "flow"),
    ]
    assert found[0].what == "the store was written under other settings: data.fps 0.0 -> 5.0"
    assert found[1].what.endswith("data.flow_bound 8.0 -> 20.0, data.fps 0.0 -> 5.0")


def test_parts_of_two_settings_in_one_store(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(root / "videos", other / "videos")
    _prepare(other, DATA.model_copy(update={"jpeg_quality": 60}), ("rgb",))
    shutil.copy(_part(other, "jump_0"), _part(root, "jump_0"))
    found = _audit(root)
    assert _told(found) == [("settings_mixed", "rgb", "jump/jump_0")]
    assert found[0].what.endswith("data.jpeg_quality 95 -> 60")


def test_an_index_that_says_something_else_than_the_parts(root: Path) -> None:
    with h5py.File(root / "mine" / "rgb.h5", "r+") as file:
        rows = file["/tables/videos"][:]
        rows["fps"][0] = 12.0
        file["/tables/videos"][...] = rows
    (found,) = _audit(root)
    assert (found.kind, found.video) == ("index_stale", "jump/jump_0")
    assert found.what == "the index says fps 12.0, in the part 25.0"


@pytest.mark.parametrize("kind", ["index_unfinished", "index_damaged", "other_schema"])
def test_an_index_that_cannot_be_used(root: Path, kind: str) -> None:
    index = root / "mine" / "flow.h5"
    if kind == "index_unfinished":
        mark_unfinished(root / "mine", "mine", "flow", DATA.stored("flow"), 6)
    elif kind == "index_damaged":
        os.truncate(index, 3000)
    else:
        with h5py.File(index, "r+") as file:
            file.attrs["schema"] = 99
    os.truncate(_part(root, "jump_0", "flow"), 100)
    assert _told(_audit(root)) == sorted([(kind, "flow", ""), ("damaged_part", "flow", "jump/jump_0")])


def test_parts_without_an_index_are_unfinished_and_nothing_at_all_is_refused(root: Path) -> None:
    (root / "mine" / "flow.h5").unlink()
    assert _told(_audit(root)) == [("index_unfinished", "flow", "")]
    shutil.rmtree(root / "mine" / "flow")
    with pytest.raises(GkdError, match="there is no flow store"):
        open_stream(root / "mine" / "flow.h5")


def test_flow_shorter_than_its_frames(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(root / "videos", other / "videos")
    write_video(_video(other, "jump_0"), draw(FRAMES - 4))
    _prepare(other)
    for path in (_part(root, "jump_0", "flow"), root / "mine" / "flow.h5"):
        shutil.copy(other / path.relative_to(root), path)
    found = [row for row in _audit(root) if row.kind != "source_changed"]
    assert _told(found) == [(kind, "flow", "jump/jump_0") for kind in ("length_mismatch", "streams_differ")]
    assert found[0].what == "rgb has 20 frames, flow 16"


def test_videos_shorter_than_a_clip_are_notices(root: Path) -> None:
    found = _audit(root, length=FRAMES + 4)
    assert [row.kind for row in found] == ["short_video"] * 6
    assert found[0].what == "20 frames, a clip has 24; its last frame is repeated"
    assert {row.level for row in found} == {"notice"}


def test_counts_of_classes_and_splits(root: Path) -> None:
    _video(root, "jump_0").unlink()
    listing = scan_folder(root / "videos", 0.5)
    videos, classes = count(_streams(root, listing), listing)
    assert videos == [
        {"split": 1, "subset": "train", "listed": 3, "rgb": 4, "flow": 4},
        {"split": 1, "subset": "test", "listed": 2, "rgb": 2, "flow": 2},
    ]
    assert classes[0] == {"class": "jump", "split": 1, "subset": "train", "listed": 1, "rgb": 2, "flow": 2}
    assert len(classes) == 4
    assert count(_streams(root, None), None)[0][0]["listed"] is None


# untrimmed videos

ROWS: dict[str, list[tuple[str, float, float]]] = {
    "one": [("jump", 0.2, 1.0), ("walk", 1.2, 1.8)],
    "two": [("walk", 0.4, 1.2)],
}
TESTED: dict[str, list[tuple[str, float, float]]] = {"three": [("jump", 0.5, 1.5)]}


@pytest.fixture
def untrimmed(tmp_path: Path) -> Path:
    for place, name in enumerate((*ROWS, *TESTED)):
        write_video(tmp_path / "videos" / f"{name}.mp4", draw(50, seed=place))
    write_json(tmp_path / "videos" / "a.json", {"train": ROWS, "test": TESTED})
    _prepare(tmp_path, modalities=("rgb",), listing=_annotated(tmp_path))
    return tmp_path


def _annotated(root: Path) -> Listing:
    return list_videos(read_annotations(find_annotations(None, [root / "videos"])), root / "videos")


def test_a_sound_detection_store_has_no_findings_and_counts_actions(untrimmed: Path) -> None:
    listing = _annotated(untrimmed)
    assert _audit(untrimmed, listing, modalities=["rgb"]) == []
    videos, classes = count(_streams(untrimmed, listing, ["rgb"]), listing)
    assert [row["rgb"] for row in videos] == [2, 1]
    assert [(row["class"], row["subset"], row["listed"], row["rgb"]) for row in classes] == [
        ("jump", "train", 1, 1),
        ("jump", "test", 1, 1),
        ("walk", "train", 2, 2),
    ]


def test_actions_that_were_corrected_since(untrimmed: Path) -> None:
    rows = ROWS | {"one": [("jump", 0.2, 1.0), ("walk", 1.3, 1.8)]}
    write_json(untrimmed / "videos" / "a.json", {"train": rows, "test": TESTED})
    (found,) = _audit(untrimmed, _annotated(untrimmed), modalities=["rgb"])
    assert (found.kind, found.video) == ("actions_changed", "train/one")
    what = "2 actions in the index, 2 in the annotations; first that differs: walk from 1.3 to 1.8 s"
    assert found.what == what


def test_a_video_that_is_tested_now(untrimmed: Path) -> None:
    write_json(
        untrimmed / "videos" / "a.json",
        {"train": {"one": ROWS["one"]}, "test": TESTED | {"two": ROWS["two"]}},
    )
    (found,) = _audit(untrimmed, _annotated(untrimmed), modalities=["rgb"])
    assert (found.kind, found.video) == ("label_changed", "train/two")


def test_odd_annotations_have_kinds_of_their_own(untrimmed: Path) -> None:
    odd = [
        ("jump", 1.5, 2.4),
        ("jump", 3.0, 4.0),
        ("walk", 1.0, 1.0),
        ("walk", 1.6, 1.2),
        ("jump", -0.5, 0.2),
    ]
    write_json(untrimmed / "videos" / "a.json", {"train": ROWS | {"one": odd}, "test": TESTED})
    listing = _annotated(untrimmed)
    _prepare(untrimmed, modalities=("rgb",), listing=listing)
    found = _audit(untrimmed, listing, modalities=["rgb"])
    assert _told(found) == [
        ("annotation_problem", "", "train/one"),
        ("segment_beyond_end", "", "train/one"),
        ("segment_length", "", "train/one"),
        ("segment_length", "", "train/one"),
        ("segment_past_end", "", "train/one"),
    ]
    assert [row.kind for row in found if row.level == "defect"] == ["segment_beyond_end"]
    assert all("a.json" in row.path for row in found)


# the sample of flow


def test_flow_is_compared_with_tvl1_on_drawn_pairs(root: Path) -> None:
    rgb, flow = _streams(root, None)
    pairs = draw_pairs(rgb, flow, 9, seed=3)
    assert pairs == draw_pairs(rgb, flow, 9, seed=3) != draw_pairs(rgb, flow, 9, seed=4)
    assert len({(pair.flow, pair.start) for pair in pairs}) == 9
    assert len(draw_pairs(rgb, flow, 10**6, seed=3)) == 6 * (FRAMES - 1)
    (row,) = summary((pair, measure(pair)) for pair in pairs)
    assert (row["method"], row["pairs"], row["failed"], row["first_failure"]) == ("farneback", 9, 0, None)
    assert 0 < row["mean_px"] < 2
    assert row["median_px"] <= row["p95_px"]


def test_stored_tvl1_lies_nearer_than_farneback(tmp_path: Path) -> None:
    means = []
    for method in ("farneback", "tvl1"):
        root = tmp_path / method
        for place, subset in enumerate(("train", "test")):
            write_video(_video(root, f"jump_{place}", subset), draw(3, seed=place))
        _prepare(root, DATA.model_copy(update={"flow": method}))
        rgb, flow = _streams(root, None)
        means.append(summary((pair, measure(pair)) for pair in draw_pairs(rgb, flow, 4, 0))[0]["mean_px"])
    assert means[1] < means[0] / 2


def test_the_summary_is_that_of_all_pixels(root: Path) -> None:
    from gkdcli.data.flow_sample import Measured

    rgb, flow = _streams(root, None)
    pairs = draw_pairs(rgb, flow, 2, 0)
    far = [np.array([0.0, 0.1, 0.2]), np.array([0.3, 4.0])]
    found = [Measured(np.bincount(np.rint(some / 0.01).astype(int)), float(some.sum())) for some in far]
    (row,) = summary(zip(pairs, found, strict=True))
    everything = np.concatenate(far)
    expected: Any = (everything.mean(), np.median(everything), 4.0)
    assert (row["mean_px"], row["median_px"], row["p95_px"]) == pytest.approx(expected)


def test_a_damaged_part_fails_its_pairs_alone(root: Path) -> None:
    rgb, flow = _streams(root, None)
    pairs = draw_pairs(rgb, flow, 10**6, 0)
    os.truncate(_part(root, "jump_0"), 900)
    some = [pair for pair in pairs if pair.start == 0]
    (row,) = summary((pair, measure(pair)) for pair in some)
    assert (row["pairs"], row["failed"]) == (5, 1)
    assert "jump_0.h5" in row["first_failure"]


def test_a_look_reads_nothing_of_a_source_that_is_not_named(root: Path) -> None:
    seen = check(Look("rgb", _part(root, "jump_0"), None))
    assert (seen.damage, seen.change) == ("", "")


def _write_list(root: Path) -> Path:
    rows = [
        f"{path.relative_to(root / 'videos')},{path.parent.name},{path.parent.parent.name}"
        for path in sorted((root / "videos").glob("*/*/*.mp4"))
    ]
    path = root / "list.csv"
    path.write_text("\n".join(["video,class,subset", *rows]))
    return path


def _relist(root: Path, path: Path) -> None:
    """The store as that list makes it."""
    shutil.rmtree(root / "mine")
    _prepare(root, listing=read_list(path, root / "videos", 0.5))
