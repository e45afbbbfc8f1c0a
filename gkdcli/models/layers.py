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
    learns = torch.is_grad_enabled() and x.requires_grad
    if x.device.type == "cuda":
        # with gradients, seen on an H100: 1.2 to 3 times as fast where it moves by one, and slower elsewhere
        if (stride == (1, 1, 1) or not learns) and x.numel() < 2**31:  # the most that its kernels count to
            return pool_by_axes(x, kernel, stride, before)
        return F.max_pool3d(x, kernel, stride, before, ceil_mode=True)
    # Seven times as fast in this layout, which pays for the way there and back.
    if not learns:
        pooled = F.max_pool3d(x.contiguous(memory_format=LAYOUT), kernel, stride, before, ceil_mode=True)
        return pooled.contiguous() if x.is_contiguous() else pooled
    # Where gradients take it too, it pays for the smaller pictures, of many channels.
    if x.is_contiguous() and x.shape[3] * x.shape[4] <= 1024 and not torch.compiler.is_compiling():
        return _Pool.apply(x, kernel, stride, before)  # type: ignore[no-any-return]
    return F.max_pool3d(x, kernel, stride, before, ceil_mode=True)


def pool_by_axes(x: Tensor, kernel: Size3, stride: Size3, before: list[int]) -> Tensor:
    """Max pooling within the pictures, then along time: GPUs have faster kernels for two axes than for three.

    Args:
        x: (B, C, T, H, W), in either layout, which the result has too.
        kernel: along T, H, W.
        stride: likewise.
        before: padding at the start of each.
    """
    batch, _, time, height, width = x.shape
    outer = x.is_contiguous()
    if kernel[1:] != (1, 1):
        pictures = x.flatten(1, 2) if outer else x.transpose(1, 2).flatten(0, 1)
        pictures = F.max_pool2d(pictures, kernel[1:], stride[1:], before[1:], ceil_mode=True)
        height, width = pictures.shape[2:]
        if outer:
            x = pictures.view(batch, -1, time, height, width)
        else:
            x = pictures.view(batch, time, -1, height, width).transpose(1, 2)
    if kernel[0] == 1 == stride[0]:
        return x
    lines = F.max_pool2d(x.flatten(3), (kernel[0], 1), (stride[0], 1), (before[0], 0), ceil_mode=True)
    return lines.view(*lines.shape[:3], height, width)


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
    if x.device.type == "cuda" and x.shape[1] < 4 and max(stride) > 1 and not any(padding):
        if torch.is_autocast_enabled("cuda"):  # moved in fewer bytes
            x = x.to(torch.get_autocast_dtype("cuda"))
        if not weight.is_contiguous():  # the layout of the network
            x = x.contiguous(memory_format=LAYOUT)
        return folded(x, weight, stride)
    learns = torch.is_grad_enabled() and x.requires_grad and weight.requires_grad
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous()
    traced = torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
    same = stride == (1, 1, 1) and [2 * before + 1 for before in padding] == list(weight.shape[2:])
    if learns and plain and same and not traced and _ONEDNN:
        return _Convolution.apply(x, weight, padding)  # type: ignore[no-any-return]
    return F.conv3d(x, weight, None, stride, padding)


def folded(x: Tensor, weight: Tensor, stride: Size3) -> Tensor:
    """conv3d without bias and padding, as one of stride 1 whose channels are blocks of `stride` px.

    GPUs multiply 8 channels and more at once; of the 2 or 3 of a clip they make next to nothing: on an H100
    the teacher's first convolution takes a fifth of the time this way.

    Args:
        x: (B, in, T, H, W).
        weight: (out, in, t, h, w).
        stride: along T, H, W.
    """
    kernel, axes = weight.shape[2:], range(3)
    blocks = [-(-kernel[n] // stride[n]) for n in axes]
    ends = [((x.shape[2 + n] - kernel[n]) // stride[n] + blocks[n]) * stride[n] for n in axes]
    x = _blocks(x, ends, stride)
    weight = _blocks(weight, [blocks[n] * stride[n] for n in axes], stride)
    return F.conv3d(x, weight)


def _blocks(x: Tensor, ends: list[int], sides: Size3) -> Tensor:
    """(N, C, T, H, W), cut or padded to `ends` -> (N, C * t * h * w, T / t, H / h, W / w), in its layout."""
    inner = not x.is_contiguous()
    x = F.pad(x, [amount for n in (2, 1, 0) for amount in (0, ends[n] - x.shape[2 + n])])
    for axis in (4, 3, 2):
        shape = (*x.shape[:axis], -1, sides[axis - 2], *x.shape[axis + 1 :])
        x = x.view(shape)  # at last (N, C, T/t, t, H/h, h, W/w, w)
    if inner:
        return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).movedim(-1, 1)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


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
