"""One whole distillation step of recognition at full size, and four in a row (golden 06)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor

from gkdcli.data.batches import ClipBatch
from gkdcli.losses.distill import ramp
from gkdcli.models.network import build_cvae
from gkdcli.models.recognizer import Recognizer
from gkdcli.resolve import resolve
from gkdcli.settings import Settings
from gkdcli.tasks import recognition
from gkdcli.training import trainer
from gkdcli.training.steps import Networks, Term, generator_terms, network_terms, see, total
from tests.parity.golden import (
    Findings,
    RecordedNoise,
    fill,
    gradients,
    needs_golden,
    recorded,
    script,
    shapes,
)
from tests.parity.steps import (
    PRECISE,
    assert_no_gradients,
    compare_gradients,
    compare_parameters,
    two_threads,  # noqa: F401 - a fixture
)
from tests.training.jobs import job_of_one_clip

pytestmark = [needs_golden, pytest.mark.heavy]
NETWORK_KEYS = {who: f"rec_{who}_in3_cls101" for who in ("teacher", "student")}


def official_page() -> Settings:
    """What `gkd distill ucf101` trains with."""
    return resolve("ucf101", stage="distill", modality="rgb", root=Path(".")).settings


def cvae_keys(who: str) -> dict[str, tuple[int, ...]]:
    """Without the branch that recognition never uses (FINDINGS 15)."""
    return {key: shape for key, shape in shapes(f"rec_cvae_{who}").items() if "_832." not in key}


def build(page: Settings) -> Networks:
    """All four networks with the recorded weights, as the trainer has them."""
    made: dict[str, tuple[Recognizer, torch.nn.ModuleDict]] = {}
    for who in ("teacher", "student"):
        salt = "teacher:" if who == "teacher" else ""
        network = recognition.build_network(page, who, 101, "rgb")
        fill(network, shapes(NETWORK_KEYS[who]), salt)
        generators = build_cvae(network)
        fill(generators, cvae_keys(who), salt)
        made[who] = network, generators
    for module in made["teacher"]:
        module.eval().requires_grad_(False)
    return Networks(*(made["student"][0].train(), made["student"][1]), *made["teacher"])


def inputs(figures: dict[str, np.ndarray]) -> tuple[Tensor, Tensor]:
    clip = script("make_inputs").recognition_clip(int(figures["input_seed"]))
    return torch.from_numpy(clip), torch.from_numpy(figures["label"])


def scalars(first: dict[str, Term], second: dict[str, Term]) -> dict[str, float]:
    """Our terms under the recorded names."""
    one, two = ({name: term.value.item() for name, term in terms.items()} for terms in (first, second))
    cost = total(second).item()
    return {
        "loss_5c": one["cvae_reconstruction.Mixed_5c"] + one["cvae_kl.Mixed_5c"],
        "KD_loss_cvae": one["generative_distillation.Mixed_5c"],
        "loss": total(first).item(),
        "loss_fg": two["classification"],
        "l_recon_5c": two["reconstruction.Mixed_5c"],
        "l_recon": two["reconstruction.Mixed_5c"],
        "KD_loss": two["attention_distillation.Mixed_5c"],
        "cost": cost,
        # what the published code logs as its classification loss is the whole cost (FINDINGS 9)
        "loss_fg_as_logged_by_reference": cost,
        "loss_fg_val": cost,
        "cost_val": cost,
        "loss_recon_val": two["reconstruction.Mixed_5c"],
        "loss_cvae_val": total(first).item(),
        "loss_cvae_KD_val": one["generative_distillation.Mixed_5c"],
        "loss_KD_val": two["attention_distillation.Mixed_5c"],
    }


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_one_step(precision):
    exact = recorded("06_step_recognition_f64")
    figures = exact if precision == "float64" else recorded("06_step_recognition")
    page, dtype = official_page(), getattr(torch, precision)
    networks = build(page)
    for module in vars(networks).values():
        if isinstance(module, torch.nn.Module):
            module.to(dtype)
    (clip, label), noise = inputs(figures), RecordedNoise(figures, dtype)
    clip = clip.to(dtype)
    found = Findings(f"06_step_recognition, {precision}")
    student = networks.student

    with torch.no_grad():
        seen = see(networks.forward, student, clip)
    first = generator_terms(networks, seen, noise, page.distill)
    total(first).backward()
    keys = cvae_keys("student")
    compare_gradients(found, figures, exact, "stage1", gradients(networks.generators, keys))
    assert not gradients(student, shapes(NETWORK_KEYS["student"]))
    networks.generators.zero_grad()
    networks.generators.requires_grad_(False)
    assert_no_gradients(networks.teacher_generators)
    networks.teacher_generators = None  # stage 2 has no use for it

    seen = see(networks.forward, student, clip)
    second = network_terms(
        networks,
        clip,
        seen,
        noise,
        ramp(int(figures["epoch"]), page.distill.ramp_epochs),
        page.distill,
        lambda ours, _, n: recognition.supervised_terms(student, ours, None, {"labels": label}, n, page),
    )
    del seen
    total(second).backward()
    ours = gradients(student, shapes(NETWORK_KEYS["student"]))
    compare_gradients(found, figures, exact, "stage2", ours)
    affine = [key for key in ours if ".bn." in key]
    assert len(affine) == int(figures["stage2/bn_affine_params_with_grad"])
    assert_no_gradients(networks.generators)
    assert_no_gradients(networks.teacher)

    wanted = {name.removeprefix("scalar/"): value for name, value in figures.items() if "scalar/" in name}
    got = scalars(first, second)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        tolerance = PRECISE if precision == "float64" else 1e-4
        found.add("scalars", name, abs(got[name] - float(value)) / float(value), tolerance)
    assert noise.draws == 3
    found.settle()


@pytest.mark.slow  # minutes, and on most machines it says no more than the reason below
@pytest.mark.xfail(
    reason="rounding grows to 7e-3 where the CPU's kernels are not the record's; float64 is 5e-3 from it",
    strict=False,
)
def test_four_steps(monkeypatch):
    """By the trainer itself, with its optimisers; the epoch stays 5, and the noise starts anew each time."""
    figures = recorded("06_trajectory_recognition")
    page = official_page()
    networks = build(page)
    before = {"student": networks.student, "cvae": networks.generators}
    before = {who: {n: v.clone() for n, v in m.state_dict().items()} for who, m in before.items()}
    (clip, label), draws = inputs(figures), []

    def noise(seed: int, epoch: int, part: int, samples: list[int], device: object) -> RecordedNoise:
        assert epoch == int(figures["epoch"])
        if part == 0:
            draws.append(RecordedNoise(figures))
        return draws[-1]

    monkeypatch.setattr(trainer, "Noise", noise)
    monkeypatch.setattr(trainer, "normalise", lambda clips, settings, frames: clips)
    page = page.model_copy(update={"optim": page.optim.model_copy(update={"batch_size": 1})})
    job = job_of_one_clip(networks, page, recognition)
    work = trainer.Trainer(job, None, None, Fabric(accelerator="cpu", devices=1))
    batch = ClipBatch(clip, {"labels": label}, [0])
    found = Findings("06_trajectory_recognition")
    for number in range(4):
        values = {}
        for part in (0, 1):
            work.position.step = 2 * (int(figures["epoch"]) - 1) + part
            values |= {f"{part}/{name}": value for name, value in work._step(batch).items()}
        got = {
            "loss_5c": values["0/cvae_reconstruction.Mixed_5c"] + values["0/cvae_kl.Mixed_5c"],
            "loss": values["0/loss"],
            "KD_loss_cvae": values["0/generative_distillation.Mixed_5c"],
            "cost": values["1/loss"],
            "l_recon_5c": values["1/reconstruction.Mixed_5c"],
            "l_recon": values["1/reconstruction.Mixed_5c"],
            "KD_loss": values["1/attention_distillation.Mixed_5c"],
            "unweighted_losses": values["1/classification"],
        }
        wanted = {name.split("/")[1]: value for name, value in figures.items() if "per_step/" in name}
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            recorded_value = float(value[number].item())
            found.add(
                "terms", f"{name}, step {number}", abs(got[name] - recorded_value) / recorded_value, 1e-3
            )
        assert draws[-1].draws == 3
    assert len(draws) == 4
    compare_parameters(found, figures, networks, before)
    found.settle()
