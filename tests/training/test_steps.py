"""training.steps: both stages against their formulas written out plainly, and whom each gradient reaches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gkdcli.data.clips import normalise
from gkdcli.data.loader import ClipBatch, load
from gkdcli.losses.distill import ramp
from gkdcli.tasks import recognition
from gkdcli.training.noise import Noise
from gkdcli.training.steps import Networks, generator_terms, held_statistics, network_terms, see, total
from tests.training.jobs import TERMS, changed, copied, networks, page, store_of, trainer_of

SETTINGS = page(distill__generative_weight=0.02, distill__kl_weight=0.3, model__dropout=0.4)
TAP = "Mixed_5c"


@pytest.fixture(scope="module")
def played() -> Networks:
    found = networks(SETTINGS, 3)
    for module in (found.teacher, found.teacher_generators):
        module.eval().requires_grad_(False)
    found.student.train()
    return found


@pytest.fixture(scope="module")
def clips() -> Tensor:
    pixels = torch.randint(
        0, 256, (3, 3, 16, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(4)
    )
    return normalise(pixels, SETTINGS.clips)


LABELS = {"labels": torch.tensor([0, 2, 1])}


def noise() -> Noise:
    return Noise(1, 3, 0, [5, 6, 7])


def both_stages(played: Networks, clips: Tensor, recipe: str = "corrected") -> tuple[dict, dict]:
    draws = noise()
    settings = SETTINGS.model_copy(update={"recipe": recipe})
    seen = see(played.forward, played.student, clips)
    first = generator_terms(played, seen, draws, SETTINGS.distill)
    second = network_terms(
        played,
        clips,
        seen,
        draws,
        ramp(3, 4),
        SETTINGS.distill,
        lambda ours, _, n: recognition.supervised_terms(played.student, ours, None, LABELS, n, settings),
    )
    return first, second


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b) ** 2).sum() / a.numel()


@pytest.mark.parametrize("recipe", ["official", "corrected"])
@torch.no_grad()
def test_terms_are_the_published_formulas(played, clips, recipe):
    first, second = both_stages(played, clips, recipe)
    student, teacher = played.student, played.teacher
    x = student.features(clips)[TAP]  # (B, C, T, H, W)
    a = student.attend({TAP: x})[TAP]  # (B, C, T)
    draws = noise()  # per sample: student's CVAE, teacher's CVAE, dropout, generation

    def eps() -> Tensor:
        return draws.normal((3, a.shape[2], a.shape[1]))

    def reconstruct(cvae: Any) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_var = cvae.encoder(x, a)
        return cvae.decoder(mean + (log_var / 2).exp() * eps(), a), mean, log_var

    ours, mean, log_var = reconstruct(played.generators[TAP])
    theirs, _, _ = reconstruct(played.teacher_generators[TAP])
    prior = a.transpose(1, 2)
    kl = -0.5 * (1 + log_var - (mean - prior) ** 2 - log_var.exp()).sum() / mean.numel()
    expected = {
        "cvae_reconstruction.Mixed_5c": (1.0, mean_square(ours, x)),
        "cvae_kl.Mixed_5c": (1.0, 0.3 * kl),
        "generative_distillation.Mixed_5c": (0.02, mean_square(ours, theirs)),
    }

    attended = x * a[..., None, None]
    if recipe == "official":
        attended = attended * (x.sum() / attended.sum())
    else:
        attended = torch.stack([xa * (xb.sum() / xa.sum()) for xa, xb in zip(attended, x, strict=True)])
    keep = draws.keep(student.dropout_shape(3), 0.4)
    logits = student.logits(attended, keep)  # (B, classes, T - 1)
    cross = []
    for sample, label in zip(logits, LABELS["labels"], strict=True):
        scores = sample.softmax(0).sum(1) if recipe == "official" else sample.mean(1)
        cross.append(-math.log(float(scores.exp()[label] / scores.exp().sum())))
    generated = played.generators[TAP].decoder(prior + eps(), a)
    wanted = teacher.attend(teacher.features(clips))[TAP]
    expected |= {
        "classification": (1.0, torch.tensor(sum(cross) / 3)),
        "reconstruction.Mixed_5c": (0.5 * 3 / 4, mean_square(generated, x)),
        "attention_distillation.Mixed_5c": (0.1, mean_square(a, wanted)),
    }

    found = first | second
    assert list(first) == TERMS["generator"]
    assert list(second) == TERMS["network"]
    for name, (weight, value) in expected.items():
        assert found[name].weight == pytest.approx(weight), name
        torch.testing.assert_close(found[name].value, value, rtol=2e-5, atol=1e-7, msg=name)
        assert value > 0, name
    for stage in (first, second):
        plain = sum(expected[name][0] * float(expected[name][1]) for name in stage)
        assert float(total(stage)) == pytest.approx(plain, rel=2e-5)


def reached(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.grad is not None and bool(p.grad.any())}


def test_stage_1_reaches_the_cvae_alone_and_stage_2_the_network_alone(played, clips):
    def clear() -> None:
        for module in (played.student, played.generators):
            module.zero_grad()

    clear()
    played.generators.requires_grad_(True)
    first, _ = both_stages(played, clips)
    total(first).backward()
    assert reached(played.student) == set()
    assert len(reached(played.generators)) == len(list(played.generators.parameters()))

    clear()
    played.generators.requires_grad_(False)
    _, second = both_stages(played, clips)
    total(second).backward()
    played.generators.requires_grad_(True)
    assert reached(played.generators) == set()
    parts = {name.split(".")[0] for name in reached(played.student)}
    assert parts == {"backbone", "attention", "classifier"}
    for module in (played.teacher, played.teacher_generators):
        assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("name", [*TERMS["generator"], *TERMS["network"]])
def test_every_term_moves_what_it_is_meant_to_move(played, clips, name):
    """Each distillation term is more than a number in the log: it changes the gradient of its stage."""
    first, second = both_stages(played, clips)
    value = (first | second)[name].value
    assert value.item() > 1e-6
    module = played.generators if name in first else played.student
    grads = torch.autograd.grad(value, list(module.parameters()), allow_unused=True)
    size = sum(float(grad.square().sum()) for grad in grads if grad is not None) ** 0.5
    assert size > 1e-6
    reached = {
        n.split(".")[0]
        for (n, _), g in zip(module.named_parameters(), grads, strict=True)
        if g is not None and bool(g.any())
    }
    expected = {
        "classification": {"backbone", "attention", "classifier"},
        "reconstruction.Mixed_5c": {"backbone", "attention"},  # neither side is detached
        "attention_distillation.Mixed_5c": {"backbone", "attention"},
    }
    assert reached == expected.get(name, {"Mixed_5c"})


def test_reconstruction_reaches_the_attention_through_the_frozen_cvae(played, clips):
    played.generators.requires_grad_(False)
    _, second = both_stages(played, clips)
    played.generators.requires_grad_(True)
    weights = list(played.student.attention.parameters())
    assert all(grad.any() for grad in torch.autograd.grad(second["reconstruction.Mixed_5c"].value, weights))


def test_the_plain_student_has_the_task_loss_alone(clips):
    student = recognition.build_network(SETTINGS, "student", 3, "rgb", attention=False)
    played = Networks(student)
    terms = network_terms(
        played,
        clips,
        see(played.forward, student, clips),
        noise(),
        1.0,
        SETTINGS.distill,
        lambda ours, _, n: recognition.supervised_terms(student, ours, None, LABELS, n, SETTINGS),
    )
    assert list(terms) == ["classification"]


def test_held_statistics_normalises_as_in_training_and_moves_nothing(played, clips):
    student = played.student
    before = copied(student)
    with held_statistics(student), torch.no_grad():
        held = student.features(clips)[TAP]
    assert changed(student, before) == set()
    with torch.no_grad():
        free = student.features(clips)[TAP]
    assert torch.equal(held, free)
    moved = changed(student, before)
    assert {name.rsplit(".", 1)[1] for name in moved} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }
    student.load_state_dict(before)


# ---- whole steps ----


def batch_of(trainer: Any) -> ClipBatch:
    return next(load(trainer.job.dataset, trainer.schedule.keys(trainer.position.step, 99), workers=0))


@pytest.mark.parametrize(("recipe", "moves"), [("official", True), ("corrected", False)])
def test_only_the_official_stage_1_moves_batch_statistics(tmp_path: Path, recipe, moves):
    trainer = trainer_of(tmp_path, store_of(tmp_path, 4), page(recipe=recipe, train__schedule="epoch"))
    student = trainer.job.networks.student
    before = copied(student)
    trainer._train_on(batch_of(trainer))  # the first pass of an epoch is the generator's
    assert bool(changed(student, before)) == moves
    assert all(".bn." in name for name in changed(student, before))
    assert student.training
    before = copied(student)
    trainer.position.step = trainer.schedule.batches
    trainer._train_on(batch_of(trainer))
    assert any(name.endswith("running_mean") for name in changed(student, before))
    assert any(name.endswith("conv3d.weight") for name in changed(student, before))


@pytest.mark.parametrize(("schedule", "forwards", "lines"), [("epoch", 2, 4), ("step", 1, 2)])
def test_schedule_step_shares_one_student_forward(tmp_path: Path, schedule, forwards, lines):
    settings = page(train__schedule=schedule, optim__epochs=1)
    trainer = trainer_of(tmp_path, store_of(tmp_path, 4), settings)
    calls = {"student": 0, "teacher": 0}
    for name in calls:
        module = getattr(trainer.job.networks, name)
        module.backbone.register_forward_hook(lambda *_, n=name: calls.update({n: calls[n] + 1}))
    trainer.fit(None)
    assert calls == {"student": 2 * forwards, "teacher": 2}  # two batches
    assert trainer.position.step == lines


def test_the_teacher_never_changes_and_gathers_no_gradients(tmp_path: Path):
    trainer = trainer_of(tmp_path, store_of(tmp_path, 4), page(optim__epochs=1, train__schedule="epoch"))
    played = trainer.job.networks
    before = copied(played.teacher), copied(played.teacher_generators)
    student, generators = copied(played.student), copied(played.generators)
    trainer.fit(None)
    for module, old in zip((played.teacher, played.teacher_generators), before, strict=True):
        assert changed(module, old) == set()
        assert not module.training
        assert all(p.grad is None and not p.requires_grad for p in module.parameters())
    assert len(changed(played.generators, generators)) == len(list(played.generators.parameters()))
    assert {name for name, _ in played.student.named_parameters()} <= changed(played.student, student)
