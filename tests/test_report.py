"""report: pictures are drawn from whatever real runs and folders hold."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from gkdcli.report import draw_confusion, draw_curves
from gkdcli.training.metrics import read


def picture(path: Path) -> np.ndarray:
    found = cv2.imread(str(path))
    assert found is not None, "no picture"
    assert list(path.parent.glob(".*.tmp")) == []
    return found


@pytest.mark.parametrize("classes", [1, 2, 12, 30, 101])
def test_a_confusion_matrix_of_any_size_is_drawn(tmp_path, classes):
    counts = np.random.default_rng(0).integers(0, 9, (classes, classes))
    counts[0] = 0  # a class without videos
    draw_confusion(counts.tolist(), [f"class {n}" for n in range(classes)], tmp_path / "confusion.png")
    assert min(picture(tmp_path / "confusion.png").shape[:2]) > 200


def test_class_names_are_text_not_formulas(tmp_path):
    names = ["$\\frac{", "a$b$c_^", "日本語", "b\udc80d", "x" * 500, ""]
    draw_confusion(np.eye(6, dtype=int).tolist(), names, tmp_path / "confusion.png")
    assert max(picture(tmp_path / "confusion.png").shape) < 2000


def lines(epochs: int, held: bool) -> list[dict]:
    found: list[dict] = []
    for epoch in range(1, epochs + 1):
        found.append({"step": epoch, "epoch": epoch, "learning_rate": 0.1 / epoch, "loss": 1.0})
        entry = {"epoch": epoch, "mean": {"classification": 2.0 / epoch, "cvae_kl.Mixed_5c": 0.0}}
        found.append(entry | ({"held_out_top1": epoch / 10} if held else {}))
    return found


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("held", [True, False])
def test_curves_are_drawn_also_of_terms_that_are_zero(tmp_path, epochs, held):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines(epochs, held)))
    draw_curves(read(metrics), tmp_path / "curves.png")
    assert picture(tmp_path / "curves.png").std() > 1


def test_without_a_whole_epoch_there_is_nothing_to_draw(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    draw_curves(read(metrics), tmp_path / "curves.png")
    metrics.write_text(json.dumps(lines(1, False)[0]) + "\n")
    draw_curves(read(metrics), tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
