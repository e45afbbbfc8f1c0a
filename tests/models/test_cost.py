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


def recognizer(kind: str, attention: str | None = "official") -> Recognizer:
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
        for kind, attention in (("i3d", None), ("i3d", "official"), ("top-i3d", "official"))
    )
    assert student.gmac / teacher.gmac == pytest.approx(0.41, abs=0.015)
    assert (teacher.parameters - plain.parameters) / 1e6 == pytest.approx(27.3, abs=0.1)
    assert student.parameters > 2.5 * plain.parameters


def test_a_student_with_lite_attention_costs_what_the_plain_one_does_and_little_more():
    plain, lite = (
        cost(lambda k=kind: recognizer("top-i3d", k), (3, 64, 224, 224)) for kind in (None, "lite")
    )
    # per step: 2 x 1024 to 128 channels, three neighbours each, 128 to 1024; once the clip's 128 to 128
    macs = 8 * (2 * 1024 * 128 + 3 * 128 + 128 * 1024) + 128 * 128
    assert lite.gmac - plain.gmac == pytest.approx(macs / 1e9, rel=1e-3)
    assert lite.gmac < 46
    assert lite.parameters - plain.parameters == 411_904
    assert lite.parameters < 12e6


def test_counting_touches_no_random_numbers():
    before = torch.get_rng_state()
    cost(lambda: recognizer("i3d"), (3, 64, 224, 224))
    assert torch.equal(before, torch.get_rng_state())


def test_a_small_network_counted_by_hand():
    assert cost(lambda: nn.Conv3d(2, 3, 1, bias=False), (2, 4, 5, 6)) == Cost(
        6, 6 * 4 * 5 * 6 / 1e9, kept_bytes=960, largest_bytes=960
    )  # kept: the clip
