"""The recognition network: backbone, attention, classifier (METHOD.md 1, 2, 6)."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from gkdcli.models.attention import AttentionKind, attend
from gkdcli.models.network import Network


class Recognizer(Network):
    """Names the action of a clip; teacher and student differ in `kind` only.

    Args:
        kind: of the backbone, one of `i3d.KINDS` or `video_backbones.TRUNKS`.
        classes: how many.
        length: frames of a clip, at least 16.
        crop: side of the picture in pixels.
        channels: 3 for rgb, 2 for flow.
        width: multiplies every channel count; of torchvision's networks the tap's and the head's alone.
        dropout: probability before the classifier, for `dropout_shape`'s user; nothing is drawn here.
        attention: its kind; None for the plain student.
        bn_momentum: share of each batch in batch norm's running statistics.
        scores_attended: False where evaluation takes the plain feature although there is an attention
            (flow in recipe `official`, METHOD.md 6).
        channels_last: whether the backbone's channels are innermost in memory; auto: where CPUs gain by it.
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
        dropout: float = 0.5,
        attention: AttentionKind | None = "official",
        bn_momentum: float = 0.01,
        scores_attended: bool = True,
        channels_last: Literal["auto", "on", "off"] = "auto",
    ) -> None:
        super().__init__(
            kind,
            ("Mixed_5c",),
            length=length,
            crop=crop,
            channels=channels,
            width=width,
            attention=attention,
            bn_momentum=bn_momentum,
            scores_attended=scores_attended,
            channels_last=channels_last,
        )
        feature = self.shapes["Mixed_5c"]
        assert feature[1] >= 2, "the classifier averages pairs of time steps: 16 frames at least"
        self.dropout = dropout
        self.classifier = nn.Conv3d(feature[0], classes, 1)

    def logits(self, feature: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, C, T', H, W) -> logits per time step, (B, classes, T' - 1).

        Args:
            feature: of Mixed_5c, attended or plain.
            keep: dropout mask of shape `dropout_shape(B)`, already divided by the probability of keeping;
                None for no dropout. It is explicit because randomness is seeded per sample.
        """
        x = F.avg_pool3d(feature, (2, *feature.shape[3:]), stride=1)  # (B, C, T' - 1, 1, 1)
        if keep is not None:
            x = x * keep
        logits: Tensor = self.classifier(x)
        return logits.flatten(2)

    def dropout_shape(self, batch: int) -> tuple[int, ...]:
        """Shape of `keep` for so many clips."""
        channels, time, _, _ = self.shapes["Mixed_5c"]
        return batch, channels, time - 1, 1, 1

    def time_logits(self, clip: Tensor) -> Tensor:
        """(B, channels, T, H, W) -> logits per time step (B, classes, T' - 1), as evaluation takes them.

        Of the attended feature, rescaled per sample (METHOD.md 8), or of the plain one.
        """
        features = self.features(clip)
        feature = features["Mixed_5c"]
        if self.scores_attended:
            for tap, attention in self.attend(features).items():
                feature = attend(features[tap], attention, over="sample")
        return self.logits(feature)

    def forward(self, clip: Tensor) -> Tensor:
        """(B, channels, T, H, W) -> time-averaged logits (B, classes): the graph that is exported."""
        return self.time_logits(clip).mean(dim=2)
