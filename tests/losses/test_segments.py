"""The losses of detection against slow, obvious ones, and what must hold of them in any batch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gkdcli.losses.segments import (
    HeadOutputs,
    SegmentLosses,
    Targets,
    background_loss,
    distance_iou,
    focal_loss,
    generalised_iou_loss,
    match,
    segment_losses,
)

FRAMES, CLASSES = 64, 4
PRIORS = torch.cat([(torch.arange(steps) + 0.5) / steps for steps in (16, 8, 4)]).double()
RECIPES = ("official", "corrected")


def pad(clips: list[list[tuple[float, float, int]]]) -> Targets:
    """Clips of (start, end, label); padding holds a segment that would win if it counted."""
    most = max(map(len, clips))
    rows = torch.tensor([clip + [(0.0, 1e-3 + FRAMES, 3)] * (most - len(clip)) for clip in clips])
    rows = rows.reshape(len(clips), most, 3).double()
    valid = torch.arange(most) < torch.tensor([len(clip) for clip in clips]).unsqueeze(1)
    return Targets(rows[:, :, :2], rows[:, :, 2].long(), valid)


def drawn(seed: int, batch: int) -> tuple[HeadOutputs, list[list[tuple[float, float, int]]]]:
    """Outputs of which some are near enough for refinement; up to three segments per clip."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    clips = []
    for _ in range(batch):
        ends = (uniform(int(uniform(1) * 3) + 1, 2) * FRAMES).sort(dim=1).values.tolist()
        clips.append([(start, end, int(uniform(1) * CLASSES)) for start, end in ends])
    matched = match(pad(clips), PRIORS, FRAMES)
    count = len(PRIORS)
    outputs = HeadOutputs(
        matched.distances * (0.1 + 2.5 * uniform(batch, count, 2)) + 0.1,
        uniform(batch, count, CLASSES) * 4,
        uniform(batch, count, 2) - 0.5,
        uniform(batch, count, CLASSES) * 4,
        uniform(batch, count, 1) * 4 - 2,
    )
    return HeadOutputs(*(value.requires_grad_() for value in outputs)), clips


def _ends_iou(a: tuple[Tensor, Tensor], b: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU of two segments given by their ends, as any textbook has them."""
    common = min(a[1], b[1]) - max(a[0], b[0])
    union = (a[1] - a[0]) + (b[1] - b[0]) - common
    hull = max(a[1], b[1]) - min(a[0], b[0])
    return common / union, common / union - (hull - union) / hull


def _focal(logits: Tensor, label: int) -> Tensor:
    score = logits.exp()[label] / logits.exp().sum() + 1e-6
    return -(0.75 if label else 0.25) * (1 - score) ** 2 * score.log()


def obvious(
    outputs: HeadOutputs, clips: list[list[tuple[float, float, int]]], refine_iou: float, recipe: str
) -> SegmentLosses:
    """Prior by prior, with the ends of the segments instead of distances."""
    sums = dict.fromkeys(SegmentLosses._fields, torch.zeros((), dtype=torch.float64))
    count = refined_count = 0
    for b, clip in enumerate(clips):
        for p, prior in enumerate(PRIORS.tolist()):
            centre = prior * FRAMES
            holding = [segment for segment in clip if segment[0] <= centre <= segment[1]]
            start, end, label = min(holding, key=lambda one: one[1] - one[0], default=(0.0, 0.0, 0))
            left, right = outputs.loc[b, p]
            refined_label = 0
            if label:
                count += 1
                iou, generalised = _ends_iou((centre - left, centre + right), (start, end))
                sums["location"] = sums["location"] + 1 - generalised
                half = (left + right) / 2
                shift = outputs.prop_loc[b, p]
                if iou >= refine_iou:
                    refined_count += 1
                    refined_label = label
                    wanted = [(centre - start - left) / half, (end - centre - right) / half]
                    for got, truth in zip(shift, wanted, strict=True):
                        sums["refined_location"] = sums["refined_location"] + (got - truth.detach()).abs()
                better = (centre - left - half * shift[0], centre + right + half * shift[1])
                quality = max(_ends_iou(better, (start, end))[0], 0 * half)
                quality = quality if recipe == "official" else quality.detach()
                logit = outputs.center[b, p, 0]
                sums["quality"] = sums["quality"] + (1 + logit.exp()).log() - logit * quality
            sums["classification"] = sums["classification"] + _focal(outputs.conf[b, p], label)
            sums["refined_classification"] = sums["refined_classification"] + _focal(
                outputs.prop_conf[b, p], refined_label
            )
    over = {name: max(refined_count if "refined" in name else count, 1) for name in sums}
    return SegmentLosses(**{name: value / over[name] for name, value in sums.items()})


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("seed", "batch"), [(0, 1), (1, 3), (2, 4)])
def test_losses_and_gradients_equal_the_obvious_ones(seed, batch, recipe):
    outputs, clips = drawn(seed, batch)
    wanted = obvious(outputs, clips, 0.5, recipe)
    got = segment_losses(outputs, pad(clips), PRIORS, FRAMES, 0.5, recipe)
    torch.testing.assert_close(torch.stack(got), torch.stack(wanted))
    assert torch.stack(got).min() > 0
    for ours, theirs in zip(got, wanted, strict=True):
        gradients = [
            torch.autograd.grad(loss, outputs, retain_graph=True, materialize_grads=True)
            for loss in (ours, theirs)
        ]
        torch.testing.assert_close(*gradients)


def test_a_batch_is_the_sum_of_its_clips_over_the_counts_of_all():
    """N and PN count over the batch, so clips are not averaged one by one."""
    outputs, clips = drawn(3, 3)
    counts: list[Tensor] = []

    def sums(these: HeadOutputs, targets: list[list[tuple[float, float, int]]]) -> Tensor:
        def remember(found: Tensor) -> Tensor:
            counts.append(found)
            return torch.ones_like(found)

        return torch.stack(segment_losses(these, pad(targets), PRIORS, FRAMES, 0.5, "corrected", remember))

    parts = torch.stack(
        [sums(HeadOutputs(*(value[b : b + 1] for value in outputs)), [clips[b]]) for b in range(3)]
    )
    positives, refined = torch.stack(counts).sum(dim=0).tolist()
    assert positives > refined > 0
    divisors = torch.tensor([positives, positives, refined, refined, positives])
    together = segment_losses(outputs, pad(clips), PRIORS, FRAMES, 0.5, "corrected")
    torch.testing.assert_close(torch.stack(together), parts.sum(dim=0) / divisors)


def test_two_processes_with_shared_counts_have_the_gradient_of_one():
    outputs, clips = drawn(3, 2)
    whole = segment_losses(outputs, pad(clips), PRIORS, FRAMES, 0.5, "official")
    counts: list[Tensor] = []
    halves = [(HeadOutputs(*(value[b : b + 1] for value in outputs)), pad([clips[b]])) for b in range(2)]
    for part, targets in halves:
        segment_losses(
            part, targets, PRIORS, FRAMES, 0.5, "official", lambda found: counts.append(found) or found + 1
        )
    shared = (counts[0] + counts[1]).clamp(min=1) / 2
    parts = [
        torch.stack(segment_losses(part, targets, PRIORS, FRAMES, 0.5, "official", lambda _: shared))
        for part, targets in halves
    ]
    torch.testing.assert_close((parts[0] + parts[1]) / 2, torch.stack(whole))


def matched_labels(clips: list[list[tuple[float, float, int]]]) -> list[list[int]]:
    return match(pad(clips), torch.tensor([0.125, 0.375, 0.625, 0.875]), FRAMES).labels.tolist()


def test_matching_takes_the_shortest_and_of_equals_the_first():
    """Centres 8, 24, 40, 56; ends count as inside; a short background segment hides an action."""
    assert matched_labels([[(0, 64, 1), (20, 30, 2), (24, 41, 3)]]) == [[1, 2, 3, 1]]
    assert matched_labels([[(4, 12, 2), (6, 14, 3), (40, 56, 1)]]) == [[2, 0, 1, 1]]
    assert matched_labels([[(6, 14, 3), (4, 12, 2)]]) == [[3, 0, 0, 0]]
    assert matched_labels([[(0, 64, 1), (30, 50, 0)]]) == [[1, 1, 0, 1]]
    assert matched_labels([[(9, 23, 1)], [(0, 64, 2), (7, 9, 1)]]) == [[0] * 4, [1, 2, 2, 2]]


def test_matched_distances_are_those_of_the_matched_segment():
    found = match(pad([[(2, 60, 1), (20, 30, 2)]]), torch.tensor([0.125, 0.375, 0.99]), FRAMES)
    assert found.distances[0].tolist() == [[6.0, 52.0], [4.0, 6.0], [1.0, 1.0]]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("clips", [[[], []], [[(5.0, 50.0, 0)], []], [[(8.1, 8.2, 2)], [(100.0, 200.0, 1)]]])
def test_without_positives_only_the_class_terms_are_left(clips, recipe):
    """No targets at all, background only, or segments that hold no centre; sums are divided by 1."""
    outputs, _ = drawn(4, 2)
    losses = segment_losses(outputs, pad(clips), PRIORS, FRAMES, 0.5, recipe)
    assert [losses.location.item(), losses.refined_location.item(), losses.quality.item()] == [0.0] * 3
    coarse, refined = (background_loss(logits, "official") for logits in (outputs.conf, outputs.prop_conf))
    assert losses.classification.item() == pytest.approx(coarse.item())
    assert losses.refined_classification.item() == pytest.approx(refined.item())
    gradients = torch.autograd.grad(torch.stack(losses).sum(), outputs)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("distance", [0.0, 1e-30, 1e30])
def test_gradients_are_finite_at_degenerate_outputs(distance, recipe):
    """Distances that vanish or explode, scores of 0 and 1."""
    outputs, clips = drawn(5, 2)
    extreme = HeadOutputs(
        torch.full_like(outputs.loc, distance),
        torch.full_like(outputs.conf, -200.0),
        torch.full_like(outputs.prop_loc, -3.0),
        torch.full_like(outputs.prop_conf, 200.0),
        torch.full_like(outputs.center, 80.0),
    )
    extreme.conf.data[:, :, 1] = 200.0
    values = HeadOutputs(*(value.detach().float().requires_grad_() for value in extreme))
    losses = segment_losses(values, pad(clips), PRIORS.float(), FRAMES, 0.5, recipe)
    assert torch.stack(losses).isfinite().all()
    for gradient in torch.autograd.grad(torch.stack(losses).sum(), values):
        assert gradient.isfinite().all()


def test_infinities_where_nothing_is_matched_do_not_reach_the_losses():
    outputs, clips = drawn(3, 2)
    targets = pad(clips)
    free = match(targets, PRIORS, FRAMES).labels == 0
    assert free.any()
    assert not free.all()
    spoilt = outputs._replace(
        loc=outputs.loc.detach().masked_fill(free.unsqueeze(-1), math.inf).requires_grad_(),
        prop_loc=outputs.prop_loc.detach().masked_fill(free.unsqueeze(-1), math.nan).requires_grad_(),
    )
    for recipe in RECIPES:
        wanted = segment_losses(outputs, targets, PRIORS, FRAMES, 0.5, recipe)
        got = segment_losses(spoilt, targets, PRIORS, FRAMES, 0.5, recipe)
        torch.testing.assert_close(torch.stack(got), torch.stack(wanted))
        for gradient in torch.autograd.grad(torch.stack(got).sum(), spoilt):
            assert gradient.isfinite().all()


def test_the_threshold_of_refinement_counts_itself():
    """IoU exactly at the threshold is refined, a hair above it is not."""
    targets = Targets(torch.tensor([[[16.0, 48.0]]]), torch.tensor([[2]]), torch.tensor([[True]]))
    outputs = HeadOutputs(
        torch.tensor([[[8.0, 8.0]]]), torch.zeros(1, 1, 4), torch.zeros(1, 1, 2), torch.zeros(1, 1, 4),
        torch.zeros(1, 1, 1),
    )  # fmt: skip
    at, above = (
        segment_losses(outputs, targets, torch.tensor([0.5]), FRAMES, threshold, "official")
        for threshold in (0.5, 0.5001)
    )
    assert float(at.refined_location) == 2.0  # (16 - 8) / 8, twice
    assert float(above.refined_location) == 0.0
    assert float(at.refined_classification) == pytest.approx(3 * float(above.refined_classification))


def test_iou_and_focal_by_hand():
    ours = torch.tensor([[2.0, 4.0], [4.0, 4.0], [-3.0, 1.0]])
    truth = torch.tensor([[4.0, 2.0], [4.0, 4.0], [4.0, 4.0]])
    assert distance_iou(ours, truth)[:2].tolist() == [0.5, 1.0]
    assert float(distance_iou(ours, truth)[2]) < 0
    assert generalised_iou_loss(ours, truth)[:2].tolist() == pytest.approx([0.5 + 2 / 8 - 2 / 8, 0.0])
    even = focal_loss(torch.zeros(1, 2, 4), torch.tensor([[0, 3]]))
    score = 0.25 + 1e-6
    expected = -((1 - score) ** 2) * math.log(score)
    assert even[0].tolist() == pytest.approx([0.25 * expected, 0.75 * expected])


def test_background_loss_of_both_recipes():
    logits = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = sum(float(_focal(logits[b, p], 0)) for b in range(3) for p in range(7))
    assert float(background_loss(logits, "official")) == pytest.approx(total)
    assert float(background_loss(logits, "corrected")) == pytest.approx(total / 21)


def test_smoothing_spreads_the_labels_of_actions_alone() -> None:
    """Against a loop over priors and classes; 0 is the plain loss."""
    logits = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 1, 2, 3, 0], [3, 0, 0, 1, 2]])
    assert torch.equal(focal_loss(logits, labels, 0.0), focal_loss(logits, labels))
    found = focal_loss(logits, labels, 0.2)
    for clip in range(2):
        for prior in range(5):
            scores = torch.softmax(logits[clip, prior], 0) + 1e-6
            label = int(labels[clip, prior])
            wanted = 0.0
            for one in range(4):
                share = float(one == label) * (0.8 if label else 1.0) + (0.2 / 4 if label else 0.0)
                wanted -= share * float((1 - scores[one]) ** 2 * scores[one].log())
            weight = 0.75 if label else 0.25
            assert float(found[clip, prior]) == pytest.approx(weight * wanted, rel=1e-9)
