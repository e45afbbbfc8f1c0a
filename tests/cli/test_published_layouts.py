"""UCF101 and HMDB51 as people have them on disk: videos or images, the published lists, all splits."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gkdcli.data.store import Store
from tests.conftest import Outcome
from tests.data.test_images import write_images
from tests.videos import draw, write_video

Gkd = Callable[..., Outcome]
FAST = ("--flow", "farneback")
UCF = (
    [f"v_Archery_g{group:02}_c01" for group in range(1, 5)],
    [f"v_HandStandPushups_g{group:02}_c01" for group in range(1, 5)],
)
HMDB = {
    "brush_hair": ["April_09_brush_hair_u_nm_np1_ba_goo_0", "#1_[A]&B;c+d=e_brush_hair_f_cm_np1_le_bad_1"],
    "cartwheel": ["(Rad)Schlag_die_Bank!_cartwheel_f_cm_np1_le_med_0", "Rad_cartwheel_f_cm_np1_le_med_3"],
}


def _write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("\r\n".join([*lines, ""]).encode())


def ucf_lists(folder: Path) -> Path:
    """Two splits of two classes, with CRLF as published; the class folder is spelt unlike its videos."""
    _write(folder / "classInd.txt", ["1 Archery", "2 HandstandPushups"])
    for split, tested in ((1, 0), (2, 1)):
        rows = [
            (f"{name}/{video}.avi", label, place == tested)
            for label, (name, videos) in enumerate(zip(("Archery", "HandstandPushups"), UCF, strict=True), 1)
            for place, video in enumerate(videos)
        ]
        _write(
            folder / f"trainlist0{split}.txt", [f"{path} {label}" for path, label, test in rows if not test]
        )
        _write(folder / f"testlist0{split}.txt", [path for path, _, test in rows if test])
    return folder


@pytest.fixture
def ucf(tmp_path: Path) -> Path:
    """The root of a laid-out UCF101."""
    ucf_lists(tmp_path / "datasets/ucf101/ucfTrainTestlist")
    for name, videos in zip(("Archery", "HandstandPushups"), UCF, strict=True):
        for place, video in enumerate(videos):
            path = tmp_path / "datasets/ucf101/UCF-101" / name / f"{video}.avi"
            write_video(path, draw(8, seed=place), codec="mpeg4")
    return tmp_path


def test_ucf101_as_it_is_unpacked(gkd: Gkd, ucf: Path) -> None:
    words = ("prepare", "ucf101", "--root", ucf, "--modality", "both", *FAST)
    outcome = gkd(*words, "--json").must()
    assert "split lists: " in outcome.err
    assert outcome.err.endswith(f"`gkd pretrain-attention ucf101 --root {ucf} --set data.flow=farneback`\n")
    assert (outcome.json["result"]["prepared"], outcome.json["result"]["rejected"]) == (8, 0)
    for modality in ("rgb", "flow"):
        store = Store.open(ucf / f"stores/ucf101/{modality}.h5")
        assert store.classes == ["Archery", "HandstandPushups"]
        names = [store.videos[video].name for video in store.split(2, "test")]
        assert names == ["v_Archery_g02_c01", "v_HandStandPushups_g02_c01"]
        assert [len(store.split(split, "train")) for split in (1, 2)] == [6, 6]
        assert store.videos[0].group == "Archery/g01"
    assert gkd(*words, "--json").must().json["result"]["kept"] == 8


def test_a_run_of_another_split_is_never_scored(gkd: Gkd, ucf: Path) -> None:
    gkd("prepare", "ucf101", "--root", ucf).must()
    small = ("model.width=0.0625", "clips.length=16", "clips.crop=32", "train.threads=1")
    sets = [word for text in small for word in ("--set", text)]
    words = ("ucf101", "--root", ucf, *sets)
    trained = gkd("pretrain-attention", *words, "--split", 2, "--epochs", 1)
    assert trained.must().code == 0
    assert "this teacher starts from scratch; the paper's starts from Kinetics weights" in trained.err
    assert "--backbone rgb_imagenet.pt" in trained.err
    for command in ("evaluate", "distill"):
        flags = ("--model", "teacher") if command == "evaluate" else ()
        outcome = gkd(command, *words, *flags)
        assert outcome.code == 1
        assert "is of split 2" in outcome.err
    (run,) = (ucf / "runs/ucf101/pretrain-attention-rgb").iterdir()
    outcome = gkd("evaluate", *words, "--model", "teacher", "--run", run)
    assert outcome.code == 1
    assert "this run is of split 2, not 1" in outcome.err
    found = gkd("evaluate", *words, "--split", 2, "--model", "teacher", "--json").must().json["result"]
    assert (found["protocol"]["split"], found["protocol"]["videos"]) == (2, 2)
    assert gkd("evaluate", *words, "--split", 3, "--model", "teacher").code == 1


def test_missing_videos_are_listed_and_nothing_is_written(gkd: Gkd, tmp_path: Path) -> None:
    lists = ucf_lists(tmp_path / "lists")
    words = ("prepare", "ucf101", "--root", tmp_path, "--annotations", lists)
    plan = gkd(*words, "--dry-run", "--json")
    assert plan.code == 1
    rejects = plan.json["result"]["rejects"]
    assert len(rejects) == 8
    assert rejects[0]["path"].endswith("datasets/ucf101/Archery/v_Archery_g01_c01.avi")
    assert plan.json["error"]["what"] == "8 of the listed inputs cannot be used"
    table = gkd(*words, "--dry-run")
    assert all(row["path"].rpartition("/")[2] in table.out.replace("\n", "") for row in rejects)
    outcome = gkd(*words)
    assert outcome.code == 1
    assert "none of the 8 listed videos can be used" in outcome.err
    assert not (tmp_path / "stores").exists()


def test_lists_are_asked_for_in_words(gkd: Gkd, tmp_path: Path) -> None:
    for dataset, name in (("ucf101", "ucfTrainTestlist"), ("hmdb51", "testTrainMulti_7030_splits")):
        outcome = gkd("prepare", dataset, "--root", tmp_path)
        assert outcome.code == 1
        assert f"there are no split lists of {dataset}" in outcome.err
        assert name in outcome.err
        assert "--annotations DIR" in outcome.err


def _hmdb_lists(folder: Path) -> None:
    for name, videos in HMDB.items():
        for split in (1, 2, 3):
            flags = (1, 2) if split != 2 else (2, 1)
            _write(
                folder / f"{name}_test_split{split}.txt",
                [f"{video}.avi {flag} " for video, flag in zip(videos, flags, strict=True)],
            )


def test_hmdb51_with_its_awkward_names(gkd: Gkd, tmp_path: Path) -> None:
    _hmdb_lists(tmp_path / "datasets/hmdb51/testTrainMulti_7030_splits")
    for name, videos in HMDB.items():
        for place, video in enumerate(videos):
            write_video(
                tmp_path / "datasets/hmdb51" / name / f"{video}.avi", draw(6, seed=place), codec="mpeg4"
            )
    gkd("prepare", "hmdb51", "--root", tmp_path).must()
    store = Store.open(tmp_path / "stores/hmdb51/rgb.h5")
    assert {row.name for row in store.videos} == {video for videos in HMDB.values() for video in videos}
    assert store.split(1, "test") != store.split(2, "test")
    assert store.split(1, "test") == store.split(3, "test")


def test_hmdb51_images_of_the_seed_layout(gkd: Gkd, tmp_path: Path) -> None:
    """`image_%05d.jpg` with `n_frames`, and hmdb51_{train,test,val}.txt."""
    frames, lists = tmp_path / "hmdb51_n_frames", tmp_path / "hmdb51_TrainTestlist"
    for name, videos in HMDB.items():
        for video in videos:
            write_images(frames / name / video, 5)
            (frames / name / video / "n_frames").write_text("5")
    write_images(frames / "cartwheel" / "unused", 5)
    labelled = [(f"{name}/{videos[0]}", label) for label, (name, videos) in enumerate(HMDB.items())]
    _write(lists / "hmdb51_train.txt", [f"{path} {label}" for path, label in labelled])
    tested = [(f"{name}/{videos[1]}", label) for label, (name, videos) in enumerate(HMDB.items())]
    _write(lists / "hmdb51_test.txt", [f"{path} {label}" for path, label in tested])
    _write(lists / "hmdb51_val.txt", ["cartwheel/unused 1"])
    words = ("prepare", "hmdb51", "--root", tmp_path, "--from-frames", frames, "--annotations", lists)
    outcome = gkd(*words, "--modality", "both", *FAST, "--json").must()
    assert outcome.json["result"]["prepared"] == 5
    store = Store.open(tmp_path / "stores/hmdb51/rgb.h5")
    assert store.classes == ["brush_hair", "cartwheel"]
    assert (len(store.split(1, "train")), len(store.split(1, "test"))) == (2, 2)
    first = store.videos[0]
    images = [np.asarray(image).tobytes() for image in store.frames(0, 0, 5)]
    assert images == [
        path.read_bytes() for path in sorted((frames / first.class_name / first.name).glob("*.jpg"))
    ]


def test_images_and_flow_of_the_two_stream_layout(gkd: Gkd, tmp_path: Path) -> None:
    """`<video>/img_%05d.jpg`, `flow_x_%05d.jpg`, `flow_y_%05d.jpg`, without class folders."""
    frames, lists = tmp_path / "ucf101_frames", tmp_path / "settings"
    for label, videos in enumerate(UCF):
        for place, video in enumerate(videos):
            write_images(frames / video, 6, "img")
            for kind in ("flow_x", "flow_y"):
                write_images(frames / video, 5, kind)
            for modality in ("rgb", "flow"):
                name = "val" if place == 0 else "train"
                path = lists / f"{name}_{modality}_split1.txt"
                path.parent.mkdir(exist_ok=True)
                with open(path, "a") as handle:
                    handle.write(f"{video} {6 if modality == 'rgb' else 5} {label}\n")
    shutil.rmtree(frames / UCF[0][3])  # one is missing
    words = ("prepare", "ucf101", "--root", tmp_path, "--from-frames", frames, "--annotations", lists)
    outcome = gkd(*words, "--modality", "both", "--json")
    assert outcome.code == 3
    assert "images of flow are taken as they are, as tvl1 with bound 20" in outcome.err
    assert (outcome.json["result"]["prepared"], outcome.json["result"]["rejected"]) == (7, 1)
    flow = Store.open(tmp_path / "stores/ucf101/flow.h5")
    assert flow.classes == ["Archery", "HandStandPushups"]
    assert {row.frames for row in flow.videos} == {6}  # the last is repeated
    stored = [np.asarray(image).tobytes() for image in flow.frames(0, 0, 5)]
    folder = frames / flow.videos[0].name
    wanted = [folder / f"flow_{axis}_{number:05}.jpg" for axis in "xy" for number in range(1, 6)]
    assert stored == [path.read_bytes() for path in wanted]


def test_videos_and_images_are_not_both_named(gkd: Gkd, tmp_path: Path) -> None:
    outcome = gkd("prepare", "ucf101", tmp_path, "--from-frames", tmp_path, "--root", tmp_path)
    assert outcome.code == 2
    assert "both named" in outcome.err
