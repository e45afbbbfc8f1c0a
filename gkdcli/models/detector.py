"""The detection network: backbone, attention, anchor-free head (METHOD.md 5)."""

from __future__ import annotations

import itertools
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from gkdcli.models.attention import AttentionKind, attend
from gkdcli.models.boundary import boundary_max_pool, frame_segments, level_segments
from gkdcli.models.layers import collapse, groups, same_padding, scaled
from gkdcli.models.network import Network

LEVELS = 6
STRIDES = tuple(4 << level for level in range(LEVELS))  # frames per prior


class Detections(NamedTuple):
    """What the head says about each of P priors: the exported graph's outputs.

    Args:
        loc: distances to start and end in frames, (B, P, 2).
        conf: class logits, (B, P, classes + 1); class 0 is background.
        prop_loc: refinement of the distances, in half widths of the coarse segment, (B, P, 2).
        prop_conf: class logits of the refined segment, (B, P, classes + 1).
        center: logit of the refined segment's quality, (B, P, 1).
    """

    loc: Tensor
    conf: Tensor
    prop_loc: Tensor
    prop_conf: Tensor
    center: Tensor


class Boundaries(NamedTuple):
    """Features whose first half of channels tells starts and whose second tells ends.

    Args:
        frame: (B, C, T).
        location: of the location branch at level 0, (B, 2C, T / 4).
        classification: of the class branch, likewise.
    """

    frame: Tensor
    location: Tensor
    classification: Tensor


def priors(frames: int) -> Tensor:
    """Centres of all priors as fractions of the clip, level after level: (P,)."""
    return torch.cat([(torch.arange(frames // s, device="cpu") + 0.5) / (frames // s) for s in STRIDES])


def attended(
    features: dict[str, Tensor], maps: dict[str, Tensor], recipe: Literal["official", "corrected"]
) -> dict[str, Tensor]:
    """Foreground features; those of the background come of `1 - a` (METHOD.md 2, 8 (4)).

    `official`: x * a / sum(a), the sum over channels and time of a clip, which shrinks features to 1e-4.
    `corrected`: x * a rescaled to the sum of x over the clip.
    """
    if recipe == "corrected":
        return {tap: attend(features[tap], attention, "sample") for tap, attention in maps.items()}
    return {
        tap: features[tap] * attention[..., None, None] / attention.sum((1, 2))[:, None, None, None, None]
        for tap, attention in maps.items()
    }


class Detector(Network):
    """Finds actions in a clip; teacher and student differ in `kind` only.

    Args:
        kind: of the backbone, one of `i3d.KINDS`.
        classes: of actions, background not counted.
        length: frames of a clip, a multiple of 128.
        recipe: how attended features are scaled.
        others: see `Network`.
    """

    def __init__(
        self,
        kind: str,
        classes: int,
        *,
        length: int,
        crop: int,
        channels: int = 3,
        width: float = 1.0,
        attention: AttentionKind | None = "official",
        bn_momentum: float = 0.01,
        scores_attended: bool = True,
        channels_last: Literal["auto", "on", "off"] = "auto",
        recipe: Literal["official", "corrected"] = "corrected",
    ) -> None:
        super().__init__(
            kind,
            ("Mixed_5c", "Mixed_4f"),
            length=length,
            crop=crop,
            channels=channels,
            width=width,
            attention=attention,
            bn_momentum=bn_momentum,
            scores_attended=scores_attended,
            channels_last=channels_last,
        )
        assert length % STRIDES[-1] == 0, f"a clip is a multiple of {STRIDES[-1]} frames"
        self.recipe = recipe
        self.head = Head(self.shapes, classes, length, 2 * scaled(256, width))

    def forward(self, clip: Tensor) -> Detections:
        """(B, channels, T, H, W) -> detections by prior: evaluation, and the graph that is exported."""
        features = self.features(clip)
        if self.scores_attended and self.attention:
            features = attended(features, self.attend(features), self.recipe)
        found: Detections = self.head(features)[0]
        return found

    def pools_alike(self, *locs: NDArray[np.floating[Any]]) -> bool:
        """Whether coarse distances (B, P, 2) that differ by rounding errors lead to the same segments."""
        found = []
        for loc in locs:
            distances = torch.from_numpy(loc)
            levels = zip(torch.split(distances, self.head.lengths, 1), self.head.levels(), strict=True)
            on_levels = [level_segments(part, centres, self.head.frames) for part, centres in levels]
            on_frames = frame_segments(distances, self.head.priors, self.head.frames)
            found.append(torch.cat([*on_levels, on_frames], dim=1))
        return all(torch.equal(found[0], other) for other in found[1:])


class Head(nn.Module):
    """Pyramid, towers and proposal branches over both taps.

    Args:
        shapes: (C, T', H, W) of the taps `Mixed_5c` and `Mixed_4f`.
        classes: of actions.
        frames: of the clip.
        hidden: channels of the pyramid: 512 at width 1.
    """

    priors: Tensor

    def __init__(
        self, shapes: dict[str, tuple[int, int, int, int]], classes: int, frames: int, hidden: int
    ) -> None:
        super().__init__()
        self.frames = frames
        self.lengths = [frames // stride for stride in STRIDES]
        self.pyramid = nn.ModuleList(
            [
                *(_Squeeze(shapes[tap], hidden) for tap in ("Mixed_4f", "Mixed_5c")),
                *(_Unit(hidden, hidden, 3, stride=2) for _ in range(LEVELS - 2)),
            ]
        )
        self.loc_scales = nn.ParameterList([nn.Parameter(torch.ones(1)) for _ in range(LEVELS)])
        self.loc_tower = nn.Sequential(_Unit(hidden, hidden, 3), _Unit(hidden, hidden, 3))
        self.conf_tower = nn.Sequential(_Unit(hidden, hidden, 3), _Unit(hidden, hidden, 3))
        self.loc_head = nn.Conv1d(hidden, 2, 3, padding=1)
        self.conf_head = nn.Conv1d(hidden, classes + 1, 3, padding=1)
        self.loc_branch, self.conf_branch = _Branch(hidden), _Branch(hidden)
        self.prop_loc_head = nn.Conv1d(hidden, 2, 1)
        self.prop_conf_head = nn.Conv1d(hidden, classes + 1, 1)
        self.center_head = nn.Conv1d(hidden, 1, 3, padding=1)
        self.frame_level = nn.Sequential(
            _Unit(hidden, hidden, 3), _Unit(hidden, hidden, 3), _Unit(hidden, hidden, 1)
        )
        self.register_buffer("priors", priors(frames), persistent=False)

    def initialise(self) -> None:
        """As published: the pyramid and frame-level units Xavier-uniform, the rest normal(0, 0.01)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv1d | nn.Conv3d):
                if name.startswith(("pyramid", "frame_level")):
                    nn.init.xavier_uniform_(module.weight)
                else:
                    nn.init.normal_(module.weight, std=0.01)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, features: dict[str, Tensor]) -> tuple[Detections, Boundaries]:
        """Features (B, C, T', H, W) of both taps, attended or plain -> all that the losses want."""
        levels = self._levels(features)
        frame = self._frame(levels[0])
        loc_features = [self.loc_tower(level) for level in levels]
        locs = [
            torch.exp(self.loc_head(feature) * scale).transpose(1, 2)
            for feature, scale in zip(loc_features, self.loc_scales, strict=True)
        ]
        # of all levels at once, for both branches
        rois = boundary_max_pool(frame, frame_segments(torch.cat(locs, dim=1), self.priors, self.frames))
        found, boundaries = [], []
        for level, (centres, roi) in enumerate(
            zip(self.levels(), torch.split(rois, self.lengths, dim=2), strict=True)
        ):
            loc, conf_feature = locs[level], self.conf_tower(levels[level])
            segments = level_segments(loc, centres, self.frames)
            loc_proposal, loc_boundary = self.loc_branch(loc_features[level], roi, segments)
            conf_proposal, conf_boundary = self.conf_branch(conf_feature, roi, segments)
            heads = (
                self.conf_head(conf_feature),
                self.prop_loc_head(loc_proposal),
                self.prop_conf_head(conf_proposal),
                self.center_head(loc_proposal),
            )
            found.append((loc, *(head.transpose(1, 2) for head in heads)))
            boundaries.append(Boundaries(frame, loc_boundary, conf_boundary))
        return Detections(*(torch.cat(parts, dim=1) for parts in zip(*found, strict=True))), boundaries[0]

    def levels(self) -> tuple[Tensor, ...]:
        """The priors' centres by level."""
        return torch.split(self.priors, self.lengths)

    def class_logits(self, features: dict[str, Tensor]) -> Tensor:
        """The coarse class logits alone, (B, P, classes + 1): all that the background's loss takes."""
        logits = [self.conf_head(self.conf_tower(level)) for level in self._levels(features)]
        return torch.cat(logits, dim=2).transpose(1, 2)

    def boundaries(self, features: dict[str, Tensor]) -> Boundaries:
        """The boundary features alone: all that the boundary contrast takes."""
        first = self._levels(features)[0]
        return Boundaries(
            self._frame(first),
            self.loc_branch.boundary(self.loc_tower(first)),
            self.conf_branch.boundary(self.conf_tower(first)),
        )

    def _frame(self, first: Tensor) -> Tensor:
        """The first level (B, hidden, T / 4) -> the frame-level feature (B, hidden, T)."""
        found: Tensor = self.frame_level(F.interpolate(first, self.frames, mode="nearest"))
        return found

    def _levels(self, features: dict[str, Tensor]) -> list[Tensor]:
        """The pyramid, (B, hidden, T / 4), (B, hidden, T / 8), ..."""
        first, second = self.pyramid[0](features["Mixed_4f"]), self.pyramid[1](features["Mixed_5c"])
        levels = [first + F.interpolate(second, first.shape[2], mode="nearest"), second]
        for unit in itertools.islice(self.pyramid, 2, None):
            levels.append(unit(levels[-1]))
        return levels


class _Squeeze(nn.Module):
    """A tap (B, C, T', H, W) to (B, hidden, T'): convolution over the whole picture, group norm, ReLU."""

    def __init__(self, shape: tuple[int, int, int, int], hidden: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(shape[0], hidden, (1, *shape[2:]))
        self.norm = nn.GroupNorm(groups(hidden), hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(collapse(self.conv, x)))


class _GroupNorm(nn.GroupNorm):
    """PyTorch's, which refuses groups of a single value unless the batch has several clips.

    The last level of a narrow network has such groups: they come out as the bias, in batches of any size.
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class _Unit(nn.Module):
    """conv1d with "same" padding, group norm, ReLU: (B, in, T) -> (B, out, ceil(T / stride))."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, stride)
        self.norm = _GroupNorm(groups(outputs), outputs)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        return F.relu(self.norm(self.conv(F.pad(x, same_padding(x.shape[2], kernel, stride)))))


class _Branch(nn.Module):
    """A proposal branch: what lies around the boundaries of each prior's coarse segment."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.short = _Unit(hidden, hidden, 1)
        self.boundary = _Unit(hidden, 2 * hidden, 1)
        self.roi = _Unit(hidden, hidden, 1)
        self.proposal = _Unit(4 * hidden, hidden, 1)

    def forward(self, feature: Tensor, roi: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
        """Proposal and boundary features.

        Args:
            feature: of the tower, (B, hidden, t).
            roi: frame-level feature pooled around the same priors, (B, hidden, t).
            segments: on the level, (B, t, 4).
        """
        boundary = self.boundary(feature)
        parts = [self.roi(roi), boundary_max_pool(boundary, segments), self.short(feature)]
        return self.proposal(torch.cat(parts, dim=1)), boundary
