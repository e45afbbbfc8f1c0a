"""Annotations of a whole detection set: which files there are, and which of them counts for which subset."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from gkdcli.console import counted
from gkdcli.data.action_files import (
    Entry,
    is_activitynet,
    read_action_csv,
    read_activitynet,
    read_class_files,
    read_class_index,
    read_video_info,
    readable,
)
from gkdcli.data.sources import SUBSETS, Action, GroundTruth, Problem, Stated, Subset
from gkdcli.errors import GkdError

_CSV = re.compile(r"(val|test)_(video_info|Annotation|Annotation_ours)\.csv")
_TEXT = re.compile(r"([A-Za-z][\w-]*)_(val|test)\.txt")
_ROW = re.compile(r"\s*\S+\s+[\d.]+\s+[\d.]+\s*")
_INDEXES = ("Class Index_Detection.txt", "detclasslist.txt")
_OFFICIAL_JSON = "thumos_gt.json"
_DATASETS = "datasets"
_WORD: dict[Subset, str] = {"train": "val", "test": "test"}  # THUMOS trains on its validation videos
_TRAIN, _TEST, _VAL = ("train", "training"), ("test", "testing"), ("val", "validation")
Validation = Literal["train", "test", "unused", ""]
_HINT = (
    "known are val_video_info.csv with val_Annotation.csv or val_Annotation_ours.csv, test_* likewise,"
    " <Class>_val.txt and <Class>_test.txt, and ActivityNet JSON such as thumos_gt.json"
)


@dataclass
class Files:
    """The annotation files of a data set, by the word in their names, "val" or "test"."""

    index: Path | None = None
    info: dict[str, Path] = field(default_factory=dict)
    csv: dict[str, Path] = field(default_factory=dict)
    text: dict[str, dict[str, Path]] = field(default_factory=dict)  # then by class
    json: list[Path] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.csv or self.text or self.json)


@dataclass
class Annotations:
    """What a detection set's files say.

    Args:
        classes: the position is the label.
        actions: by subset and video, in the order of the file; only videos that have any.
        listed: every video of a subset, annotated or not, and what is said about it.
        files: path of the file behind the actions of a subset.
        ground_truth: by subset.
        problems: rows that were left out or look wrong.
        validation: what the videos are for that the files call validation: "train" (THUMOS14), "test"
            (ActivityNet), "unused", or "" where they call none so.
    """

    classes: list[str]
    actions: dict[Subset, dict[str, list[Action]]]
    listed: dict[Subset, dict[str, Stated]]
    files: dict[Subset, str]
    ground_truth: dict[Subset, GroundTruth]
    problems: list[Problem]
    validation: Validation


def find_annotations(named: Path | None, folders: Iterable[Path]) -> Files:
    """The annotation files of a detection set.

    Args:
        named: a file or a folder of theirs, as the user names it. A JSON file stands alone, another file
            stands for those beside it and is preferred to them.
        folders: otherwise, where to look: in each, two folders deep, then beside it; the first that has any.

    Raises:
        GkdError: there are none, or two that differ have one name.
    """
    if named is not None:
        if named.is_file() and named.suffix.lower() == ".json":
            return Files(json=[named])
        files = _collect([named.parent if named.is_file() else named])
        match = _CSV.fullmatch(named.name) if named.is_file() else None
        if match and match[2] != "video_info":
            files.csv[match[1]] = named
        elif named.is_file() and not match and not _TEXT.fullmatch(named.name):
            raise GkdError("the kind of this annotation file is unknown", str(named), _HINT)
        if not files:
            raise GkdError("there are no annotations of actions", f"looked in {named}", _HINT)
        return files
    looked = list(dict.fromkeys(folders))
    for folder in looked:
        parent = Path(os.path.abspath(folder)).parent
        beside = [] if _DATASETS in (parent.name, folder.name) or parent == parent.parent else [parent]
        for places in (_below(folder, 2), _below(beside[0], 1) if beside else ()):
            if files := _collect(places):
                return files
    where = f"looked in {' and '.join(map(str, looked))}, two folders deep, and beside"
    raise GkdError("there are no annotations of actions", where, f"`--annotations PATH` names them; {_HINT}")


def _below(folder: Path, depth: int) -> Iterator[Path]:
    """A folder and those below it, the upper ones first; hidden and unreadable ones are skipped."""
    level = [folder]
    for _ in range(depth + 1):
        yield from level
        level = [inner for outer in level for inner in _entries(outer) if inner.is_dir()]


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:
        return []


def _collect(folders: Iterable[Path]) -> Files:
    named: dict[str, Path] = {}
    documents: dict[str, Path] = {}
    for folder in folders:
        for path in _entries(folder):
            name = path.name
            if name.lower().endswith(".json"):
                if path.is_file() and is_activitynet(path):
                    _once(documents, path)
            elif name in _INDEXES or _CSV.fullmatch(name) or (_TEXT.fullmatch(name) and _has_rows(path)):
                _once(named, path)
    files = Files(json=list(documents.values()))
    for name in reversed(_INDEXES):
        files.index = named.get(name, files.index)
    for name, path in sorted(named.items()):  # `_Annotation.csv` before `_Annotation_ours.csv`, which wins
        if match := _CSV.fullmatch(name):
            (files.info if match[2] == "video_info" else files.csv)[match[1]] = path
        elif match := _TEXT.fullmatch(name):
            files.text.setdefault(match[2], {})[match[1]] = path
    return files


def _once(known: dict[str, Path], path: Path) -> None:
    first = known.setdefault(path.name, path)
    try:
        if first is not path and first.read_bytes() != path.read_bytes():
            what = "two annotation files of one name differ"
            raise GkdError(
                what, f"{first} and {path}", "name the right one, or its folder, with `--annotations`"
            )
    except OSError as error:
        raise GkdError("an annotation file cannot be read", f"{path}: {error.strerror}") from None


def _has_rows(path: Path) -> bool:
    """Whether one of the first lines is `VIDEO START END`."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return any(_ROW.fullmatch(line) for line, _ in zip(file, range(50), strict=False))
    except OSError:
        return False


def read_annotations(files: Files) -> Annotations:
    """Reads what counts: for training CSV, JSON, text; for testing JSON, CSV, text, the first there is.

    The JSON comes first in testing because the published evaluation reads it.

    Raises:
        GkdError: a file is not what its name says, several JSON files, or no action that can be used.
    """
    problems: list[Problem] = []
    classes = read_class_index(files.index, problems) if files.index else None
    known: dict[Subset, set[str]] = {}  # whom the ground truth knows, annotated or not
    found: dict[Subset, dict[str, list[Action]]] = {}
    listed: dict[Subset, dict[str, Stated]] = {subset: {} for subset in SUBSETS}
    names: dict[Subset, str] = {}
    entries, validation = _read_json(files, classes, problems)
    for subset, word in _WORD.items():
        if word in files.info:
            listed[subset] |= read_video_info(files.info[word], problems)
        if entries.get(subset):
            names[subset] = str(_the_json(files))
            found[subset] = {v: entry.actions for v, entry in entries[subset].items() if entry.actions}
            for video, entry in entries[subset].items():
                stated = listed[subset].get(video, Stated())
                listed[subset][video] = replace(stated, duration=entry.duration)
        elif word in files.csv:
            names[subset] = str(files.csv[word])
            found[subset] = read_action_csv(files.csv[word], classes, problems)
        elif word in files.text:
            texts = {name: path for name, path in files.text[word].items() if _is_meant(name, classes)}
            names[subset] = str(next(iter(files.text[word].values())).with_name(f"*_{word}.txt"))
            found[subset] = read_class_files(texts, classes, problems)
        if subset == "train" and subset in names and not entries.get(subset):
            validation = "train"
        known[subset] = set(entries.get(subset) or found.setdefault(subset, {}))
        for video in found[subset]:
            listed[subset].setdefault(video, Stated())
    if not any(found.values()):
        raise GkdError("no annotated action can be used", _first_problem(files, problems), _HINT)
    _settle(found, listed, names, problems)
    truth = {
        subset: _ground_truth(names.get(subset, ""), found[subset], listed[subset].keys() - known[subset])
        for subset in SUBSETS
    }
    order = list(classes) if classes else sorted(_labels(found["train"]) | _labels(found["test"]))
    return Annotations(order, found, listed, names, truth, problems, validation)


def _read_json(
    files: Files, classes: Mapping[str, int] | None, problems: list[Problem]
) -> tuple[dict[Subset, dict[str, Entry]], Validation]:
    """Entries of the subsets that a JSON file decides, and what its validation videos are for."""
    document = _the_json(files)
    if document is None:
        return {}, ""
    found: list[Problem] = []
    database = read_activitynet(document, classes, found)
    entries, unused, validation = _by_subset(database)
    if "val" in files.csv:
        entries["train"] = {}
    aside = {readable(video) for video in database} - {
        readable(video) for videos in entries.values() for video in videos
    }
    problems += [problem for problem in found if problem.video not in aside]
    problems += [Problem(str(document), 0, "", text) for text in unused]
    return entries, validation


def _settle(
    found: dict[Subset, dict[str, list[Action]]],
    listed: dict[Subset, dict[str, Stated]],
    names: Mapping[Subset, str],
    problems: list[Problem],
) -> None:
    """No video is in both subsets, and each training video has an action."""
    for video in sorted(listed["train"].keys() & listed["test"].keys()):
        reason = "the video is in both subsets; it is tested and not trained on"
        problems.append(Problem(names.get("train", ""), 0, readable(video), reason))
        del listed["train"][video]
        found["train"].pop(video, None)
    for video in [video for video in listed["train"] if video not in found["train"]]:
        reason = "a training video without a usable action; left out"
        problems.append(Problem(names.get("train", ""), 0, readable(video), reason))
        del listed["train"][video]
    trained = _labels(found["train"])
    for name in sorted(_labels(found["test"]) - trained) if trained else ():
        reason = f"`{readable(name)}` is tested, but no training video shows it"
        problems.append(Problem(names["test"], 0, "", reason))


def _labels(actions: Mapping[str, list[Action]]) -> set[str]:
    return {action.class_name for found in actions.values() for action in found}


def _ground_truth(name: str, actions: Mapping[str, list[Action]], without: Iterable[str]) -> GroundTruth:
    rows = [(video, *action[:3]) for video, found in actions.items() for action in found]
    file = Path(name).name
    return GroundTruth(file, len(actions), len(rows), len(rows) - len(set(rows)), tuple(sorted(without)))


def _the_json(files: Files) -> Path | None:
    official = [path for path in files.json if path.name == _OFFICIAL_JSON]
    if len(official or files.json) > 1:
        both = " and ".join(map(str, files.json[:2]))
        raise GkdError("there are several JSON files of actions", both, "name one with `--annotations FILE`")
    return next(iter(official or files.json), None)


def _by_subset(
    database: Mapping[str, Entry],
) -> tuple[dict[Subset, dict[str, Entry]], list[str], Validation]:
    """Entries by subset, what is not used, and what validation videos are for.

    `validation` is for training where nothing else is (THUMOS), for testing where no test video is annotated
    (ActivityNet).
    """
    groups: dict[str, dict[str, Entry]] = {}
    for video, entry in database.items():
        kind = next((kinds[0] for kinds in (_TRAIN, _TEST, _VAL) if entry.subset in kinds), entry.subset)
        groups.setdefault(kind, {})[video] = entry
    subsets: dict[Subset, dict[str, Entry]] = {}
    validation: Validation = "unused" if "val" in groups else ""
    if "train" not in groups and "val" in groups:
        groups["train"], validation = groups.pop("val"), "train"
    elif "val" in groups and not any(entry.actions for entry in groups.get("test", {}).values()):
        groups["test without annotations"] = groups.pop("test", {})
        groups["test"], validation = groups.pop("val"), "test"
    for subset in SUBSETS:
        subsets[subset] = groups.pop(subset, {})
    unused = [
        counted(len(entries), "video") + f" of subset `{readable(name)}`, not used"
        for name, entries in groups.items() if entries
    ]  # fmt: skip
    return subsets, unused, validation


def _is_meant(name: str, classes: Mapping[str, int] | None) -> bool:
    return classes is None or name in classes or name.lower() == "ambiguous"


def _first_problem(files: Files, problems: list[Problem]) -> str:
    if not problems:
        return str(next(iter([*files.json, *files.csv.values()]), ""))
    first = problems[0]
    return f"{first.file} line {first.line}, {first.video}: {first.reason}"
