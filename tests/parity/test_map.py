"""Recorded submissions scored by the published evaluation (golden 09): AP of every class and threshold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gkdcli.evaluation.detection import detection_scores, mean_ap
from gkdcli.evaluation.submission import read_ground_truth, read_submission
from tests.parity.golden import FOLDER, needs_golden

TRUTH = FOLDER.parent / "data" / "annotations" / "thumos14" / "thumos_gt.json"
CASES = {
    "main": "main",
    "empty": "empty",
    "missing_class": "missing_class",
    "mini": "mini",
    "ties": "ties_file_order_first",
}
pytestmark = needs_golden


def _files(case: str) -> tuple[Path, Path]:
    if case == "mini":
        return FOLDER / "09_map_mini.gt.json", FOLDER / "09_map_mini.pred.json"
    if not TRUTH.is_file():
        pytest.skip(f"the published ground truth is not at {TRUTH}")
    return TRUTH, FOLDER / f"09_map_{case}.pred.json.gz"


@pytest.mark.parametrize("case", CASES)
def test_every_class_and_threshold(case: str) -> None:
    document = json.loads((FOLDER / "09_map.json").read_text())
    record, thresholds = document[CASES[case]], document["tiou_thresholds"]
    truth_file, file = _files(case)
    truth, subset, problems, _ = read_ground_truth(truth_file)
    found = read_submission(file, truth)
    assert (subset, problems) == ("test", [])
    assert sorted(record["classes"]) == truth.classes
    columns = [truth.classes.index(name) for name in record["classes"]]
    np.testing.assert_allclose(mean_ap(truth, found, thresholds)[:, columns], record["ap"], rtol=0, atol=1e-9)
    scores = detection_scores(truth, found, thresholds)
    np.testing.assert_allclose(list(scores["map"].values()), record["mAP"], rtol=0, atol=1e-9)
    assert scores["average_map"] == pytest.approx(record["average_mAP"], abs=1e-9)
    about = scores["ground_truth"]
    assert (about["segments"], about["detections_used"]) == (record["n_gt"], record["n_pred_used"])


def test_the_order_of_ties_matters_in_the_recorded_case() -> None:
    document = json.loads((FOLDER / "09_map.json").read_text())
    first, last = (document[f"ties_file_order_{which}"]["ap"] for which in ("first", "last"))
    assert np.abs(np.subtract(first, last)).max() > 1e-3


def test_what_is_unknown_is_counted() -> None:
    truth_file, file = _files("main")
    truth = read_ground_truth(truth_file).truth
    about = detection_scores(truth, read_submission(file, truth))["ground_truth"]
    assert (about["videos"], about["classes"], about["duplicates"]) == (210, 20, 0)
    assert (about["detections"], about["of_unknown_videos"], about["of_unknown_labels"]) == (18551, 2, 20)
