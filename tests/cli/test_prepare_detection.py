"""`gkd prepare` of detection sets, as people type it: what is said, what is stored, with which exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from gkdcli.data.segments import Segment
from gkdcli.data.store import Store
from gkdcli.resolve import read_page
from tests.conftest import Outcome
from tests.detection_sets import (
    ACTIONS,
    TEST,
    TRAIN,
    csv_row,
    draw_videos,
    write,
    write_array,
    write_csvs,
    write_json,
    write_texts,
)
from tests.videos import draw, write_video

Gkd = Callable[..., Outcome]
FAST = ("--flow", "farneback")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_videos(tmp_path_factory.mktemp("thumos"))


@pytest.fixture
def root(drawn: Path, tmp_path: Path) -> Path:
    """`datasets/thumos14` with four videos of 4 s, and the official files beside them."""
    folder = tmp_path / "datasets" / "thumos14"
    for name in ("validation", "test"):
        (folder / name).mkdir(parents=True)
        for path in (drawn / name).iterdir():
            (folder / name / path.name).hardlink_to(path)
    write_csvs(folder / "annotations")
    return tmp_path


def _problems(root: Path, dataset: str = "thumos14") -> list[list[str]]:
    lines = (root / "stores" / dataset / "annotations.problems.tsv").read_text().splitlines()
    assert lines[0].split("\t") == ["file", "line", "video", "reason"]
    return [line.split("\t") for line in lines[1:]]


def test_thumos14_is_prepared_without_flags(gkd: Gkd, root: Path) -> None:
    done = gkd("prepare", "thumos14", "--root", root, "--modality", "both", *FAST, "--json").must()
    result = done.json["result"]
    assert (result["classes"], result["prepared"], result["problems"]) == (2, 4, 0)
    truth = result["ground_truth"]["test"]
    assert (truth["file"], truth["videos"], truth["segments"], truth["duplicates"]) == (
        "test_Annotation_ours.csv",
        2,
        2,
        0,
    )
    assert "annotations for testing: " in done.err
    assert "test_Annotation_ours.csv: 2 videos, 2 segments, 0 duplicates" in done.err
    assert not (root / "stores" / "thumos14" / "annotations.problems.tsv").exists()
    stores = [Store.open(root / "stores" / "thumos14" / f"{name}.h5") for name in ("rgb", "flow")]
    for store, channels in zip(stores, (3, 2), strict=True):
        assert store.classes == ["BaseballPitch", "Diving"]
        assert [(row.class_name, row.name, row.label) for row in store.videos] == [
            *(("test", name, -1) for name in TEST),
            *(("validation", name, -1) for name in TRAIN),
        ]
        assert (store.split(1, "test"), store.split(1, "train")) == ([0, 1], [2, 3])
        assert all((row.frames, row.fps, row.width) == (40, 10.0, 112) for row in store.videos)
        assert np.asarray(store.frames(0, 38, 2)).shape == (2, 112, 112, channels)
        # frames 15 to 45, and 60 to 90, of the source's 120 at 30 frames/s
        assert store.segments[2] == (Segment(0.5, 1.5, 1, 5.0, 15.0), Segment(2.0, 3.0, 0, 20.0, 30.0))
        assert store.ground_truth["train"]["stored_segments"] == 3
        store.close()
    flow = np.asarray(Store.open(root / "stores" / "thumos14" / "flow.h5").frames(0, 38, 2))
    np.testing.assert_array_equal(flow[0], flow[1])  # the last is repeated
    with h5py.File(root / "stores" / "thumos14" / "rgb.h5") as file:
        assert file["/tables/segments"].dtype.names == ("video", "start", "end", "label", "first", "last")
        assert len(file["/tables/segments"]) == 5


def test_a_second_run_keeps_all_and_the_fingerprint_follows_the_annotations(gkd: Gkd, root: Path) -> None:
    def run() -> tuple[int, str]:
        done = gkd("prepare", "thumos14", "--root", root, "--json").must()
        return done.json["result"]["kept"], Store.open(root / "stores/thumos14/rgb.h5").fingerprint

    first = run()
    assert run() == (4, first[1])
    path = root / "datasets/thumos14/annotations/val_Annotation_ours.csv"
    write(path, path.read_text() + csv_row("video_validation_0000002", "Diving", 2.5, 3.0))
    kept, other = run()
    assert kept == 4
    assert other != first[1]


def test_an_older_index_is_rebuilt(gkd: Gkd, root: Path) -> None:
    gkd("prepare", "thumos14", "--root", root).must()
    index = root / "stores" / "thumos14" / "rgb.h5"
    with h5py.File(index, "r+") as file:
        file.attrs["schema"] = 2
    assert gkd("prepare", "thumos14", "--root", root, "--json").must().json["result"]["kept"] == 4
    assert len(Store.open(index).segments[2]) == 2


def test_seconds_count_where_the_file_has_no_frames(gkd: Gkd, root: Path) -> None:
    videos = root / "datasets" / "thumos14"
    lists = write_json(root / "thumos_gt.json", {"train": TRAIN, "test": TEST})
    gkd("prepare", "thumos14", videos, "--root", root, "--annotations", lists).must()
    store = Store.open(root / "stores" / "thumos14" / "rgb.h5")
    assert store.videos[2].class_name == "validation"  # as the folder, whoever annotates
    assert store.segments[2][0] == Segment(0.5, 1.5, 1, 5.0, 15.0)
    gkd("prepare", "thumos14", "--root", root, "--annotations", write_texts(root / "texts")).must()
    other = Store.open(root / "stores" / "thumos14" / "rgb.h5")
    assert [set(found) for found in other.segments] == [set(found) for found in store.segments]
    assert other.ground_truth["test"]["file"] == "*_test.txt"
    assert [row[1:] for row in _problems(root)] == [
        ["1", "video_validation_0000001", "ambiguous: it shows no class for certain; left out"]
    ]


def test_videos_outside_the_json_are_stored_without_ground_truth(gkd: Gkd, root: Path) -> None:
    first, second = TEST
    folder = root / "datasets" / "thumos14" / "annotations"
    write_json(folder / "thumos_gt.json", {"test": {first: TEST[first]}})
    done = gkd("prepare", "thumos14", "--root", root).must()
    assert f"1 listed test video is not in it, so without ground truth: {second}" in done.err
    store = Store.open(root / "stores" / "thumos14" / "rgb.h5")
    assert store.split(1, "test") == [0, 1]
    assert [len(found) for found in store.segments[:2]] == [1, 0]
    assert store.ground_truth["test"]["without"] == [second]
    assert store.ground_truth["train"]["file"] == "val_Annotation_ours.csv"


def test_every_misfit_is_told_and_none_ends_the_run(gkd: Gkd, root: Path) -> None:
    folder = root / "datasets" / "thumos14"
    slow = folder / "validation" / "video_validation_0000001.mp4"
    slow.unlink()
    write_video(slow, draw(20), 5)  # 4 s, under 10 frames/s
    short = folder / "test" / "video_test_0000002.mp4"
    short.unlink()
    write_video(short, draw(60), 30)  # the file says 120
    (folder / "test" / "video_test_0000001.mp4").unlink()
    write_video(folder / "test" / "video_test_0000777.mp4", draw(5))
    path = folder / "annotations" / "test_Annotation_ours.csv"
    first, second = TEST
    write(
        path,
        ACTIONS
        + csv_row(first, "Diving", 1.0, 2.0)
        + csv_row(second, "Diving", 1.5, 9.0)
        + csv_row(second, "Diving", 1.5, 9.0)
        + f"{second},Ambiguous,0,0,1,0,30\n{second},Juggling,8,0,1,0,30\n{second},Diving,26,2,1,60,30\n,\n",
    )
    done = gkd("prepare", "thumos14", "--root", root, "--json")
    assert done.code == 3
    result = done.json["result"]
    assert (result["rejected"], result["unlisted"], result["videos"]) == (1, 0, 3)
    assert "1 video that is in no list" in done.err
    rejected = (root / "stores" / "thumos14" / "rgb.rejected.tsv").read_text()
    assert "video_test_0000001.mp4\tthere is no such file; it is annotated" in rejected
    told = {(Path(file).name, line, reason) for file, line, _, reason in _problems(root)}
    csv, info = path.name, "val_video_info.csv"
    again = "is there twice; kept, as in the published evaluation"
    assert told == {
        (csv, "4", f"Diving from 1.5 to 9 s {again}"),
        (csv, "5", "ambiguous: it shows no class for certain; left out"),
        (csv, "6", "`Juggling` is not a class; left out"),
        (csv, "7", "Diving from 2 to 1 s has a negative length; left out"),
        (csv, "8", "a row has 2 cells, the header 7; left out"),
        (csv, "3", "Diving from 1.5 to 9 s is beyond the end, 2.0 s; kept as it is"),
        (csv, "4", "Diving from 1.5 to 9 s is beyond the end, 2.0 s; kept as it is"),
        (
            "test_video_info.csv",
            "",
            "40 sampled frames are annotated, 20 are stored; of the source, 120 and 60",
        ),
        (info, "", "40 sampled frames are annotated, 20 are stored; of the source, 120 and 20"),
        (info, "", "30 frames/s are annotated, the video has 5"),
        (
            "val_Annotation_ours.csv",
            "",
            "the video has 5 frames/s, under 10, every frame is kept; its times follow its own rate",
        ),
    }
    assert result["problems"] == len(told) == len(_problems(root))
    assert [row["line"] for row in result["first_problems"]] == [
        int(row[1]) if row[1] else None for row in _problems(root)[:5]
    ]
    assert f"{len(told)} problems of the annotations" in done.err
    store = Store.open(root / "stores" / "thumos14" / "rgb.h5")
    rows = {row.name: (place, row) for place, row in enumerate(store.videos)}
    place, row = rows["video_validation_0000001"]
    assert (row.frames, row.fps) == (20, 5.0)
    # the file's counts are of another video: its frames are scaled by those that are really there, 20 of 20
    assert store.segments[place][0][3:] == (15.0, 45.0)
    assert store.ground_truth["test"]["duplicates"] == 1
    place, _ = rows[second]
    assert [found[:3] for found in store.segments[place]] == [(1.5, 9.0, 1)] * 2


def test_a_dry_run_lists_what_is_missing(gkd: Gkd, root: Path) -> None:
    (root / "datasets" / "thumos14" / "test" / "video_test_0000001.mp4").unlink()
    done = gkd("prepare", "thumos14", "--root", root, "--dry-run", "--json")
    assert done.code == 1
    result = done.json["result"]
    assert (result["listed"], result["usable"], result["training"], result["test"]) == (4, 3, 2, 1)
    assert [Path(row["path"]).name for row in result["rejects"]] == ["video_test_0000001.mp4"]
    assert result["ground_truth"]["test"]["segments"] == 2
    assert not (root / "stores").exists()


def test_arrays_by_flag(gkd: Gkd, root: Path) -> None:
    rng = np.random.default_rng(0)
    for folder, rows in (("validation", TRAIN), ("test", TEST)):
        for video in rows:
            for infix, channels in (("", 3), ("_flow", 2)):
                array = rng.integers(0, 256, (40, 112, 112, channels), np.uint8)
                write_array(root / "published" / f"{folder}{infix}_npy" / f"{video}.npy", array)
    words = ("prepare", "thumos14", "--root", root, "--from-npy", root / "published")
    done = gkd(*words, "--modality", "both", "--json").must()
    assert (done.json["result"]["prepared"], done.json["result"]["problems"]) == (4, 0)
    for modality, infix in (("rgb", ""), ("flow", "_flow")):
        store = Store.open(root / "stores" / "thumos14" / f"{modality}.h5")
        array = np.load(root / "published" / f"validation{infix}_npy" / "video_validation_0000001.npy")
        np.testing.assert_array_equal(np.asarray(store.frames(2, 0, 40)), array)
        assert store.segments[2][1] == Segment(2.0, 3.0, 0, 20.0, 30.0)
    bad = root / "published" / "test_flow_npy" / "video_test_0000001.npy"
    write_array(bad, np.zeros((7, 112, 112, 2), np.uint8))
    done = gkd(*words, "--modality", "both")
    assert done.code == 3
    assert "the two streams differ in length: flow has 7 frames, rgb has 40 frames" in done.err


OWN = {
    "train": {"a": [("run", 0.0, 2.0)], "b": [("jump", 1.0, 3.0)]},
    "test": {"c": [("jump", 0.5, 1.0), ("run", 2.0, 2.5)]},
}


def test_ones_own_set(gkd: Gkd, tmp_path: Path) -> None:
    for place, name in enumerate(("one/a", "one/deeper/b", "c")):
        write_video(tmp_path / "films" / f"{name}.mp4", draw(75, seed=place), 25)
    lists = write_json(tmp_path / "mine.json", OWN)
    words = ("prepare", "own-detection", tmp_path / "films", "--annotations", lists, "--name", "mine")
    done = gkd(*words, "--root", tmp_path).must()
    assert "next: `gkd pretrain-attention mine" in done.err
    store = Store.open(tmp_path / "stores" / "mine" / "rgb.h5")
    assert store.classes == ["jump", "run"]
    assert [(row.class_name, row.name) for row in store.videos] == [
        ("test", "c"),
        ("train", "a"),
        ("train", "b"),
    ]
    assert store.segments[0] == (Segment(0.5, 1.0, 0, 5.0, 10.0), Segment(2.0, 2.5, 1, 20.0, 25.0))
    assert len(store.frames(0, 0, 3)) == 3  # JPEG
    page = read_page(tmp_path / "stores" / "mine" / "preset.toml")
    assert (page["dataset"], page["task"], page["data"]["fps"]) == ("mine", "detection", 10.0)
    shown = gkd("distill", "mine", "--root", tmp_path, "--show-config", "--json").must().json["result"]
    settings = shown["settings"]
    assert (settings["task"], settings["recipe"], settings["distill"]["beta"]) == (
        "detection",
        "corrected",
        10.0,
    )


def test_a_stated_duration_that_is_wrong_is_told(gkd: Gkd, tmp_path: Path) -> None:
    for name in "abc":
        write_video(tmp_path / "films" / f"{name}.mp4", draw(75), 25)
    lists = write_json(tmp_path / "mine.json", OWN)
    document = json.loads(lists.read_text())
    document["database"]["a"]["duration"] = 30
    document["database"]["b"]["duration"] = 3.2
    write(lists, json.dumps(document))
    words = ("prepare", "own-detection", tmp_path / "films", "--annotations", lists, "--name", "mine")
    gkd(*words, "--root", tmp_path).must()
    assert [row[1:] for row in _problems(tmp_path, "mine")] == [
        ["", "a", "30 s are annotated, the video has 3.0 s"]
    ]


REFUSED: dict[str, tuple[tuple[str, ...], int, str]] = {
    "no annotations": ((), 1, "there are no annotations of actions"),
    "no such file": (("--annotations", "none.json"), 2, "there is no such annotation file or folder"),
    "images": (("--from-frames", "."), 2, "extracted images say no frame rate"),
    "two inputs": (
        ("--from-frames", ".", "--from-npy", "."),
        2,
        "extracted images and arrays are both named",
    ),
    "no folder": (("--annotations", "mine.json", "--from-npy", "none"), 1, "there is no folder of videos"),
    "nothing there": (("--annotations", "mine.json", "--from-npy", "."), 1, "none of the 3 listed videos"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals(gkd: Gkd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    if kind in ("no folder", "nothing there"):
        write_json(tmp_path / "mine.json", OWN)
    words, code, what = REFUSED[kind]
    done = gkd("prepare", "own-detection", *words)
    assert (done.code, done.out) == (code, "")
    assert f"error: {what}" in done.err
    assert "hint: " in done.err


def test_arrays_are_not_for_recognition(gkd: Gkd, tmp_path: Path) -> None:
    done = gkd("prepare", "folder", "--from-npy", tmp_path, "--root", tmp_path)
    assert (done.code, done.err.splitlines()[0]) == (2, "error: arrays are read for detection only")


def test_an_interrupted_run_continues(gkd: Gkd, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after the first video: its part stays, the next run makes the others, the index is whole."""
    import os
    import signal

    from gkdcli.data import extract

    add = extract._Tally.add

    def interrupted(self: Any, job: Any, result: Any) -> None:
        add(self, job, result)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(extract._Tally, "add", interrupted)
    words = ("prepare", "thumos14", "--root", root, "--set", "data.workers=1", "--json")
    assert gkd(*words).code == 130
    monkeypatch.undo()
    there = len(list((root / "stores" / "thumos14" / "rgb").rglob("*.h5")))
    assert 0 < there < 4
    result = gkd(*words).must().json["result"]
    assert (result["kept"], result["prepared"]) == (there, 4 - there)
    assert sum(map(len, Store.open(root / "stores" / "thumos14" / "rgb.h5").segments)) == 5


def test_a_drawn_set_goes_the_same_way(gkd: Gkd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever draws leaves videos and `annotations.json`; the rest is as with any other set."""

    def draw_untrimmed(folder: Path, counts: dict[str, int], seed: int, workers: int, progress: Any) -> None:
        assert (counts, seed) == ({"train": 2, "test": 1}, 2020)
        for subset, rows in OWN.items():
            for name in rows:
                write_video(folder / subset / f"{name}.mp4", draw(50), 25)
        write_json(folder / "annotations.json", OWN)
        progress(3, 3)

    # in the process of the test: the command draws where it runs
    from gkdcli.pipeline import videos

    monkeypatch.setattr(videos, "draw_untrimmed", draw_untrimmed)
    sets = ("data.source=drawn", "data.draw_train=2", "data.draw_test=1")
    words = [
        "prepare",
        "own-detection",
        "--root",
        tmp_path,
        *(word for text in sets for word in ("--set", text)),
    ]
    plan = gkd(*words, "--dry-run", "--json").must().json["result"]
    assert plan["videos_drawn"] == 3
    assert gkd(*words, "--json").must().json["result"]["prepared"] == 3
    assert len(Store.open(tmp_path / "stores" / "own-detection" / "rgb.h5").segments[0]) == 2
