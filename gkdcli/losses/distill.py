"""The terms of both stages of recognition, and those of distillation in either task (METHOD.md 3, 4).

Every function is pure and returns a scalar, a mean unless it says otherwise. Sums over taps and weights
other than the CVAE's own belong to the trainer, which logs each term.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Reconstructed(Protocol):
    """What a CVAE returns: feature (B, C, T', H, W), mean and log-variance (B, T', C)."""

    @property
    def feature(self) -> Tensor:
        """The decoded feature."""

    @property
    def mean(self) -> Tensor:
        """Of the latent."""

    @property
    def log_var(self) -> Tensor:
        """Of the latent."""


class CVAELoss(NamedTuple):
    """The two terms of the CVAE loss, weighted: their sum is the loss."""

    reconstruction: Tensor
    kl: Tensor


def cvae_loss(
    reconstruction: Reconstructed, feature: Tensor, attention: Tensor, kl_weight: float
) -> CVAELoss:
    """MSE(reconstruction, x) and kl_weight * KL(N(mean, exp(log_var)) || N(a, 1)) (METHOD.md 3).

    KL = -1/2 mean(1 + log_var - (mean - a)^2 - exp(log_var)), the mean taken over all elements, latent
    channels included; so `kl_weight` 0.1 weighs a nat per element, not per latent vector, as published.

    Args:
        reconstruction: of the CVAE whose loss this is.
        feature: x, (B, C, T', H, W).
        attention: a, (B, C, T').
        kl_weight: 0.1 in the paper.
    """
    mean, log_var = reconstruction.mean, reconstruction.log_var
    distance = mean - attention.transpose(1, 2)  # (B, T', C)
    kl = -0.5 * (1 + log_var - distance.square() - log_var.exp()).mean()
    return CVAELoss(F.mse_loss(reconstruction.feature, feature), kl_weight * kl)


def generative_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """MSE between the reconstructions by the student's and by the teacher's CVAE (stage 1; METHOD.md 4).

    Both (B, C, T', H, W), of the same feature and attention: the student's.
    """
    return F.mse_loss(student, teacher)


def reconstruction_error(generated: Tensor, feature: Tensor) -> Tensor:
    """MSE between the feature generated from the attention and the feature (stage 2; METHOD.md 4).

    Both (B, C, T', H, W). Neither side is detached: through the frozen CVAE the gradient reaches the
    attention, and the feature is drawn towards what its attention explains.
    """
    return F.mse_loss(generated, feature)


def attention_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """MSE between the attention maps (B, C, T') of student and teacher (stage 2; METHOD.md 4)."""
    return F.mse_loss(student, teacher)


def ramp(epoch: float, epochs: int) -> float:
    """Weight of the reconstruction term, min(epoch, epochs) / epochs; epochs count from 1 (METHOD.md 4)."""
    return min(epoch, epochs) / epochs


def classification_loss(
    logits: Tensor, labels: Tensor, recipe: Literal["official", "corrected"], smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of recognition (METHOD.md 4 and 8 (6)).

    `corrected`: of the time-averaged logits. `official`: of the class probabilities summed over time, that
    is with a second softmax; a perfect prediction over 7 steps of 101 classes still costs 0.087.

    Args:
        logits: (B, classes, T).
        labels: (B,), integers from 0.
        recipe: one of the two.
        smoothing: share of the label that is spread over all classes, its own included.
    """
    scores = torch.softmax(logits, dim=1).sum(dim=2) if recipe == "official" else logits.mean(dim=2)
    return F.cross_entropy(scores, labels, label_smoothing=smoothing)
