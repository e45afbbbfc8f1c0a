"""Detection: how its networks are built, its own loss terms, what it is trained on.

What its networks find, and how that is scored: `detection_scores`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gkdcli.data.store import Store
from gkdcli.data.window_clips import WindowDataset
from gkdcli.errors import GkdError
from gkdcli.evaluation.detection import remarks
from gkdcli.losses.boundary import boundary_contrast, boundary_loss
from gkdcli.losses.segments import (
    Divisors,
    HeadOutputs,
    Targets,
    at_least_one,
    background_loss,
    segment_losses,
)
from gkdcli.models.boundary import boundary_max_pool, proposal_segments
from gkdcli.models.detector import Boundaries, Detector, attended
from gkdcli.settings import CHANNELS, Role, Settings
from gkdcli.tasks.detection_scores import (
    SCORE,
    SUMMARY,
    agreement,
    draw,
    fuses_plain,
    held_out_score,
    load,
    predict_run,
    protocol,
    score,
    seen_by,
    write_output,
)
from gkdcli.training.noise import Noise
from gkdcli.training.steps import Seen, Supervised, Term

__all__ = [
    "SCORE",
    "SUMMARY",
    "agreement",
    "build_network",
    "draw",
    "fuses_plain",
    "held_out_score",
    "load",
    "predict_run",
    "protocol",
    "remarks",
    "score",
    "seen_by",
    "supervised_terms",
    "training_set",
    "write_output",
]
LEVEL_WEIGHT = 0.1  # of the boundary terms on the two maps of level 0, beside the frame level's 1


def build_network(
    settings: Settings, role: Role, classes: int, modality: str, attention: bool = True
) -> Detector:
    """The teacher or the student of a page; the plain student has no attention (METHOD.md 8)."""
    network = Detector(
        settings.model.teacher if role == "teacher" else settings.model.student,
        classes,
        length=settings.clips.length,
        crop=settings.clips.crop,
        channels=CHANNELS[modality],
        width=settings.model.width,
        attention=settings.model.attention if attention else None,
        bn_momentum=settings.model.bn_momentum,
        channels_last=settings.train.channels_last,
        recipe=settings.recipe,
    )
    network.head.initialise()
    return network


def supervised_terms(
    network: Detector,
    seen: Seen,
    spliced: Seen | None,
    targets: Mapping[str, Tensor],
    noise: Noise,
    settings: Settings,
    divisors: Divisors = at_least_one,
    spliced_part: Tensor | float = 1.0,
) -> Supervised:
    """All of AFSD's terms on the attended feature, the background's on what attention leaves (METHOD.md 5).

    A network without attention has them on the plain feature, and no background term.

    Args:
        network: in training mode.
        seen: of the clips.
        spliced: of those clips that have a spliced version; None where none has.
        targets: `segments` (B, M, 2), `labels`, `valid`, `maps` (B, 2, T), `spliced` (B,), `proposals`.
        noise: not used; nothing is dropped.
        settings: recipe and weights.
        divisors: see `segment_losses`.
        spliced_part: makes of a mean over these spliced clips their part of the mean over all processes'.
    """
    weights, recipe = settings.distill, settings.recipe
    feature = attended(seen.features, seen.maps, recipe) if seen.maps else seen.features
    found, boundaries = network.head(feature)
    truth = Targets(targets["segments"], targets["labels"], targets["valid"])
    frames, centres = network.head.frames, network.head.priors
    outputs = HeadOutputs(*found)
    smoothing = settings.optim.label_smoothing
    losses = segment_losses(outputs, truth, centres, frames, weights.refine_iou, recipe, divisors, smoothing)
    starts, ends = _boundary_losses(boundaries, targets["maps"])
    terms = {
        "location": Term(weights.location_weight, losses.location),
        "classification": Term(weights.class_weight, losses.classification),
        "refined_location": Term(weights.location_weight, losses.refined_location),
        "refined_classification": Term(weights.class_weight, losses.refined_classification),
        "quality": Term(weights.class_weight, losses.quality),
        "start": Term(1.0, starts),
        "end": Term(1.0, ends),
    }
    last = feature
    if seen.maps and weights.background_weight:
        last = attended(seen.features, {tap: 1 - attention for tap, attention in seen.maps.items()}, recipe)
        background = background_loss(network.head.class_logits(last), recipe)
        terms["background"] = Term(weights.background_weight, background)
    if spliced is not None:
        last = attended(spliced.features, spliced.maps, recipe) if spliced.maps else spliced.features
        proposals = targets["proposals"][targets["spliced"]]
        contrast = _contrast(network.head.boundaries(last), proposals) * spliced_part
        terms["boundary_contrast"] = Term(weights.contrast_weight, contrast)
    # the released code has overwritten the features by then (METHOD.md 4, 8 (1))
    return Supervised(terms, last if recipe == "official" else None)


def training_set(store: Store, videos: Sequence[int], settings: Settings) -> WindowDataset:
    """The clips of some videos that show an action (METHOD.md 5).

    Raises:
        GkdError: fewer of them than one batch.
    """
    found = WindowDataset(store, videos, store.segments, settings.clips, settings.recipe, settings.train.seed)
    if len(found) < settings.optim.batch_size:
        raise GkdError(
            f"there are {len(found)} training clips, fewer than a batch of {settings.optim.batch_size}",
            f"{store.path}: {len(videos)} training videos",
            "a clip is kept where an action lies wholly inside it: `--set clips.length=...` makes it longer,"
            " `--batch-size` the batch smaller",
        )
    return found


def _boundary_losses(boundaries: Boundaries, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Of starts and of ends, over the frame-level feature and the two maps of level 0."""
    totals = [maps.new_zeros(()), maps.new_zeros(())]
    for weight, feature in zip((1.0, LEVEL_WEIGHT, LEVEL_WEIGHT), boundaries, strict=True):
        start, end = feature.chunk(2, dim=1)
        for side, loss in enumerate(boundary_loss(start, end, maps)):
            totals[side] = totals[side] + weight * loss
    return totals[0], totals[1]


def _contrast(boundaries: Boundaries, proposals: Tensor) -> Tensor:
    """Triplets of the three proposals (b, 3, 2) of spliced clips, on all three features."""
    on_frames = proposal_segments(proposals)  # (b, 3, 4)
    on_level = on_frames / (boundaries.frame.shape[2] // boundaries.location.shape[2])
    everywhere = torch.ones(len(proposals), dtype=torch.bool, device=proposals.device)
    total = proposals.new_zeros(())
    for weight, feature, segments in zip(
        (1.0, LEVEL_WEIGHT, LEVEL_WEIGHT), boundaries, (on_frames, on_level, on_level), strict=True
    ):
        total = total + weight * boundary_contrast(boundary_max_pool(feature, segments), everywhere)
    return total
