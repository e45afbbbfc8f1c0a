"""data.detection_files and detection_videos: every kind of annotation file, and every defect in one."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from gkdcli.data.detection_files import Annotations, find_annotations, read_annotations
from gkdcli.data.detection_videos import list_videos
from gkdcli.data.sources import Action
from gkdcli.errors import GkdError
from tests.detection_sets import (
    ACTIONS,
    CLASSES,
    INFO,
    TEST,
    TRAIN,
    Rows,
    csv_row,
    write,
    write_csvs,
    write_json,
    write_texts,
)


def _read(folder: Path) -> Annotations:
    return read_annotations(find_annotations(None, [folder]))


def _rows(found: dict[str, list[Action]]) -> Rows:
    return {video: [tuple(action[:3]) for action in actions] for video, actions in found.items()}


def _reasons(annotations: Annotations) -> list[tuple[str, int, str, str]]:
    return [(Path(p.file).name, p.line, p.video, p.reason) for p in annotations.problems]


# ---- the three kinds ----


def test_the_official_csvs(tmp_path: Path) -> None:
    read = _read(write_csvs(tmp_path))
    assert read.classes == list(CLASSES)
    assert (_rows(read.actions["train"]), _rows(read.actions["test"])) == (TRAIN, TEST)
    assert read.problems == []
    action = read.actions["train"]["video_validation_0000001"][1]
    assert action == Action("BaseballPitch", 2.0, 3.0, 60.0, 90.0, line=3)
    stated = read.listed["test"]["video_test_0000002"]
    assert (stated.fps, stated.count, stated.sample_fps, stated.sample_count) == (30.0, 120, 10.0, 40)
    assert (read.ground_truth["train"].file, read.ground_truth["train"].segments) == (
        "val_Annotation_ours.csv",
        3,
    )


def test_ours_is_preferred_and_the_other_can_be_named(tmp_path: Path) -> None:
    write_csvs(tmp_path)
    video = "video_validation_0000001"
    other = write(tmp_path / "val_Annotation.csv", f"{ACTIONS}{video},Ambiguous,0,1,2,30,60\n")
    write(other, other.read_text() + csv_row(video, "Diving", 0.5, 1.5))
    assert _read(tmp_path).problems == []
    named = read_annotations(find_annotations(other, [tmp_path]))
    assert _rows(named.actions["train"]) == {video: [("Diving", 0.5, 1.5)]}
    assert _reasons(named)[0] == (
        "val_Annotation.csv",
        2,
        video,
        "ambiguous: it shows no class for certain; left out",
    )


def test_the_json_decides_the_test_subset_beside_csvs(tmp_path: Path) -> None:
    write_csvs(tmp_path)
    first = "video_test_0000001"
    write_json(tmp_path / "thumos_gt.json", {"test": {first: [("BaseballPitch", 0.25, 0.5)]}, "train": TRAIN})
    read = _read(tmp_path)
    assert _rows(read.actions["test"]) == {first: [("BaseballPitch", 0.25, 0.5)]}
    assert read.actions["test"][first][0].first_frame is None
    assert read.actions["train"]["video_validation_0000002"][0].first_frame == 30.0  # the CSV trains
    assert read.listed["test"].keys() == TEST.keys()
    truth = read.ground_truth["test"]
    assert (truth.file, truth.videos, truth.segments, truth.without) == (
        "thumos_gt.json",
        1,
        1,
        ("video_test_0000002",),
    )


def test_the_original_text_files(tmp_path: Path) -> None:
    read = _read(write_texts(tmp_path))
    assert read.classes == list(CLASSES)
    ordered = {video: sorted(found, key=lambda row: row[0]) for video, found in TRAIN.items()}
    assert _rows(read.actions["train"]) == dict(sorted(ordered.items()))
    assert _rows(read.actions["test"]) == dict(TEST)
    assert _reasons(read) == [
        (
            "Ambiguous_val.txt",
            1,
            "video_validation_0000001",
            "ambiguous: it shows no class for certain; left out",
        )
    ]
    assert (read.validation, read.ground_truth["test"].file) == ("train", "*_test.txt")


@pytest.mark.parametrize(
    ("subsets", "trained", "tested", "unused"),
    [
        (("train", "test"), "train", "test", []),
        (("Training", "testing"), "Training", "testing", []),
        (("validation", "test"), "validation", "test", []),  # THUMOS14
        (("training", "validation"), "training", "validation", []),  # ActivityNet
        (("train", "val", "test"), "train", "test", ["1 video of subset `val`, not used"]),
        (("train", "test", "extra"), "train", "test", ["1 video of subset `extra`, not used"]),
    ],
)
def test_names_of_subsets(
    tmp_path: Path, subsets: tuple[str, ...], trained: str, tested: str, unused: list[str]
) -> None:
    rows: dict[str, Rows] = {name: {f"in {name}": [("run", 0.0, 1.0)]} for name in subsets}
    read = _read(write_json(tmp_path / "mine.json", rows).parent)
    assert list(read.actions["train"]) == [f"in {trained}"]
    assert list(read.actions["test"]) == [f"in {tested}"]
    assert [problem.reason for problem in read.problems] == unused


# ---- defects ----

OUTSIDE = "leads out of the folder of videos, or is no name of a file; left out"
NO_ANNOTATION = "an annotation is not an object with a `segment` of two and a `label`; left out"
DEFECTS = {
    "v,Diving,26,2,1,60,30": "Diving from 2 to 1 s has a negative length; left out",
    "v,Diving,26,1,1,30,30": "Diving from 1 to 1 s has no length; left out",
    "v,Diving,26,1,2,30,30": "frames 30 to 30 have no length; left out",
    "v,Juggling,3,1,2,30,60": "`Juggling` is not a class; left out",
    "v,Ambiguous,0,1,2,30,60": "ambiguous: it shows no class for certain; left out",
    "v,Diving,7,1,2,30,60": "the class has number 7 here and 26 in the class index; left out",
    "v,Diving,26,one,2,30,60": "start and end are `one` and `2`, not two numbers of seconds; left out",
    "v,Diving,26,nan,2,30,60": "start and end are `nan` and `2`, not two numbers of seconds; left out",
    "v,Diving,26,1,1e999,30,60": "start and end are `1` and `1e999`, not two numbers of seconds; left out",
    "v,Diving,26,1,2,,60": "startFrame and endFrame are `` and `60`, not two numbers; left out",
    "v,Diving,26,1,2": "a row has 5 cells, the header 7; left out",
    'v,"Diving,26,1,2,30,60': "not CSV: unexpected end of data; left out",
    "../v,Diving,26,1,2,30,60": f"`../v` {OUTSIDE}",
    "/etc/v,Diving,26,1,2,30,60": f"`/etc/v` {OUTSIDE}",
    "..,Diving,26,1,2,30,60": f"`..` {OUTSIDE}",
    ",Diving,26,1,2,30,60": "a name is empty; left out",
    "v\x1b[2J,Diving,26,1,2,30,60": "a name holds '\\x1b', which is not valid text; left out",
    "v,Diving,26,-1,2,0,60": "Diving from -1 to 2 s starts before the video; kept as it is",
}


@pytest.mark.parametrize("row", DEFECTS)
def test_a_bad_row_is_told_with_its_line_and_the_others_count(tmp_path: Path, row: str) -> None:
    path = write_csvs(tmp_path) / "test_Annotation_ours.csv"
    write(path, path.read_text() + f"{row}\n\n" + csv_row("video_test_0000001", "Diving", 3.0, 3.5))
    read = _read(tmp_path)
    (found,) = _reasons(read)
    assert (found[0], found[1], found[3]) == ("test_Annotation_ours.csv", 4, DEFECTS[row])
    assert found[2].isprintable()
    kept = read.actions["test"]["video_test_0000001"]
    assert [action.start for action in kept] == [1.0, 3.0]
    assert ("v" in read.actions["test"]) == ("kept" in DEFECTS[row])


def test_duplicates_are_counted_told_and_kept(tmp_path: Path) -> None:
    path = write_csvs(tmp_path) / "test_Annotation_ours.csv"
    write(path, path.read_text() + csv_row("video_test_0000001", "Diving", 1.0, 2.0))
    read = _read(tmp_path)
    assert (read.ground_truth["test"].segments, read.ground_truth["test"].duplicates) == (3, 1)
    assert "is there twice" in read.problems[0].reason


def test_bad_rows_of_the_list_of_rates(tmp_path: Path) -> None:
    path = write_csvs(tmp_path) / "test_video_info.csv"
    first, second = TEST
    write(path, f"{INFO}{first},30,10,120,40\n{first},1,1,1,1\n{second},30,10,many,40\n../x,1,1,1,1\nz,1\n")
    read = _read(tmp_path)
    assert [(line, reason.split(";")[1]) for _, line, _, reason in _reasons(read)] == [
        (3, " the first row counts"),
        (4, " the video's own are taken"),
        (5, " left out"),
        (6, " left out"),
    ]
    assert read.listed["test"][first].count == 120
    assert read.listed["test"][second].count == 0  # it is annotated, and its own figures will count


BAD_JSON = {
    '{"subset": "test", "annotations": 3}': "`annotations` is not an array; left out",
    '{"annotations": []}': "the video is not an object with a `subset`; left out",
    "[]": "the video is not an object with a `subset`; left out",
    '{"subset": "test", "annotations": [{"segment": [1], "label": "a"}]}': NO_ANNOTATION,
    '{"subset": "test", "annotations": [{"segment": [1, 2]}]}': NO_ANNOTATION,
    '{"subset": "test", "annotations": [{"segment": [1, 2], "label": 3}]}': "label `3` is not text; left out",
    '{"subset": "test", "annotations": [{"segment": [1, true], "label": "a"}]}': "start and end are `1` and"
    " `True`, not two numbers of seconds; left out",
    '{"subset": "test", "annotations": [{"segment": [1, NaN], "label": "a"}]}': "start and end are `1` and"
    " `nan`, not two numbers of seconds; left out",
    '{"subset": "test", "annotations": [{"segment": ["5", "4"], "label": "a"}]}': (
        "a from 5 to 4 s has a negative length; left out"
    ),
    '{"subset": "test", "annotations": [{"segment": [1, 2], "label": "a/b"}]}': f"`a/b` {OUTSIDE}",
}


@pytest.mark.parametrize("entry", BAD_JSON)
def test_bad_entries_of_json(tmp_path: Path, entry: str) -> None:
    good = '{"subset": "%s", "annotations": [{"segment": [1, 2], "label": "a"}]}'
    text = f'{{"database": {{"x": {entry}, "y": {good % "train"}, "z": {good % "test"}}}}}'
    read = _read(write(tmp_path / "mine.json", text).parent)
    assert [problem.reason for problem in read.problems] == [BAD_JSON[entry]]
    assert (list(read.actions["train"]), list(read.actions["test"])) == (["y"], ["z"])


def test_a_video_in_both_subsets_is_not_trained_on(tmp_path: Path) -> None:
    write_csvs(tmp_path)
    path = tmp_path / "val_Annotation_ours.csv"
    write(path, path.read_text() + csv_row("video_test_0000001", "Diving", 0.0, 1.0))
    read = _read(tmp_path)
    assert "video_test_0000001" not in read.actions["train"]
    assert "video_test_0000001" in read.actions["test"]
    assert read.problems[0].reason == "the video is in both subsets; it is tested and not trained on"


# ---- files that are none ----


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("test_Annotation_ours.csv", b"video,type\nv,Diving\n", "there is no column `type_idx`"),
        ("test_Annotation_ours.csv", b"", "an annotation file is empty"),
        ("test_Annotation_ours.csv", b"\x89PNG\r\n\x1a\n\x00\xff", "an annotation file is not UTF-8 text"),
        ("val_video_info.csv", b"video,fps,sample_fps,count\nv,1,1,1\n", "there is no column `sample_count`"),
        ("Class Index_Detection.txt", b"\n", "a class index names no class"),
        ("thumos_gt.json", b'{"database": [', "not a JSON file"),
        ("thumos_gt.json", b'{"database": []}', "annotations in JSON need an object `database`"),
        ("thumos_gt.json", b'{"database": ' + b"[" * 100_000, "the JSON is nested too deeply"),
    ],
)
def test_a_file_of_another_kind_is_an_error(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    write_csvs(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(GkdError) as caught:
        _read(tmp_path)
    assert caught.value.what.startswith(what)
    assert name in caught.value.where


def test_where_files_are_looked_for(tmp_path: Path) -> None:
    videos = tmp_path / "set" / "videos"
    videos.mkdir(parents=True)
    with pytest.raises(GkdError, match="there are no annotations of actions"):
        find_annotations(None, [videos])
    write_csvs(tmp_path / "set" / "lists")  # beside
    assert find_annotations(None, [videos]).csv["val"].parent.name == "lists"
    write_csvs(videos / "a" / "b")  # two folders below, which is nearer
    assert find_annotations(None, [videos]).csv["val"].parent.name == "b"
    (tmp_path / "datasets" / "x").mkdir(parents=True)
    write_csvs(tmp_path / "datasets" / "y")
    with pytest.raises(GkdError):  # another data set's
        find_annotations(None, [tmp_path / "datasets" / "x"])


def test_two_files_of_one_name_must_be_equal(tmp_path: Path) -> None:
    write_csvs(tmp_path / "a")
    write_csvs(tmp_path / "b")
    assert find_annotations(None, [tmp_path]).csv["val"].parent.name == "a"
    write_csvs(tmp_path / "b", frames=60)
    with pytest.raises(GkdError, match="two annotation files of one name differ"):
        find_annotations(None, [tmp_path])
    assert find_annotations(tmp_path / "b", []).info["val"].parent.name == "b"
    write_json(tmp_path / "c" / "one.json", {"train": TRAIN})
    write_json(tmp_path / "c" / "two.json", {"train": TRAIN})
    with pytest.raises(GkdError, match="several JSON files"):
        read_annotations(find_annotations(tmp_path / "c", []))


# ---- videos ----


def _touch(root: Path, *names: str) -> Path:
    for name in names:
        write(root / name, "")
    return root


def test_videos_are_found_in_their_folders_one_deeper_and_by_any_extension(tmp_path: Path) -> None:
    _touch(
        tmp_path,
        "validation/deeper/video_validation_0000001.mkv",
        "validation/video_validation_0000002.avi",
        "test/video_test_0000001.mp4",
        "test/video_test_0000099.mp4",
        "test/readme.md",
    )
    listing = list_videos(_read(write_csvs(tmp_path / "lists").parent), tmp_path)
    assert [(s.class_name, s.name, s.splits[1], s.path.suffix) for s in listing.sources] == [
        ("test", "video_test_0000001", "test", ".mp4"),
        ("validation", "video_validation_0000001", "train", ".mkv"),
        ("validation", "video_validation_0000002", "train", ".avi"),
    ]
    assert listing.rejects == [
        (str(tmp_path / "test" / "video_test_0000002.mp4"), "there is no such file; it is annotated")
    ]
    assert (listing.unlisted, listing.ignored, listing.classes) == (1, 1, list(CLASSES))


def test_two_files_of_one_stem_and_a_wrong_folder(tmp_path: Path) -> None:
    rows: dict[str, Rows] = {
        "train": {"a": [("run", 0, 1)], "b": [("run", 0, 1)]},
        "test": {"c": [("run", 0, 1)], "d": [("run", 0, 1)]},
    }
    _touch(tmp_path, "x/a.mp4", "y/a.avi", "train/b.mp4", "test/b.mp4", "train/c.mp4", "v_d.mp4")
    listing = list_videos(_read(write_json(tmp_path / "mine.json", rows).parent), tmp_path)
    assert {s.name: s.path.relative_to(tmp_path).as_posix() for s in listing.sources} == {
        "b": "train/b.mp4",
        "c": "train/c.mp4",
        "d": "v_d.mp4",
    }
    assert listing.rejects == [
        (str(tmp_path / "x" / "a.mp4"), "there are several of that name: x/a.mp4, y/a.avi")
    ]
    assert [(p.video, p.reason) for p in listing.problems] == [
        ("c", "it lies in a folder for train and is annotated for test, which counts")
    ]


def test_loops_of_links_end(tmp_path: Path) -> None:
    _touch(tmp_path, "videos/a.mp4", "videos/b.mp4")
    (tmp_path / "videos" / "again").symlink_to(tmp_path / "videos")
    rows: dict[str, Rows] = {"train": {"a": [("run", 0, 1)]}, "test": {"b": [("run", 0, 1)]}}
    listing = list_videos(_read(write_json(tmp_path / "mine.json", rows).parent), tmp_path / "videos")
    assert (len(listing.sources), listing.rejects) == (2, [])


# ---- damage of every kind ----


def _bases(folder: Path) -> list[Path]:
    write_csvs(folder / "csv")
    write_texts(folder / "text")
    write_json(folder / "json" / "thumos_gt.json", {"train": TRAIN, "test": TEST})
    write_csvs(folder / "all")
    write_json(folder / "all" / "thumos_gt.json", {"train": TRAIN, "test": TEST})
    return [folder / name for name in ("csv", "text", "json", "all")]


NASTY = [
    b"\0",
    b"\xff",
    b"\n",
    b",",
    b'"',
    b"..",
    b"/",
    b"-",
    b"e999",
    b"nan",
    b"{",
    b"}",
    b"[",
    b"\r",
    b"\xe2\x80\xa8",
]


def _damaged(data: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 3)):
        place, length = rng.randrange(len(data) + 1), rng.choice([0, 1, 1, 5, 40])
        kind = rng.randrange(4)
        if kind == 0:
            data = data[:place] + rng.choice(NASTY) + data[place + length :]
        elif kind == 1:
            data = data[:place] + data[place + length :]
        elif kind == 2:
            data = data[:place] + data[place : place + length] * 2 + data[place + length :]
        else:
            data = data[:place]
    return data


def test_damaged_files_are_refused_with_a_reason_or_read_soundly(tmp_path: Path) -> None:
    """Hundreds of mutations: never another exception, and what is read could stand in a store."""
    rng = random.Random(7)
    bases = _bases(tmp_path)
    names = {*TRAIN, *TEST}
    refused = told = clean = 0
    rounds = 400
    for _ in range(rounds):
        files = sorted(rng.choice(bases).iterdir())
        path = rng.choice(files)
        before = path.read_bytes()
        path.write_bytes(_damaged(before, rng))
        try:
            read = _read(path.parent)
        except GkdError as error:
            refused += bool(error.what and error.where)
        else:
            told += bool(read.problems)
            clean += not read.problems
            for found in read.actions.values():
                for video, actions in found.items():
                    assert actions
                    assert "/" not in video
                    assert video not in ("", ".", "..")
                    assert all(math.isfinite(x) for a in actions for x in (a.start, a.end))
                    assert all(a.end > a.start and a.class_name in read.classes for a in actions)
            assert not read.listed["train"].keys() & read.listed["test"].keys()
            listing = list_videos(read, tmp_path)  # no video is there: all are rejects below the folder
            assert listing.sources == []
            assert all(Path(p).resolve().is_relative_to(tmp_path.resolve()) for p, _ in listing.rejects)
            assert names & {Path(p).stem for p, _ in listing.rejects}
        finally:
            path.write_bytes(before)
    assert refused + told + clean == rounds
    assert min(refused, told, clean) > 20, (refused, told, clean)
