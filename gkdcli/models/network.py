"""What the networks of both tasks share: a backbone, and an attention per tap in use (METHOD.md 1, 2)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import Tensor, nn

from gkdcli.models.attention import AttentionKind, build_attention
from gkdcli.models.cvae import CVAE
from gkdcli.models.i3d import I3D, layout_of, tap_shape
from gkdcli.models.layers import BATCH_NORMS, recomputed
from gkdcli.models.video_backbones import TRUNKS, VideoBackbone

# of the backbone's batch norms: all is trained; statistics stay; gains and biases stay too (METHOD.md 8 (7))
Norms = Literal["trained", "held", "frozen"]


class Network(nn.Module):
    """Backbone and attention; teacher and student differ in `kind` only.

    Args:
        kind: of the backbone, one of `i3d.KINDS` or `video_backbones.TRUNKS`.
        taps: in use, by name.
        length: frames of a clip.
        crop: side of the picture in pixels.
        channels: 3 for rgb, 2 for flow.
        width: multiplies every channel count; of torchvision's networks the tap's and the head's alone.
        attention: its kind; None for the plain student.
        bn_momentum: share of each batch in batch norm's running statistics.
        scores_attended: False where evaluation takes the plain feature although there is an attention.
        channels_last: whether the backbone's channels are innermost in memory; auto: where CPUs gain by it.
    """

    def __init__(
        self,
        kind: str,
        taps: tuple[str, ...],
        *,
        length: int,
        crop: int,
        channels: int,
        width: float,
        attention: AttentionKind | None,
        bn_momentum: float,
        scores_attended: bool,
        channels_last: Literal["auto", "on", "off"],
    ) -> None:
        super().__init__()
        self.taps = taps
        self.scores_attended = scores_attended
        self.norms: Norms = "trained"
        self.shapes = {tap: tap_shape(tap, length, crop, width) for tap in taps}
        self.backbone: I3D | VideoBackbone
        if kind in TRUNKS:  # of full width, whatever the tap's
            layout = layout_of(channels_last, 1.0)
            self.backbone = VideoBackbone(kind, channels, self.shapes["Mixed_5c"], layout)
        else:
            self.backbone = I3D(kind, channels, width, layout_of(channels_last, width))
        for module in self._batch_norms():
            module.momentum = bn_momentum
        self.attention = nn.ModuleDict()
        if attention:
            self.attention.update(
                {tap: build_attention(attention, shape, width) for tap, shape in self.shapes.items()}
            )

    def features(self, clip: Tensor) -> dict[str, Tensor]:
        """(B, channels, T, H, W) -> the taps in use, {"Mixed_5c": (B, C, T', H', W')}."""
        found = self.backbone(clip)
        return {tap: found[tap] for tap in self.taps}

    def attend(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The attention map (B, C, T') of each tap; empty for a network built without."""
        return {tap: module(features[tap]) for tap, module in self.attention.items()}

    def hold_norms(self, norms: Norms) -> None:
        """Decides what training does to the backbone's batch norms; call it before the optimiser is built."""
        self.norms = norms
        for module in self._batch_norms():
            module.requires_grad_(norms != "frozen")
        self.train(self.training)

    def recompute(self) -> None:
        """Has training keep less of the backbone's blocks and compute them again, see `recomputed`."""
        self.backbone.run = recomputed

    def sync_norms(self) -> None:
        """Has the backbone's batch norms go by the clips of all processes; weights keep their names."""
        nn.SyncBatchNorm.convert_sync_batchnorm(self.backbone)  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> Network:
        """As PyTorch's, except that held batch norms stay in evaluation mode."""
        super().train(mode)
        if self.norms != "trained":
            for module in self._batch_norms():
                module.eval()
        return self

    def _batch_norms(self) -> Iterator[nn.BatchNorm3d | nn.SyncBatchNorm]:
        return (module for module in self.backbone.modules() if isinstance(module, BATCH_NORMS))


def build_cvae(network: Network) -> nn.ModuleDict:
    """One CVAE per tap in use: {"Mixed_5c": CVAE} (METHOD.md 3, 9)."""
    return nn.ModuleDict({tap: CVAE(shape) for tap, shape in network.shapes.items()})
