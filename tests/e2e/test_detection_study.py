"""The detection demo at length (`make slow`): rgb, flow, and both together reach their marks."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.readme import GKD

pytestmark = pytest.mark.slow
LONGER = {
    "pretrain-attention": ("--epochs", "18"),
    "distill": ("--epochs", "16", "--set", "optim.learning_rate=1e-3"),
}


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Scores of the teacher, and of the students' fusion; the backbones start from the recognition demo's."""
    folder = tmp_path_factory.mktemp("detection")
    for preset in ("demo", "demo-detection"):
        _gkd(folder, "prepare", preset, "--modality", "both")
    for modality in ("rgb", "flow"):
        here = ("--modality", modality)
        _gkd(folder, "pretrain-attention", "demo", *here)
        backbone = f"runs/demo/pretrain-attention-{modality}"
        words = ("pretrain-attention", "demo-detection", *here, *LONGER["pretrain-attention"])
        _gkd(folder, *words, "--backbone", backbone)
        _gkd(folder, "distill", "demo-detection", *here, *LONGER["distill"])
    teacher = _gkd(folder, "evaluate", "demo-detection", "--model", "teacher")
    fused = _gkd(folder, "evaluate", "demo-detection", "--fusion")
    print({part["stream"]: part["average_map"] for part in fused["streams"]}, teacher["average_map"])
    return {"teacher": teacher, "fused": fused}


def test_teacher_and_student_reach_their_marks(studied: dict[str, Any]) -> None:
    assert studied["teacher"]["average_map"] >= 0.6
    assert studied["fused"]["rgb"]["average_map"] >= 0.5


def test_both_streams_are_not_worse_than_the_better_one(studied: dict[str, Any]) -> None:
    scores = {part["stream"]: part["average_map"] for part in studied["fused"]["streams"]}
    assert scores["fused"] >= max(scores["rgb"], scores["flow"]) - 0.02


def test_chance_is_far_below(studied: dict[str, Any]) -> None:
    student = studied["fused"]["rgb"]
    for chance in ("average_map_of_shuffled_scores", "average_map_of_class_priors"):
        assert student[chance] < 0.5 * student["average_map"]


def _gkd(folder: Path, *words: str) -> dict[str, Any]:
    done = subprocess.run(
        [str(GKD), *words, "--json", "-q"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)["result"]
    return result
