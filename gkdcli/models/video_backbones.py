"""torchvision's Kinetics video networks behind the tap of an I3D, so that any two kinds fit each other."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import video

from gkdcli.models.layers import Size3, Unit, call

# kind -> children of torchvision's network that make up the trunk, and the channels it ends with
TRUNKS = {
    "r3d_18": (("stem", "layer1", "layer2", "layer3", "layer4"), 512),
    "mc3_18": (("stem", "layer1", "layer2", "layer3", "layer4"), 512),
    "r2plus1d_18": (("stem", "layer1", "layer2", "layer3", "layer4"), 512),
    "s3d": (("features",), 1024),
}


def related(kind: str, other: str) -> bool:
    """Whether tensors of equal names mean the same in backbones of both kinds.

    r2plus1d_18 shares names of batch norms with r3d_18, but they follow other convolutions.
    """
    if kind in TRUNKS or other in TRUNKS:
        return kind == other or {kind, other} == {"r3d_18", "mc3_18"}
    return True


def pool_to(x: Tensor, size: Size3) -> Tensor:
    """Adaptive average pooling, (B, C, T, H, W) -> (B, C, *size), in operations that every exporter knows.

    An axis that divides is pooled by kernel = stride; the bins of any other are averaged one by one.
    """
    kernel = [
        have // wanted if have % wanted == 0 else 1 for have, wanted in zip(x.shape[2:], size, strict=True)
    ]
    if max(kernel) > 1:
        x = F.avg_pool3d(x, kernel)
    for axis, wanted in enumerate(size, start=2):
        have = x.shape[axis]
        if have != wanted:
            ends = [(i * have // wanted, -(-(i + 1) * have // wanted)) for i in range(wanted)]
            bins = [x.narrow(axis, start, end - start).mean(axis, keepdim=True) for start, end in ends]
            x = torch.cat(bins, dim=axis)
    return x


class VideoBackbone(nn.Module):
    """`r3d_18`, `mc3_18`, `r2plus1d_18` or `s3d` without its classifier, giving the tap `Mixed_5c`.

    The trunk has torchvision's sizes and names (`stem.0.weight`, `features.0.0.0.weight`), so that its files
    load by name. What it ends with is brought to the tap's shape: average pooling where time or picture
    differ, then a 1x1x1 unit (`to_tap`) where the channels do. The unit ends in a ReLU as I3D does: the
    attended feature is a share of a sum (`attention.attend`), which must not be negative. Where nothing
    differs nothing is added.

    Args:
        kind: one of `TRUNKS`.
        channels: of the clip: 3 for rgb; any other number gets a first convolution of its own.
        tap_shape: (C, T', H, W) of the tap, see `i3d.tap_shape`.
        layout: in which clips and kernels lie in memory.
    """

    def __init__(
        self,
        kind: str,
        channels: int,
        tap_shape: tuple[int, int, int, int],
        layout: torch.memory_format = torch.contiguous_format,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.children_of_trunk, ends_with = TRUNKS[kind]
        whole = getattr(video, kind)(weights=None)  # never downloads
        for name in self.children_of_trunk:
            self.add_module(name, whole.get_submodule(name))
        if channels != 3:
            self._replace_first_convolution(channels)
        self.size: Size3 = tap_shape[1:]
        self.to_tap = Unit(ends_with, tap_shape[0]) if ends_with != tap_shape[0] else nn.Identity()
        self.layout = layout
        self.run = call  # how a block is run
        self.to(memory_format=layout)

    def first_convolution(self) -> str:
        """Its name: the one layer that depends on the clip's channels."""
        names = (name for name, part in self.named_modules() if isinstance(part, nn.Conv3d))
        return str(next(names))

    def _replace_first_convolution(self, channels: int) -> None:
        name = self.first_convolution()
        old: Any = self.get_submodule(name)
        new = nn.Conv3d(channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=False)
        parent, _, child = name.rpartition(".")
        setattr(self.get_submodule(parent), child, new)

    def forward(self, clip: Tensor) -> dict[str, Tensor]:
        """(B, channels, T, H, W) -> {"Mixed_5c": (B, C, T', H', W')}."""
        x = clip.contiguous(memory_format=self.layout)
        for name in self.children_of_trunk:
            part = self.get_submodule(name)
            blocks: Any = [part] if name == "stem" else part  # its last layer works in place
            for block in blocks:
                x = self.run(block, x)
        return {"Mixed_5c": self.to_tap(pool_to(x, self.size))}
