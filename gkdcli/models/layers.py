"""The units the networks are built of: "same" padding, convolution with batch norm, pooling, widths."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Size3 = tuple[int, int, int]
BATCH_NORMS = (nn.BatchNorm3d, nn.SyncBatchNorm)  # the second knows the clips of all processes
# Channels innermost. On CPU max pools vectorise over them, and full-extent kernels become plain matrices.
LAYOUT = torch.channels_last_3d


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
    if x.requires_grad or x.device.type != "cpu":
        return F.max_pool3d(x, kernel, stride, before, ceil_mode=True)
    # Seven times as fast in this layout, which pays for the way there and back unless gradients take it too.
    pooled = F.max_pool3d(x.contiguous(memory_format=LAYOUT), kernel, stride, before, ceil_mode=True)
    return pooled.contiguous() if x.is_contiguous() else pooled


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
        x = F.conv3d(x, self.conv3d.weight, None, self.stride, [before for before, _ in pads])
        return F.relu(self.bn(x), inplace=True)


def collapse(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """A convolution whose kernel 1xHxW spans the picture: (B, C, T, H, W) -> (B, out, T).

    Computed as the matrix product it is, some ten times as fast as the convolution on CPU. Nothing is copied
    where kernel and x lie in memory as `LAYOUT` has it.
    """
    assert tuple(x.shape[3:]) == conv.kernel_size[1:], (x.shape, conv)
    rows = x.permute(0, 2, 3, 4, 1).flatten(2)  # (B, T, H * W * C)
    kernel = conv.weight.permute(0, 2, 3, 4, 1).flatten(1)  # (out, H * W * C)
    return F.linear(rows, kernel, conv.bias).transpose(1, 2)


def spread(conv: nn.ConvTranspose3d, x: Tensor) -> Tensor:
    """The transposed convolution of kernel 1xHxW on a picture of one pixel: (B, C, T) -> (B, out, T, H, W).

    A matrix product too, see `collapse`.
    """
    kernel = conv.weight.permute(0, 2, 3, 4, 1)  # (C, 1, H, W, out)
    rows = x.transpose(1, 2) @ kernel.flatten(1)  # (B, T, H * W * out)
    picture = rows.view(*rows.shape[:2], *kernel.shape[2:])  # (B, T, H, W, out)
    if conv.bias is not None:
        picture = picture + conv.bias
    return picture.permute(0, 4, 1, 2, 3)


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
