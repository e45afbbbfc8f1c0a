"""The demo at full size (`make slow`): its scores hold over seeds, and it asks for motion."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gkdcli.data.clips import ClipDataset, normalise
from gkdcli.data.demo import REVERSE
from gkdcli.data.loader import load, test_order
from gkdcli.data.store import Store
from gkdcli.runs import Run
from gkdcli.tasks.trained import rebuild
from tests.readme import GKD

pytestmark = pytest.mark.slow
SEEDS = (2020, 1, 2, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    _gkd(folder, "prepare", "demo")
    return folder


@pytest.fixture(scope="module", params=SEEDS)
def trained(folder: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Run folders and scores of teacher, plain and distilled student of one seed."""
    seed = ("--seed", str(request.param))
    _gkd(folder, "pretrain-attention", "demo", *seed)
    _gkd(folder, "distill", "demo", "--set", "distill.method=none", *seed)
    _gkd(folder, "distill", "demo", *seed)
    rows = _gkd(folder, "evaluate", "demo", "--model", "all")["runs"]
    print(request.param, [(row["model"], row["top1"], row["training_seconds"]) for row in rows])
    return {row["model"]: row for row in rows} | {"folder": folder}


def test_teacher_and_student_reach_their_marks(trained: dict[str, Any]) -> None:
    assert trained["teacher"]["top1"] >= 0.90
    assert trained["distilled student"]["top1"] >= 0.80
    assert trained["distilled student"]["gmac"] < 0.6 * trained["teacher"]["gmac"]


def test_one_repeated_frame_says_little(trained: dict[str, Any]) -> None:
    for frame in (0, 8, 15):
        called, labels, _ = _called(trained, lambda clips, f=frame: clips[:, :, f : f + 1].expand_as(clips))
        assert (called == labels).float().mean() <= 0.25, frame


def test_a_clip_played_backwards_is_its_reverse_class(trained: dict[str, Any]) -> None:
    called, labels, classes = _called(trained, lambda clips: clips.flip(2))
    pairs = [
        (classes[int(found)], REVERSE[classes[int(label)]])
        for found, label in zip(called, labels, strict=True)
        if classes[int(label)] in REVERSE
    ]
    assert sum(found == wanted for found, wanted in pairs) >= 0.8 * len(pairs)


def _called(trained: dict[str, Any], change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, list[str]]:
    """What the teacher calls the test clips after `change`, their labels, and the class names."""
    run = Run(trained["folder"] / trained["teacher"]["run"])
    store = Store.open(trained["folder"] / "stores/demo/rgb.h5")
    videos = store.split(1, "test")
    clips = run.settings.clips
    dataset = ClipDataset(store, videos, clips, run.settings.recipe, seed=None)
    network, called, labels = rebuild(run), [], []
    for batch in load(dataset, test_order(len(videos), 16), workers=0):
        with torch.inference_mode():
            called.append(network(change(normalise(batch.clips, clips))).argmax(1))
        labels.append(batch.targets["labels"])
    return torch.cat(called), torch.cat(labels), store.classes


def _gkd(folder: Path, *words: str) -> dict[str, Any]:
    done = subprocess.run(
        [str(GKD), *words, "--json", "-q"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)["result"]
    return result
