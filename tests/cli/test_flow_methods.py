"""`gkd prepare --flow METHOD`: what is planned and shown, and what a method needs before anything begins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.videos import draw, write_video


@pytest.fixture
def prepare(gkd: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    for name in "ab":
        write_video(tmp_path / "videos" / "up" / f"{name}.mp4", draw(4, 32, 24))
    call = (
        "prepare",
        "folder",
        tmp_path / "videos",
        "--name",
        "own",
        "--root",
        tmp_path,
        "--modality",
        "flow",
    )
    return lambda *words: gkd(*call, *words)


@pytest.mark.parametrize("method", ["tvl1", "tvl1-torch"])
def test_the_method_is_planned_and_shown(prepare: Callable[..., Any], method: str) -> None:
    plan = prepare("--flow", method, "--device", "cpu", "--dry-run", "--json").must().json["result"]
    assert (plan["settings"]["flow"], plan["flow_device"]) == (method, "cpu")
    assert "flow_batch" not in plan["settings"]  # a store does not depend on it
    page = prepare("--flow", method, "--set", "data.flow_batch=3", "--show-config").must().out
    assert f'flow = "{method}"' in page
    assert "flow_batch = 3 " in page


def test_raft_without_weights_is_refused_before_anything_begins(
    prepare: Callable[..., Any], tmp_path: Path
) -> None:
    outcome = prepare("--flow", "raft")
    assert outcome.code == 2
    assert "data.flow_weights" in outcome.err
    outcome = prepare("--flow", "raft", "--set", f"data.flow_weights={tmp_path / 'none.pth'}")
    assert outcome.code == 1
    assert "none.pth" in outcome.err
    assert not (tmp_path / "stores").exists()
