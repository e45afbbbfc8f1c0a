"""Recognition: how its networks are built, its own loss terms, what it is trained on and validated by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from gkdcli.data.clips import ClipDataset
from gkdcli.data.store import Store
from gkdcli.evaluation.predict import predict
from gkdcli.evaluation.scores import class_scores
from gkdcli.losses.distill import classification_loss
from gkdcli.models.attention import attend
from gkdcli.models.recognizer import Recognizer
from gkdcli.settings import CHANNELS, Role, Settings
from gkdcli.training.noise import Noise
from gkdcli.training.steps import Seen, Supervised, Term

SCORE = "top1"  # what validation gives


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


def training_set(store: Store, videos: Sequence[int], settings: Settings) -> ClipDataset:
    """A random view of each video."""
    return ClipDataset(store, videos, settings.clips, settings.recipe, settings.train.seed)


def held_out_score(
    network: Recognizer,
    store: Store,
    videos: Sequence[int],
    settings: Settings,
    device: torch.device,
    limit: int | None = None,
) -> float:
    """Top-1 on the middle window of each video, or of the first `limit` ones, read by this process."""
    network.eval()
    logits, labels = predict(
        ClipDataset(store, videos, settings.clips, settings.recipe, seed=None),
        network.time_logits,
        batch_size=settings.eval.batch_size,
        device=device,
        workers=settings.train.workers if limit is None else 0,
        tick=lambda done, text="": None,
        limit=limit,
    )
    return float((class_scores(logits, settings.recipe).argmax(1) == labels).mean())
