"""evaluation.scores: against slow loops; ties, absent classes, requirements."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gkdcli.errors import ExitCode, GkdError
from gkdcli.evaluation.scores import check_requirements, class_scores, parse_requirement, recognition_scores

CLASSES = [f"class {n}" for n in range(7)]


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(0, 2, (60, 7, 3)).astype(np.float32), rng.integers(0, 6, 60)  # no video of class 6


def slow_scores(logits: np.ndarray, recipe: str) -> list[list[float]]:
    found = []
    for sample in logits.tolist():
        classes, times = len(sample), len(sample[0])
        if recipe == "official":
            columns = [[sample[c][t] for c in range(classes)] for t in range(times)]
        else:
            columns = [[sum(row) / times for row in sample]]
        scores = [0.0] * classes
        for column in columns:
            whole = sum(math.exp(value) for value in column)
            scores = [score + math.exp(value) / whole for score, value in zip(scores, column, strict=True)]
        found.append(scores)
    return found


@pytest.mark.parametrize("recipe", ["official", "corrected"])
def test_scores_equal_slow_loops(drawn, recipe):
    logits, labels = drawn
    slow = slow_scores(logits, recipe)
    np.testing.assert_allclose(class_scores(logits, recipe), slow, rtol=1e-10)

    ranks = [sorted(range(7), key=lambda c: (-row[c], c)) for row in slow]
    hit1 = [rank[0] == label for rank, label in zip(ranks, labels, strict=True)]
    hit5 = [label in rank[:5] for rank, label in zip(ranks, labels, strict=True)]
    found = recognition_scores(logits, labels, CLASSES, recipe)
    assert found["top1"] == pytest.approx(sum(hit1) / 60)
    assert found["top5"] == pytest.approx(sum(hit5) / 60)
    each = {}
    for label, row in enumerate(found["per_class"]):
        mine = [n for n in range(60) if labels[n] == label]
        taken = [ranks[n][0] for n in mine]
        assert row["videos"] == len(mine)
        assert found["confusion"][label] == [taken.count(c) for c in range(7)]
        if mine:
            each[label] = taken.count(label) / len(mine)
            assert row["top1"] == pytest.approx(each[label])
            wrong = {c: taken.count(c) for c in taken if c != label}
            assert wrong[CLASSES.index(row["mostly_taken_for"])] == max(wrong.values())
    assert found["mean_class_top1"] == pytest.approx(sum(each.values()) / len(each))


def test_a_class_without_videos_has_no_score_and_spoils_no_mean(drawn):
    found = recognition_scores(*drawn, CLASSES, "corrected")
    assert found["per_class"][6] == {"class": "class 6", "videos": 0, "top1": None, "mostly_taken_for": None}
    assert math.isfinite(found["mean_class_top1"])


def test_recipes_can_disagree():
    """One very sure time step outweighs two doubtful ones in the mean of logits, not in the sum of scores."""
    logits = np.array([[[9.0, 0.0, 0.0], [0.0, 2.0, 2.0]]])
    assert class_scores(logits, "corrected").argmax() == 0
    assert class_scores(logits, "official").argmax() == 1


def test_ties_go_to_the_first_class():
    found = recognition_scores(np.zeros((3, 7, 2)), np.array([0, 1, 6]), CLASSES, "corrected")
    assert found["top1"] == pytest.approx(1 / 3)
    assert found["top5"] == pytest.approx(2 / 3)


def test_top5_of_fewer_than_five_classes_is_whole():
    logits = np.random.default_rng(0).normal(size=(10, 3, 2))
    assert recognition_scores(logits, np.arange(10) % 3, CLASSES[:3], "corrected")["top5"] == 1.0


def test_large_logits_do_not_overflow():
    logits = np.array([[[1e4], [-1e4], [0.0]]], dtype=np.float32)
    assert class_scores(logits, "official").tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("top1>=0.6", ("top1", ">=", 0.6)),
        (" top5 < 1e-1 ", ("top5", "<", 0.1)),
        ("map.0.5>.3", ("map.0.5", ">", 0.3)),
        ("mean_class_top1<=+1", ("mean_class_top1", "<=", 1.0)),
    ],
)
def test_requirements_are_read(text, parsed):
    assert parse_requirement(text) == parsed


@pytest.mark.parametrize(
    "text", ["top1", "top1>=", ">=0.5", "top1=0.5", "top1>=0.5.5", "top1>=high", "", "top1>=-"]
)
def test_what_is_no_requirement_is_refused(text):
    with pytest.raises(GkdError, match="is not a requirement") as caught:
        parse_requirement(text)
    assert caught.value.code is ExitCode.USAGE


def test_requirements_are_checked():
    scores = {"top1": 0.5, "top5": 1.0, "nothing": math.nan, "per_class": [], "map": {"0.5": 0.25}}

    def check(*texts: str) -> GkdError | None:
        return check_requirements(scores, [parse_requirement(text) for text in texts])

    assert check() is None
    assert check("top1>=0.5", "top5>0.9", "top1<=0.5", "top1<0.6") is None
    missed = check("top5>=0.9", "top1>0.5", "top1>0.7")
    assert missed.code is ExitCode.REQUIREMENT
    assert missed.what == "top1 is 0.5, required is > 0.5"
    assert check("nothing>=0").code is ExitCode.REQUIREMENT  # NaN meets nothing
    for unknown in ("top2>0", "per_class>0", "map>0", "top1.x>0"):
        with pytest.raises(GkdError, match="is not a score") as caught:
            check(unknown)
        assert caught.value.code is ExitCode.USAGE
        assert "top1, top5" in caught.value.hint
