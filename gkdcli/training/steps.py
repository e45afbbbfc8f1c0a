"""The two stages of a step as named terms (METHOD.md 4). Phase 1 is the same two stages without a teacher."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gkdcli.data.clock import spent
from gkdcli.losses import distill as losses
from gkdcli.models.layers import BATCH_NORMS
from gkdcli.settings import DistillSettings, Settings
from gkdcli.training.forward import Forward
from gkdcli.training.noise import Noise


class Term(NamedTuple):
    """A loss term: its weight in the sum, and its own value (a scalar)."""

    weight: float
    value: Tensor


Maps = dict[str, Tensor]  # of attention, (B, C, T'), by tap


class Taught(NamedTuple):
    """The teacher's attention maps of clips, and of those spliced clips that there are (METHOD.md 5)."""

    maps: Maps
    spliced: Maps


class Seen(NamedTuple):
    """What a network makes of clips: features (B, C, T', H, W) and attention maps (B, C, T'), by tap."""

    features: dict[str, Tensor]
    maps: Maps

    def divided(self, count: int) -> tuple[Seen, Seen]:
        """Of the first `count` clips, and of the others."""
        return self._part(slice(None, count)), self._part(slice(count, None))

    def _part(self, rows: slice) -> Seen:
        return Seen(*({tap: value[rows] for tap, value in each.items()} for each in self))


class Supervised(NamedTuple):
    """What a task adds to a step.

    Args:
        terms: of its own losses.
        generated_like: what generated features are compared with; None for the features themselves.
    """

    terms: dict[str, Term]
    generated_like: dict[str, Tensor] | None = None


@dataclass
class Networks:
    """Everything in play.

    Args:
        student: the network being trained (the teacher itself in phase 1).
        generators: its CVAEs by tap; None for the plain student.
        teacher: frozen; None in phase 1, for the plain student, and where what it says is known.
        teacher_generators: the frozen teacher's CVAEs.
        forward: how they are run; heads and losses are in float32 whatever it says.
    """

    student: Any
    generators: nn.ModuleDict | None = None
    teacher: Any = None
    teacher_generators: nn.ModuleDict | None = None
    forward: Forward = field(default_factory=Forward)


# of the clips, and of their spliced versions where there are any (METHOD.md 5)
Supervise = Callable[[Seen, Seen | None, Noise], Supervised]


def total(terms: dict[str, Term]) -> Tensor:
    """The weighted sum: the only place where terms are added up."""
    return torch.stack([term.weight * term.value for term in terms.values()]).sum()


def generator_terms(
    networks: Networks, seen: Seen, noise: Noise, settings: DistillSettings
) -> dict[str, Term]:
    """Stage 1: the CVAE loss, and generative distillation where there is a teacher.

    Both CVAEs are fed what the student has `seen`, detached here; each draws its own noise, the student's
    taps first.
    """
    assert networks.generators is not None
    features = {tap: feature.detach() for tap, feature in seen.features.items()}
    maps = {tap: attention.detach() for tap, attention in seen.maps.items()}
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
    seen: Seen,
    noise: Noise,
    ramp: float,
    settings: DistillSettings,
    supervise: Supervise,
    spliced: int = 0,
    spliced_part: Tensor | float = 1.0,
    taught: Taught | None = None,
) -> dict[str, Term]:
    """Stage 2: the task, the error of the generated feature, and attention distillation.

    The CVAE is frozen by the caller; gradient passes through it to the attention, and to the feature on the
    other side.

    Args:
        networks: all in play.
        clips: (B + spliced, C, T, H, W), normalised; the teacher sees the same clips.
        seen: by the student, with gradient.
        noise: of this batch.
        ramp: min(epoch, ramp epochs) / ramp epochs.
        settings: the weights.
        supervise: the task's own terms.
        spliced: of the clips so many, the last ones, are versions of others with background spliced in
            (METHOD.md 5).
        spliced_part: makes of a mean over them this process's part of the mean over those of all processes.
        taught: what the teacher makes of these clips, where that is known; None: it is run.
    """
    count = len(clips) - spliced
    seen, more = seen.divided(count)
    terms, generated_like = supervise(seen, more if spliced else None, noise)
    generators: Any = networks.generators or {}
    for tap, generator in reversed(generators.items()):
        attention = seen.maps[tap]
        generated = networks.forward(generator.generate, attention, noise.normal(_latent(attention)))
        value = losses.reconstruction_error(generated, (generated_like or seen.features)[tap])
        terms[f"reconstruction.{tap}"] = Term(settings.reconstruction_weight * ramp, value)
    if seen.maps and (taught or networks.teacher is not None):
        theirs = taught or _teach(networks, clips, count)
        for name, ours, wanted in zip(("", ".spliced"), (seen.maps, more.maps), theirs, strict=True):
            for tap, attention in ours.items() if not name or spliced else ():
                value = losses.attention_distillation(attention, wanted[tap])
                if name:
                    value = value * spliced_part
                terms[f"attention_distillation.{tap}{name}"] = Term(settings.beta, value)
    return terms


@torch.no_grad()
def _teach(networks: Networks, clips: Tensor, count: int) -> Taught:
    seen = spent("teacher_forward", see, networks.forward, networks.teacher, clips)
    ours, spliced = seen.divided(count)
    return Taught(ours.maps, spliced.maps)


def has_spliced(settings: Settings) -> bool:
    """Whether clips with background spliced in are among what networks are shown (METHOD.md 5)."""
    return settings.task == "detection" and settings.distill.contrast_weight > 0


def see(forward: Forward, network: Any, clips: Tensor) -> Seen:
    """Runs backbone and attention on normalised clips (B, C, T, H, W)."""
    features = forward.features(network, clips)
    return Seen(features, forward(lambda: network.attend(features)))


@contextlib.contextmanager
def held_statistics(network: nn.Module) -> Iterator[None]:
    """Batch norm in training mode goes by the batch but leaves its running statistics alone (METHOD.md 8)."""
    norms = [module for module in network.modules() if isinstance(module, BATCH_NORMS)]
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
