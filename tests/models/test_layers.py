"""Padding, pooling and full-extent convolutions against slow, obvious code."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkdcli.models.layers import (
    LAYOUT,
    Unit,
    collapse,
    convolve,
    folded,
    groups,
    initialise,
    max_pool,
    pool_by_axes,
    same_padding,
    scaled,
    spread,
)


def windows(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]):
    """Yields (output position, window of x) in TensorFlow's "same" fashion; zeros outside."""
    sizes = x.shape[2:]
    outputs = [-(-n // s) for n, s in zip(sizes, stride, strict=True)]
    starts = [
        max((o - 1) * s + k - n, 0) // 2 for o, s, k, n in zip(outputs, stride, kernel, sizes, strict=True)
    ]
    for position in itertools.product(*map(range, outputs)):
        window = torch.zeros(*x.shape[:2], *kernel)
        for offset in itertools.product(*map(range, kernel)):
            at = [p * s - b + d for p, s, b, d in zip(position, stride, starts, offset, strict=True)]
            if all(0 <= i < n for i, n in zip(at, sizes, strict=True)):
                window[:, :, *offset] = x[:, :, *at]
        yield position, window


@pytest.mark.parametrize(("channels", "expected"), [(1, 1), (32, 32), (48, 24), (832, 32), (66, 22), (37, 1)])
def test_groups_is_the_largest_divisor_not_above_32(channels, expected):
    assert groups(channels) == expected


def test_scaled_never_reaches_zero():
    assert [scaled(64, w) for w in (1.0, 0.25, 0.001)] == [64, 16, 1]


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "expected"),
    [(224, 7, 2, (2, 3)), (225, 7, 2, (3, 3)), (112, 3, 2, (0, 1)), (7, 3, 1, (1, 1)), (8, 2, 2, (0, 0))],
)
def test_same_padding_puts_the_odd_element_at_the_end(size, kernel, stride, expected):
    assert same_padding(size, kernel, stride) == expected


CASES = [
    ((7, 7, 7), (2, 2, 2), (6, 9, 8)),
    ((1, 7, 7), (2, 2, 2), (5, 8, 7)),
    ((1, 3, 3), (1, 2, 2), (3, 6, 5)),
    ((3, 3, 3), (2, 2, 2), (4, 5, 6)),
    ((2, 2, 2), (2, 2, 2), (5, 4, 3)),
    ((3, 3, 3), (1, 1, 1), (2, 3, 1)),
]


@pytest.mark.parametrize(("kernel", "stride", "size"), CASES)
def test_unit_equals_the_slow_convolution(kernel, stride, size):
    torch.manual_seed(0)
    unit = Unit(2, 3, kernel, stride).eval()
    unit.bn.running_mean.normal_()
    unit.bn.running_var.uniform_(0.5, 2.0)
    x = torch.randn(2, 2, *size)
    got = unit(x)
    for position, window in windows(x, kernel, stride):
        raw = torch.einsum("bcijk,ocijk->bo", window, unit.conv3d.weight)
        mean, variance = unit.bn.running_mean, unit.bn.running_var
        wanted = torch.relu((raw - mean) / torch.sqrt(variance + 1e-3))
        torch.testing.assert_close(got[:, :, *position], wanted, rtol=1e-4, atol=1e-5)
    assert tuple(got.shape[2:]) == tuple(-(-n // s) for n, s in zip(size, stride, strict=True))


@pytest.mark.parametrize(("kernel", "stride", "size"), CASES[2:])
def test_max_pool_equals_the_slow_zero_padded_pool(kernel, stride, size):
    torch.manual_seed(0)
    x = torch.relu(torch.randn(2, 3, *size))
    got = max_pool(x, kernel, stride)
    positions = list(windows(x, kernel, stride))
    assert got[0, 0].numel() == len(positions)
    for position, window in positions:
        assert torch.equal(got[:, :, *position], window.flatten(2).amax(dim=2))


@pytest.mark.parametrize(("kernel", "stride", "size"), CASES[2:])
def test_the_faster_pool_sends_gradients_where_pytorchs_does(kernel, stride, size):
    torch.manual_seed(0)
    x = torch.relu(torch.randn(2, 5, *size)).round(decimals=1).requires_grad_()  # with equal maxima
    before = [same_padding(n, k, s)[0] for n, k, s in zip(size, kernel, stride, strict=True)]
    got, wanted = max_pool(x, kernel, stride), F.max_pool3d(x, kernel, stride, before, ceil_mode=True)
    assert "_Pool" in type(got.grad_fn).__name__
    assert torch.equal(got, wanted)
    gradient = torch.randn_like(got)
    assert torch.equal(*(torch.autograd.grad(pooled, x, gradient)[0] for pooled in (got, wanted)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAYOUT])
@pytest.mark.parametrize(("kernel", "stride", "size"), CASES[2:])
def test_pooling_by_axes_as_on_gpus_is_pooling_and_keeps_the_layout(kernel, stride, size, layout):
    torch.manual_seed(0)
    x = torch.relu(torch.randn(2, 5, *size)).contiguous(memory_format=layout).requires_grad_()
    before = [same_padding(n, k, s)[0] for n, k, s in zip(size, kernel, stride, strict=True)]
    got = pool_by_axes(x, kernel, stride, before)
    wanted = F.max_pool3d(x, kernel, stride, before, ceil_mode=True)
    assert torch.equal(got, wanted)
    assert got.is_contiguous(memory_format=layout)
    gradient = torch.randn_like(got)
    ours, theirs = (torch.autograd.grad(pooled, x, gradient)[0] for pooled in (got, wanted))
    taken = x > 0  # of equal maxima each takes another, and these are zeros that ReLU lets nothing through
    torch.testing.assert_close(ours[taken], theirs[taken])


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAYOUT])
@pytest.mark.parametrize(
    ("kernel", "stride", "size"),
    [
        ((7, 7, 7), (2, 2, 2), (21, 37, 36)),
        ((1, 7, 7), (1, 2, 2), (5, 20, 21)),
        ((3, 3, 3), (1, 2, 2), (7, 9, 9)),
    ],
)
def test_a_convolution_on_blocks_as_on_gpus_is_that_convolution(kernel, stride, size, layout):
    torch.manual_seed(0)
    x, weight = (
        torch.randn(*shape, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
        for shape in ((2, 3, *size), (5, 3, *kernel))
    )
    got, wanted = folded(x, weight, stride), F.conv3d(x, weight, None, stride)
    torch.testing.assert_close(got, wanted)
    gradient = torch.randn_like(wanted)
    pairs = (torch.autograd.grad(y, (x, weight), gradient) for y in (got, wanted))
    for found, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("kernel", "inputs"), [((1, 3, 3), 3), ((3, 3, 3), 70), ((1, 1, 1), 5)])
def test_the_faster_way_back_of_a_convolution_gives_its_gradients(kernel, inputs):
    torch.manual_seed(0)
    x, weight = torch.randn(2, inputs, 4, 9, 7), torch.randn(6, inputs, *kernel)
    padding = [size // 2 for size in kernel]
    ours = [value.clone().requires_grad_() for value in (x, weight)]
    theirs = [value.double().requires_grad_() for value in (x, weight)]
    got, wanted = (
        convolve(*ours, (1, 1, 1), padding),
        F.conv3d(*theirs, None, 1, padding),
    )
    assert "_Convolution" in type(got.grad_fn).__name__
    gradient = torch.randn_like(got)
    pairs = zip(
        (got, *torch.autograd.grad(got, ours, gradient)),
        (wanted, *torch.autograd.grad(wanted, theirs, gradient.double())),
        strict=True,
    )
    for found, expected in pairs:
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAYOUT])
def test_full_extent_convolutions_equal_the_convolutions_they_replace(layout):
    torch.manual_seed(0)
    conv = nn.Conv3d(6, 5, (1, 3, 4)).to(memory_format=layout)
    back = nn.ConvTranspose3d(5, 6, (1, 3, 4)).to(memory_format=layout)
    x = torch.randn(2, 6, 7, 3, 4).contiguous(memory_format=layout)
    low = collapse(conv, x)
    torch.testing.assert_close(low, conv(x)[..., 0, 0])
    torch.testing.assert_close(spread(back, low), back(low[..., None, None]))


def test_batch_norm_uses_tensorflows_figures():
    unit = Unit(1, 1)
    assert (unit.bn.eps, unit.bn.momentum, unit.conv3d.bias) == (1e-3, 0.01, None)


def test_initialise_reaches_convolutions_and_group_norms_and_spares_linear_layers():
    torch.manual_seed(0)
    module = nn.ModuleDict(
        {
            "conv": nn.Conv3d(8, 8, (1, 3, 3)),
            "norm": nn.GroupNorm(4, 8),
            "back": nn.ConvTranspose3d(8, 8, (1, 3, 3)),
            "line": nn.Conv1d(8, 8, 3),
            "fc": nn.Linear(8, 8),
        }
    )
    fc = module["fc"].weight.clone()
    nn.init.normal_(module["norm"].weight)
    initialise(module)
    assert torch.equal(module["fc"].weight, fc)
    assert torch.equal(module["norm"].weight, torch.ones(8))
    for name, receptive in (("conv", 9), ("back", 9), ("line", 3)):
        bound = (6 / (8 * receptive * 2)) ** 0.5  # Xavier: sqrt(6 / (fan in + fan out))
        weight = module[name].weight
        assert 0.9 * bound < weight.abs().max() <= bound
        assert not module[name].bias.any()


def test_max_pool_of_a_layer_that_follows_relu_loses_nothing_to_its_minus_infinity_padding():
    x = torch.zeros(1, 1, 1, 3, 3)
    assert torch.equal(max_pool(x, (3, 3, 3), (2, 2, 2)), F.max_pool3d(F.pad(x, [1] * 6), 3, 2))
