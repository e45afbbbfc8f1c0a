"""The README's table of deviations from the published code: every test that it names exists."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gkdcli.pipeline.train import _build_networks
from gkdcli.resolve import resolve
from gkdcli.runs import Place

ROOT = Path(__file__).parent.parent
# all but those that keep the published code from starting
NUMBERS = {*map(str, (*range(1, 24), 26, 33))}


def rows() -> list[list[str]]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition("<!-- deviations -->")[2].partition("<!-- /deviations -->")[0]
    lines = [line.strip("|").split("|") for line in table.strip().splitlines()]
    return [[cell.strip() for cell in line] for line in lines[2:]]


def test_every_number_has_its_row() -> None:
    assert {row[0] for row in rows()} - {"-"} == NUMBERS
    assert all(len(row) == 5 and all(row[:3]) for row in rows())


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_the_test_that_a_row_names_exists(row: list[str]) -> None:
    path, name = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)`", row[4]).groups()
    assert re.search(rf"^def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("stage", ["pretrain", "distill"])
def test_only_corrected_applies_the_stated_initialisation(stage: str) -> None:
    """FINDINGS 11: zero biases of the convolutions of attention and CVAE, nowhere else."""
    store = SimpleNamespace(classes=["a", "b"])
    built = {}
    for recipe in ("official", "corrected"):
        sets = (f"recipe={recipe}", "train.init=scratch")
        page = resolve("demo-tiny", stage=stage, modality="rgb", root=ROOT, sets=sets).settings
        built[recipe] = _build_networks(Place(ROOT, page), stage, store, None, None)[0]
    for networks in built.values():
        zero = [
            name
            for module in (networks.student, networks.generators)
            for name, value in module.named_parameters()
            if name.endswith(("squeeze.bias", "expand.bias", "conv.bias")) and not value.any()
        ]
        corrected = networks is built["corrected"]
        assert len(zero) == (4 if corrected else 0)
    same = [
        torch.equal(*(networks.student.backbone.Mixed_5c.b0.conv3d.weight for networks in built.values())),
        torch.equal(*(networks.generators["Mixed_5c"].encoder.fc1.weight for networks in built.values())),
    ]
    assert all(same)  # linear layers and backbone keep PyTorch's defaults
