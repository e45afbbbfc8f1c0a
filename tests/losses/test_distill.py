"""The loss terms against their formulas, and numbers that must not move."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from gkdcli.losses.distill import (
    attention_distillation,
    classification_loss,
    cvae_loss,
    generative_distillation,
    ramp,
    reconstruction_error,
)


class Result(NamedTuple):
    """Stands for what a CVAE returns."""

    feature: Tensor
    mean: Tensor
    log_var: Tensor


def drawn() -> tuple[Result, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    result = Result(normal(2, 4, 3, 2, 2), normal(2, 3, 4), normal(2, 3, 4))
    return result, normal(2, 4, 3, 2, 2), torch.sigmoid(normal(2, 4, 3))


def test_cvae_loss_equals_the_formula_element_by_element():
    result, feature, attention = drawn()
    terms = cvae_loss(result, feature, attention, kl_weight=0.1)
    kl = 0.0
    for b in range(2):
        for t in range(3):
            for c in range(4):
                m, v, a = result.mean[b, t, c], result.log_var[b, t, c], attention[b, c, t]
                kl += -0.5 * (1 + v - (m - a) ** 2 - math.exp(v)) / 24
    assert float(terms.kl) == pytest.approx(0.1 * float(kl))
    assert float(terms.reconstruction) == pytest.approx(float((result.feature - feature).pow(2).mean()))
    assert min(terms) > 0


def test_kl_vanishes_only_at_the_prior():
    result, feature, attention = drawn()
    at_prior = Result(feature, attention.transpose(1, 2), torch.zeros(2, 3, 4, dtype=torch.float64))
    terms = cvae_loss(at_prior, feature, attention, kl_weight=0.1)
    assert [float(term) for term in terms] == [0.0, 0.0]
    assert cvae_loss(result._replace(mean=at_prior.mean), feature, attention, 0.1).kl > 0
    assert cvae_loss(result._replace(log_var=at_prior.log_var), feature, attention, 0.1).kl > 0


@pytest.mark.parametrize("term", [generative_distillation, reconstruction_error, attention_distillation])
def test_squared_errors_are_means_with_gradients_on_both_sides(term):
    left = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    right = torch.tensor([[1.0, 0.0], [3.0, 1.0]], requires_grad=True)
    loss = term(left, right)
    assert loss.item() == pytest.approx(13 / 4)
    loss.backward()
    assert left.grad.any()
    torch.testing.assert_close(left.grad, -right.grad)


def test_ramp_rises_and_stays():
    assert [ramp(epoch, 20) for epoch in (1, 10, 20, 200)] == [0.05, 0.5, 1.0, 1.0]


def test_official_classification_is_a_second_softmax():
    perfect = torch.full((1, 101, 7), -50.0)
    perfect[0, 3] = 50.0
    labels = torch.tensor([3])
    assert float(classification_loss(perfect, labels, "official")) == pytest.approx(0.0873, abs=5e-5)
    assert float(classification_loss(perfect, labels, "corrected")) == pytest.approx(0.0, abs=1e-6)


def test_classification_losses_against_the_formulas():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 4, 2])
    official = corrected = 0.0
    for b, label in enumerate(labels.tolist()):
        summed = sum(torch.exp(logits[b, :, t]) / torch.exp(logits[b, :, t]).sum() for t in range(4))
        official -= math.log(math.exp(summed[label]) / float(torch.exp(summed).sum())) / 3
        mean = logits[b].mean(dim=1)
        corrected -= math.log(math.exp(mean[label]) / float(torch.exp(mean).sum())) / 3
    assert float(classification_loss(logits, labels, "official")) == pytest.approx(official)
    assert float(classification_loss(logits, labels, "corrected")) == pytest.approx(corrected)


@pytest.mark.parametrize("recipe", ["official", "corrected"])
def test_smoothing_takes_its_share_of_the_label_for_all_classes(recipe: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(3, 4, 2, generator=generator), torch.tensor([1, 0, 3])
    scores = torch.softmax(logits, 1).sum(2) if recipe == "official" else logits.mean(2)
    chances = torch.log_softmax(scores, 1)
    wanted = -(0.9 * chances[torch.arange(3), labels] + 0.1 * chances.mean(1)).mean()
    torch.testing.assert_close(classification_loss(logits, labels, recipe, 0.1), wanted)
