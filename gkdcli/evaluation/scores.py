"""Scores of recognition: top-k, per class, confusion (METHOD.md 6)."""

from __future__ import annotations

import operator
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gkdcli.errors import ExitCode, GkdError, usage_error

Array = NDArray[np.floating[Any]]


def class_scores(logits: Array, recipe: str) -> Array:
    """(N, classes, T) -> (N, classes) (METHOD.md 6).

    `official`: softmax over classes per time step, summed over time. `corrected`: softmax of the
    time-averaged logits, as trained.
    """
    if recipe == "official":
        scores: Array = _softmax(logits.astype(np.float64)).sum(axis=2)
        return scores
    return _softmax(logits.astype(np.float64).mean(axis=2))


def _softmax(logits: Array) -> Array:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: Array = shifted / shifted.sum(axis=1, keepdims=True)
    return result


def recognition_scores(
    logits: Array, labels: NDArray[np.int64], classes: list[str], recipe: str
) -> dict[str, Any]:
    """Top-1, top-5, per class, and the confusion matrix.

    Args:
        logits: (N, classes, T).
        labels: (N,), from 0.
        classes: names; the position is the label.
        recipe: how logits become scores.

    Returns:
        `top1`, `top5` (fractions; top-5 of fewer than five classes is 1), `mean_class_top1`, `per_class`
        (class, videos, top1, mostly_taken_for) and `confusion` (counts; rows true, columns predicted).
    """
    ranked = np.argsort(-class_scores(logits, recipe), axis=1, kind="stable")
    hits = ranked == labels[:, None]
    confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(confusion, (labels, ranked[:, 0]), 1)
    rows: list[dict[str, Any]] = []
    for label, name in enumerate(classes):
        count = int(confusion[label].sum())
        wrong = confusion[label].copy()
        wrong[label] = 0
        worst = classes[int(wrong.argmax())] if wrong.any() else None
        top1 = float(confusion[label, label] / count) if count else None
        rows.append({"class": name, "videos": count, "top1": top1, "mostly_taken_for": worst})
    scored = [row["top1"] for row in rows if row["top1"] is not None]
    return {
        "top1": float(hits[:, 0].mean()),
        "top5": float(hits[:, :5].any(axis=1).mean()),
        "mean_class_top1": float(np.mean(scored)),
        "per_class": rows,
        "confusion": confusion.tolist(),
    }


_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


def parse_requirement(text: str) -> tuple[str, str, float]:
    """`top1>=0.6` -> ("top1", ">=", 0.6).

    Raises:
        GkdError: not of that form (exit code 2).
    """
    match = re.fullmatch(r"\s*([A-Za-z_][\w.]*)\s*(>=|<=|>|<)\s*([-+.\deE]+)\s*", text)
    try:
        if match:
            return match[1], match[2], float(match[3])
    except ValueError:
        pass
    raise usage_error(f"`{text}` is not a requirement", "--require", "write --require 'top1>=0.6'")


def _score_called(name: str, scores: Any) -> int | float | None:
    """`map.0.5` -> scores["map"]["0.5"]: a key may hold dots itself."""
    if not isinstance(scores, dict):
        return None
    if isinstance(scores.get(name), (int, float)):
        return scores[name]  # type: ignore[no-any-return]  # just checked
    heads = [name[:place] for place, sign in enumerate(name) if sign == "."]
    found = (_score_called(name[len(head) + 1 :], scores.get(head)) for head in heads)
    return next((value for value in found if value is not None), None)


def _score_names(scores: dict[str, Any]) -> list[str]:
    """What a requirement may ask for first: plain scores, then those by threshold."""
    plain = [key for key, score in scores.items() if isinstance(score, (int, float))]
    return plain + [f"map.{key}" for key in scores.get("map", {})]


def check_requirements(scores: dict[str, Any], requirements: list[tuple[str, str, float]]) -> GkdError | None:
    """The first requirement that the scores miss, as an error of exit code 4.

    Raises:
        GkdError: a name that is no score (exit code 2).
    """
    for name, sign, bound in requirements:
        value = _score_called(name, scores)
        if value is None:
            known = ", ".join(_score_names(scores))
            raise usage_error(
                f"`{name}` is not a score", f"--require '{name}{sign}{bound:g}'", f"known: {known}"
            )
        if not _COMPARE[sign](value, bound):
            return GkdError(
                f"{name} is {value:.4g}, required is {sign} {bound:g}",
                f"--require '{name}{sign}{bound:g}'",
                "train longer, or lower the requirement",
                ExitCode.REQUIREMENT,
            )
    return None
