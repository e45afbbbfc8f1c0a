"""The units the networks are built of: "same" padding, convolution with batch norm, pooling, widths."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Size3 = tuple[int, int, int]
BATCH_NORMS = (nn.BatchNorm3d, nn.SyncBatchNorm)  # the second knows the clips of all processes
# Channels innermost: on CPU max pools vectorise over them.
LAYOUT = torch.channels_last_3d
_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def scaled(channels: int, width: float) -> int:
    """A channel count under the width multiplier, at least 1."""
    return max(1, round(channels * width))


def groups(channels: int) -> int:
    """Groups of a group norm: the largest divisor of `channels` not above 32 (METHOD.md 2)."""
    return max(count for count in range(1, min(32, channels) + 1) if channels % count == 0)


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Elements (before, after) one axis so that the output has ceil(size / stride) of them.

    TensorFlow's rule: an odd total puts the extra element at the end (METHOD.md 1).
    """
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def max_pool(x: Tensor, kernel: Size3, stride: Size3) -> Tensor:
    """Max pooling with "same" padding of zeros, for x >= 0 of shape (B, C, T, H, W).

    The pool's own padding (minus infinity) equals zeros where nothing is negative, and every pool of the
    networks follows a ReLU; `ceil_mode` supplies the odd element at the end. So no padded copy is made.
    """
    before = [same_padding(size, k, s)[0] for size, k, s in zip(x.shape[2:], kernel, stride, strict=True)]
    if x.device.type != "cpu":
        return F.max_pool3d(x, kernel, stride, before, ceil_mode=True)
    # Seven times as fast in this layout, which pays for the way there and back.
    if not (torch.is_grad_enabled() and x.requires_grad):
        pooled = F.max_pool3d(x.contiguous(memory_format=LAYOUT), kernel, stride, before, ceil_mode=True)
        return pooled.contiguous() if x.is_contiguous() else pooled
    # Where gradients take it too, it pays for the smaller pictures, of many channels.
    if x.is_contiguous() and x.shape[3] * x.shape[4] <= 1024 and not torch.compiler.is_compiling():
        return _Pool.apply(x, kernel, stride, before)  # type: ignore[no-any-return]
    return F.max_pool3d(x, kernel, stride, before, ceil_mode=True)


class _Pool(torch.autograd.Function):
    """Max pooling there with channels innermost, and back with channels outermost, as x is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Size3, stride: Size3, before: list[int]) -> Tensor:
        inner = x.contiguous(memory_format=LAYOUT)
        pooled, places = torch.ops.aten.max_pool3d_with_indices(
            inner, kernel, stride, before, [1, 1, 1], True
        )
        ctx.save_for_backward(x, places.to(torch.int32).contiguous())  # places within one channel of one clip
        ctx.pool = kernel, stride, before
        found: Tensor = pooled.contiguous()
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        x, places = ctx.saved_tensors
        of_x = torch.ops.aten.max_pool3d_with_indices_backward(
            gradients[0].contiguous(), x, *ctx.pool, [1, 1, 1], True, places.long()
        )
        return of_x, None, None, None


def convolve(x: Tensor, weight: Tensor, stride: Size3, padding: list[int]) -> Tensor:
    """conv3d without bias; where a CPU learns from it, with a faster way back.

    Args:
        x: (B, in, T, H, W).
        weight: (out, in, t, h, w).
        stride: along T, H, W.
        padding: at either side of each.
    """
    learns = torch.is_grad_enabled() and x.requires_grad and weight.requires_grad
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous()
    traced = torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
    same = stride == (1, 1, 1) and [2 * before + 1 for before in padding] == list(weight.shape[2:])
    if learns and plain and same and not traced and _ONEDNN:
        return _Convolution.apply(x, weight, padding)  # type: ignore[no-any-return]
    return F.conv3d(x, weight, None, stride, padding)


class _Convolution(torch.autograd.Function):
    """A convolution of stride 1 and "same" padding, whose input gradient is a convolution as well.

    oneDNN's own takes half as long again; and for few channels PyTorch does not ask oneDNN at all, which
    takes three times as long.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, padding: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return _onednn(x, weight, padding)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        mirrored = weight.flip(2, 3, 4).transpose(0, 1)  # (in, out, t, h, w)
        one, none = [1, 1, 1], [0, 0, 0]
        _, of_weight, _ = torch.ops.aten.convolution_backward(
            gradient, x, weight, None, one, ctx.padding, one, False, none, 1, [False, True, False]
        )
        return _onednn(gradient, mirrored, ctx.padding), of_weight, None


def _onednn(x: Tensor, weight: Tensor, padding: list[int]) -> Tensor:
    one = [1, 1, 1]
    found: Tensor = torch.ops.aten.mkldnn_convolution(x, weight, None, padding, one, one, 1)
    return found


def recomputed(block: nn.Module, x: Tensor) -> Tensor:
    """`block(x)` of which backward keeps the input alone and computes the rest again, to the same bits.

    Where no gradient is wanted this is a plain call.
    """
    if not torch.is_grad_enabled():
        return call(block, x)
    found: Tensor = checkpoint(
        block,
        x,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _copied_statistics(block)),
    )
    return found


@contextlib.contextmanager
def _copied_statistics(block: nn.Module) -> Iterator[None]:
    """Batch norm moves copies of its running statistics: those themselves have seen this batch already."""
    norms = [module for module in block.modules() if isinstance(module, BATCH_NORMS)]
    buffers = [(norm, dict(norm.named_buffers(recurse=False))) for norm in norms]
    for norm, own in buffers:
        for name, value in own.items():
            setattr(norm, name, value.clone())
    try:
        yield
    finally:
        for norm, own in buffers:
            for name, value in own.items():
                setattr(norm, name, value)


def call(block: nn.Module, x: Tensor) -> Tensor:
    """`block(x)`."""
    found: Tensor = block(x)
    return found


class Unit(nn.Module):
    """conv3d without bias, "same" padding, batch norm (eps 1e-3, momentum 0.01), ReLU (METHOD.md 1).

    (B, in, T, H, W) -> (B, out, ceil(T / st), ceil(H / sh), ceil(W / sw)).
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: Size3 = (1, 1, 1), stride: Size3 = (1, 1, 1)
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.stride = stride
        self.conv3d = nn.Conv3d(inputs, outputs, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(outputs, eps=1e-3, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the unit."""
        pads = [same_padding(n, k, s) for n, k, s in zip(x.shape[2:], self.kernel, self.stride, strict=True)]
        if any(before != after for before, after in pads):
            # Only the first layer on an even size comes here, and its input is small (2 or 3 channels).
            x = F.pad(x, [amount for pair in reversed(pads) for amount in pair])
            pads = [(0, 0)] * 3
        x = convolve(x, self.conv3d.weight, self.stride, [before for before, _ in pads])
        return F.relu(self.bn(x), inplace=True)


def collapse(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """A convolution whose kernel 1xHxW spans the picture: (B, C, T, H, W) -> (B, out, T).

    Computed as the matrix product it is, some ten times as fast as the convolution on CPU. The kernel, which
    is large, stays as it lies in memory; the feature, which is small, is copied.
    """
    assert tuple(x.shape[3:]) == conv.kernel_size[1:], (x.shape, conv)
    rows = x.transpose(1, 2).flatten(2)  # (B, T, C * H * W)
    return F.linear(rows, conv.weight.flatten(1), conv.bias).transpose(1, 2)


def spread(conv: nn.ConvTranspose3d, x: Tensor) -> Tensor:
    """The transposed convolution of kernel 1xHxW on a picture of one pixel: (B, C, T) -> (B, out, T, H, W).

    A matrix product too, see `collapse`.
    """
    rows = x.transpose(1, 2) @ conv.weight.flatten(1)  # (B, T, out * H * W)
    picture = rows.view(*rows.shape[:2], conv.out_channels, *conv.kernel_size[1:]).transpose(1, 2)
    if conv.bias is not None:
        picture = picture + conv.bias[:, None, None, None]
    return picture


def initialise(module: nn.Module) -> None:
    """The stated initialisation, for attention and CVAE (recipe `corrected`; METHOD.md 4 and 8 (11)).

    Convolutions: Xavier-uniform, zero bias; group norms: 1 and 0. Linear layers keep PyTorch's default, and
    so does a backbone: call this on the attention and the CVAE, not on the whole network.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv1d | nn.Conv3d | nn.ConvTranspose3d):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.GroupNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
