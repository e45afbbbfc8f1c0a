"""Recognition: how its networks are built, its own loss terms, what it predicts."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from gkdcli.losses.distill import classification_loss
from gkdcli.models.attention import attend
from gkdcli.models.recognizer import Recognizer
from gkdcli.settings import CHANNELS, Role, Settings
from gkdcli.training.noise import Noise
from gkdcli.training.steps import Seen, Supervised, Term


def build_network(
    settings: Settings, role: Role, classes: int, modality: str, attention: bool = True
) -> Recognizer:
    """The teacher or the student of a page; the plain student has no attention (METHOD.md 8)."""
    return Recognizer(
        settings.model.teacher if role == "teacher" else settings.model.student,
        classes,
        length=settings.clips.length,
        crop=settings.clips.crop,
        channels=CHANNELS[modality],
        width=settings.model.width,
        dropout=settings.model.dropout,
        bn_momentum=settings.model.bn_momentum,
        attention=attention,
        channels_last=settings.train.channels_last,
        scores_attended=not (modality == "flow" and settings.recipe == "official"),
    )


def supervised_terms(
    network: Recognizer,
    seen: Seen,
    spliced: Seen | None,
    targets: dict[str, Tensor],
    noise: Noise,
    settings: Settings,
) -> Supervised:
    """Cross-entropy on the attended feature, or on the plain one of a network without (METHOD.md 4, 8)."""
    assert spliced is None, "a matter of detection"
    feature, labels = seen.features["Mixed_5c"], targets["labels"]
    if seen.maps:
        over: Literal["batch", "sample"] = "batch" if settings.recipe == "official" else "sample"
        feature = attend(feature, seen.maps["Mixed_5c"], over)
    keep = noise.keep(network.dropout_shape(len(labels)), network.dropout)
    loss = classification_loss(network.logits(feature, keep), labels, settings.recipe)
    return Supervised({"classification": Term(1.0, loss)})
