"""One document on stdout per command, whatever comes of it; notes and the next command on stderr."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gkdcli.result import jsonable
from tests.videos import draw, write_video

COMMANDS = {
    "prepare": ("prepare", "demo-tiny", "--dry-run"),
    "pretrain-attention": ("pretrain-attention", "demo-tiny", "--dry-run"),
    "distill": ("distill", "demo-tiny", "--dry-run"),
    "evaluate": ("evaluate", "demo-tiny"),
    "export": ("export", "demo-tiny"),
}


@pytest.fixture(scope="module")
def root(tiny_trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained root of this module's own: evaluation and export write into it."""
    return Path(shutil.copytree(tiny_trained, tmp_path_factory.mktemp("json") / "root", symlinks=True))


@pytest.mark.parametrize("command", COMMANDS)
def test_success(command: str, root: Path, gkd: Callable[..., Any]) -> None:
    outcome = gkd(*COMMANDS[command], "--root", root, "--json").must()
    document = outcome.json
    assert outcome.out.count("\n") == 1
    assert list(document) == ["schema", "ok", "command", "version", "run", "result"]
    assert (document["schema"], document["ok"], document["command"]) == (1, True, command)
    assert document["version"] == "0.1.0"
    if command in ("evaluate", "export"):
        assert document["run"].startswith(f"{root}/runs/demo-tiny/distill-rgb/")
    assert document["result"]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_table_is_all_that_stdout_gets(command: str, root: Path, gkd: Callable[..., Any]) -> None:
    outcome = gkd(*COMMANDS[command], "--root", root).must()
    assert outcome.out.strip()
    for word in ("next:", "newest that fits", "hint:", "\x1b"):
        assert word not in outcome.out
    quiet = gkd(*COMMANDS[command], "--root", root, "--quiet").must()
    assert quiet.err == ""
    free_space = r"\d{8,}"  # moves while we look
    assert re.sub(free_space, "", quiet.out) == re.sub(free_space, "", outcome.out)


def test_what_was_chosen_is_said_with_the_flag_that_overrides_it(root: Path, gkd: Callable[..., Any]) -> None:
    (student,) = (root / "runs/demo-tiny/distill-rgb").iterdir()
    shown = gkd("evaluate", "demo-tiny", "--root", root).must().err.splitlines()
    assert shown[0] == f"student: {student} (newest that fits; `--run PATH` names another)"
    assert shown[-1] == f"next: `gkd export demo-tiny --root {root}`"


def test_a_missed_requirement_is_4_with_result_and_error(root: Path, gkd: Callable[..., Any]) -> None:
    words = ("evaluate", "demo-tiny", "--root", root, "--require", "top5<=1", "--require", "top1>=1.5")
    outcome = gkd(*words, "--json")
    document = outcome.json
    assert outcome.code == 4
    assert list(document) == ["schema", "ok", "command", "version", "run", "result", "error"]
    assert document["ok"] is False
    assert 0 <= document["result"]["top1"] <= 1
    assert document["error"]["code"] == 4
    assert document["error"]["what"] == f"top1 is {document['result']['top1']:.4g}, required is >= 1.5"
    assert outcome.err.splitlines()[-3].startswith("error: top1 is ")
    assert gkd(*words).code == 4


def test_a_malformed_requirement_is_refused_before_any_work(root: Path, gkd: Callable[..., Any]) -> None:
    outcome = gkd("evaluate", "demo-tiny", "--root", root, "--require", "top1=0.5", "--json")
    assert (outcome.code, outcome.json["error"]["code"]) == (2, 2)


def test_rejects_are_3_and_ok(tmp_path: Path, gkd: Callable[..., Any]) -> None:
    """The store is there and usable: a pipeline may go on, and can tell."""
    for name in ("up/a", "up/b", "down/a", "down/b"):
        path = tmp_path / "videos" / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, draw(4, 64, 48))
    (tmp_path / "videos" / "up" / "bad.mp4").write_bytes(b"no video")
    words = ("prepare", "folder", tmp_path / "videos", "--name", "mine", "--root", tmp_path)
    outcome = gkd(*words, "--json")
    assert outcome.code == 3, outcome.err
    assert outcome.json["ok"] is True
    assert outcome.json["result"]["rejected"] == 1
    assert "warning: 1 of 5 videos are not in the store" in outcome.err
    assert outcome.err.splitlines()[-1] == f"next: `gkd pretrain-attention mine --root {tmp_path}`"
    assert gkd("prepare", "mine", tmp_path / "videos", "--root", tmp_path).code == 3
    assert gkd("distill", "mine", "--root", tmp_path, "--show-config").must()


def test_missing_inputs_of_a_dry_run_are_listed_and_end_with_1(
    tmp_path: Path, gkd: Callable[..., Any]
) -> None:
    path = tmp_path / "videos" / "up" / "a.mp4"
    path.parent.mkdir(parents=True)
    write_video(path, draw(4, 64, 48))
    (tmp_path / "list.csv").write_text("video,class\nup/a.mp4,up\nup/none.mp4,up\n")
    outcome = gkd(
        *("prepare", "folder", tmp_path / "videos", "--name", "mine", "--root", tmp_path),
        *("--annotations", tmp_path / "list.csv", "--dry-run", "--json"),
    )
    document = outcome.json
    assert outcome.code == 1
    assert (document["ok"], document["error"]["code"]) == (False, 1)
    assert [row["path"] for row in document["result"]["rejects"]] == ["up/none.mp4"]
    assert not (tmp_path / "stores").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_dry_run_writes_nothing(command: str, root: Path, gkd: Callable[..., Any]) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    gkd(*COMMANDS[command], "--root", root, "--dry-run").must()
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_numbers_that_are_none_become_null() -> None:
    found = jsonable(
        {"a": [math.nan, math.inf, 1.5], 2: np.array([[1, 2]]), "c": (np.float32(2), None, "x", True)}
    )
    assert json.dumps(found, allow_nan=False)
    assert found == {"a": [None, None, 1.5], "2": [[1, 2]], "c": [2.0, None, "x", True]}
