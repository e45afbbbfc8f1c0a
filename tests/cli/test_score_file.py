"""`gkd evaluate --predictions`: any file of detections is scored, without store, run or torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gkdcli.cli.scoring import thresholds
from gkdcli.errors import GkdError

Gkd = Callable[..., Any]
TRUTH = {
    "database": {
        "one": {
            "subset": "test",
            "annotations": [
                {"segment": ["0", "10"], "label": "Jump"},
                {"segment": [20, 30], "label": "Jump"},
                {"segment": [40, 44], "label": "Run"},
            ],
        }
    }
}
FOUND = {
    "version": "x",
    "results": {
        "one": [
            {"label": "Jump", "score": 0.9, "segment": [0, 10]},
            {"label": "Jump", "score": 0.8, "segment": [20, 26]},
            {"label": "Run", "score": 0.7, "segment": [50, 60]},
            {"label": "Fly", "score": 0.7, "segment": [50, 60]},
        ],
        "two": [{"label": "Run", "score": 0.7, "segment": [50, 60]}],
    },
    "external_data": {},
}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Predictions, and ground truth where it is looked for."""
    folder = tmp_path / "datasets" / "thumos14" / "annotations"
    folder.mkdir(parents=True)
    (folder / "thumos_gt.json").write_text(json.dumps(TRUTH))
    (tmp_path / "found.json").write_text(json.dumps(FOUND))
    return tmp_path / "found.json", folder / "thumos_gt.json"


def test_the_document(gkd: Gkd, files: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, truth = files
    words = ("evaluate", "thumos14", "--predictions", predictions, "--ground-truth", truth, "--json")
    outcome = gkd(*words, "--tiou", "0.1:0.9:0.1").must()
    result = outcome.json["result"]
    assert outcome.json["run"] is None
    assert list(result["map"]) == [f"0.{digit}" for digit in range(1, 10)]
    assert (result["map"]["0.6"], result["map"]["0.7"]) == (0.5, 0.25)
    assert result["average_map"] == pytest.approx((6 * 0.5 + 3 * 0.25) / 9)
    assert result["average_map_official"] == 0.5
    assert [row["class"] for row in result["per_class"]] == ["Jump", "Run"]
    assert result["ground_truth"]["source"] == "thumos_gt.json"
    assert result["ground_truth"]["of_unknown_videos"] == result["ground_truth"]["of_unknown_labels"] == 1
    assert (result["protocol"]["subset"], result["protocol"]["predictions"]) == ("test", str(predictions))
    assert list(gkd(*words).must().json["result"]["map"])[-1] == "0.7"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "datasets",
        "found.json",
    ]  # nothing is written


def test_ground_truth_is_found_under_the_data_set(gkd: Gkd, files: tuple[Path, Path], tmp_path: Path) -> None:
    words = ("evaluate", "thumos14", "--root", tmp_path, "--predictions", files[0], "--json")
    outcome = gkd(*words).must()
    assert f"ground truth: {files[1]} (`--ground-truth FILE` names another)" in outcome.err
    assert outcome.json["result"]["map"]["0.5"] == 0.5
    files[1].unlink()
    refused = gkd(*words)
    assert refused.code == 1
    assert "there is no ground truth for thumos14" in refused.err
    assert "--ground-truth FILE.json" in refused.err


def test_what_is_wrong_is_told_as_of_networks(gkd: Gkd, files: tuple[Path, Path], tmp_path: Path) -> None:
    result = (
        gkd("evaluate", "thumos14", "--root", tmp_path, "--predictions", files[0], "--json")
        .must()
        .json["result"]
    )
    profile, recall = result["false_positives"], result["recall_by_length"]
    assert (profile["tiou"], profile["segments"], profile["detections"]) == (0.5, 3, 3)
    assert profile["slices"][0]["shares"] == pytest.approx(
        {"true_positive": 2 / 3, "background": 1 / 3}
        | dict.fromkeys(("duplicate", "wrong_label", "localisation", "confusion"), 0)
    )
    assert recall["recall"]["10G"] == pytest.approx(2 / 3)
    assert [row["segments"] for row in recall["bins"]] == [0, 1, 2, 0, 0]


def test_pictures_lie_beside_the_output(gkd: Gkd, files: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "scored" / "scores.json"
    words = ("evaluate", "thumos14", "--root", tmp_path, "--predictions", files[0], "--output", output)
    err = gkd(*words).must().err
    pictures = [output.parent / f"scores-{name}.png" for name in ("profile", "timelines")]
    assert sorted(output.parent.iterdir()) == sorted([output, *pictures])
    assert all(path.read_bytes().startswith(b"\x89PNG") and str(path) in err for path in pictures)


def test_the_table(gkd: Gkd, files: tuple[Path, Path], tmp_path: Path) -> None:
    out = gkd("evaluate", "thumos14", "--root", tmp_path, "--predictions", files[0]).must().out
    lines = [line.split() for line in out.splitlines()]
    assert ["average", "map", "0.45"] in lines
    assert ["0.7", "0.25"] in lines
    header = lines.index(["class", "segments", *(f"0.{digit}" for digit in range(1, 8)), "average"])
    assert lines[header + 1] == ["Jump", "2", "1", "1", "1", "1", "1", "1", "0.5", "0.9"]
    assert max(map(len, out.splitlines()[header:])) <= 80


def test_output_and_requirements(gkd: Gkd, files: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    words = ("evaluate", "thumos14", "--root", tmp_path, "--predictions", files[0], "--output", output)
    assert gkd(*words, "--require", "average_map>=0.3", "--require", "map.0.5>=0.5").code == 0
    result = json.loads(output.read_text())
    assert result["map"]["0.5"] == 0.5
    missed = gkd(*words, "--json", "--require", "map.0.7>=0.5")
    assert missed.code == 4
    assert missed.json["error"]["what"] == "map.0.7 is 0.25, required is >= 0.5"
    assert missed.json["result"]["map"] == result["map"]
    unknown = gkd(*words, "--require", "map.0.95>=0.5")
    assert unknown.code == 2
    assert "average_map, average_map_official" in unknown.err
    assert "map.0.7" in unknown.err
    for own in files:
        before = own.read_bytes()
        assert gkd(*words[:-1], own).code == 2
        assert own.read_bytes() == before


def test_a_dry_run_reads_and_writes_nothing(gkd: Gkd, files: tuple[Path, Path], tmp_path: Path) -> None:
    words = ("evaluate", "thumos14", "--root", tmp_path, "--predictions", files[0], "--dry-run")
    plan = gkd(*words, "--output", tmp_path / "scores.json", "--json").must().json["result"]
    assert (plan["segments"], plan["detections"]) == (3, 5)
    assert not (tmp_path / "scores.json").exists()
    files[0].write_text("[]")
    assert gkd(*words).code == 1


@pytest.mark.parametrize(
    "words",
    [
        ["--fusion"],
        ["--run", "somewhere"],
        ["--rescore"],
        ["--model", "teacher"],
        ["--fusion-weights", "1,2"],
        ["--flow-run", "somewhere"],
        ["--tiou", "0.5:0.1:0.1"],
        ["--tiou", "half"],
        ["--tiou", "0.5,1.5"],
        ["--tiou", "0.5,0.5"],
        ["--require", "average_map"],
    ],
)
def test_what_does_not_go_with_a_file(
    gkd: Gkd, files: tuple[Path, Path], tmp_path: Path, words: list[str]
) -> None:
    outcome = gkd("evaluate", "thumos14", "--root", tmp_path, "--predictions", files[0], *words)
    assert outcome.code == 2
    assert words[0] in outcome.err


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["ucf101", "--predictions", "found.json"], "ucf101 is of recognition"),
        (["thumos14", "--ground-truth", "gt.json"], "--ground-truth does not go without --predictions"),
        (["ucf101", "--tiou", "0.5"], "--tiou is of detection only"),
    ],
)
def test_what_does_not_go_without(gkd: Gkd, tmp_path: Path, words: list[str], what: str) -> None:
    outcome = gkd("evaluate", *words, "--root", tmp_path)
    assert outcome.code == 2
    assert what in outcome.err


def test_what_the_ground_truth_leaves_out_and_names_that_do_not_fit_are_said(
    gkd: Gkd, files: tuple[Path, Path], tmp_path: Path
) -> None:
    document = json.loads(files[1].read_text())
    document["database"]["one"]["annotations"].append({"segment": [9, 8], "label": "Run"})
    files[1].write_text(json.dumps(document))
    files[0].write_text(json.dumps({"results": {"one.mp4": FOUND["results"]["one"]}}))
    err = gkd("evaluate", "thumos14", "--root", tmp_path, "--predictions", files[0]).must().err
    assert "1 annotation of the ground truth may be wrong" in err
    assert "one annotation 4" in err
    assert "no detection is of a video and a class that the ground truth knows" in err
    assert "its videos are called like one" in err


def test_segments_beyond_the_end_of_a_video_are_kept_and_said(
    gkd: Gkd, files: tuple[Path, Path], tmp_path: Path
) -> None:
    document = json.loads(files[1].read_text())
    document["database"]["one"]["duration"] = 35
    files[1].write_text(json.dumps(document))
    outcome = gkd("evaluate", "thumos14", "--root", tmp_path, "--predictions", files[0], "--json").must()
    counts = outcome.json["result"]["ground_truth"]
    assert (counts["segments"], counts["beyond_end"]) == (3, 1)
    assert outcome.err.count("1 segment lies wholly beyond the end of the video") == 1


def test_neither_torch_nor_a_store_is_needed(files: tuple[Path, Path]) -> None:
    code = (
        "import sys; from gkdcli.cli import run; status = run(sys.argv[1:]);"
        " print('heavy:', status, *sorted({'torch', 'h5py', 'av', 'cv2', 'matplotlib'} & set(sys.modules)))"
    )
    words = ["evaluate", "thumos14", "--predictions", *files[:1], "--ground-truth", files[1]]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "heavy: 0"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.1,0.5", [0.1, 0.5]),
        ("0.5", [0.5]),
        ("0.1:0.9:0.1", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
        ("0.5:0.95:0.05", [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]),
        ("0.1:0.5:0.3", [0.1, 0.4]),
        ("0.5:0.5:0.1", [0.5]),
    ],
)
def test_thresholds(text: str, values: list[float]) -> None:
    assert thresholds("--tiou", text) == values


@pytest.mark.parametrize(
    "text", ["", "a", "0.1:0.5", "0.1:0.5:0", "0.5:0.1:0.1", "0.1:0.5:-0.1", "0:1:1e-9", "nan:1:1", "0:inf:1"]
)
def test_what_is_no_list_of_thresholds(text: str) -> None:
    with pytest.raises(GkdError, match="neither a list nor a range"):
        thresholds("--tiou", text)
