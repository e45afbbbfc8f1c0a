"""models.cost: the counts of METHOD.md 9, without the memory or the time of the networks themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gkdcli.models.cost import Cost, cost
from gkdcli.models.i3d import I3D
from gkdcli.models.recognizer import Recognizer


class Tail(nn.Module):
    """A backbone alone."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.backbone = I3D(kind)

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        return self.backbone(clip)["Mixed_5c"]


def recognizer(kind: str, attention: bool = True) -> Recognizer:
    return Recognizer(kind, 101, length=64, crop=224, attention=attention)


@pytest.mark.parametrize(
    ("kind", "clip", "gmac", "millions"),
    [
        ("i3d", (3, 64, 224, 224), 111.2, 12.3),
        ("top-i3d", (3, 64, 224, 224), 45.4, 10.4),
        ("i3d", (3, 256, 96, 96), 81.7, 12.3),
        ("top-i3d", (3, 256, 96, 96), 33.3, 10.4),
    ],
)
def test_backbones_cost_what_was_counted(kind, clip, gmac, millions):
    found = cost(lambda: Tail(kind), clip)
    assert found.gmac == pytest.approx(gmac, abs=0.05)
    assert found.parameters / 1e6 == pytest.approx(millions, abs=0.5)


def test_the_student_costs_two_fifths_of_its_teacher_and_the_head_holds_the_parameters():
    plain, teacher, student = (
        cost(lambda k=kind, a=attention: recognizer(k, a), (3, 64, 224, 224))
        for kind, attention in (("i3d", False), ("i3d", True), ("top-i3d", True))
    )
    assert student.gmac / teacher.gmac == pytest.approx(0.41, abs=0.015)
    assert (teacher.parameters - plain.parameters) / 1e6 == pytest.approx(27.3, abs=0.1)
    assert student.parameters > 2.5 * plain.parameters


def test_counting_touches_no_random_numbers():
    before = torch.get_rng_state()
    cost(lambda: recognizer("i3d"), (3, 64, 224, 224))
    assert torch.equal(before, torch.get_rng_state())


def test_a_small_network_counted_by_hand():
    assert cost(lambda: nn.Conv3d(2, 3, 1, bias=False), (2, 4, 5, 6)) == Cost(6, 6 * 4 * 5 * 6 / 1e9)
