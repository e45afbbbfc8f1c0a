"""torchvision's networks from the command line: as teacher, as student, from a file, resumed, exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torchvision.models import video

from tests.conftest import borrow

CHANGES = (
    "model.teacher=s3d",
    "model.student=mc3_18",
    "optim.batch_size=4",
    "optim.epochs=1",
    "data.holdout=0",
)
ONE = tuple(word for change in CHANGES for word in ("--set", change))  # an epoch of 72 drawn videos: 18 steps


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("public") / "s3d-00000000.pth"
    torch.manual_seed(5)
    torch.save(video.s3d(weights=None).state_dict(), path)
    return path


def test_the_whole_line_with_other_backbones(gkd, tiny, public, tmp_path):
    root = borrow(tiny, tmp_path / "root")
    here = ("demo-tiny", "--root", root, *ONE)
    plan = gkd("pretrain-attention", *here, "--dry-run", "--json").must().json["result"]
    assert plan["parameters"] > 7_900_000 - 400 * 1025  # counted, not built
    outcome = gkd("pretrain-attention", *here, "--backbone", public, "--max-steps", 2).must()
    assert "s3d-00000000.pth (" in outcome.err
    assert "fresh: classifier, to_tap.bn, to_tap.conv3d" in outcome.err
    outcome = gkd("pretrain-attention", *here, "--resume").must()
    assert "step 2" in outcome.err
    outcome = gkd("distill", *here).must()
    # what starts from an unlike teacher is the head alone, and that is said
    assert "from the teacher's head (a mc3_18 has no use for a s3d backbone)" in outcome.err
    scores = gkd("evaluate", *here, "--json").must().json["result"]
    assert 0 <= scores["top1"] <= 1
    out = tmp_path / "out"
    found = gkd(
        "export",
        *here,
        "--model",
        "teacher",
        "--format",
        "onnx",
        "--format",
        "safetensors",
        "--out",
        out,
        "--json",
    ).must()
    onnx = found.json["result"]["onnx"]
    assert onnx["largest_relative_difference"] <= onnx["accepted_difference"]
    assert json.loads((out / "card.json").read_text())["backbone"] == "s3d"
    assert "backbone.features.0.0.0.weight" in load_file(out / "model.safetensors")


def test_a_file_of_another_kind_and_an_address_that_is_none_are_refused(gkd, workspace, public):
    here = ("pretrain-attention", "demo-tiny", "--root", workspace)
    outcome = gkd(*here, "--backbone", public)
    assert outcome.code == 1
    assert "these weights are no i3d backbone; they look like s3d" in outcome.err
    outcome = gkd(*here, "--backbone", "http://example.org/s3d-d76dad2f.pth")
    assert outcome.code == 2
    assert "no address that weights are taken from" in outcome.err
    assert not (workspace / "models").exists()
    outcome = gkd(*here, "--backbone", "https://nowhere.invalid/s3d-d76dad2f.pth", "--dry-run").must()
    assert not (workspace / "models").exists()


def test_the_detector_has_no_use_for_them(gkd, tmp_path):
    outcome = gkd("distill", "thumos14", "--root", tmp_path, "--set", "model.student=r3d_18")
    assert outcome.code == 2
    assert "model.student is r3d_18, which has no tap Mixed_4f" in outcome.err
