"""Files of detections and ground truth: what is read, what is refused and where, and writing them."""

from __future__ import annotations

import contextlib
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkdcli.errors import GkdError
from gkdcli.evaluation.detection import Detections, GroundTruth
from gkdcli.evaluation.submission import read_ground_truth, read_submission, write_submission

GOOD: dict[str, Any] = {"label": "b", "score": 0.5, "segment": [1, 2.5]}
TRUTH = GroundTruth(
    ["a", "b"], ["one", "two"], np.zeros(1, np.int64), np.array([[0.0, 1.0]]), np.zeros(1, np.int64)
)


def _read(path: Path, document: Any) -> Detections:
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return read_submission(path, TRUTH)


def test_what_is_read(tmp_path: Path) -> None:
    results = {
        "two": [GOOD, {"label": "a", "score": -1, "segment": [0, 0], "more": None}],
        "else": [{"label": "c", "score": 2, "segment": [-0.5, 1]}],
        "one": [],
    }
    found = _read(tmp_path / "file.json", {"version": "x", "results": results, "external_data": {}})
    assert found.video.tolist() == [1, 1, -1]
    assert found.labels.tolist() == [1, 0, -1]
    assert found.scores.tolist() == [0.5, -1, 2]
    assert found.segments.tolist() == [[1, 2.5], [0, 0], [-0.5, 1]]
    none = _read(tmp_path / "none.json", {"results": {}})
    assert (none.segments.shape, none.scores.dtype, none.video.dtype) == ((0, 2), float, int)


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ([], "is not an object"),
        ({"score": 1, "segment": [0, 1]}, "has no `label`"),
        ({"label": "a", "segment": [0, 1]}, "has no `score`"),
        ({"label": "a", "score": 1}, "has no `segment`"),
        (GOOD | {"label": 3}, "label of a detection is not text"),
        (GOOD | {"score": "0.5"}, "score of a detection is not a number"),
        (GOOD | {"score": True}, "score of a detection is not a number"),
        (GOOD | {"score": None}, "score of a detection is not a number"),
        (GOOD | {"score": float("nan")}, "score of a detection is not finite"),
        (GOOD | {"score": 10**400}, "score of a detection is not finite"),
        (GOOD | {"segment": "0, 1"}, "not an array of start and end"),
        (GOOD | {"segment": [0, 1, 2]}, "not an array of start and end"),
        (GOOD | {"segment": ["0", "1"]}, "start of a detection is not a number"),
        (GOOD | {"segment": [0, float("inf")]}, "end of a detection is not finite"),
        (GOOD | {"segment": [2, 1.5]}, "ends at 1.5 s, before it starts at 2 s"),
    ],
)
def test_a_wrong_entry_is_refused_with_video_and_number(tmp_path: Path, entry: Any, what: str) -> None:
    with pytest.raises(GkdError) as caught:
        _read(tmp_path / "file.json", {"results": {"one": [GOOD], "two": [GOOD, GOOD, entry]}})
    assert what in caught.value.what
    assert caught.value.where == f"{tmp_path / 'file.json'}, video two, entry 3"


@pytest.mark.parametrize(
    ("text", "what", "where"),
    [
        ("", "not a JSON file", "line 1"),
        ('{"results": ', "not a JSON file", "line 1"),
        ("[]", "needs an object `results`", ""),
        ('{"results": []}', "needs an object `results`", ""),
        ('{"database": {}}', "needs an object `results`", ""),
        ('{"results": {"one": {}}}', "are not an array", "video one"),
        ('{"results": {"one": [], "one": []}}', "`one` is there twice", "`results`"),
        ('{"results": {}, "results": {}}', "`results` is there twice", ""),
        ('{"results": {"one": [{"score": 1, "score": 2}]}}', "the key `score` twice", "video one, entry 1"),
        ('{"results": ' + "[" * 200_000, "nested too deeply", ""),
        ('{"results": {"\\u001b[31m": 1}}', "are not an array", "video \\x1b[31m"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, what: str, where: str) -> None:
    with pytest.raises(GkdError) as caught:
        _read(tmp_path / "file.json", text)
    assert what in caught.value.what
    assert str(tmp_path / "file.json") in caught.value.where
    assert where in caught.value.where
    assert "\x1b" not in caught.value.where


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "file.json.gz"
    whole = gzip.compress(json.dumps({"results": {"one": [GOOD] * 50}}).encode())
    path.write_bytes(whole)
    assert len(read_submission(path, TRUTH).scores) == 50
    for damaged in (whole[:-12], whole[:12], whole[:30] + b"xxxx" + whole[34:]):
        path.write_bytes(damaged)
        with pytest.raises(GkdError, match="compressed file is damaged"):
            read_submission(path, TRUTH)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(GkdError, match="not UTF-8"):
        read_submission(path, TRUTH)
    with pytest.raises(GkdError, match="cannot be read"):
        read_submission(tmp_path / "none.json", TRUTH)
    with pytest.raises(GkdError, match="cannot be read"):
        read_submission(tmp_path, TRUTH)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["results", "database", "label", "score", "segment", "subset", "annotations", "x"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(inner=JSON)
def test_no_document_is_a_crash(tmp_path_factory: pytest.TempPathFactory, inner: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    for document in (inner, {"results": inner}, {"results": {"v": inner}}, {"results": {"v": [inner]}}):
        path.write_text(json.dumps(document))
        with contextlib.suppress(GkdError):
            assert len({len(column) for column in read_submission(path, TRUTH)}) == 1
    for document in (inner, {"database": inner}, {"database": {"v": inner}}):
        path.write_text(json.dumps(document))
        with contextlib.suppress(GkdError):
            assert read_ground_truth(path).truth.classes


@pytest.mark.parametrize("name", ["file.json", "file.json.gz"])
def test_what_is_written_is_read_back(tmp_path: Path, name: str) -> None:
    found = Detections(
        np.array([1, 0, 1]), np.array([[0.1, 1 / 3], [2, 3], [0, 1]]), np.array([0, 1, 1]),
        np.array([0.7, 1e-9, 0.7]),
    )  # fmt: skip
    path = tmp_path / name
    write_submission(path, TRUTH.videos, TRUTH.classes, found, "THUMOS14")
    again = read_submission(path, TRUTH)
    order = np.argsort(found.video, kind="stable")  # by video, in their order within it
    for ours, theirs in zip(again, found, strict=True):
        np.testing.assert_array_equal(ours, theirs[order])
    raw = path.read_bytes()
    write_submission(path, TRUTH.videos, TRUTH.classes, found, "THUMOS14")
    assert path.read_bytes() == raw
    document = json.loads(gzip.decompress(raw) if name.endswith(".gz") else raw)
    assert list(document) == ["version", "results", "external_data"]
    assert document["results"]["one"] == [{"label": "b", "score": 1e-9, "segment": [2.0, 3.0]}]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_video_without_detections_is_written_too(tmp_path: Path) -> None:
    nothing = Detections(np.zeros(0, np.int64), np.zeros((0, 2)), np.zeros(0, np.int64), np.zeros(0))
    write_submission(tmp_path / "file.json", ["one", "two"], ["a"], nothing, "x")
    assert json.loads((tmp_path / "file.json").read_text())["results"] == {"one": [], "two": []}


def _database(**subsets: str) -> dict[str, Any]:
    annotations = [{"segment": ["1.5", "2"], "label": "b"}, {"segment": [3, 4], "label": "a"}]
    return {
        "database": {
            video: {"subset": subset, "annotations": annotations} for video, subset in subsets.items()
        }
    }


@pytest.mark.parametrize(
    ("subsets", "scored"),
    [
        ({"one": "test", "two": "validation"}, ["one"]),
        ({"one": "training", "two": "Testing", "three": "testing"}, ["two", "three"]),
        ({"one": "training", "two": "validation"}, ["two"]),
        ({"one": "training", "two": "val"}, ["two"]),
    ],
)
def test_the_subset_that_is_scored(tmp_path: Path, subsets: dict[str, str], scored: list[str]) -> None:
    path = tmp_path / "gt.json"
    path.write_text(json.dumps(_database(**subsets)))
    truth, subset, problems, durations = read_ground_truth(path)
    assert durations.tolist() == [0] * len(scored)  # it does not say
    assert truth.videos == scored
    assert (subset, problems) == (subsets[scored[0]].lower(), [])
    assert truth.classes == ["a", "b"]
    assert truth.video.tolist() == [place for place in range(len(scored)) for _ in range(2)]
    assert truth.segments[:2].tolist() == [[1.5, 2], [3, 4]]
    assert truth.labels[:2].tolist() == [1, 0]


def test_test_videos_without_actions_leave_it_to_the_validation_videos(tmp_path: Path) -> None:
    path, document = tmp_path / "gt.json", _database(one="testing", two="validation", three="validation")
    document["database"]["one"]["annotations"] = []
    document["database"]["three"]["annotations"] = []
    path.write_text(json.dumps(document))
    truth = read_ground_truth(path).truth
    assert truth.videos == ["two", "three"]  # a video that shows nothing is scored too
    assert truth.video.tolist() == [0, 0]


def test_no_tested_video_is_an_error_that_says_which_subsets_there_are(tmp_path: Path) -> None:
    path = tmp_path / "gt.json"
    path.write_text(json.dumps(_database(one="training", two="spare")))
    with pytest.raises(GkdError, match="no tested video") as caught:
        read_ground_truth(path)
    assert "subsets: spare, training" in caught.value.where


def test_problems_of_the_scored_videos_are_reported_and_of_others_not(tmp_path: Path) -> None:
    path, document = tmp_path / "gt.json", _database(one="test", two="training")
    for video in ("one", "two"):
        document["database"][video]["annotations"] = [
            {"segment": [5, 4], "label": "a"},
            {"segment": [1, 2], "label": "a"},
        ]
    path.write_text(json.dumps(document))
    read = read_ground_truth(path)
    assert [(problem.video, problem.line) for problem in read.problems] == [("one", 1)]
    assert len(read.truth.labels) == 1
