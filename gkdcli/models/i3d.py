"""I3D and its lighter siblings out of one builder (METHOD.md 1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from gkdcli.models.layers import LAYOUT, Size3, Unit, call, max_pool, scaled

KINDS = ("i3d", "top-i3d", "bottom-i3d", "i2d")


class Pool(NamedTuple):
    """One max pool between blocks: the same in every kind."""

    kernel: Size3
    stride: Size3


# Branch widths of the inception blocks: b0, b1a, b1b, b2a, b2b, b3b.
MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
POOLS = {
    "MaxPool3d_2a_3x3": Pool((1, 3, 3), (1, 2, 2)),
    "MaxPool3d_3a_3x3": Pool((1, 3, 3), (1, 2, 2)),
    "MaxPool3d_4a_3x3": Pool((3, 3, 3), (2, 2, 2)),
    "MaxPool3d_5a_2x2": Pool((2, 2, 2), (2, 2, 2)),
}
ENDPOINTS = (
    "Conv3d_1a_7x7",
    "MaxPool3d_2a_3x3",
    "Conv3d_2b_1x1",
    "Conv3d_2c_3x3",
    "MaxPool3d_3a_3x3",
    "Mixed_3b",
    "Mixed_3c",
    "MaxPool3d_4a_3x3",
    "Mixed_4b",
    "Mixed_4c",
    "Mixed_4d",
    "Mixed_4e",
    "Mixed_4f",
    "MaxPool3d_5a_2x2",
    "Mixed_5b",
    "Mixed_5c",
)
# Strides of the taps in time and in space, relative to the clip.
TAP_STRIDES = {"Mixed_4f": (4, 16), "Mixed_5c": (8, 32)}


def tap_shape(tap: str, length: int, crop: int, width: float = 1.0) -> tuple[int, int, int, int]:
    """Shape (C, T', H, W) of a tap for clips of `length` frames and `crop` x `crop` pixels."""
    b0, _, b1b, _, b2b, b3b = (scaled(branch, width) for branch in MIXED[tap])
    time, space = TAP_STRIDES[tap]
    side = -(-crop // space)
    return b0 + b1b + b2b + b3b, -(-length // time), side, side


def is_spatial(kind: str, endpoint: str) -> bool:
    """Whether the convolutions of `endpoint` see one frame at a time in a backbone of this kind."""
    upper = ENDPOINTS.index(endpoint) > ENDPOINTS.index("Mixed_4c")
    match kind:
        case "i3d":
            return False
        case "top-i3d":
            return not upper
        case "bottom-i3d":
            return upper
        case "i2d":
            return True
        case _:
            raise AssertionError(f"no backbone is called {kind}")


def layout_of(channels_last: Literal["auto", "on", "off"], width: float) -> torch.memory_format:
    """The memory layout that `train.channels_last` means for a backbone of this width."""
    # Narrow networks train a third faster on CPU with channels innermost. Wide ones do not, and PyTorch's
    # batch statistics are less exact there (1e-4 of the standard deviation over 400 000 elements).
    innermost = width < 0.5 if channels_last == "auto" else channels_last == "on"
    return LAYOUT if innermost else torch.contiguous_format


class Inception(nn.Module):
    """Branches 1x1, 1x1 then 3x3x3 (twice), pool then 1x1, side by side; `time` replaces the first 3."""

    def __init__(self, inputs: int, branches: tuple[int, ...], time: int) -> None:
        super().__init__()
        b0, b1a, b1b, b2a, b2b, b3b = branches
        self.window: Size3 = (time, 3, 3)
        self.b0 = Unit(inputs, b0)
        self.b1a = Unit(inputs, b1a)
        self.b1b = Unit(b1a, b1b, self.window)
        self.b2a = Unit(inputs, b2a)
        self.b2b = Unit(b2a, b2b, self.window)
        self.b3b = Unit(inputs, b3b)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, b0 + b1b + b2b + b3b, T, H, W)."""
        pooled = max_pool(x, self.window, (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], dim=1)


class I3D(nn.Module):
    """Inception-v1 inflated to 3D, or a sibling with spatial convolutions below, above or throughout.

    Sub-modules carry the public names (`Conv3d_1a_7x7.conv3d.weight`, `Mixed_3b.b1a.bn.running_mean`, ...).

    Args:
        kind: one of `KINDS`.
        channels: of the clip: 3 for rgb, 2 for flow.
        width: multiplies every channel count inside.
        layout: in which clips and kernels lie in memory; None for what is fastest on CPU.
    """

    def __init__(
        self, kind: str, channels: int = 3, width: float = 1.0, layout: torch.memory_format | None = None
    ) -> None:
        super().__init__()
        assert kind in KINDS, kind
        self.kind = kind
        stem = scaled(64, width)
        for name in ENDPOINTS:
            time = 1 if is_spatial(kind, name) else 3
            match name:
                case "Conv3d_1a_7x7":
                    block: nn.Module = Unit(channels, stem, (1 if time == 1 else 7, 7, 7), (2, 2, 2))
                    channels = stem
                case "Conv3d_2b_1x1":
                    block = Unit(channels, stem)
                case "Conv3d_2c_3x3":
                    block = Unit(channels, scaled(192, width), (time, 3, 3))
                    channels = scaled(192, width)
                case _ if name in MIXED:
                    branches = tuple(scaled(branch, width) for branch in MIXED[name])
                    block = Inception(channels, branches, time)
                    channels = branches[0] + branches[2] + branches[4] + branches[5]
                case _:
                    continue
            self.add_module(name, block)
        self.layout = layout or layout_of("auto", width)
        self.run = call  # how a block is run
        self.to(memory_format=self.layout)

    def endpoints(self, clip: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yields the 16 named feature maps of a clip (B, channels, T, H, W), bottom first."""
        x = clip.contiguous(memory_format=self.layout)
        for name in ENDPOINTS:
            pool = POOLS.get(name)
            x = max_pool(x, *pool) if pool else self.run(self.get_submodule(name), x)
            yield name, x

    def forward(self, clip: Tensor) -> dict[str, Tensor]:
        """The taps `Mixed_4f` (B, 832, T/4, H/16, W/16) and `Mixed_5c` (B, 1024, T/8, H/32, W/32)."""
        return {name: x for name, x in self.endpoints(clip) if name in TAP_STRIDES}
