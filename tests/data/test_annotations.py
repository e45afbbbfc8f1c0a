"""data.annotations: folders and lists become sources, and nothing is left out silently."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gkdcli.data.annotations import Listing, read_list, scan_folder
from gkdcli.errors import GkdError


def _touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


def _split(listing: Listing) -> dict[str, str]:
    return {f"{source.class_name}/{source.name}": source.splits[1] for source in listing.sources}


def test_one_folder_per_class(tmp_path: Path) -> None:
    _touch(
        tmp_path, "jump/b.MP4", "jump/a.avi", "walk/é ü.gif", "walk/-x.webm", "walk/notes.txt", "readme.md"
    )
    _touch(tmp_path, ".hidden/a.mp4", "jump/.a.mp4")
    listing = scan_folder(tmp_path, 0.5)
    assert listing.classes == ["jump", "walk"]
    assert [(s.class_name, s.name, s.path.name) for s in listing.sources] == [
        ("jump", "a", "a.avi"),
        ("jump", "b", "b.MP4"),
        ("walk", "-x", "-x.webm"),
        ("walk", "é ü", "é ü.gif"),
    ]
    assert (listing.rejects, listing.ignored) == ([], 2)


def test_each_class_is_divided_and_has_both_subsets(tmp_path: Path) -> None:
    _touch(tmp_path, *(f"a/{n}.mp4" for n in range(50)), "b/0.mp4", "b/1.mp4", "c/0.mp4")
    for fraction, tested in ((0.2, 10), (0.001, 1), (0.999, 49)):
        split = _split(scan_folder(tmp_path, fraction))
        assert sum(split[f"a/{n}"] == "test" for n in range(50)) == tested
        assert {split["b/0"], split["b/1"]} == {"train", "test"}
        assert split["c/0"] == "train"


def test_the_division_depends_on_names_alone(tmp_path: Path) -> None:
    names = [f"a/{n}.mp4" for n in range(30)]
    here = _split(scan_folder(_touch(tmp_path / "x", *names), 0.3))
    there = _split(scan_folder(_touch(tmp_path / "elsewhere", *reversed(names), "b/new.mp4"), 0.3))
    assert here.items() <= there.items()
    assert [name for name, subset in here.items() if subset == "test"] != [f"a/{n}" for n in range(9)]


def test_given_subsets_are_taken(tmp_path: Path) -> None:
    _touch(tmp_path, "train/jump/a.mp4", "Test/jump/b.mp4", "train/walk/a.mp4")
    listing = scan_folder(tmp_path, 0.2)
    assert _split(listing) == {"jump/a": "train", "jump/b": "test", "walk/a": "train"}
    assert listing.classes == ["jump", "walk"]


def test_classes_may_be_called_train_and_test(tmp_path: Path) -> None:
    assert scan_folder(_touch(tmp_path, "train/a.mp4", "test/b.mp4"), 0.2).classes == ["test", "train"]


def test_what_cannot_be_used_is_a_reject_with_its_reason(tmp_path: Path) -> None:
    _touch(tmp_path, "a/1.mp4", "a/2.mp4", "a/2.avi", "a/deep/3.mp4", "lost.mp4", "empty/readme.txt")
    (tmp_path / "a" / "4.mp4").symlink_to("nowhere.mp4")
    (tmp_path / "a" / "5.mp4").symlink_to("1.mp4")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    listing = scan_folder(tmp_path, 0.2)
    assert [source.name for source in listing.sources] == ["1", "5"]
    assert listing.classes == ["a"]
    reasons = {Path(path).name: reason for path, reason in listing.rejects}
    assert set(reasons) == {"2.mp4", "2.avi", "deep", "loop", "lost.mp4", "empty", "4.mp4"}
    assert "2.avi" in reasons["2.mp4"]
    assert "2.mp4" in reasons["2.avi"]
    assert "without videos" in reasons["empty"]
    assert "class is unknown" in reasons["lost.mp4"]
    assert "link" in reasons["4.mp4"]


def test_the_same_name_in_both_subsets_is_a_reject(tmp_path: Path) -> None:
    _touch(tmp_path, "train/a/1.mp4", "test/a/1.mp4", "train/a/2.mp4", "test/a/3.mp4")
    listing = scan_folder(tmp_path, 0.2)
    assert [source.name for source in listing.sources] == ["2", "3"]
    assert len(listing.rejects) == 2


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ([], "no videos"),
        (["a/x.txt"], "no videos"),
        (["x.mp4"], "no videos"),
        (["train/a/1.mp4", "test/a/2.mp4", "b/3.mp4"], "cannot tell"),
        (["train/a/1.mp4"], "cannot tell"),
        (["train/a/1.mp4", "test/a/x.txt"], "`test`"),
    ],
)
def test_folders_that_are_no_data_set_are_refused(tmp_path: Path, files: list[str], what: str) -> None:
    with pytest.raises(GkdError, match=what):
        scan_folder(_touch(tmp_path, *files), 0.2)
    with pytest.raises(GkdError, match="no folder"):
        scan_folder(tmp_path / "absent", 0.2)


def _list(tmp_path: Path, text: str, name: str = "list.csv") -> Listing:
    _touch(tmp_path / "v", "jump/a.mp4", "jump/b.mp4", "walk/a.mp4", "deep/er/c.mp4")
    (tmp_path / name).write_bytes(text.encode())
    return read_list(tmp_path / name, tmp_path / "v", 0.5)


def test_a_list_in_csv_with_all_that_spreadsheets_do(tmp_path: Path) -> None:
    text = (
        "\ufeffvideo,class,subset\r\n\r\njump/a.mp4,jump,train\r\n"
        '"jump/b.mp4", jump ,test\r\n,,\r\ndeep/er/c.mp4,walk,train\r\n'
    )
    listing = _list(tmp_path, text)
    assert _split(listing) == {"jump/a": "train", "jump/b": "test", "walk/deep/er/c": "train"}
    assert listing.classes == ["jump", "walk"]


def test_a_list_in_json_is_the_same(tmp_path: Path) -> None:
    rows = [{"video": "jump/a.mp4", "class": "jump"}, {"video": "jump/b.mp4", "class": "jump"}]
    assert sorted(_split(_list(tmp_path, json.dumps(rows), "list.json")).values()) == ["test", "train"]


def test_a_listed_file_that_is_missing_is_a_reject_and_keeps_its_class(tmp_path: Path) -> None:
    listing = _list(tmp_path, "video,class\njump/a.mp4,jump\njump/gone.mp4,gone\n")
    assert listing.classes == ["gone", "jump"]
    assert listing.rejects == [("jump/gone.mp4", "there is no such file")]
    assert [source.name for source in listing.sources] == ["a"]


@pytest.mark.parametrize(
    ("text", "what", "line"),
    [
        ("video,klass\n", "`klass` is not a column", 1),
        ("video\n", "no column `class`", 1),
        ("video,class,class\n", "twice", 1),
        ("video,class\njump/a.mp4\n", "1 cells", 2),
        ("video,class\njump/a.mp4,\n", "`class` is empty", 2),
        ("video,class,subset\njump/a.mp4,jump,val\n", "`val` is not a subset", 2),
        ("video,class,subset\njump/a.mp4,jump,\n", "`subset` is empty", 2),
        ("video,class\n\n/etc/passwd,jump\n", "leads out", 3),
        ("video,class\n../x.mp4,jump\n", "leads out", 2),
        ("video,class\njump/../../x.mp4,jump\n", "leads out", 2),
        ("video,class\n.,jump\n", "names no file", 2),
        ("video,class\njump/a.mp4,jump\njump/a.mp4,jump\n", "listed twice", 3),
        ("video,class\njump/a.mp4,jump\njump/./a.mp4,jump\n", "listed twice", 3),
        ("video,class\njump/a.mp4,jump\njump/a.mp4,walk\n", "also of class `jump`", 3),
        ("video,class\njump/a.mp4,jump\na.mp4,jump\n", "both be called `a`", 3),
        ('video,class\n"jump/a.mp4,jump\n', "not a CSV", 2),
        ("video,class\njump/a.mp4,ju\0mp\n", "not valid text", 2),
        ("video,class\njump/a.mp4,jump\n\ufeffjump/b.mp4,jump\n", "not valid text", 3),
        ('video,class\n"jump/a\nb.mp4",jump\n', "not valid text", 3),
    ],
)
def test_mistakes_in_a_csv_are_refused_with_their_line(
    tmp_path: Path, text: str, what: str, line: int
) -> None:
    with pytest.raises(GkdError, match=what) as caught:
        _list(tmp_path, text)
    assert f"list.csv line {line}" in caught.value.where
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "not a JSON file"),
        ('{"video": "a"}', "array"),
        ("[3]", "entry is not an object"),
        ('[{"video": "a.mp4", "class": 3}]', "entry is not an object"),
        ('[{"video": "a.mp4"}]', "no column `class`"),
        (
            '[{"video": "jump/a.mp4", "class": "jump"}, {"video": "b", "class": "b", "subset": "test"}]',
            "some",
        ),
        ('[{"video": "\\u0000", "class": "a"}]', "not valid text"),
        ('[{"video": "a.mp4", "class": "a\\u001b[2J"}]', "not valid text"),
        ('[{"video": "a.mp4", "class": "a", "\\ud800": "a"}]', "not valid text"),
        ('[{"video": "a.mp4", "class": "a", "class": "b"}]', "key `class` twice"),
        ('[{"video": "a.mp4", "class": {"a": "b", "a": "c"}}]', "entry is not an object"),
        ("[" * 100_000, "nested too deeply"),
        ("[" + "9" * 5000 + "]", "not a JSON file"),
        ('[{"video": "\\ud800.mp4", "class": "a"}]', "not valid text"),
        ("[]", "names no videos"),
    ],
)
def test_mistakes_in_a_json_list_are_refused(tmp_path: Path, text: str, what: str) -> None:
    with pytest.raises(GkdError, match=what):
        _list(tmp_path, text, "list.json")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "names no videos"),
        ("video,class,subset\njump/a.mp4,jump,train\n", "`test`"),
        ("video,class\njump/no.mp4,jump\n", "none of the listed"),
    ],
)
def test_lists_without_use_are_refused(tmp_path: Path, text: str, what: str) -> None:
    with pytest.raises(GkdError, match=what):
        _list(tmp_path, text)


def test_a_list_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(b"\xff\xfe\x00video")
    with pytest.raises(GkdError, match="cannot be read"):
        read_list(tmp_path / "list.csv", tmp_path, 0.5)
    with pytest.raises(GkdError, match="cannot be read"):
        read_list(tmp_path / "absent.csv", tmp_path, 0.5)
