"""Files of annotated actions, one kind at a time: CSV, ActivityNet JSON, text files of one class each.

A row that cannot be used becomes a `Problem` and is left out; a file that is of another kind is an error.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gkdcli.data.names import check_text, short
from gkdcli.data.sources import Action, Problem, Stated
from gkdcli.errors import GkdError

ACTION_COLUMNS = ("video", "type", "type_idx", "start", "end", "startFrame", "endFrame")
INFO_COLUMNS = ("video", "fps", "sample_fps", "count", "sample_count")
_AMBIGUOUS = "ambiguous"
_LONGEST_SEC = 1e7  # four months
_JSON_HINT = (
    '{"database": {VIDEO: {"subset": "train", "annotations": [{"segment": [START, END], "label": NAME}]}}}'
)


class Entry(NamedTuple):
    """One video of an ActivityNet file; `subset` as it stands there, in lower case."""

    subset: str
    duration: float
    actions: list[Action]


class _Actions:
    """Takes the actions of one file, or says why not.

    Args:
        path: the file.
        classes: number by name, where the names are known beforehand; 0 where there is no number.
        problems: where to say so.
    """

    def __init__(self, path: Path, classes: Mapping[str, int] | None, problems: list[Problem]) -> None:
        self.path, self.classes, self.problems = path, classes, problems
        self.by_video: dict[str, list[Action]] = {}
        self._seen: set[tuple[str, str, float, float]] = set()

    def problem(self, line: int, video: str, reason: str) -> None:
        self.problems.append(Problem(str(self.path), line, readable(video), reason))

    def add(
        self, line: int, video: str, class_name: str, times: Sequence[Any], frames: Sequence[Any] = (),
        number: str = "",
    ) -> None:  # fmt: skip
        """One row; `times` and `frames` are pairs as they stand in the file."""
        found = self._read(video, class_name, times, frames, number)
        if isinstance(found, str):
            self.problem(line, video, f"{found}; left out")
            return
        action = found._replace(line=line)
        if action.start < 0:
            self.problem(line, video, f"{told(action)} starts before the video; kept as it is")
        key = (video, class_name, action.start, action.end)
        if key in self._seen:
            self.problem(line, video, f"{told(action)} is there twice; kept, as in the published evaluation")
        self._seen.add(key)
        self.by_video.setdefault(video, []).append(action)

    def _read(
        self, video: str, class_name: str, times: Sequence[Any], frames: Sequence[Any], number: str
    ) -> Action | str:
        """The action, or what is wrong with it."""
        if defect := name_defect(video) or name_defect(class_name):
            return defect
        known = (self.classes or {}).get(class_name)
        if known is None and (class_name.lower() == _AMBIGUOUS or number == "0"):
            return "ambiguous: it shows no class for certain"
        if self.classes is not None and known is None:
            return f"`{short(class_name)}` is not a class"
        if known and number and _number(number) != known:
            return f"the class has number {short(number)} here and {known} in the class index"
        ends = [_number(value) for value in times]
        places = [_number(value) for value in frames]
        if any(value is None or abs(value) > _LONGEST_SEC for value in ends):
            return f"start and end are {_quoted(times)}, not two numbers of seconds"
        if any(value is None for value in places):
            return f"startFrame and endFrame are {_quoted(frames)}, not two numbers"
        action = Action(class_name, *ends, *places)  # type: ignore[arg-type]  # none is None
        if action.end <= action.start:
            return f"{told(action)} has {'no' if action.end == action.start else 'a negative'} length"
        if action.first_frame is not None and action.last_frame is not None:
            length = action.last_frame - action.first_frame
            if length <= 0:
                return (
                    f"frames {action.first_frame:g} to {action.last_frame:g} have"
                    f" {'a negative' if length else 'no'} length"
                )
        return action


def told(action: Action) -> str:
    """An action in words."""
    return f"{short(action.class_name)} from {action.start:g} to {action.end:g} s"


def readable(name: str) -> str:
    """A name that may be anything, fit for a table and a terminal."""
    return short(name.encode("unicode_escape").decode() if not name.isprintable() else name)


def name_defect(name: str) -> str:
    """Why a name can be neither a file's nor a class's; "" where it can."""
    try:
        check_text(name, "")
    except GkdError as error:
        return error.what
    if not name.strip():
        return "a name is empty"
    if "/" in name or "\\" in name or name in (".", ".."):
        return f"`{short(name)}` leads out of the folder of videos, or is no name of a file"
    return ""


def read_class_index(path: Path, problems: list[Problem]) -> dict[str, int]:
    """Class names and their numbers, in the order of the file: lines `7 BaseballPitch`.

    Raises:
        GkdError: it cannot be read, or names no class.
    """
    classes: dict[str, int] = {}
    for line, text in _lines(path):
        number, name = [*text.split(None, 1), ""][:2]
        if not number.isdecimal() or len(number) > 9 or name_defect(name) or name in classes:
            problems.append(
                Problem(str(path), line, "", f"`{readable(text)}` is not `NUMBER NAME`; left out")
            )
        else:
            classes[name] = int(number)
    if not classes:
        raise GkdError("a class index names no class", str(path), "a line is `NUMBER NAME`")
    return classes


def read_video_info(path: Path, problems: list[Problem]) -> dict[str, Stated]:
    """Rates and frame counts of `*_video_info.csv`, by video; a video whose numbers are wrong has none.

    Raises:
        GkdError: it is no such file.
    """
    found: dict[str, Stated] = {}
    for line, row in _rows(path, INFO_COLUMNS, problems):
        video = row["video"]
        reason = name_defect(video)
        numbers = [_number(row[name]) for name in INFO_COLUMNS[1:]]
        if reason:
            reason += "; left out"
        elif video in found:
            reason = "the video is there twice; the first row counts"
        elif any(value is None or not 0 < value < 1e9 for value in numbers):
            found[video] = Stated()
            reason = "rates and counts are not four positive numbers; the video's own are taken"
        else:
            fps, sample_fps, count, sample_count = (value or 0.0 for value in numbers)
            found[video] = Stated(fps, round(count), sample_fps, round(sample_count), file=str(path))
        if reason:
            problems.append(Problem(str(path), line, readable(video), reason))
    if not found:
        raise GkdError("a list of video rates names no video", str(path), _columns_hint(INFO_COLUMNS))
    return found


def read_action_csv(
    path: Path, classes: Mapping[str, int] | None, problems: list[Problem]
) -> dict[str, list[Action]]:
    """Actions of `*_Annotation.csv` or `*_Annotation_ours.csv`, by video.

    Raises:
        GkdError: it is no such file.
    """
    actions = _Actions(path, classes, problems)
    for line, row in _rows(path, ACTION_COLUMNS, problems):
        times, frames = (row["start"], row["end"]), (row["startFrame"], row["endFrame"])
        actions.add(line, row["video"], row["type"], times, frames, row["type_idx"])
    return actions.by_video


def read_class_files(
    paths: Mapping[str, Path], classes: Mapping[str, int] | None, problems: list[Problem]
) -> dict[str, list[Action]]:
    """Actions of text files of one class each, by class name: lines `VIDEO START END`, in seconds.

    Raises:
        GkdError: a file cannot be read.
    """
    by_video: dict[str, list[Action]] = {}
    for class_name, path in paths.items():
        actions = _Actions(path, classes, problems)
        for line, text in _lines(path):
            cells = text.split()
            if len(cells) == 3:
                actions.add(line, cells[0], class_name, cells[1:])
            else:
                actions.problem(line, cells[0], f"a line has {len(cells)} cells, not 3; left out")
        for video, found in actions.by_video.items():
            by_video.setdefault(video, []).extend(found)
    return by_video


def is_activitynet(path: Path) -> bool:
    """Whether a JSON file may hold annotated actions."""
    try:
        return b'"database"' in path.read_bytes()
    except OSError:
        return False


def read_activitynet(
    path: Path, classes: Mapping[str, int] | None, problems: list[Problem]
) -> dict[str, Entry]:
    """Videos of an ActivityNet file.

    Raises:
        GkdError: it is no such file.
    """
    twice: list[str] = []

    def keep_first(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        taken: dict[str, Any] = {}
        for key, value in pairs:
            if key in taken:
                twice.append(key)
            taken.setdefault(key, value)
        return taken

    try:
        document = json.loads(_text(path), object_pairs_hook=keep_first)
    except ValueError as error:
        raise GkdError("not a JSON file", f"{path}: {error}", _JSON_HINT) from None
    except RecursionError:
        raise GkdError("the JSON is nested too deeply", str(path), _JSON_HINT) from None
    database = document.get("database") if isinstance(document, dict) else None
    if not isinstance(database, dict) or not database:
        raise GkdError("annotations in JSON need an object `database`", str(path), _JSON_HINT)
    actions = _Actions(path, classes, problems)
    for key in twice:
        actions.problem(0, key, "a key is there twice; the first counts")
    entries = {}
    for video, about in database.items():
        if defect := name_defect(video):
            actions.problem(0, video, f"{defect}; left out")
        elif not isinstance(about, dict) or not isinstance(about.get("subset"), str):
            actions.problem(0, video, "the video is not an object with a `subset`; left out")
        else:
            _add_annotations(actions, video, about.get("annotations", []))
            duration = _number(about.get("duration", 0))
            found = actions.by_video.get(video, [])
            entries[video] = Entry(about["subset"].strip().lower(), max(duration or 0.0, 0.0), found)
    return entries


def _add_annotations(actions: _Actions, video: str, annotations: Any) -> None:
    if not isinstance(annotations, list):
        actions.problem(0, video, "`annotations` is not an array; left out")
        return
    for number, annotation in enumerate(annotations, 1):
        segment = annotation.get("segment") if isinstance(annotation, dict) else None
        label = annotation.get("label") if isinstance(annotation, dict) else None
        if (
            isinstance(segment, list)
            and len(segment) == 2
            and label is not None
            and not isinstance(label, str)
        ):
            actions.problem(number, video, f"label {_quoted([label])} is not text; left out")
        elif not isinstance(segment, list) or len(segment) != 2 or not isinstance(label, str):
            actions.problem(
                number,
                video,
                "an annotation is not an object with a `segment` of two and a `label`; left out",
            )
        else:
            actions.add(number, video, label.strip(), segment)


def _number(value: Any) -> float | None:
    """A finite number, also as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str) and ("_" in value or not value.isascii()):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _quoted(values: Sequence[Any]) -> str:
    return " and ".join(f"`{readable(str(value)[:200])}`" for value in values)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        what = "an annotation file cannot be read"
        raise GkdError(what, f"{path}: {error.strerror}", "check the file and its permissions") from None
    except UnicodeDecodeError as error:
        what = "an annotation file is not UTF-8 text"
        raise GkdError(what, f"{path}: {error.reason}", "save it as UTF-8, or unpack it again") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not blank; LF or CRLF."""
    for number, raw in enumerate(_text(path).split("\n"), 1):
        if text := raw.strip():
            yield number, text


def _rows(
    path: Path, columns: tuple[str, ...], problems: list[Problem]
) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells by column of each row that has all cells; a row is one line."""
    header: list[str] = []
    for number, text in _lines(path):
        try:
            cells = [cell.strip() for cell in next(csv.reader([text], strict=True), [])]
        except csv.Error as error:
            cells = []
            defect = f"not CSV: {error}"
        else:
            defect = f"a row has {len(cells)} cells, the header {len(header)}"
        if not header:
            header = cells
            missing = [name for name in columns if header.count(name) != 1]
            if missing:
                what = f"there is no column `{missing[0]}`, or two of it"
                raise GkdError(what, f"{path} line {number}", _columns_hint(columns))
        elif len(cells) != len(header):
            problems.append(Problem(str(path), number, readable(text.split(",")[0]), f"{defect}; left out"))
        else:
            yield number, dict(zip(header, cells, strict=True))
    if not header:
        raise GkdError("an annotation file is empty", str(path), _columns_hint(columns))


def _columns_hint(columns: tuple[str, ...]) -> str:
    return f"the first line is `{','.join(columns)}`"
