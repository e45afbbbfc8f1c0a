"""`gkd prepare --audit`, as people type it: what it says, its exit code, and that it changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Outcome
from tests.detection_sets import Rows, write_json
from tests.videos import draw, write_video

Gkd = Callable[..., Outcome]
OWN = ("--name", "mine", "--workers", "1", "--set", "data.short_side=32")
HOLD = """
import sys, time
from pathlib import Path
from gkdcli.files import locked
with locked(Path(sys.argv[1]), "the test's store"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with `videos/` of two classes and the store `mine` of both modalities; read only."""
    from gkdcli.cli import run

    root = tmp_path_factory.mktemp("prepared")
    for number, name in enumerate(("jump", "walk")):
        for place, subset in enumerate(("train", "train", "test")):
            path = root / "videos" / subset / name / f"{name}_{place}.mp4"
            write_video(path, draw(20, seed=10 * number + place))
    words = ["--modality", "both", "--flow", "farneback", "--root", str(root), *OWN]
    assert run(["prepare", "folder", str(root / "videos"), *words]) == 0
    return root


@pytest.fixture
def root(prepared: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(prepared, tmp_path / "root"))


def _audit(gkd: Gkd, root: Path, *words: object) -> Outcome:
    own = ("--workers", "1", "--modality", "both")
    return gkd("prepare", "mine", root / "videos", "--audit", "--root", root, *own, *words)


def _tree(root: Path) -> dict[str, tuple[int, int, int, bytes]]:
    """All there is: permissions, sizes, times and content."""
    tree = {}
    for path in sorted(root.rglob("*")):
        stat = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        tree[str(path)] = (stat.st_mode, stat.st_size, stat.st_mtime_ns, content)
    return tree


def test_a_sound_store_ends_with_0_and_nothing_is_written(gkd: Gkd, root: Path) -> None:
    before = _tree(root)
    done = _audit(gkd, root, "--set", "clips.length=16").must()
    assert _tree(root) == before
    lines = [line.split() for line in done.out.splitlines()]
    assert ["parts", "12"] in lines
    assert ["defects", "0"] in lines
    assert ["notices", "0"] in lines
    assert ["1", "train", "4", "4", "4"] in lines
    assert "classes" not in done.out, "rows of classes are shown where they differ, or with -v"
    assert "audit mine: 12/12" in done.err
    assert "next: `gkd pretrain-attention mine" in done.err
    assert ["jump", "1", "train", "2", "2", "2"] in [
        line.split() for line in _audit(gkd, root, "-v").out.splitlines()
    ]


def test_defects_end_with_1_and_are_all_in_the_document(gkd: Gkd, root: Path) -> None:
    part = root / "stores" / "mine" / "rgb" / "jump" / "jump_0.h5"
    os.truncate(part, part.stat().st_size - 1)
    (root / "videos" / "train" / "walk" / "walk_0.mp4").unlink()
    shutil.copy(root / "videos/train/jump/jump_1.mp4", root / "videos/test/jump/again.mp4")
    before = _tree(root)
    done = _audit(gkd, root, "--set", "clips.length=16", "--json")
    assert _tree(root) == before
    assert done.code == 1
    document = done.json
    assert (document["ok"], document["command"], document["error"]["code"]) == (False, "prepare", 1)
    assert document["error"]["what"] == "6 defects in the store of mine"
    result = document["result"]
    assert result["kinds"] == {
        "missing": 2,
        "source_missing": 2,
        "damaged_part": 1,
        "duplicate_across_subsets": 1,
    }
    assert (result["defects"], result["notices"]) == (6, 0)
    assert set(result["findings"][0]) == {"kind", "level", "modality", "video", "path", "what", "hint"}
    damaged = next(row for row in result["findings"] if row["kind"] == "damaged_part")
    assert (damaged["video"], damaged["modality"], damaged["path"]) == ("jump/jump_0", "rgb", str(part))
    assert damaged["hint"].startswith("delete that part")
    assert {"class": "walk", "split": 1, "subset": "train", "listed": 1, "rgb": 2, "flow": 2} in result[
        "classes"
    ]


def test_the_table_groups_findings_by_kind(gkd: Gkd, root: Path) -> None:
    (root / "videos" / "train" / "walk" / "walk_0.mp4").unlink()
    done = _audit(gkd, root)  # clips of 64 frames, videos of 20
    assert done.code == 1
    blocks = done.out.split("\n\n")
    assert (
        "source_missing: 2 defects\n"
        "  rgb, flow walk/walk_0: its video walk_0.mp4 is not in the folder any more\n"
        "  hint: put the video back; or run the same `gkd prepare` again, which takes it out of the index"
    ) in blocks
    short = next(block for block in blocks if block.startswith("short_video: 6 notices"))
    assert short.splitlines()[-2] == "  ... and 2 more (-v shows all)"
    assert done.err.splitlines()[-3] == "error: 2 defects in the store of mine"
    shown = _audit(gkd, root, "-v").out
    assert "more (-v" not in shown
    assert shown.count("a clip has 64") == 6


def test_an_audit_after_the_cure_is_content(gkd: Gkd, root: Path) -> None:
    """What the hints say, done: prepare again, and delete what is damaged first."""
    part = root / "stores" / "mine" / "flow" / "jump" / "jump_0.h5"
    os.truncate(part, 900)
    write_video(root / "videos" / "train" / "walk" / "walk_0.mp4", draw(20, seed=99))
    shutil.move(root / "videos/train/jump/jump_1.mp4", root / "videos/train/walk/jump_1.mp4")
    assert _audit(gkd, root).code == 1
    part.unlink()
    gkd("prepare", "mine", root / "videos", "--modality", "both", "--root", root, "--workers", 1).must()
    found = _audit(gkd, root, "--set", "clips.length=16", "--json").must().json["result"]
    assert found["kinds"] == {"unlisted_part": 2}


def test_a_store_without_its_videos_is_read_all_the_same(gkd: Gkd, root: Path) -> None:
    shutil.rmtree(root / "videos")
    words = ("--root", root, "--workers", 1, "--set", "clips.length=16", "--json")
    result = gkd("prepare", "mine", "--audit", *words).must().json["result"]
    assert (result["kinds"], result["parts"], result["listed"]) == ({"sources_absent": 1}, 6, None)
    part = root / "stores" / "mine" / "rgb" / "jump" / "jump_0.h5"
    part.unlink()
    result = gkd("prepare", "mine", "--audit", *words).json["result"]
    assert [row["kind"] for row in result["findings"]] == ["sources_absent", "part_missing"][::-1]


def test_other_settings_and_no_store(gkd: Gkd, root: Path) -> None:
    done = _audit(gkd, root, "--set", "data.fps=5", "--json")
    assert (done.code, done.json["result"]["kinds"]["settings_differ"]) == (1, 2)
    words = ("--audit", "--root", root, "--name", "yours")
    done = gkd("prepare", "folder", root / "videos", *words, "--json")
    assert (done.code, done.json["error"]["what"]) == (1, "there is no rgb store for yours")
    assert "result" not in done.json
    assert not (root / "stores" / "yours").exists()


def test_the_other_stream_is_compared_by_its_index(gkd: Gkd, root: Path) -> None:
    (root / "videos" / "train" / "walk" / "walk_0.mp4").unlink()
    gkd("prepare", "mine", root / "videos", "--root", root, "--workers", 1).must()
    done = gkd("prepare", "mine", root / "videos", "--audit", "--root", root, "--workers", 1, "--json")
    found = [row for row in done.json["result"]["findings"] if row["level"] == "defect"]
    assert [(row["kind"], row["video"], row["what"]) for row in found] == [
        ("stream_missing", "walk/walk_0", "its flow is stored, its rgb is not")
    ]


@pytest.fixture
def holder(root: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that prepares."""
    words = [sys.executable, "-c", HOLD, str(root / "stores" / "mine" / ".lock")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_store_at_work_is_left_alone(gkd: Gkd, root: Path, holder: subprocess.Popen[str]) -> None:
    done = _audit(gkd, root)
    assert done.code == 1
    assert done.err.splitlines()[0] == "error: another command is using the store of mine"
    assert f"held by process {holder.pid} on" in done.err


def test_a_folder_that_cannot_be_written_to(gkd: Gkd, root: Path) -> None:
    """No lock can be made there, and none is needed; a mount binds root too."""
    store = root / "stores"
    (store / "mine" / ".lock").unlink()
    bound = subprocess.run(["mount", "--bind", str(store), str(store)], capture_output=True, check=False)
    if bound.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(store)], check=True)
        with pytest.raises(OSError, match="Read-only"):
            (store / "mine" / ".lock").touch()
        _audit(gkd, root).must()
    finally:
        subprocess.run(["umount", "--lazy", str(store)], check=True)


WRONG = [
    (("--retry",), "--retry has no part in an audit, which changes nothing"),
    (("--dry-run",), "--dry-run has no part in an audit, which changes nothing"),
    (("--flow", "dis", "--modality", "flow"), "--flow has no part in an audit, which changes nothing"),
    (("--flow-sample", "5"), "--flow-sample compares stored flow, but only rgb is audited"),
]


@pytest.mark.parametrize(("words", "what"), WRONG)
def test_flags_that_make_no_sense_with_it(gkd: Gkd, words: tuple[str, ...], what: str) -> None:
    done = gkd("prepare", "demo-tiny", "--audit", *words)
    assert (done.code, done.err.splitlines()[0]) == (2, f"error: {what}")


def test_a_sample_of_flow_is_a_part_of_the_audit(gkd: Gkd) -> None:
    done = gkd("prepare", "demo-tiny", "--flow-sample", "5", "--modality", "both")
    assert (done.code, done.err.splitlines()[0]) == (2, "error: --flow-sample is a part of the audit")


def test_flow_is_compared_with_tvl1(gkd: Gkd, root: Path) -> None:
    words = ("--flow-sample", "3", "--set", "clips.length=16")
    done = _audit(gkd, root, *words, "--json").must()
    (row,) = done.json["result"]["flow_sample"]
    assert (row["method"], row["pairs"], row["failed"]) == ("farneback", 3, 0)
    assert 0 < row["median_px"] <= row["p95_px"]
    table = _audit(gkd, root, *words).must().out.partition("flow sample\n")[2].splitlines()
    assert table[0].split("  ")[0] == "method"
    assert table[1].split()[:2] == ["farneback", "3"]


def test_flow_without_frames_cannot_be_compared(gkd: Gkd, root: Path) -> None:
    shutil.rmtree(root / "stores" / "mine" / "rgb")
    (root / "stores" / "mine" / "rgb.h5").unlink()
    words = ("--modality", "flow", "--flow-sample", "3", "--root", root)
    done = gkd("prepare", "mine", root / "videos", "--audit", *words)
    assert done.code == 1
    assert "flow can be compared with TV-L1 only where its frames are stored too" in done.err


def test_the_drawn_sets_are_sound(gkd: Gkd, tiny: Path, tiny_detection_store: Path) -> None:
    for preset, root in (("demo-tiny", tiny), ("demo-detection-tiny", tiny_detection_store)):
        done = gkd("prepare", preset, "--audit", "--modality", "both", "--root", root, "--json").must()
        assert done.json["result"]["findings"] == []


def test_an_own_detection_set(gkd: Gkd, tmp_path: Path) -> None:
    rows: Rows = {"one": [("jump", 0.2, 1.0)], "two": [("walk", 0.4, 1.2)]}
    tested: Rows = {"three": [("jump", 0.5, 1.5)]}
    for place, name in enumerate((*rows, *tested)):
        write_video(tmp_path / "videos" / f"{name}.mp4", draw(50, seed=place))
    names = write_json(tmp_path / "videos" / "a.json", {"train": rows, "test": tested})
    words = ("--root", tmp_path, "--workers", 1, "--annotations", names, "--set", "data.short_side=32")
    gkd("prepare", "own-detection", tmp_path / "videos", "--name", "mine", *words).must()
    audit = ("prepare", "mine", tmp_path / "videos", "--audit", "--root", tmp_path, "--workers", 1)
    result = gkd(*audit, "--annotations", names, "--json").must().json["result"]
    assert set(result["kinds"]) == {"short_video"}
    rows["one"] = [("jump", 0.2, 1.0), ("walk", 1.5, 1.5), ("walk", 7.0, 8.0), ("walk", 1.9, 2.3)]
    write_json(names, {"train": rows, "test": tested})
    done = gkd(*audit, "--annotations", names, "--json")
    kinds = done.json["result"]["kinds"]
    assert done.code == 1
    assert {kind for kind in kinds if kind != "short_video"} == {
        "actions_changed",
        "segment_beyond_end",
        "segment_past_end",
        "segment_length",
    }
    assert {"class": "walk", "split": 1, "subset": "train", "listed": 3, "rgb": 1} in done.json["result"][
        "classes"
    ]


def test_interrupting_an_audit_leaves_nothing(root: Path) -> None:
    """Ctrl-C is answered with a document."""
    before = _tree(root)
    words = ["prepare", "mine", str(root / "videos"), "--audit", "--root", str(root), "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gkdcli", *words, "--modality", "both", "--flow-sample", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    document: Any = json.loads(out)
    assert (process.returncode, document["error"]["code"]) == (130, 130)
    assert _tree(root) == before
