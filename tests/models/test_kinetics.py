"""models.kinetics: public files start backbones of their own kind, and are recognised where they do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.models import video

from gkdcli.errors import GkdError
from gkdcli.models.foreign import looks_like, open_weights
from gkdcli.models.kinetics import start_backbone, told
from gkdcli.models.recognizer import Recognizer
from gkdcli.models.video_backbones import TRUNKS


def recognizer(kind: str, classes: int = 3, **options) -> Recognizer:
    return Recognizer(kind, classes, **{"length": 16, "crop": 32, "width": 0.0625, **options})


def public(kind: str, seed: int = 1) -> dict[str, Tensor]:
    """A state dict as torchvision publishes them: 400 classes."""
    torch.manual_seed(seed)
    return getattr(video, kind)(weights=None).state_dict()


def saved(tensors: dict[str, Tensor], path: Path) -> Path:
    torch.save(tensors, path)
    return path


@pytest.mark.parametrize("kind", TRUNKS)
def test_a_public_file_starts_its_backbone(kind, tmp_path):
    tensors, network = public(kind), recognizer(kind)
    found = start_backbone(network, saved(tensors, tmp_path / "w.pth"))
    state = network.backbone.state_dict()
    trunk = {name for name in state if not name.startswith("to_tap.")}
    assert set(found.loaded) == trunk
    assert all(torch.equal(state[name], tensors[name]) for name in trunk)
    if kind == "s3d":
        assert told(found).endswith("; fresh: classifier, to_tap.bn, to_tap.conv3d")
    else:
        assert found.unexpected == ["fc.weight", "fc.bias"]
        assert told(found).endswith(
            "; fresh: classifier, to_tap.bn, to_tap.conv3d; not taken: fc.weight, fc.bias"
        )


def test_s3ds_classifier_is_taken_where_it_fits(tmp_path):
    tensors, network = public("s3d"), recognizer("s3d", classes=400, width=1.0)
    found = start_backbone(network, saved(tensors, tmp_path / "w.pth"))
    assert found.complete
    assert torch.equal(network.classifier.weight, tensors["classifier.1.weight"])


@pytest.mark.parametrize("prefix", ["module.", "network.backbone."])
def test_a_prefix_is_seen_through(prefix, tmp_path):
    tensors = {prefix + name: value for name, value in public("mc3_18").items()}
    counters = [name for name in tensors if name.endswith("num_batches_tracked")]
    for name in counters:  # older files come without
        del tensors[name]
    network = recognizer("mc3_18")
    start_backbone(network, saved(tensors, tmp_path / "w.pth"))
    assert torch.equal(network.backbone.stem[0].weight, tensors[f"{prefix}stem.0.weight"])


def test_a_checkpoint_with_other_things_beside_the_weights_is_looked_into(tmp_path):
    tensors, network = public("mc3_18"), recognizer("mc3_18")
    path = tmp_path / "w.pth"
    torch.save({"epoch": 3, "optimizer": {"lr": torch.ones(1)}, "model": tensors}, path)
    start_backbone(network, path)
    assert torch.equal(network.backbone.stem[0].weight, tensors["stem.0.weight"])


@pytest.mark.parametrize("kind", TRUNKS)
def test_our_own_weights_of_these_networks_are_recognised(kind, tmp_path):
    theirs, ours = recognizer(kind), recognizer(kind)
    path = saved({f"network.{name}": value for name, value in theirs.state_dict().items()}, tmp_path / "w.pt")
    found = open_weights(path).require_network().fit(ours)
    assert found.complete
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize(("kind", "stem"), [("mc3_18", "stem.0"), ("s3d", "features.0.0.0")])
def test_flow_keeps_a_fresh_first_convolution(kind, stem, tmp_path):
    network = recognizer(kind, channels=2)
    before = network.backbone.get_submodule(stem).weight.clone()
    found = start_backbone(network, saved(public(kind), tmp_path / "w.pth"))
    assert f"{stem}.weight" in [entry[0] for entry in found.wrong_shape]
    assert f" {stem}," in told(found)
    assert torch.equal(network.backbone.get_submodule(stem).weight, before)


@pytest.mark.parametrize(
    ("wanted", "given"),
    [
        ("r3d_18", "mc3_18"),
        ("mc3_18", "r2plus1d_18"),
        ("r2plus1d_18", "r3d_18"),
        ("s3d", "r3d_18"),
        ("i3d", "s3d"),
    ],
)
def test_another_kind_is_named(wanted, given, tmp_path):
    network = recognizer(wanted)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(GkdError) as caught:
        start_backbone(network, saved(public(given), tmp_path / "w.pth"))
    assert caught.value.what == f"these weights are no {wanted} backbone; they look like {given}"
    assert f"--set model.teacher={given}" in caught.value.hint
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_an_i3d_file_is_named_to_a_video_network(tmp_path):
    tensors = recognizer("top-i3d").backbone.state_dict()
    with pytest.raises(GkdError, match="these weights are no s3d backbone; they look like i3d"):
        start_backbone(recognizer("s3d"), saved(tensors, tmp_path / "w.pth"))


def test_what_is_nothing_we_know_is_said_so(tmp_path):
    path = saved({"layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3)}, tmp_path / "resnet18.pth")
    with pytest.raises(GkdError) as caught:
        start_backbone(recognizer("r3d_18"), path)
    assert caught.value.what == "these weights are no r3d_18 backbone"
    assert "resnet18.pth, 1 tensor, the first is `layer1.0.conv1.weight`" in caught.value.where
    assert caught.value.hint == "torchvision's file for r3d_18 is called r3d_18-b3b3357e.pth"


@pytest.mark.parametrize("damage", ["cut", "resized"])
def test_a_file_of_the_kind_that_does_not_fit_is_refused(damage, tmp_path):
    tensors = dict(public("mc3_18"))
    if damage == "cut":
        del tensors["layer4.1.conv2.0.weight"]
    else:
        tensors["layer4.1.conv2.0.weight"] = torch.zeros(512, 512, 1, 5, 5)
    with pytest.raises(
        GkdError, match=r"do not fit the mc3_18 backbone.*1 (missing|tensor has another shape)|1 missing"
    ):
        start_backbone(recognizer("mc3_18"), saved(tensors, tmp_path / "w.pth"))


@pytest.mark.parametrize("kind", TRUNKS)
def test_every_kind_is_told_from_the_others(kind):
    with torch.device("meta"):
        tensors = getattr(video, kind)(weights=None).state_dict()
    assert looks_like(tensors) == (kind, "")
    assert looks_like({f"a.b.{name}": value for name, value in tensors.items()}) == (kind, "a.b.")
    assert looks_like({"stem.0.weight": torch.zeros(1)}) == ("", "")
