"""`gkd distill ... --profile N`: a table, a file, and no run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import borrow


@pytest.fixture
def place(tiny_trained: Path, tmp_path: Path) -> Path:
    """A root with store and teacher."""
    root, teachers = borrow(tiny_trained, tmp_path / "root"), "runs/demo-tiny/pretrain-attention-rgb"
    shutil.copytree(tiny_trained / teachers, root / teachers)
    return root


def test_a_profile_is_printed_and_written_and_leaves_no_run(gkd, place: Path):
    outcome = gkd("distill", "demo-tiny", "--root", place, "--profile", 1, "--json").must()
    found = outcome.json["result"]
    folder = place / "runs/demo-tiny/distill-rgb"
    assert [path.name for path in folder.iterdir()] == ["profile.json"]
    assert json.loads((folder / "profile.json").read_text()) == found
    assert {row["what"] for row in found["step"]} >= {"student_forward", "teacher_forward", "backward"}
    assert found["peak_memory_bytes"] > 0
    assert "nothing of them is kept" in outcome.err
    assert outcome.json["run"] is None
    lines = gkd("distill", "demo-tiny", "--root", place, "--profile", 1).must().out.splitlines()
    assert any(line.split()[:2] == ["network", "teacher_forward"] for line in lines)


@pytest.mark.parametrize("other", [("--resume",), ("--max-steps", 3)])
def test_a_profile_has_no_run_to_continue_or_cut(gkd, place: Path, other):
    outcome = gkd("distill", "demo-tiny", "--root", place, "--profile", 1, *other)
    assert outcome.code == 2
    assert f"{other[0]} does not go with --profile" in outcome.err
