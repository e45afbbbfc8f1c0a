"""Files of detections in the form that ActivityNet-style evaluators share, and of ground truth."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gkdcli.console import counted
from gkdcli.data.action_files import Entry, read_activitynet, readable
from gkdcli.data.json_keys import Twice, object_or_twice
from gkdcli.data.names import check_text
from gkdcli.data.sources import Problem
from gkdcli.errors import GkdError
from gkdcli.evaluation.detection import Detections, Floats, GroundTruth
from gkdcli.files import atomic_path

_HINT = '{"version": TEXT, "results": {VIDEO: [{"label": NAME, "score": S, "segment": [START, END]}]}}'
_TESTED = (("test", "testing"), ("val", "validation"))  # the first that shows an action is scored


class ReadTruth(NamedTuple):
    """Ground truth out of a file.

    Args:
        truth: what is scored against.
        subset: which part of the file that is.
        problems: annotations of it that were left out, or look wrong.
        durations: (V,) seconds, of its videos; 0 where the file does not say.
    """

    truth: GroundTruth
    subset: str
    problems: list[Problem]
    durations: Floats


def read_ground_truth(path: Path) -> ReadTruth:
    """The tested videos of an ActivityNet file: subset `test` or `testing`, else `val` or `validation`.

    Classes are those that the subset shows, by name. Segments may be given as text, as in thumos_gt.json.

    Raises:
        GkdError: it is no such file, or no tested video in it shows an action.
    """
    found: list[Problem] = []
    database = read_activitynet(path, None, found)
    for names in _TESTED:
        tested = {video: entry for video, entry in database.items() if entry.subset in names}
        if any(entry.actions for entry in tested.values()):
            aside = {readable(video) for video in database.keys() - tested.keys()}
            problems = [problem for problem in found if problem.video not in aside]
            durations = np.array([entry.duration for entry in tested.values()])
            return ReadTruth(_truth(tested), next(iter(tested.values())).subset, problems, durations)
    subsets = sorted({entry.subset for entry in database.values()})
    first = ""
    if found:
        first = f"; first of {counted(len(found), 'problem')}: {found[0].video}: {found[0].reason}"
    raise GkdError(
        "no tested video has an action that can be used",
        f"{path}; subsets: {', '.join(map(readable, subsets)) or 'none'}{first}",
        "the subset that is scored is called test or testing, or else validation",
    )


def _truth(tested: dict[str, Entry]) -> GroundTruth:
    classes = sorted({action.class_name for entry in tested.values() for action in entry.actions})
    label = {name: number for number, name in enumerate(classes)}
    rows = [
        (video, action.start, action.end, label[action.class_name])
        for video, entry in enumerate(tested.values())
        for action in entry.actions
    ]
    return GroundTruth(
        classes,
        list(tested),
        np.array([row[0] for row in rows], dtype=np.int64),
        np.array([row[1:3] for row in rows], dtype=np.float64).reshape(-1, 2),
        np.array([row[3] for row in rows], dtype=np.int64),
    )


def read_submission(path: Path, truth: GroundTruth) -> Detections:
    """Detections of a .json or .json.gz file, in its order.

    Raises:
        GkdError: anything in it that is not as it should be, with video and entry: missing or repeated keys,
            other types, numbers that are not finite, an end before its start.
    """
    document = _load(path)
    _refuse_twice(document, str(path))
    results = document.get("results") if isinstance(document, dict) else None
    _refuse_twice(results, f"{path}, `results`")
    if not isinstance(results, dict):
        raise GkdError("a file of detections needs an object `results`", str(path), _HINT)
    videos = {name: number for number, name in enumerate(truth.videos)}
    labels = {name: number for number, name in enumerate(truth.classes)}
    video_of: list[int] = []
    label_of: list[int] = []
    numbers: list[tuple[float, float, float]] = []
    for video, entries in results.items():
        if not isinstance(entries, list):
            what = "the detections of a video are not an array"
            raise GkdError(what, f"{path}, video {readable(video)}", _HINT)
        for place, entry in enumerate(entries, 1):
            try:
                label, *three = _entry(entry)
            except ValueError as error:
                where = f"{path}, video {readable(video)}, entry {place}"
                raise GkdError(str(error), where, _HINT) from None
            label_of.append(labels.get(label, -1))
            numbers.append((three[0], three[1], three[2]))
        video_of += [videos.get(video, -1)] * len(entries)
    table = np.array(numbers, dtype=np.float64).reshape(-1, 3)
    return Detections(
        np.array(video_of, dtype=np.int64),
        table[:, :2].copy(),
        np.array(label_of, dtype=np.int64),
        table[:, 2].copy(),
    )


def _entry(entry: Any) -> tuple[str, float, float, float]:
    """Label, start, end and score of one detection.

    Raises:
        ValueError: what is wrong with it.
    """
    if isinstance(entry, Twice):
        raise ValueError(f"a detection has the key `{readable(entry.key)}` twice")
    if not isinstance(entry, dict):
        raise ValueError("a detection is not an object")
    for key in ("label", "score", "segment"):
        if key not in entry:
            raise ValueError(f"a detection has no `{key}`")
    label, segment = entry["label"], entry["segment"]
    if not isinstance(label, str):
        raise ValueError("the label of a detection is not text")
    if not isinstance(segment, list) or len(segment) != 2:
        raise ValueError("the segment of a detection is not an array of start and end")
    start, end = _number(segment[0], "start"), _number(segment[1], "end")
    if end < start:
        raise ValueError(f"a detection ends at {end:g} s, before it starts at {start:g} s")
    return label, start, end, _number(entry["score"], "score")


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"the {name} of a detection is not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"the {name} of a detection is not finite")
    return number


def _refuse_twice(document: Any, where: str) -> None:
    if isinstance(document, Twice):
        raise GkdError(f"the key `{readable(document.key)}` is there twice", where, "keep one of the two")


def _load(path: Path) -> Any:
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise GkdError("a compressed file is damaged", f"{path}: {error}", "write or copy it again") from None
    except OSError as error:
        what = "the file of detections cannot be read"
        raise GkdError(what, f"{path}: {error.strerror}", "check the path and its permissions") from None
    except UnicodeDecodeError as error:
        raise GkdError("the file of detections is not UTF-8 text", f"{path}: {error.reason}", _HINT) from None
    try:
        return json.loads(text, object_pairs_hook=object_or_twice)
    except RecursionError:
        raise GkdError("the JSON is nested too deeply", str(path), _HINT) from None
    except ValueError as error:
        raise GkdError("not a JSON file", f"{path}: {error}", _HINT) from None


def write_submission(
    path: Path, videos: Sequence[str], classes: Sequence[str], detections: Detections, version: str
) -> None:
    """Writes detections for any ActivityNet-style evaluator, whole or not at all; .gz compresses.

    Args:
        path: the file.
        videos: names; each is listed, also with nothing found in it.
        classes: names by label.
        detections: of these videos and classes; each video keeps their order.
        version: what the file says it is of, for example "THUMOS14".
    """
    assert not len(detections.video) or min(detections.video.min(), detections.labels.min()) >= 0
    for name in (*videos, *classes):
        check_text(name, str(path))
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in videos}
    lists = list(results.values())
    assert len(lists) == len(videos), "two videos of one name"
    for video, segment, label, score in zip(*(column.tolist() for column in detections), strict=True):
        lists[video].append({"label": classes[label], "score": score, "segment": segment})
    document = {"version": version, "results": results, "external_data": {}}
    raw = (json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n").encode()
    if path.suffix.lower() == ".gz":
        raw = gzip.compress(raw, mtime=0)  # the same detections give the same bytes
    with atomic_path(path) as temporary:
        temporary.write_bytes(raw)
