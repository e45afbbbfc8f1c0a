"""The two stages of a step as named terms (METHOD.md 4). Phase 1 is the same two stages without a teacher."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gkdcli.losses import distill as losses
from gkdcli.settings import DistillSettings
from gkdcli.training.forward import Forward
from gkdcli.training.noise import Noise


class Term(NamedTuple):
    """A loss term: its weight in the sum, and its own value (a scalar)."""

    weight: float
    value: Tensor


@dataclass
class Networks:
    """Everything in play.

    Args:
        student: the network being trained (the teacher itself in phase 1).
        generators: its CVAEs by tap; None for the plain student.
        teacher: frozen; None in phase 1 and for the plain student.
        teacher_generators: the frozen teacher's CVAEs.
        forward: how they are run; heads and losses are in float32 whatever it says.
    """

    student: Any
    generators: nn.ModuleDict | None = None
    teacher: Any = None
    teacher_generators: nn.ModuleDict | None = None
    forward: Forward = field(default_factory=Forward)


Supervised = Callable[[dict[str, Tensor], dict[str, Tensor], Noise], dict[str, Term]]


def total(terms: dict[str, Term]) -> Tensor:
    """The weighted sum: the only place where terms are added up."""
    return torch.stack([term.weight * term.value for term in terms.values()]).sum()


def generator_terms(
    networks: Networks,
    features: dict[str, Tensor],
    maps: dict[str, Tensor],
    noise: Noise,
    settings: DistillSettings,
) -> dict[str, Term]:
    """Stage 1: the CVAE loss, and generative distillation where there is a teacher.

    Both CVAEs are fed the student's features (B, C, T', H, W) and maps (B, C, T'), detached here; each draws
    its own noise, the student's taps first.
    """
    assert networks.generators is not None
    features = {tap: feature.detach() for tap, feature in features.items()}
    maps = {tap: attention.detach() for tap, attention in maps.items()}
    terms: dict[str, Term] = {}
    rebuilt = {}
    for tap, generator in networks.generators.items():
        result = networks.forward(generator, features[tap], maps[tap], noise.normal(_latent(maps[tap])))
        loss = losses.cvae_loss(result, features[tap], maps[tap], settings.kl_weight)
        terms[f"cvae_reconstruction.{tap}"] = Term(1.0, loss.reconstruction)
        terms[f"cvae_kl.{tap}"] = Term(1.0, loss.kl)
        rebuilt[tap] = result.feature
    if networks.teacher_generators is not None:
        for tap, generator in networks.teacher_generators.items():
            with torch.no_grad():
                theirs = networks.forward(
                    generator, features[tap], maps[tap], noise.normal(_latent(maps[tap]))
                )
            value = losses.generative_distillation(rebuilt[tap], theirs.feature)
            terms[f"generative_distillation.{tap}"] = Term(settings.generative_weight, value)
    return terms


def network_terms(
    networks: Networks,
    clips: Tensor,
    features: dict[str, Tensor],
    maps: dict[str, Tensor],
    noise: Noise,
    ramp: float,
    settings: DistillSettings,
    supervised: Supervised,
) -> dict[str, Term]:
    """Stage 2: the task, the error of the generated feature, and attention distillation.

    The CVAE is frozen by the caller; gradient passes through it to the attention, and to the feature on the
    other side.

    Args:
        networks: all in play.
        clips: (B, C, T, H, W), normalised; the teacher sees the same clip.
        features: the student's, with gradient.
        maps: likewise.
        noise: of this batch.
        ramp: min(epoch, ramp epochs) / ramp epochs.
        settings: the weights.
        supervised: the task's own terms.
    """
    terms = supervised(features, maps, noise)
    generators: Any = networks.generators or {}
    for tap, generator in generators.items():
        generated = networks.forward(generator.generate, maps[tap], noise.normal(_latent(maps[tap])))
        value = losses.reconstruction_error(generated, features[tap])
        terms[f"reconstruction.{tap}"] = Term(settings.reconstruction_weight * ramp, value)
    if networks.teacher is not None and maps:
        with torch.no_grad():
            theirs = networks.forward.features(networks.teacher, clips)
            wanted_maps = attention_maps(networks.forward, networks.teacher, theirs)
        for tap, attention in maps.items():
            value = losses.attention_distillation(attention, wanted_maps[tap])
            terms[f"attention_distillation.{tap}"] = Term(settings.beta, value)
    return terms


def attention_maps(forward: Forward, network: Any, features: dict[str, Tensor]) -> dict[str, Tensor]:
    """The maps (B, C, T') of a network's features by tap."""
    maps: dict[str, Tensor] = forward(lambda: network.attend(features))
    return maps


@contextlib.contextmanager
def held_statistics(network: nn.Module) -> Iterator[None]:
    """Batch norm in training mode goes by the batch but leaves its running statistics alone (METHOD.md 8)."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm3d)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _latent(attention: Tensor) -> tuple[int, int, int]:
    """(B, C, T') -> the latent's (B, T', C)."""
    batch, channels, time = attention.shape
    return batch, time, channels
