"""The attention map of a tap, and the feature it leaves (METHOD.md 2)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkdcli.models.layers import collapse, groups, scaled

AttentionKind = Literal["official", "lite"]
STEEPNESS = 8.0  # of the lite map's sigmoid


def build_attention(kind: AttentionKind, tap_shape: tuple[int, int, int, int], width: float) -> nn.Module:
    """The attention of a tap of shape (C, T', H, W); `width` scales what lies within the official one."""
    return LiteAttention(tap_shape[0]) if kind == "lite" else Attention(tap_shape, scaled(512, width))


def attention_kind(names: Iterable[str]) -> AttentionKind | None:
    """Whose tensors these are (`attention.Mixed_5c.squeeze.weight`); None where none is of an attention."""
    parts = {name.split(".")[2] for name in names if re.match(r"attention\.\w+\.\w", name)}
    if not parts:
        return None
    return "lite" if parts <= {name for name, _ in LiteAttention(8).named_children()} else "official"


class Attention(nn.Module):
    """The official one: maps a tap's feature to a map in (0, 1) per channel and time step.

    As published: convolution over the whole picture to (B, hidden, T'), group norm, ReLU; time stretched to
    length C (nearest); convolution 3 over time to C channels, group norm, ReLU; a linear layer on the time
    axis, C -> T'; sigmoid. So it is bound to the clip length and the crop it was built for.

    The stretched signal consists of T' constant runs, so that the convolution has at most 3 T' distinct
    columns (start, middle and end of each run). Only those are computed, and the group norm and the linear
    layer count each as often as it occurs: the same result up to rounding for a hundredth of the work.

    Args:
        tap_shape: (C, T', H, W) of the tap.
        hidden: channels in between: 512 at width 1.
    """

    windows: Tensor
    occurs: Tensor

    def __init__(self, tap_shape: tuple[int, int, int, int], hidden: int) -> None:
        super().__init__()
        channels, length, height, width = tap_shape
        self.squeeze = nn.Conv3d(channels, hidden, (1, height, width))
        self.squeeze_norm = nn.GroupNorm(groups(hidden), hidden)
        self.expand = nn.Conv1d(hidden, channels, 3, padding=1)
        self.expand_norm = nn.GroupNorm(groups(channels), channels)
        self.time = nn.Linear(channels, length)
        windows, occurs = _distinct_columns(length, channels)
        self.register_buffer("windows", windows.flatten(), persistent=False)
        self.register_buffer("occurs", occurs, persistent=False)  # (C, U)

    def forward(self, feature: Tensor) -> Tensor:
        """(B, C, T', H, W) -> (B, C, T')."""
        x = F.relu(self.squeeze_norm(collapse(self.squeeze, feature)))  # (B, hidden, T')
        x = F.pad(x, (0, 1))[:, :, self.windows]  # (B, hidden, 3 U): the U windows side by side
        x = F.conv1d(x, self.expand.weight, self.expand.bias, stride=3)  # (B, C, U)
        x = F.relu(self._normalise(x))
        return torch.sigmoid(F.linear(x, self.time.weight @ self.occurs, self.time.bias))

    def _normalise(self, x: Tensor) -> Tensor:
        """`expand_norm`, each column (B, C, U) counted as often as it occurs."""
        norm = self.expand_norm
        share = self.occurs.sum(dim=0) / len(self.occurs)  # (U,), in whatever precision the network has
        x = x.view(x.shape[0], norm.num_groups, -1, x.shape[2])  # (B, groups, C / groups, U)
        mean = (x.mean(dim=2, keepdim=True) * share).sum(dim=3, keepdim=True)
        x = x - mean
        variance = (x.square().mean(dim=2, keepdim=True) * share).sum(dim=3, keepdim=True)
        x = (x * torch.rsqrt(variance + norm.eps)).flatten(1, 2)
        return x * norm.weight[:, None] + norm.bias[:, None]


def _distinct_columns(length: int, stretched: int) -> tuple[Tensor, Tensor]:
    """What a kernel of 3 sees of `length` steps stretched to `stretched` (nearest), zeros around.

    Returns:
        windows: (U, 3), the step under each kernel element; `length` stands for a zero.
        occurs: (stretched, U), 1 where the window at a stretched position is that column.
    """
    # PyTorch's own rounding decides which step is nearest; on the CPU even for a network built on "meta".
    steps = torch.arange(length, device="cpu", dtype=torch.float32)
    source = F.interpolate(steps[None, None], size=stretched, mode="nearest")[0, 0].long()
    padded = F.pad(source, (1, 1), value=length)
    windows, column = torch.unique(padded.unfold(0, 3, 1), dim=0, return_inverse=True)
    return windows, F.one_hot(column, len(windows)).float()


class LiteAttention(nn.Module):
    """A light one for clips of any length and crop: maps a tap's feature to a map in (0, 1) likewise.

    Mean and maximum over the picture; a 1x1 convolution to C / 8 channels, group norm, ReLU. To that is added
    what the neighbouring steps say (a depthwise convolution over time) and what the whole clip does (a 1x1
    convolution of the mean over time); group norm, ReLU; a linear layer back to C channels; sigmoid.

    The norms take all channels and steps of a clip together: groups of a few channels would be nothing but
    signs where a clip has one or two steps. As initialised, the map lies around 1/2. Only near 0 and 1 does
    it say much through the CVAE's noise: so the last layer's output is multiplied, its first weights being
    as much smaller. Then the map moves as fast as the official one, whose last layer has as many more inputs.

    Args:
        channels: C of the tap.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 8, 8)
        self.narrow = nn.Conv1d(2 * channels, hidden, 1)
        self.narrow_norm = nn.GroupNorm(1, hidden)
        self.nearby = nn.Conv1d(hidden, hidden, 3, padding=1, groups=hidden)
        self.overall = nn.Conv1d(hidden, hidden, 1)
        self.mixed_norm = nn.GroupNorm(1, hidden)
        self.widen = nn.Linear(hidden, channels)  # linear: the stated initialisation leaves it as it is here
        with torch.no_grad():
            self.widen.weight /= STEEPNESS
            self.widen.bias.zero_()

    def forward(self, feature: Tensor) -> Tensor:
        """(B, C, T', H, W) -> (B, C, T')."""
        x = torch.cat([feature.mean((3, 4)), feature.amax((3, 4))], dim=1)  # (B, 2 C, T')
        x = F.relu(self.narrow_norm(self.narrow(x)))  # (B, hidden, T')
        x = x + self.nearby(x) + self.overall(x.mean(2, keepdim=True))
        x = F.relu(self.mixed_norm(x)).transpose(1, 2)
        return torch.sigmoid(STEEPNESS * self.widen(x)).transpose(1, 2)


def attend(feature: Tensor, attention: Tensor, over: Literal["sample", "batch"]) -> Tensor:
    """The product x * a rescaled to the sum of x: attended feature of recognition (METHOD.md 2, 8 (4, 5)).

    Args:
        feature: x, (B, C, T', H, W), not negative.
        attention: a, (B, C, T').
        over: what the sums run over: each sample, or the whole batch as the official training does.
    """
    focused = feature * attention[..., None, None]
    dims = (1, 2, 3, 4) if over == "sample" else (0, 1, 2, 3, 4)
    total = feature.sum(dims, keepdim=True)
    # Only a feature that is zero throughout gives a zero sum; it stays zero instead of becoming NaN.
    rest = focused.sum(dims, keepdim=True).clamp_min(torch.finfo(feature.dtype).tiny)
    return focused * (total / rest)
