"""The supervised terms of detection on classes and segments (METHOD.md 5): matching and losses.

Distances and segments are in frames of the clip, class 0 is background. Every function is pure and takes a
whole batch; weights of the terms belong to the trainer, which logs each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Recipe = Literal["official", "corrected"]
Divisors = Callable[[Tensor], Tensor]
BACKGROUND_WEIGHT, ACTION_WEIGHT = 0.25, 0.75  # of the focal loss


class HeadOutputs(NamedTuple):
    """What the detector says of each of its P priors.

    Args:
        loc: coarse distances to start and end, in frames: (B, P, 2), >= 0.
        conf: coarse class logits, (B, P, classes + 1).
        prop_loc: refinement of the distances, in halves of the coarse length: (B, P, 2).
        prop_conf: refined class logits, (B, P, classes + 1).
        center: logit of the quality, (B, P, 1).
    """

    loc: Tensor
    conf: Tensor
    prop_loc: Tensor
    prop_conf: Tensor
    center: Tensor


class Targets(NamedTuple):
    """The true segments of a batch, padded to the same number M per clip; M may be 0.

    Args:
        segments: start and end in frames of the clip, (B, M, 2).
        labels: (B, M), long; 0 for background.
        valid: (B, M), False for padding.
    """

    segments: Tensor
    labels: Tensor
    valid: Tensor


class Matched(NamedTuple):
    """What each prior should say.

    Args:
        distances: from the centre to the ends of the matched segment, (B, P, 2); 1 where there is none.
        labels: (B, P), 0 for background.
    """

    distances: Tensor
    labels: Tensor


class SegmentLosses(NamedTuple):
    """The five terms, unweighted scalars."""

    location: Tensor
    classification: Tensor
    refined_location: Tensor
    refined_classification: Tensor
    quality: Tensor


def at_least_one(counts: Tensor) -> Tensor:
    """The divisors of a batch that one process holds alone."""
    return counts.clamp(min=1)


def segment_losses(
    outputs: HeadOutputs,
    targets: Targets,
    priors: Tensor,
    frames: int,
    refine_iou: float,
    recipe: Recipe,
    divisors: Divisors = at_least_one,
    smoothing: float = 0.0,
) -> SegmentLosses:
    """All losses of the head, foreground (METHOD.md 5).

    With N priors that match an action, and PN of them whose coarse IoU is at least `refine_iou`:
    location is the generalised IoU loss over the N, refined location the L1 distance of the refinement from
    (true - coarse) / (half the coarse length) over the PN, quality the binary cross-entropy of `center` with
    the IoU of the refined segment over the N; both class terms are focal losses over all priors, the refined
    one with the PN alone as positives. Sums are divided by N, the refined ones by PN.

    `official` differentiates the IoU that is quality's target, so quality pulls at the distances too;
    `corrected` detaches it (METHOD.md 8 (21)).

    Args:
        outputs: of the detector.
        targets: of the same clips.
        priors: centres as fractions of the clip, (P,).
        frames: length of a clip.
        refine_iou: from which coarse IoU on a prior is refined; 0.5 as published.
        recipe: one of the two.
        divisors: makes of the counts [N, PN] of this call what the sums are divided by. Where several
            processes share a batch: the counts' sum over all, at least 1, divided by the number of
            processes, since gradients are averaged over them.
        smoothing: of the class of matched priors, see `focal_loss`.
    """
    matched = match(targets, priors, frames)
    positive = matched.labels > 0  # (B, P)
    # Where nothing is matched, numbers that no term counts stand in, so that infinities there send no NaN.
    coarse = torch.where(positive.unsqueeze(-1), outputs.loc, 1.0)
    half_length = coarse.sum(dim=-1, keepdim=True) / 2
    with torch.no_grad():
        refined = positive & (distance_iou(coarse, matched.distances) >= refine_iou)
        wanted = (matched.distances - coarse) / half_length
        wanted = torch.where(refined.unsqueeze(-1), wanted, 0.0)
    refined_labels = matched.labels.where(refined, 0)
    shift = torch.where(positive.unsqueeze(-1), outputs.prop_loc, 0.0)
    iou = distance_iou(coarse + half_length * shift, matched.distances).clamp(min=0)
    if recipe == "corrected":
        iou = iou.detach()
    quality = F.binary_cross_entropy_with_logits(outputs.center.squeeze(-1), iou, reduction="none")
    apart = (torch.where(refined.unsqueeze(-1), outputs.prop_loc, 0.0) - wanted).abs()

    count, refined_count = divisors(torch.stack([positive.sum(), refined.sum()])).unbind()
    return SegmentLosses(
        location=_over(generalised_iou_loss(coarse, matched.distances), positive) / count,
        classification=focal_loss(outputs.conf, matched.labels, smoothing).sum() / count,
        refined_location=apart.sum() / refined_count,
        refined_classification=focal_loss(outputs.prop_conf, refined_labels, smoothing).sum() / refined_count,
        quality=_over(quality, positive) / count,
    )


def background_loss(conf: Tensor, recipe: Recipe) -> Tensor:
    """The coarse classes on the background feature, where every prior should say background (METHOD.md 5).

    With the gaps between actions as targets of class 0, no prior is positive wherever they lie; what is left
    of location and class is the focal loss of all priors. `official` takes its sum; `corrected` divides it by
    clips x priors (METHOD.md 8 (22)).

    Args:
        conf: class logits on the background feature, (B, P, classes + 1).
        recipe: one of the two.
    """
    each = focal_loss(conf, torch.zeros(conf.shape[:2], dtype=torch.long, device=conf.device))
    return each.sum() if recipe == "official" else each.mean()


def match(targets: Targets, priors: Tensor, frames: int) -> Matched:
    """Gives each prior the shortest segment that contains its centre, ends included (METHOD.md 5).

    Among equally short ones the first. A segment of background takes part and makes its priors background.

    Args:
        targets: of B clips.
        priors: centres as fractions of the clip, (P,).
        frames: length of a clip.
    """
    # a column that is padding for every clip, so that there is always something to take the least of
    segments = F.pad(targets.segments, (0, 0, 0, 1))
    labels, valid = F.pad(targets.labels, (0, 1)), F.pad(targets.valid, (0, 1))
    centres = (priors * frames).unsqueeze(-1)  # (P, 1)
    distances = torch.stack(
        [centres - segments[:, None, :, 0], segments[:, None, :, 1] - centres], dim=-1
    )  # (B, P, M, 2)
    inside = (distances >= 0).all(dim=-1) & valid.unsqueeze(1)
    length, which = distances.sum(dim=-1).masked_fill(~inside, torch.inf).min(dim=2)  # (B, P)
    found = length.isfinite()
    ends = distances.take_along_dim(which[:, :, None, None], dim=2).squeeze(2)
    return Matched(torch.where(found.unsqueeze(-1), ends, 1.0), labels.gather(1, which).where(found, 0))


def distance_iou(distances: Tensor, wanted: Tensor) -> Tensor:
    """IoU of segments about the same centre, given by their distances (..., 2) to start and end: (...).

    Below 0 where a distance is so negative that the segments lie apart.
    """
    common, union, _ = _measures(distances, wanted)
    return common / union


def generalised_iou_loss(distances: Tensor, wanted: Tensor) -> Tensor:
    """1 - IoU + (hull - union) / hull of segments given by their distances (..., 2): (...).

    Rezatofighi et al., CVPR 2019, in one dimension.
    """
    common, union, hull = _measures(distances, wanted)
    return 1 - common / union + (hull - union) / hull


def focal_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """-w (1 - p)^2 log p with p = softmax(logits)[label] + 1e-6, per prior: (B, P).

    w is 0.25 for background and 0.75 for every other class, whatever the number of classes (METHOD.md 5;
    Lin et al., ICCV 2017, on softmax scores).

    Args:
        logits: (B, P, classes + 1).
        labels: (B, P), long.
        smoothing: share of an action's label that is spread over all classes, background and its own
            included: the mean of their (1 - p)^2 log p takes this share. Priors of background stay as they
            are: smoothed, each of these many would give every action a score.
    """
    everywhere = torch.softmax(logits, dim=-1)
    scores = everywhere.gather(-1, labels.unsqueeze(-1)).squeeze(-1) + 1e-6
    weights = torch.where(labels > 0, ACTION_WEIGHT, BACKGROUND_WEIGHT)
    focal = (1 - scores).square() * scores.log()
    if smoothing:
        others = everywhere + 1e-6
        spread = ((1 - others).square() * others.log()).mean(dim=-1)
        focal = torch.where(labels > 0, torch.lerp(focal, spread, smoothing), focal)
    return -weights * focal


def _measures(distances: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lengths of intersection, union and hull; what is divided by is kept above 0."""
    least = torch.finfo(torch.float32).eps
    common = torch.minimum(distances, wanted).sum(dim=-1)
    union = (distances.sum(dim=-1) + wanted.sum(dim=-1) - common).clamp(min=least)
    hull = torch.maximum(distances, wanted).sum(dim=-1).clamp(min=least)
    return common, union, hull


def _over(values: Tensor, chosen: Tensor) -> Tensor:
    """The sum over the chosen ones."""
    return torch.where(chosen, values, 0.0).sum()
