"""The attention map against the published chain of layers, and the attended feature."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gkdcli.models.attention import Attention, attend


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
