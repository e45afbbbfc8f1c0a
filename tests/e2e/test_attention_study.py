"""The demo with both kinds of attention (`make slow`): the lite one loses nothing beside the official one.

Of each seed five trainings: a teacher of each kind, and three students. A teacher serves all of its students.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.readme import GKD

pytestmark = pytest.mark.slow
SEEDS = (2020, 1, 2)
# student and teacher
PAIRS = (("official", "official"), ("lite", "official"), ("lite", "lite"))
Pair = tuple[str, str]


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> dict[Pair, list[float]]:
    """Top-1 on the test videos by pair, one for each seed; a teacher stands beside nobody: (kind, "")."""
    folder = tmp_path_factory.mktemp("attention")
    _gkd(folder, "prepare", "demo")
    scores: dict[Pair, list[float]] = {}
    for seed in SEEDS:
        teachers = {}
        for kind in ("official", "lite"):
            teachers[kind] = _train(folder, "pretrain-attention", seed, kind)["run"]
            scores.setdefault((kind, ""), []).append(_top1(folder, teachers[kind], "teacher"))
        for kind, teacher in PAIRS:
            run = _train(folder, "distill", seed, kind, "--teacher", teachers[teacher])["run"]
            scores.setdefault((kind, teacher), []).append(_top1(folder, run, "student"))
    for pair, found in scores.items():
        print(*pair, [round(top1, 4) for top1 in found], round(statistics.mean(found), 4))
    return scores


@pytest.mark.parametrize("teacher", ["official", "lite"])
def test_a_lite_student_is_no_worse_than_an_official_one(
    studied: dict[Pair, list[float]], teacher: str
) -> None:
    """By more than scores of one and the same pair scatter: the sample standard deviation over the seeds.

    Of the official and of the lite students, whichever scatter more: three values say little of a spread.
    """
    official, lite = studied["official", "official"], studied["lite", teacher]
    spread = max(statistics.stdev(official), statistics.stdev(lite))
    assert statistics.mean(lite) >= statistics.mean(official) - spread


def test_all_of_them_learn(studied: dict[Pair, list[float]]) -> None:
    """Else a wide spread would let anything pass."""
    assert min(statistics.mean(found) for found in studied.values()) >= 0.80


def _train(folder: Path, command: str, seed: int, kind: str, *words: str) -> dict[str, Any]:
    sets = ("--seed", str(seed), "--set", f"model.attention={kind}")
    return _gkd(folder, command, "demo", *sets, *words)


def _top1(folder: Path, run: str, model: str) -> float:
    return float(_gkd(folder, "evaluate", "demo", "--run", run, "--model", model)["top1"])


def _gkd(folder: Path, *words: str) -> dict[str, Any]:
    done = subprocess.run(
        [str(GKD), *words, "--json", "-q"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)["result"]
    return result
