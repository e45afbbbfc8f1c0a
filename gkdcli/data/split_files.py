"""The four kinds of split list files, line by line: which class and which splits a video belongs to."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import NamedTuple, TypeVar

from gkdcli.data.annotations import SUBSETS, Subset
from gkdcli.data.list_lines import (
    LAST_COLUMN,
    NUMBER,
    Line,
    bare_name,
    check_class,
    class_and_video,
    cut_last,
    once,
    read_lines,
    whole_number,
)
from gkdcli.data.names import short, video_stem
from gkdcli.errors import GkdError

CLASS_INDEX = "classInd.txt"
Files = Mapping[Path, re.Match[str]]
# names of videos -> the class folders in which each found one lies; asked where no list says the class
Lookup = Callable[[Collection[str]], Mapping[str, set[str]]]

_Key = TypeVar("_Key", int, tuple[int, str])
_TAKEN = re.compile(r"v_(.+)_(g[0-9]+)_c[0-9]+")  # UCF101: class, recording session, clip


@dataclass(frozen=True)
class Listed:
    """One video of the lists: its file name as first listed, and its splits."""

    file: str
    splits: dict[int, Subset]


@dataclass
class Lists:
    """What the lists of one folder say.

    Args:
        classes: the position is the label.
        spelled: False where class names come from video names, whose case a class folder may correct.
        videos: by class, and name without extension.
    """

    classes: list[str]
    spelled: bool = True
    videos: dict[tuple[str, str], Listed] = field(default_factory=dict)
    _first: dict[tuple[int, str, str], Line] = field(default_factory=dict)

    def add(self, line: Line, class_name: str, file: str, split: int, subset: Subset | None) -> None:
        """Takes one row.

        Raises:
            GkdError: the split names this video already.
        """
        stem = stem_of(file)
        once(self._first.setdefault((split, class_name, stem), line), line)
        listed = self.videos.setdefault((class_name, stem), Listed(file, {}))
        if subset:
            listed.splits[split] = subset


def stem_of(file: str) -> str:
    """A listed name without its extension, if that is a video's: people encode videos anew."""
    return video_stem(file) or file


def group_of(class_name: str, stem: str) -> str:
    """The recording session, which a hold-out must not divide; "" where the name does not say it."""
    taken = _TAKEN.fullmatch(stem)
    return f"{class_name}/{taken[2]}" if taken else ""


def read_ucf101(folder: Path, files: Files, lookup: Lookup) -> Lists:
    """`trainlist01.txt`: `<class>/<video> <label>`; `testlist01.txt`: `<class>/<video>`; labels from 1.

    Raises:
        GkdError: anything wrong in the lists, with its line.
    """
    index = folder / CLASS_INDEX
    if not index.exists():
        raise GkdError(f"there is no `{CLASS_INDEX}`", str(folder), "it names the classes of these lists")
    named = _class_index(index)
    labels = {name: label for label, name in enumerate(named, start=1)}
    lists = Lists(list(named))
    subsets: dict[str, Subset] = {"train": "train", "test": "test"}
    for split, paths in _pairs(files, lambda m: (int(m[2]), subsets[m[1]])).items():
        for subset in SUBSETS:
            for line in read_lines(paths[subset]):
                text, token = _class_video_label(line, needed=subset == "train")
                class_name, video = class_and_video(line, text)
                if class_name not in labels:
                    raise line.error(f"`{short(class_name)}` is not a class", f"the classes: {index}")
                if token and whole_number(line, token, "label") != labels[class_name]:
                    what = f"the label of class `{short(class_name)}` is {labels[class_name]}, not {token}"
                    raise line.error(what, f"the labels: {index}")
                lists.add(line, class_name, video, split, subset)
    _need_videos(named, {name for name, _ in lists.videos})
    return lists


def read_hmdb51(folder: Path, files: Files, lookup: Lookup) -> Lists:
    """`<class>_test_split1.txt`: `<video> <flag>`, where 1 is training, 2 test, and 0 neither.

    Raises:
        GkdError: anything wrong in the lists, with its line.
    """
    by_class: dict[str, dict[int, Path]] = {}
    for path, match in files.items():
        check_class(str(path), match[1])
        by_class.setdefault(match[1], {})[int(match[2])] = path
    lists = Lists(sorted(by_class))
    numbers = sorted({number for paths in by_class.values() for number in paths})
    for class_name in lists.classes:
        for split in numbers:
            if split not in by_class[class_name]:
                what = f"class `{class_name}` has no list of split {split}, other classes have"
                raise GkdError(what, str(folder / f"{class_name}_test_split{split}.txt"), "add that list")
            for line in read_lines(by_class[class_name][split]):
                video, flag = cut_last(line, line.text, "<video> <flag>")
                if flag not in ("0", "1", "2"):
                    hint = "1 is training, 2 test, 0 neither"
                    raise line.error(f"`{short(flag)}` is not a flag of a split", hint)
                subset = (None, *SUBSETS)[int(flag)]
                lists.add(line, class_name, bare_name(line, video), split, subset)
    for split, subset in product(numbers, SUBSETS):
        if not any(listed.splits.get(split) == subset for listed in lists.videos.values()):
            what = f"no video belongs to `{subset}` of split {split}"
            raise GkdError(what, str(folder), "a flag of 1 is training, 2 test, 0 neither")
    return lists


def read_two_stream(folder: Path, files: Files, lookup: Lookup) -> Lists:
    """`{train,val}_{rgb,flow}_split1.txt`: `<video> <frames> <label>` from 0; val is the test list.

    Raises:
        GkdError: anything wrong in the lists, with its line.
    """
    first: dict[str, _Row] = {}
    rows: dict[tuple[int, str, Subset], dict[str, _Row]] = {}
    subsets: dict[str, Subset] = {"train": "train", "val": "test"}
    for (split, modality), paths in _pairs(files, lambda m: ((int(m[3]), m[2]), subsets[m[1]])).items():
        for subset in SUBSETS:
            rows[split, modality, subset] = _two_stream_rows(paths[subset], first)
    lists = _name_labels(folder, first, lookup)
    for (split, modality, subset), taken in rows.items():
        twin = rows.get((split, "flow" if modality == "rgb" else "rgb", subset), taken)
        for stem, row in taken.items():
            if stem not in twin:
                other = next(iter(twin.values())).line.file
                raise row.line.error(
                    "a video is listed for one modality only", f"it is not in {other}; use one pair of lists"
                )
        if modality == "rgb" or twin is taken:
            for row in taken.values():
                lists.add(row.line, lists.classes[row.label], row.video, split, subset)
    return lists


def read_labelled(folder: Path, files: Files, lookup: Lookup) -> Lists:
    """`<name>_{train,test,val}.txt`: `<class>/<video> [<frames>] <label>`; labels from 0 or 1.

    The videos of val are those that HMDB51 neither trains on nor tests.

    Raises:
        GkdError: anything wrong in the lists, with its line.
    """
    names = sorted({match[1] for match in files.values()})
    if len(names) > 1:
        what = "the lists belong to several data sets"
        raise GkdError(what, f"{folder}: {', '.join(map(short, names))}", "keep each in a folder of its own")
    paths = {match[2]: path for path, match in files.items()}
    parts: dict[str, Subset | None] = {"train": "train", "test": "test", "val": None}
    rows: list[tuple[Subset | None, _Row, str]] = []
    for part, subset in parts.items():
        if part not in paths:
            if subset is None:
                continue
            raise GkdError("a list is missing", str(folder / f"{names[0]}_{part}.txt"), "add that list")
        lines = read_lines(paths[part])
        cuts = [cut_last(line, line.text, "<class>/<video> <label>") for line in lines]
        counts = [LAST_COLUMN.fullmatch(text) for text, _ in cuts]
        counted = all(count and NUMBER.fullmatch(count[2]) for count in counts)
        for line, (text, token), count in zip(lines, cuts, counts, strict=True):
            class_name, video = class_and_video(line, count[1] if counted and count else text)
            rows.append((subset, _Row(line, video, whole_number(line, token, "label")), class_name))
    start = min(1, *(row.label for _, row, _ in rows))
    lists = Lists(_classes([(row, name) for _, row, name in rows], start))
    for subset, row, class_name in rows:
        lists.add(row.line, class_name, row.video, 1, subset)
    return lists


class _Row(NamedTuple):
    line: Line
    video: str
    label: int


def _two_stream_rows(path: Path, first: dict[str, _Row]) -> dict[str, _Row]:
    """One list by name of the video; `first` knows those of all lists read so far."""
    rows: dict[str, _Row] = {}
    for line in read_lines(path):
        columns = re.split(r"[ \t]+", line.text)
        if len(columns) != 3:
            raise line.error(f"a line has {len(columns)} columns, not 3", "`<video> <frames> <label>`")
        whole_number(line, columns[1], "number of frames")
        row = _Row(line, bare_name(line, columns[0]), whole_number(line, columns[2], "label"))
        once(rows.setdefault(stem_of(row.video), row).line, line)
        known = first.setdefault(stem_of(row.video), row)
        if known.label != row.label:
            what = f"a video has the label {row.label} here and {known.label} elsewhere"
            raise line.error(what, f"elsewhere: {known.line.where}")
    return rows


def _name_labels(folder: Path, rows: Mapping[str, _Row], lookup: Lookup) -> Lists:
    """Finds the class names of bare labels: a list of classes, else the videos' names, else their folders."""
    beside = (folder, folder.parent, folder.parent / "ucfTrainTestlist")
    index = next((path / CLASS_INDEX for path in beside if (path / CLASS_INDEX).exists()), None)
    taken = {stem: match[1] for stem in rows if (match := _TAKEN.fullmatch(stem))}
    if index:
        named = _class_index(index)
        classes = list(named)
        for stem, row in rows.items():
            if row.label >= len(classes):
                raise row.line.error(f"there is no class of label {row.label}", f"the classes: {index}")
            name = classes[row.label]
            if taken.get(stem, name).casefold() != name.casefold():
                what = f"the video's name says another class than its label, `{short(name)}`"
                raise row.line.error(what, f"the classes: {index}")
        _need_videos(named, {classes[row.label] for row in rows.values()})
        return Lists(classes)
    if len(taken) == len(rows):
        for stem, name in taken.items():
            check_class(rows[stem].line.where, name)
        return Lists(
            _classes([(row, taken[stem]) for stem, row in rows.items()], 0, fold=True), spelled=False
        )
    folders = lookup(rows)
    lying = [(row, min(folders[stem])) for stem, row in rows.items() if len(folders.get(stem, ())) == 1]
    seen = {row.label for row, _ in lying}
    nameless = next((row for row in rows.values() if row.label not in seen), None)
    if nameless:
        raise nameless.line.error(
            f"nothing says the name of class {nameless.label}",
            f"put `{CLASS_INDEX}` (`1 <class>`) into {folder}",
        )
    return Lists(_classes(lying, 0))


def _classes(rows: Iterable[tuple[_Row, str]], start: int, *, fold: bool = False) -> list[str]:
    """The classes by label; each label has one class and each class one label, without gaps from `start`."""
    by_label: dict[int, tuple[str, Line]] = {}
    by_class: dict[str, tuple[int, Line]] = {}
    for row, name in rows:
        key = name.casefold() if fold else name
        known, at = by_label.setdefault(row.label, (name, row.line))
        if (known.casefold() if fold else known) != key:
            what = f"label {row.label} is here of class `{short(name)}`, elsewhere of `{short(known)}`"
            raise row.line.error(what, f"elsewhere: {at.where}")
        label, at = by_class.setdefault(key, (row.label, row.line))
        if label != row.label:
            what = f"class `{short(name)}` has the label {row.label} here and {label} elsewhere"
            raise row.line.error(what, f"elsewhere: {at.where}")
    for due, label in enumerate(sorted(by_label), start=start):
        if label != due:
            raise by_label[label][1].error(
                f"no video has the label {due}, though this one has {label}",
                "labels are counted without gaps",
            )
    return [by_label[label][0] for label in sorted(by_label)]


def _class_index(path: Path) -> dict[str, Line]:
    """`<number> <class>`, numbers from 1: the lines by class, in the order of the numbers."""
    by_number: dict[int, tuple[str, Line]] = {}
    by_class: dict[str, Line] = {}
    for line in read_lines(path):
        match = re.fullmatch(r"([^ \t]+)[ \t]+(.+)", line.text)
        if not match:
            raise line.error("there is no class name", "a line is `<number> <class>`")
        number, name = whole_number(line, match[1], "class number"), match[2]
        check_class(line.where, name)
        for first in (by_number.setdefault(number, (name, line))[1], by_class.setdefault(name, line)):
            if first is not line:
                raise line.error("a class or its number is listed twice", f"first at line {first.number}")
    for due, number in enumerate(sorted(by_number), start=1):
        if number != due:
            hint = "classes are numbered from 1 without gaps"
            raise by_number[number][1].error(f"there is a class {number}, but none in place {due}", hint)
    return {name: line for _, (name, line) in sorted(by_number.items())}


def _need_videos(classes: Mapping[str, Line], used: Collection[str]) -> None:
    for name, line in classes.items():
        if name not in used:
            raise line.error(
                f"class {short(name)} has no videos in the lists", "remove the class, or complete the lists"
            )


def _pairs(
    files: Files, place: Callable[[re.Match[str]], tuple[_Key, Subset]]
) -> dict[_Key, dict[Subset, Path]]:
    """The two lists of each split, or of each split and modality."""
    pairs: dict[_Key, dict[Subset, Path]] = {}
    for path, match in files.items():
        key, subset = place(match)
        other = pairs.setdefault(key, {}).setdefault(subset, path)
        if other != path:
            raise GkdError("two files are the same list", f"{path} and {other.name}", "keep one of the two")
    for pair in pairs.values():
        for path in pair.values() if len(pair) < 2 else ():
            what = "a split has only one of its lists, of training or of test videos"
            raise GkdError(what, str(path), "add the other list")
    return pairs


def _class_video_label(line: Line, *, needed: bool) -> tuple[str, str]:
    """The label may be absent from a test list, so a blank may belong to the name there."""
    cut = LAST_COLUMN.fullmatch(line.text)
    if not needed and (not cut or video_stem(line.text) is not None or "/" in cut[2]):
        return line.text, ""
    return cut_last(line, line.text, "<class>/<video> <label>")
