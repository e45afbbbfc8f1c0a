"""Names and shapes of every tensor of the published recognition networks (golden 01)."""

from __future__ import annotations

import pytest
import torch

from gkdcli.models.cvae import CVAE
from gkdcli.models.foreign import official_name
from gkdcli.models.i3d import I3D, tap_shape
from gkdcli.models.network import build_cvae
from gkdcli.models.recognizer import Recognizer
from tests.parity.golden import needs_golden, shapes

pytestmark = needs_golden


def ours(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize(("who", "kind"), [("teacher", "i3d"), ("student", "top-i3d")])
@pytest.mark.parametrize(("channels", "classes"), [(3, 101), (2, 101), (3, 51), (2, 51)])
def test_networks(who, kind, channels, classes):
    with torch.device("meta"):
        model = Recognizer(kind, classes, length=64, crop=224, channels=channels)
    theirs = shapes(f"rec_{who}_in{channels}_cls{classes}")
    assert {official_name(key): shape for key, shape in theirs.items()} == ours(model)


@pytest.mark.parametrize(("model", "kind"), [("i3d", "i3d"), ("topi3d", "top-i3d")])
@pytest.mark.parametrize("channels", [3, 2])
def test_bare_backbones_carry_the_public_names(model, kind, channels):
    with torch.device("meta"):
        backbone = I3D(kind, channels)
    theirs = shapes(f"backbone_{model}_in{channels}_cls400")
    assert {k: v for k, v in theirs.items() if not k.startswith("logits.")} == ours(backbone)


def test_cvaes_including_the_idle_branch():
    with torch.device("meta"):
        used = build_cvae(Recognizer("i3d", 101, length=64, crop=224))
        idle = torch.nn.ModuleDict({"Mixed_4f": CVAE(tap_shape("Mixed_4f", 64, 224))})
    theirs = {official_name(key): shape for key, shape in shapes("rec_cvae_teacher").items()}
    assert theirs == ours(used) | ours(idle)
