"""data.lists: split lists of every kind are read, matched to files, and refused where they are wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gkdcli.data.annotations import Listing
from gkdcli.data.lists import find_split_lists, read_split_lists
from gkdcli.errors import GkdError
from tests.split_lists import COUNTED, HMDB51, KINDS, LABELLED, TWO_STREAM, UCF101, touch, write_lists

AVI = [
    "Zumba/v_Zumba_g01_c01.avi",
    "Zumba/v_Zumba_g02_c01.avi",
    "Zumba/v_Zumba_g02_c02.avi",
    "Archery/v_Archery_g01_c01.avi",
    "Archery/v_Archery_g02_c01.avi",
]


def _splits(listing: Listing) -> dict[str, dict[int, str]]:
    return {f"{source.class_name}/{source.name}": dict(source.splits) for source in listing.sources}


def _names(listing: Listing) -> list[str]:
    return [source.name for source in listing.sources]


def test_ucf101_has_the_classes_of_its_index_all_splits_and_groups(tmp_path: Path) -> None:
    lists = write_lists(tmp_path / "lists", UCF101)
    listing = read_split_lists(lists, touch(tmp_path / "v", *AVI))
    assert listing.classes == ["Zumba", "Archery"]
    assert [(s.class_name, s.name) for s in listing.sources] == sorted(
        (name.split("/")[0], Path(name).stem) for name in AVI
    )
    assert _splits(listing)["Zumba/v_Zumba_g02_c02"] == {1: "train", 2: "test"}
    assert {s.group for s in listing.sources if s.class_name == "Zumba"} == {"Zumba/g01", "Zumba/g02"}
    assert [listing.count(n, subset) for n in (1, 2) for subset in ("train", "test")] == [3, 2, 2, 3]
    assert (listing.rejects, listing.ignored, listing.unlisted) == ([], 0, 0)


def test_ucf101_test_lists_may_have_labels_and_names_blanks(tmp_path: Path) -> None:
    changed = {
        "classInd.txt": "2 Archery \r\n\r\n1 Zum ba\r\n",
        "trainlist1.txt": "\ufeffZum ba/-a b.avi 1\r\nArchery/1.avi\t2\r\n",
        "testlist1.txt": "Zum ba/c d.avi\r\nZum ba/e f.avi 1\r\nZum ba/bare\r\nArchery/'[2]'.avi 2",
    }
    listing = read_split_lists(write_lists(tmp_path / "l", changed), touch(tmp_path / "v", "Zum ba/-a b.mp4"))
    assert listing.classes == ["Zum ba", "Archery"]
    assert _names(listing) == ["-a b"]
    assert {Path(path).name for path, _ in listing.rejects} == {
        "1.avi",
        "'[2]'.avi",
        "c d.avi",
        "e f.avi",
        "bare",
    }


def test_hmdb51_flags_give_the_splits(tmp_path: Path) -> None:
    files = [f"wave/{name}_wave_u.avi" for name in ("a(1)!#&+;=[x]", "b", "c")]
    videos = touch(tmp_path / "v", *files, "brush_hair/a_brush_hair.avi", "brush_hair/b_brush_hair.avi")
    listing = read_split_lists(write_lists(tmp_path / "l", HMDB51), videos)
    assert listing.classes == ["brush_hair", "wave"]
    assert _splits(listing) == {
        "brush_hair/a_brush_hair": {1: "train"},
        "brush_hair/b_brush_hair": {1: "test", 2: "train"},
        "wave/a(1)!#&+;=[x]_wave_u": {1: "train", 2: "test"},
        "wave/b_wave_u": {1: "test", 2: "train"},
        "wave/c_wave_u": {},
    }
    assert listing.rejects == []


def test_two_stream_names_say_the_class_and_folders_its_case(tmp_path: Path) -> None:
    lists = write_lists(tmp_path / "l", TWO_STREAM)
    listing = read_split_lists(lists, tmp_path / "absent")
    assert listing.classes == ["Zumba", "ArcHery"]
    videos = touch(tmp_path / "v", *(name.replace("v_Archery", "v_ArcHery") for name in AVI))
    listing = read_split_lists(lists, videos)
    assert listing.classes == ["Zumba", "Archery"]
    assert _splits(listing)["Archery/v_ArcHery_g01_c01"] == {1: "test"}
    assert {s.group for s in listing.sources} >= {"Archery/g01", "Zumba/g02"}
    assert len(listing.sources) == 5
    assert listing.rejects == []


@pytest.mark.parametrize("where", ["l", ".", "ucfTrainTestlist"])
@pytest.mark.parametrize("modality", ["rgb", "flow", "both"])
def test_two_stream_takes_names_from_a_class_index(tmp_path: Path, where: str, modality: str) -> None:
    chosen = {name: text for name, text in TWO_STREAM.items() if modality == "both" or modality in name}
    lists = write_lists(tmp_path / "l", chosen)
    write_lists(tmp_path / where, {"classInd.txt": "1 Zumba\n2 Archery\n"})
    listing = read_split_lists(lists, touch(tmp_path / "v", "Zumba/v_Zumba_g01_c01.avi"))
    assert listing.classes == ["Zumba", "Archery"]
    assert (len(listing.sources), len(listing.rejects)) == (1, 4)


def test_two_stream_asks_the_folders_where_names_say_nothing(tmp_path: Path) -> None:
    changed = {"train_rgb_split1.txt": "a 1 0\nb 1 1\n", "val_rgb_split1.txt": "c 1 0\nd 1 1\n"}
    lists = write_lists(tmp_path / "l", changed)
    with pytest.raises(GkdError, match="name of class 0") as caught:
        read_split_lists(lists, tmp_path / "absent")
    assert "train_rgb_split1.txt line 1" in caught.value.where
    assert "classInd.txt" in caught.value.hint
    with pytest.raises(GkdError, match="name of class 1"):
        read_split_lists(lists, touch(tmp_path / "v", "x/wave/a.avi"))
    for frames, end in ((False, ".avi"), (True, "/")):
        videos = touch(tmp_path / f"v{frames}", *(f"x/{n}{end}" for n in ("wave/a", "wave/c", "brush/d")))
        listing = read_split_lists(lists, videos, frames=frames)
        assert listing.classes == ["wave", "brush"]
        assert _names(listing) == ["d", "a", "c"]
        assert len(listing.rejects) == 1
    with pytest.raises(GkdError, match="class `wave` has the label 1 here and 0 elsewhere"):
        read_split_lists(lists, touch(tmp_path / "w", "wave/a.avi", "wave/b.avi"))
    with pytest.raises(GkdError, match="label 0 is here of class"):
        read_split_lists(lists, touch(tmp_path / "u", "wave/a.avi", "brush/b.avi", "brush/c.avi"))


def test_labelled_lists_are_split_1_and_val_is_in_none(tmp_path: Path) -> None:
    names = ["wave/a b", "wave/-c", "wave/d", "wave/f", "brush hair/é'\"", "brush hair/e"]
    videos = touch(tmp_path / "v", *(f"{name}.avi" for name in names))
    listing = read_split_lists(write_lists(tmp_path / "l", LABELLED), videos)
    assert listing.classes == ["wave", "brush hair"]
    assert _splits(listing) == {
        "brush hair/e": {1: "test"},
        "brush hair/é'\"": {1: "train"},
        "wave/-c": {1: "train"},
        "wave/a b": {1: "train"},
        "wave/d": {1: "test"},
        "wave/f": {},
    }


def test_labelled_lists_may_count_frames(tmp_path: Path) -> None:
    listing = read_split_lists(write_lists(tmp_path / "l", COUNTED), touch(tmp_path / "v", "wave/a.avi"))
    assert (listing.classes, _names(listing)) == (["wave", "brush"], ["a"])
    assert {Path(path).name for path, _ in listing.rejects} == {"a", "b"}
    # a number that not every line has belongs to the name
    changed = COUNTED | {"own_train.txt": "wave/take 12 0\nbrush/a 1\n"}
    videos = touch(tmp_path / "w", "wave/take 12.avi")
    assert _names(read_split_lists(write_lists(tmp_path / "l", changed), videos)) == ["take 12"]


def test_without_videos_every_row_is_a_reject(tmp_path: Path) -> None:
    for kind, lists in KINDS.items():
        listing = read_split_lists(write_lists(tmp_path / kind, lists), tmp_path / "absent")
        assert listing.sources == []
        assert len(listing.rejects) == {"labelled": 6, "counted": 4}.get(kind, 5)
        assert {reason for _, reason in listing.rejects} == {"there is no such file"}


def test_what_cannot_be_used_is_a_reject_and_what_is_not_listed_is_counted(tmp_path: Path) -> None:
    lists = write_lists(tmp_path / "l", UCF101)
    videos = touch(
        tmp_path / "v",
        "Zumba/v_Zumba_g01_c01.MP4",
        "Zumba/v_Zumba_g02_c01.avi",
        "Zumba/v_Zumba_g02_c01.mkv",
        "Zumba/v_Zumba_g02_c02.avi/",
        "Zumba/v_Zumba_g09_c01.avi",
        "Zumba/.v_Zumba_g09_c02.avi",
        "Zumba/readme.txt",
        "Walking/x.avi",
        "lost.avi",
        "notes.txt",
    )
    touch(videos / "Archery")
    (videos / "Archery").mkdir()
    (videos / "Archery" / "v_Archery_g01_c01.avi").symlink_to("nowhere.avi")
    (videos / "Archery" / "v_Archery_g02_c01.avi").symlink_to(videos / "Zumba" / "v_Zumba_g02_c01.avi")
    (videos / "Archery" / "loop.avi").symlink_to("loop.avi")
    listing = read_split_lists(lists, videos)
    assert _names(listing) == ["v_Archery_g02_c01", "v_Zumba_g01_c01"]
    assert [(Path(path).name, reason) for path, reason in listing.rejects] == [
        ("v_Archery_g01_c01.avi", "not a file, or a link that leads nowhere"),
        (
            "v_Zumba_g02_c01.avi",
            "there are several of that name: Zumba/v_Zumba_g02_c01.avi, Zumba/v_Zumba_g02_c01.mkv",
        ),
        ("v_Zumba_g02_c02.avi", "not a file, or a link that leads nowhere"),
    ]
    assert (listing.ignored, listing.unlisted) == (1, 4)  # g09_c01, loop, x, lost


def test_the_root_is_the_folder_that_holds_most_classes(tmp_path: Path) -> None:
    lists = write_lists(tmp_path / "d" / "lists", UCF101)
    videos = touch(tmp_path / "d", *(f"UCF-101/{name}" for name in AVI), "Zumba/v_Zumba_g01_c01.avi")
    assert len(read_split_lists(lists, videos).sources) == 5
    touch(tmp_path / "d", "Archery/")
    listing = read_split_lists(lists, videos)
    assert [source.path.parent.parent for source in listing.sources] == [tmp_path / "d"]


def test_frames_lie_in_class_folders_or_without(tmp_path: Path) -> None:
    lists = write_lists(tmp_path / "l", UCF101)
    names = [name.removesuffix(".avi") for name in AVI]
    nested = touch(
        tmp_path / "n", *(f"jpegs/{n}/1.jpg" for n in names), "jpegs/Zumba/x/1.jpg", "jpegs/Zumba/a.txt"
    )
    flat = touch(
        tmp_path / "f",
        *(f"jpegs/{n.split('/')[1]}/1.jpg" for n in names),
        "jpegs/v_x/1.jpg",
        "jpegs/empty/",
        "jpegs/a.avi",
    )
    for videos, ignored in ((nested, 1), (flat, 0)):
        listing = read_split_lists(lists, videos, frames=True)
        assert (len(listing.sources), listing.rejects) == (5, [])
        assert (listing.ignored, listing.unlisted) == (ignored, 1)
        assert all(source.path.is_dir() for source in listing.sources)


def test_frame_folders_that_mean_two_videos_or_none_are_rejects(tmp_path: Path) -> None:
    lists = write_lists(
        tmp_path / "l",
        {"x_train.txt": "wave/a 0\nbrush/a 1\nwave/e 0\n", "x_test.txt": "wave/b 0\nbrush/c 1\n"},
    )
    videos = touch(tmp_path / "v", "a/1.jpg", "wave/b/1.jpg", "b/1.jpg")
    (videos / "c").symlink_to("nowhere")
    listing = read_split_lists(lists, videos, frames=True)
    assert listing.sources == []
    reasons = {str(Path(path).relative_to(videos)): reason for path, reason in listing.rejects}
    assert reasons["wave/e"] == "there is no such folder"
    assert reasons["wave/b"] == "there are several of that name: b, wave/b"
    assert reasons["c"] == "not a folder, or a link that leads nowhere"
    assert [path for path, reason in listing.rejects if "several classes" in reason] == [
        str(videos / "a")
    ] * 2


def test_other_files_beside_the_lists_do_not_matter(tmp_path: Path) -> None:
    lists = write_lists(
        tmp_path, UCF101 | {"README.txt": "?", "._trainlist01.txt": "\0", "trainlist04.txt": ""}
    )
    assert read_split_lists(lists, tmp_path / "absent").classes == ["Zumba", "Archery"]


def test_a_folder_of_no_lists_or_of_two_kinds_is_refused(tmp_path: Path) -> None:
    touch(tmp_path / "x", "readme.txt", "classInd.txt")
    for folder in (tmp_path / "x", tmp_path / "absent", tmp_path / "x" / "readme.txt"):
        with pytest.raises(GkdError, match="no split lists") as caught:
            read_split_lists(folder, tmp_path)
        assert "trainlist01.txt" in caught.value.hint
        assert "train_rgb_split1.txt" in caught.value.hint
    write_lists(tmp_path / "x", UCF101 | TWO_STREAM)
    with pytest.raises(GkdError, match="two kinds") as caught:
        read_split_lists(tmp_path / "x", tmp_path)
    assert "testlist01.txt" in caught.value.where
    assert "train_flow_split1.txt" in caught.value.where


BROKEN: list[tuple[dict[str, str], dict[str, str | None], str, str]] = [
    # a changed file of None is removed
    (UCF101, {"classInd.txt": None}, "no `classInd.txt`", "l"),
    (UCF101, {"classInd.txt": "1 Zumba\n3 Archery\n"}, "class 3, but none in place 2", "classInd.txt line 2"),
    (UCF101, {"classInd.txt": "0 Zumba\n1 Archery\n"}, "class 0, but none in place 1", "classInd.txt line 1"),
    (UCF101, {"classInd.txt": "1 Zumba\n1 Archery\n"}, "listed twice", "classInd.txt line 2"),
    (UCF101, {"classInd.txt": "1 Zumba\n2 Zumba\n"}, "listed twice", "classInd.txt line 2"),
    (UCF101, {"classInd.txt": "1 Zumba\n2\n"}, "no class name", "classInd.txt line 2"),
    (UCF101, {"classInd.txt": "Zumba 1\n"}, "`Zumba` is not a class number", "classInd.txt line 1"),
    (UCF101, {"classInd.txt": "1 Zumba\n2 ../x\n"}, "cannot be the name of a class", "classInd.txt line 2"),
    (
        UCF101,
        {"classInd.txt": UCF101["classInd.txt"] + "3 X\n"},
        "class X has no videos",
        "classInd.txt line 3",
    ),
    (UCF101, {"testlist02.txt": None}, "only one of its lists", "trainlist02.txt"),
    (UCF101, {"testlist1.txt": "Zumba/a.avi\n"}, "the same list", "testlist1.txt"),
    (UCF101, {"trainlist01.txt": ""}, "empty", "trainlist01.txt"),
    (UCF101, {"trainlist01.txt": "\n \r\n"}, "empty", "trainlist01.txt"),
    (
        UCF101,
        {"trainlist01.txt": "\nZumba/a.avi 2\n"},
        "the label of class `Zumba` is 1, not 2",
        "trainlist01.txt line 2",
    ),
    (UCF101, {"testlist01.txt": "Zumba/a.avi 2\n"}, "the label of class", "testlist01.txt line 1"),
    (UCF101, {"testlist01.txt": "Zumba/a.avi x\n"}, "`x` is not a label", "testlist01.txt line 1"),
    (UCF101, {"trainlist01.txt": "Zumba/a.avi\n"}, "column is missing", "trainlist01.txt line 1"),
    (UCF101, {"trainlist01.txt": "Zumba/a.avi 1 1\n"}, "too many columns", "trainlist01.txt line 1"),
    (UCF101, {"trainlist01.txt": "Zumba/a.avi -1\n"}, "`-1` is not a label", "trainlist01.txt line 1"),
    (UCF101, {"trainlist01.txt": "Zumba/a.avi 1.0\n"}, "`1.0` is not a label", "trainlist01.txt line 1"),
    (UCF101, {"trainlist01.txt": "Zumba/a.avi \u0661\n"}, "is not a label", "trainlist01.txt line 1"),
    (UCF101, {"trainlist01.txt": f"Zumba/a.avi {'9' * 5000}\n"}, "is not a label", "trainlist01.txt line 1"),
    (UCF101, {"trainlist01.txt": "Rumba/a.avi 1\n"}, "`Rumba` is not a class", "trainlist01.txt line 1"),
    (UCF101, {"trainlist01.txt": "a.avi 1\n"}, "not `<class>/<video>`", "trainlist01.txt line 1"),
    (UCF101, {"trainlist01.txt": "Zumba/a/b.avi 1\n"}, "not `<class>/<video>`", "trainlist01.txt line 1"),
    (UCF101, {"trainlist01.txt": "Zumba/ 1\n"}, "not the name of a file", "trainlist01.txt line 1"),
    (UCF101, {"trainlist01.txt": "Zumba/. 1\n"}, "not the name of a file", "trainlist01.txt line 1"),
    (UCF101, {"trainlist01.txt": "/Zumba/a.avi 1\n"}, "leads out", "trainlist01.txt line 1"),
    (UCF101, {"trainlist01.txt": "../a.avi 1\n"}, "leads out", "trainlist01.txt line 1"),
    (UCF101, {"trainlist01.txt": "Zumba\\..\\..\\a.avi 1\n"}, "leads out", "trainlist01.txt line 1"),
    (UCF101, {"trainlist01.txt": "Zumba/a\0.avi 1\n"}, r"holds '\\x00'", "trainlist01.txt line 1"),
    (UCF101, {"trainlist01.txt": "Zumba/a\tb.avi 1\n"}, r"holds '\\t'", "trainlist01.txt line 1"),
    (UCF101, {"trainlist01.txt": "Zumba/a.avi 1\rZumba/b.avi 1\n"}, r"holds '\\r'", "trainlist01.txt line 1"),
    (UCF101, {"trainlist01.txt": "Zumba/a.avi 1\n\ufeffZumba/b.avi 1\n"}, "ufeff", "trainlist01.txt line 2"),
    (UCF101, {"trainlist01.txt": "Zumba/a.avi 1\nZumba/a.avi 1\n"}, "listed twice", "trainlist01.txt line 2"),
    (UCF101, {"trainlist01.txt": "Zumba/a.avi 1\nZumba/a.mp4 1\n"}, "listed twice", "first at line 1"),
    (
        UCF101,
        {"trainlist01.txt": "Zumba/v_Zumba_g01_c01.avi 1\n"},
        "two lists of one split",
        "trainlist01.txt line 1",
    ),
    (HMDB51, {"wave_test_split2.txt": None}, "`wave` has no list of split 2", "wave_test_split2.txt"),
    (HMDB51, {"wave_test_split1.txt": "a.avi 3\n"}, "`3` is not a flag", "wave_test_split1.txt line 1"),
    (HMDB51, {"wave_test_split1.txt": "a.avi\n"}, "column is missing", "wave_test_split1.txt line 1"),
    (HMDB51, {"wave_test_split1.txt": "a.avi 1 1\n"}, "too many columns", "wave_test_split1.txt line 1"),
    (
        HMDB51,
        {"wave_test_split1.txt": "wave/a.avi 1\n"},
        "not the name of a file",
        "wave_test_split1.txt line 1",
    ),
    (
        HMDB51,
        {"wave_test_split1.txt": "a.avi 1\nb.avi 0\na.avi 2\n"},
        "listed twice",
        "wave_test_split1.txt line 3",
    ),
    (
        {"wave_test_split1.txt": "a.avi 1\n"},
        {},
        "no video belongs to `test` of split 1",
        "l",
    ),
    (TWO_STREAM, {"val_flow_split1.txt": None}, "only one of its lists", "train_flow_split1.txt"),
    (
        TWO_STREAM,
        {"val_flow_split1.txt": "v_Zumba_g01_c01 29 0\n"},
        "one modality only",
        "val_rgb_split1.txt line 2",
    ),
    (
        TWO_STREAM,
        {"val_flow_split1.txt": TWO_STREAM["val_flow_split1.txt"] + "v_Zumba_g03_c01 1 0\n"},
        "one modality only",
        "val_flow_split1.txt line 3",
    ),
    (
        TWO_STREAM,
        {"val_flow_split1.txt": "v_Zumba_g01_c01 29 1\nv_ArcHery_g01_c01 30 1\n"},
        "label",
        "line 1",
    ),
    (
        TWO_STREAM,
        {"val_rgb_split1.txt": "v_Zumba_g01_c01 0\n"},
        "2 columns, not 3",
        "val_rgb_split1.txt line 1",
    ),
    (
        TWO_STREAM,
        {"val_rgb_split1.txt": "v_Zumba g01 1 0\n"},
        "4 columns, not 3",
        "val_rgb_split1.txt line 1",
    ),
    (
        TWO_STREAM,
        {"val_rgb_split1.txt": "v_Z_g01_c01 -3 0\n"},
        "not a number of frames",
        "val_rgb_split1.txt line 1",
    ),
    (
        TWO_STREAM,
        {"val_rgb_split1.txt": "v_Z_g01_c01 3 -1\n"},
        "`-1` is not a label",
        "val_rgb_split1.txt line 1",
    ),
    (
        TWO_STREAM,
        {"val_rgb_split1.txt": "Z/v_Z_g01_c01 3 0\n"},
        "not the name of a file",
        "val_rgb_split1.txt line 1",
    ),
    (
        {name: text for name, text in TWO_STREAM.items() if "rgb" in name},
        {"val_rgb_split1.txt": "v_Zumba_g02_c01 30 0\n"},
        "two lists of one split",
        "val_rgb_split1.txt line 1",
    ),
    (
        {name: text for name, text in TWO_STREAM.items() if "rgb" in name},
        {"val_rgb_split1.txt": "v_Zumba_g01_c01 30 0\nv_Rumba_g01_c01 30 3\n"},
        "no video has the label 2, though this one has 3",
        "val_rgb_split1.txt line 2",
    ),
    (
        {name: text for name, text in TWO_STREAM.items() if "rgb" in name},
        {"val_rgb_split1.txt": "v_Rumba_g01_c01 30 0\n"},
        "label 0 is here of class `Rumba`, elsewhere of `Zumba`",
        "val_rgb_split1.txt line 1",
    ),
    (
        {name: text for name, text in TWO_STREAM.items() if "rgb" in name},
        {"val_rgb_split1.txt": "v_ZUMBA_g01_c01 30 1\n"},
        "label 1",
        "val_rgb_split1.txt line 1",
    ),
    (
        TWO_STREAM,
        {"classInd.txt": "1 Archery\n2 Zumba\n"},
        "says another class",
        "train_flow_split1.txt line 1",
    ),
    (TWO_STREAM, {"classInd.txt": "1 Zumba\n"}, "no class of label 1", "train_flow_split1.txt line 3"),
    (
        TWO_STREAM,
        {"classInd.txt": "1 Zumba\n2 Archery\n3 X\n"},
        "class X has no videos",
        "classInd.txt line 3",
    ),
    (LABELLED, {"hmdb51_test.txt": None}, "list is missing", "hmdb51_test.txt"),
    (LABELLED, {"hmdb51_train.txt": None}, "list is missing", "hmdb51_train.txt"),
    (LABELLED, {"ucf_train.txt": "a/b 0\n"}, "several data sets", "hmdb51, ucf"),
    (LABELLED, {"hmdb51_val.txt": "wave/d.avi 1\n"}, "two lists of one split", "hmdb51_val.txt line 1"),
    (
        LABELLED,
        {"hmdb51_val.txt": "wave/x.avi 2\n"},
        "label 2 is here of class `wave`",
        "hmdb51_val.txt line 1",
    ),
    (LABELLED, {"hmdb51_val.txt": "wave/x.avi 3\n"}, "class `wave` has the label 3", "hmdb51_val.txt line 1"),
    (LABELLED, {"hmdb51_val.txt": "run/x.avi 4\n"}, "no video has the label 3", "hmdb51_val.txt line 1"),
    (LABELLED, {"hmdb51_val.txt": "wave/x.avi one\n"}, "`one` is not a label", "hmdb51_val.txt line 1"),
    (LABELLED, {"hmdb51_val.txt": "wave/x.avi\n"}, "column is missing", "hmdb51_val.txt line 1"),
    (LABELLED, {"hmdb51_val.txt": "x.avi 1\n"}, "not `<class>/<video>`", "hmdb51_val.txt line 1"),
    (
        LABELLED,
        {"hmdb51_val.txt": "wave/x.avi 12 1\nwave/y.avi 1\n"},
        "some lines only",
        "hmdb51_val.txt line 1",
    ),
    (COUNTED, {"own_test.txt": "wave/b 30 2\nbrush/b 3 3\n"}, "label", "own_test.txt line 1"),
    (
        {"x_train.txt": "wave/a 2\n", "x_test.txt": "wave/b 2\n"},
        {},
        "no video has the label 1, though this one has 2",
        "x_train.txt line 1",
    ),
]


@pytest.mark.parametrize(("base", "changed", "what", "where"), BROKEN)
def test_wrong_lists_are_refused_with_their_line(
    tmp_path: Path, base: dict[str, str], changed: dict[str, str | None], what: str, where: str
) -> None:
    texts = {name: text for name, text in (base | changed).items() if text is not None}
    lists = write_lists(tmp_path / "l", texts)
    with pytest.raises(GkdError, match=what) as caught:
        read_split_lists(lists, tmp_path / "absent")
    assert re.search(re.escape(where) + r"(?!\d)", caught.value.where), caught.value.where
    assert caught.value.hint
    assert len(caught.value.what) < 200
    assert len(caught.value.where) < 400 + len(str(tmp_path))


def test_a_list_in_another_encoding_is_refused_with_its_line(tmp_path: Path) -> None:
    lists = write_lists(tmp_path, LABELLED)
    (lists / "hmdb51_val.txt").write_bytes("\ufeffwave/x.avi 1\nwave/".encode() + b"\xe9.avi 1\n")
    with pytest.raises(GkdError, match="not UTF-8") as caught:
        read_split_lists(lists, tmp_path)
    assert "hmdb51_val.txt line 2" in caught.value.where
    (lists / "hmdb51_val.txt").unlink()
    (lists / "hmdb51_val.txt").mkdir()
    with pytest.raises(GkdError, match="cannot be read"):
        read_split_lists(lists, tmp_path)


def test_lists_are_found_in_the_folder_or_beside_the_videos(tmp_path: Path) -> None:
    data = tmp_path / "datasets" / "ucf101"
    videos = touch(data / "UCF-101", *AVI)
    write_lists(tmp_path / "datasets" / "hmdb51", HMDB51)
    assert find_split_lists(data) is None
    assert find_split_lists(videos) is None
    assert find_split_lists(tmp_path / "absent") is None
    write_lists(data / "two_stream", TWO_STREAM)
    assert find_split_lists(data) == data / "two_stream"
    official = write_lists(data / "ucfTrainTestlist", UCF101)
    for folder in (data, videos, official, data / "absent"):
        assert find_split_lists(folder) == official
    write_lists(data / "again", UCF101)
    with pytest.raises(GkdError, match="same kind") as caught:
        find_split_lists(data)
    assert "again" in caught.value.where
    assert "ucfTrainTestlist" in caught.value.where
    write_lists(data, LABELLED)
    assert find_split_lists(data) == find_split_lists(videos) == data


def test_folders_of_videos_and_other_data_sets_are_not_taken_for_lists(tmp_path: Path) -> None:
    touch(tmp_path / "a", "jump/x_train.txt", "jump/a.avi", "walk/y_train.txt", "walk/a.jpg")
    assert find_split_lists(tmp_path / "a") is None
    touch(write_lists(tmp_path / "b", HMDB51), "hmdb51_org/")
    assert find_split_lists(tmp_path / "a") is None
    assert find_split_lists(tmp_path / "b") == tmp_path / "b"


def test_names_that_differ_in_case_alone_are_matched_where_that_is_clear(tmp_path: Path) -> None:
    texts = {"x_train.txt": "Wave/a 0\nwave/a 1\nRUN/a 2\n", "x_test.txt": "Wave/b 0\n"}
    lists = write_lists(tmp_path / "l", texts)
    listing = read_split_lists(lists, touch(tmp_path / "v", "wave/a.avi", "run/a.avi"))
    assert [(s.class_name, str(s.path.relative_to(tmp_path / "v"))) for s in listing.sources] == [
        ("RUN", "run/a.avi"),
        ("wave", "wave/a.avi"),
    ]
    assert listing.classes == ["Wave", "wave", "RUN"]
