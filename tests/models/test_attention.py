"""The attention maps, official (against the published chain of layers) and lite; the attended feature."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkdcli.models.attention import Attention, LiteAttention, attend, attention_kind, build_attention
from gkdcli.models.detector import Detector
from gkdcli.models.layers import initialise
from gkdcli.models.recognizer import Recognizer
from tests.training.jobs import settle


def published(module: Attention, feature: Tensor) -> Tensor:
    """Every column of the stretched signal computed, layer by layer."""
    x = F.relu(module.squeeze_norm(module.squeeze(feature)))[..., 0, 0]
    x = F.interpolate(x, size=module.expand.out_channels, mode="nearest")
    x = F.relu(module.expand_norm(module.expand(x)))
    return torch.sigmoid(module.time(x))


def randomised(shape: tuple[int, int, int, int], hidden: int) -> Attention:
    torch.manual_seed(0)
    module = Attention(shape, hidden).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


# Lengths that divide the channels and that do not, runs of one step, and more steps than channels.
@pytest.mark.parametrize("channels", [64, 52, 33])
@pytest.mark.parametrize("length", [2, 3, 8, 32, 64])
def test_attention_equals_the_published_layers(channels, length):
    module = randomised((channels, length, 3, 2), 16)
    feature = torch.rand(2, channels, length, 3, 2, dtype=torch.float64, requires_grad=True)
    got, wanted = module(feature), published(module, feature)
    assert got.shape == (2, channels, length)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    weights = torch.randn_like(got)
    inputs = [feature, *module.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad((got * weights).sum(), inputs),
        torch.autograd.grad((wanted * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_columns_survive_building_without_memory():
    """--dry-run builds on "meta"; the constants must not become placeholders there."""
    with torch.device("meta"):
        module = Attention((64, 4, 2, 2), 8)
    assert module.windows.device.type == "cpu"
    assert "windows" not in module.state_dict()


def test_map_lies_in_0_1_and_does_not_depend_on_batch_mates():
    module = randomised((32, 4, 2, 2), 8)
    feature = torch.rand(3, 32, 4, 2, 2, dtype=torch.float64)
    together = module(feature)
    assert 0 < together.min() < together.max() < 1
    torch.testing.assert_close(together[1:2], module(feature[1:2]))


def test_attended_feature_keeps_the_sum_of_each_sample_or_of_the_batch():
    torch.manual_seed(0)
    x, a = torch.rand(3, 4, 2, 3, 3), torch.rand(3, 4, 2)
    product = x * a[:, :, :, None, None]
    alone = torch.stack([p * (s.sum() / p.sum()) for p, s in zip(product, x, strict=True)])
    torch.testing.assert_close(attend(x, a, "sample"), alone)
    torch.testing.assert_close(attend(x, a, "batch"), product * (x.sum() / product.sum()))
    torch.testing.assert_close(attend(x, a, "sample").sum((1, 2, 3, 4)), x.sum((1, 2, 3, 4)))


@pytest.mark.parametrize("over", ["sample", "batch"])
def test_a_dead_feature_stays_zero_and_has_finite_gradients(over):
    x = torch.zeros(1, 4, 2, 2, 2, requires_grad=True)
    a = torch.rand(1, 4, 2, requires_grad=True)
    attended = attend(x, a, over)
    attended.square().sum().backward()
    assert not attended.any()
    assert x.grad.isfinite().all()
    assert a.grad.isfinite().all()


# ---- the lite kind ----

TAPS = {"Mixed_5c": 1024, "Mixed_4f": 832}


def lite(channels: int = 64, seed: int = 0) -> LiteAttention:
    torch.manual_seed(seed)
    module = LiteAttention(channels)
    initialise(module)
    return module


@pytest.mark.parametrize("side", [(1, 1), (2, 2), (7, 7), (3, 5)])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 7, 8, 33])
def test_one_lite_attention_serves_clips_of_any_length_and_crop(length, side):
    module, feature = lite(), torch.rand(2, 64, length, *side)
    feature[0] = 0  # a dead feature
    found = module(feature)
    assert found.shape == (2, 64, length)
    assert 0 < found.min() < found.max() < 1
    torch.testing.assert_close(found[1:], module(feature[1:]))  # no matter who else is in the batch


@pytest.mark.parametrize("channels", TAPS.values())
@pytest.mark.parametrize("stated", [False, True])
def test_it_starts_around_one_half_and_tells_channels_and_clips_apart(channels, stated):
    """Under PyTorch's defaults (recipe official) and under the stated initialisation (corrected)."""
    torch.manual_seed(0)
    module = LiteAttention(channels)
    if stated:
        initialise(module)
    found = module(torch.randn(3, channels, 8, 3, 3).relu())
    assert found.mean().item() == pytest.approx(0.5, abs=0.02)
    assert 0.02 < found.std().item() < 0.2
    assert (found[0] - found[1]).abs().max() > 0.01


def test_every_step_sees_its_neighbours_and_the_whole_clip():
    """Without the first, or without the second, maps would not follow a motion."""
    module, feature = lite().double(), torch.rand(1, 64, 9, 2, 2, dtype=torch.float64)
    changed = feature.clone()
    changed[:, :, 4] *= 1.5
    moved = (module(changed) - module(feature)).abs().mean((0, 1))
    assert moved.min() > 0
    assert moved[[3, 5]].min() > 1.2 * moved[[0, 1, 7, 8]].max()


@pytest.mark.parametrize("length", [1, 2, 8])
def test_every_parameter_and_the_feature_get_a_gradient(length):
    module = lite()
    feature = torch.rand(3, 64, length, 2, 2, requires_grad=True)
    found = module(feature)
    (found * torch.rand_like(found)).sum().backward()
    for name, value in [*module.named_parameters(), ("feature", feature)]:
        assert value.grad is not None, name
        assert value.grad.isfinite().all(), name
        assert value.grad.abs().max() > 0, name


def test_gradients_are_those_of_the_function():
    module = LiteAttention(8).double()
    feature = torch.rand(2, 8, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (feature,))


def test_it_learns_a_map():
    """Channels that rise where a few others do, at each step: what neither constants nor gains could say."""
    module, draw = lite(16), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    for _ in range(200):
        feature = torch.rand(16, 16, 4, 2, 2, generator=draw)
        wanted = feature[:, :3].mean((3, 4)).repeat(1, 6, 1)[:, :16]
        loss = F.mse_loss(module(feature), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5 * wanted.var()


def test_lite_has_under_a_million_parameters_for_both_taps_together_and_no_batch_norm():
    with torch.device("meta"):
        taps = {tap: build_attention("lite", (channels, 8, 7, 7), 1.0) for tap, channels in TAPS.items()}
        official = build_attention("official", (1024, 8, 7, 7), 1.0)
    counts = {tap: sum(value.numel() for value in module.parameters()) for tap, module in taps.items()}
    assert counts == {"Mixed_5c": 411_904, "Mixed_4f": 272_272}
    assert sum(value.numel() for value in official.parameters()) > 60 * counts["Mixed_5c"]
    for module in taps.values():
        assert not list(module.buffers())
        assert not any(isinstance(part, nn.BatchNorm1d | nn.BatchNorm3d) for part in module.modules())


def test_the_kind_is_told_by_names():
    for kind in ("official", "lite"):
        network = Detector("top-i3d", 2, length=128, crop=32, width=0.0625, attention=kind)
        assert attention_kind(network.state_dict()) == kind
        assert attention_kind([name for name in network.state_dict() if "Mixed_4f.w" not in name]) == kind
    plain = Detector("top-i3d", 2, length=128, crop=32, width=0.0625, attention=None)
    assert attention_kind(plain.state_dict()) is None
    assert not set(dict(LiteAttention(8).named_children())) & set(
        dict(Attention((8, 2, 2, 2), 8).named_children())
    )


def test_a_recognizer_with_it_takes_other_clips_than_it_was_built_for():
    """Neither pooling nor classifier are bound; the official attention is."""
    clip = torch.rand(2, 3, 40, 64, 64)
    network = Recognizer("top-i3d", 5, length=16, crop=32, width=0.0625, attention="lite").eval()
    again = Recognizer("top-i3d", 5, length=40, crop=64, width=0.0625, attention="lite").eval()
    again.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert network.time_logits(clip).shape == (2, 5, 4)
        torch.testing.assert_close(network(clip), again(clip))
        bound = Recognizer("top-i3d", 5, length=16, crop=32, width=0.0625).eval()
        with pytest.raises(AssertionError):
            bound(clip)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_the_graph_of_lite_equals_the_module(tmp_path: Path, length):
    module, feature = lite().eval(), torch.rand(2, 64, length, 3, 3)
    assert_graph_equals(module, feature, tmp_path / "lite.onnx")


@pytest.mark.parametrize("task", ["recognition"])  # detection, on whole videos: tests/cli
def test_the_graph_of_a_network_with_lite_equals_it(tmp_path: Path, task):
    torch.manual_seed(0)
    options = {"crop": 32, "width": 0.0625, "attention": "lite"}
    if task == "recognition":
        network: nn.Module = Recognizer("top-i3d", 3, length=16, **options)
    else:
        network = Detector("top-i3d", 3, length=128, **options)
    clip = torch.randn(2, 3, 16 if task == "recognition" else 128, 32, 32)
    settle(network, clip)
    # on the detector's last levels a group norm has a handful of values, which magnifies rounding
    assert_graph_equals(network, clip, tmp_path / "network.onnx", 1e-3 if task == "recognition" else 1e-2)


def assert_graph_equals(module: nn.Module, given: Tensor, path: Path, rtol: float = 1e-3) -> None:
    """The graph computes what the module does, for other batch sizes too."""
    batch = {0: torch.export.Dim("batch")}
    torch.onnx.export(module, (given,), path, dynamo=True, dynamic_shapes=(batch,), verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for clips in (given, torch.cat([given, given.flip(2)[:1]])):
        with torch.no_grad():
            wanted = module(clips)
        found = session.run(None, {session.get_inputs()[0].name: clips.numpy()})
        for ours, theirs in zip((wanted,) if isinstance(wanted, Tensor) else wanted, found, strict=True):
            np.testing.assert_allclose(theirs, ours.numpy(), rtol=rtol, atol=1e-5)
