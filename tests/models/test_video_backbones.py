"""models.video_backbones: torchvision's trunks give an I3D's tap, and are torchvision's to the last bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn
from torchvision.models import video

from gkdcli.models.cost import cost
from gkdcli.models.i3d import KINDS, tap_shape
from gkdcli.models.network import build_cvae
from gkdcli.models.recognizer import Recognizer
from gkdcli.models.video_backbones import TRUNKS, VideoBackbone, pool_to, related
from gkdcli.settings import Settings


def recognizer(kind: str, **options) -> Recognizer:
    return Recognizer(kind, 3, **{"length": 16, "crop": 32, "width": 0.0625, **options})


@pytest.mark.parametrize("kind", TRUNKS)
@pytest.mark.parametrize(
    ("length", "crop", "width", "channels"), [(64, 224, 1.0, 3), (16, 48, 0.0625, 2), (24, 112, 0.25, 3)]
)
def test_the_tap_is_that_of_an_i3d(kind, length, crop, width, channels):
    with torch.device("meta"):
        network = recognizer(kind, length=length, crop=crop, width=width, channels=channels).to("meta")
        features = network.features(torch.empty(2, channels, length, crop, crop))
        maps = network.attend(features)
        rebuilt = build_cvae(network)["Mixed_5c"].generate(
            maps["Mixed_5c"], torch.empty(maps["Mixed_5c"].mT.shape)
        )
        logits = network(torch.empty(2, channels, length, crop, crop))
    wanted = tap_shape("Mixed_5c", length, crop, width)
    assert {tap: tuple(x.shape) for tap, x in features.items()} == {"Mixed_5c": (2, *wanted)}
    assert rebuilt.shape == features["Mixed_5c"].shape
    assert logits.shape == (2, 3)


@pytest.mark.parametrize("kind", TRUNKS)
def test_trunk_and_names_are_torchvisions(kind):
    torch.manual_seed(0)
    theirs = getattr(video, kind)(weights=None).eval()
    ours = VideoBackbone(kind, 3, (1024, 2, 2, 2)).eval()
    state = {name: value for name, value in theirs.state_dict().items() if name in ours.state_dict()}
    heads = theirs.state_dict().keys() - state.keys()
    assert {name.split(".")[0] for name in heads} == {"classifier" if kind == "s3d" else "fc"}
    ours.load_state_dict(state, strict=False)
    clip = torch.rand(1, 3, 16, 64, 64)
    with torch.no_grad():
        if kind == "s3d":
            wanted = theirs.features(clip)
            assert torch.equal(ours(clip)["Mixed_5c"], wanted)  # nothing is added where nothing differs
            assert not [name for name in ours.state_dict() if name.startswith("to_tap")]
        else:
            ours.to_tap = nn.Identity()
            wanted = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(theirs.stem(clip)))))
            pooled = F.adaptive_avg_pool3d(wanted, (2, 2, 2))
            torch.testing.assert_close(ours(clip)["Mixed_5c"], pooled)


@pytest.mark.parametrize("size", [(2, 7, 7), (8, 2, 2), (4, 4, 5), (2, 3, 1), (8, 7, 7), (3, 9, 2)])
def test_pooling_is_adaptive_average_pooling(size):
    x = torch.randn(2, 3, 8, 7, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(pool_to(x, size), F.adaptive_avg_pool3d(x, size))


def test_the_tap_is_never_negative_as_the_attended_feature_needs():
    torch.manual_seed(0)
    network = recognizer("mc3_18").train()
    tap = network.features(torch.randn(2, 3, 16, 32, 32))["Mixed_5c"]
    assert tap.min() == 0 < tap.max()


@pytest.mark.parametrize("kind", TRUNKS)
def test_batch_norm_has_the_pages_momentum_and_flow_a_stem_of_its_own(kind):
    with torch.device("meta"):
        network = recognizer(kind, channels=2, bn_momentum=0.3)
    norms = [part for part in network.backbone.modules() if isinstance(part, nn.BatchNorm3d)]
    assert {norm.momentum for norm in norms} == {0.3}
    first = network.backbone.get_submodule(network.backbone.first_convolution())
    with torch.device("meta"):
        theirs = getattr(video, kind)(weights=None)
    rgb = next(part for part in theirs.modules() if isinstance(part, nn.Conv3d))
    assert first.in_channels == 2
    assert (first.kernel_size, first.stride, first.padding, first.out_channels, first.bias) == (
        rgb.kernel_size,
        rgb.stride,
        rgb.padding,
        rgb.out_channels,
        None,
    )


def test_cost_is_that_of_torchvisions_trunk_and_our_head():
    found = cost(lambda: recognizer("r3d_18", attention=None, crop=112, width=1.0), (3, 16, 112, 112))
    # 33.4 million with 400 classes of 513 numbers each, 40.7 GMAC: torchvision's page
    head = 1024 * 512 + 2 * 1024 + 3 * 1025
    assert found.parameters == 33_371_472 - 400 * 513 + head
    assert found.gmac == pytest.approx(40.697, abs=0.02)


def test_width_leaves_the_trunk_alone():
    with torch.device("meta"):
        narrow, wide = recognizer("s3d"), recognizer("s3d", width=1.0)
    trunk = {name: x.shape for name, x in wide.backbone.state_dict().items() if "to_tap" not in name}
    assert {
        name: x.shape for name, x in narrow.backbone.state_dict().items() if "to_tap" not in name
    } == trunk


def test_only_backbones_of_one_make_share_tensors():
    alike = {(a, b) for a in (*KINDS, *TRUNKS) for b in (*KINDS, *TRUNKS) if related(a, b)}
    assert alike == {(a, b) for a in KINDS for b in KINDS} | {(kind, kind) for kind in TRUNKS} | {
        ("r3d_18", "mc3_18"),
        ("mc3_18", "r3d_18"),
    }


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_the_detector_refuses_them(role):
    page = {"task": "detection", "clips": {"length": 256}, "model": {role: "s3d"}}
    with pytest.raises(ValidationError, match=rf"model\.{role} is s3d, which has no tap Mixed_4f"):
        Settings.model_validate(page)
    assert Settings.model_validate(page | {"task": "recognition"})
