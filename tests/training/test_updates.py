"""training.updates: gradients scaled for fp16, the mean of the weights; runs with them are resumed exactly.

Networks run in float32 here, where a scale that is a power of two changes no bit: what is tried is the
scaling, on any machine. Passes in fp16 itself: test_forward.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from gkdcli.data.store import Store
from gkdcli.errors import GkdError
from gkdcli.runs import Run
from gkdcli.settings import OptimSettings
from gkdcli.tasks import detection
from gkdcli.tasks.trained import rebuild
from gkdcli.training import optim
from gkdcli.training.processes import Group
from gkdcli.training.trainer import Trainer
from gkdcli.training.updates import LEAST_SCALE, Average, Updates
from tests.training import detection_jobs, jobs
from tests.training.jobs import copied, metrics_of, page, store_of, trainer_of, untimed


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return store_of(tmp_path_factory.mktemp("store"), 5)


def same(run: Run, other: Run) -> None:
    """All tensors and all metrics but the times."""
    ours, theirs = load_file(run.last), load_file(other.last)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert untimed(metrics_of(run)) == untimed(metrics_of(other))


# ---- fp16 ----


@pytest.mark.parametrize("schedule", ["step", "epoch"])
@pytest.mark.parametrize("norm", [0.0, 0.05])
def test_scaled_gradients_move_the_weights_as_plain_ones_do(tmp_path: Path, store, schedule, norm):
    """Clipping, too, is by the gradients as they are without the scale."""
    ends = []
    for precision in ("32", "fp16"):
        settings = page(
            train__precision=precision,
            train__schedule=schedule,
            optim__clip_norm=norm,
            optim__epochs=1,
            optim__accumulation=2,
        )
        trainer = trainer_of(tmp_path / precision, store, settings)
        trainer.fit(None)
        ends.append((load_file(trainer.run.last), metrics_of(trainer.run)))
    (plain, plain_log), (scaled, scaled_log) = ends
    assert [name for name in plain if not torch.equal(plain[name], scaled[name])] == []
    assert {line["network_scale"] for line in scaled_log if "loss" in line} == {2.0**16}
    assert "network_scale" not in plain_log[0]


def overflowing(trainer: Trainer, steps: tuple[int, ...]) -> None:
    """A gradient of both stages is infinite in these steps, counted from 0."""
    played = trainer.job.networks
    for module in (played.student, played.generators):
        parameter = next(parameter for parameter in module.parameters() if parameter.requires_grad)
        parameter.register_hook(
            lambda gradient: gradient * math.inf if trainer.position.step in steps else gradient
        )


def test_a_step_whose_gradient_overflows_is_left_out_and_the_scale_is_halved(tmp_path: Path, store):
    trainer = trainer_of(tmp_path, store, page(train__precision="fp16", optim__ema=0.5))
    overflowing(trainer, (0, 1))
    student, mean = trainer.job.networks.student, trainer.updates.average
    weights = {name: value.clone() for name, value in student.named_parameters()}
    means = {name: value.clone() for name, value in mean.tensors.items()}
    trainer.fit(2)
    assert all(torch.equal(value, weights[name]) for name, value in student.named_parameters())
    assert all(torch.equal(value, means[name]) for name, value in mean.tensors.items())
    assert mean.steps == 0
    assert trainer.updates.optimizer.state_dict()["state"] == {}
    trainer.fit(None)
    assert trainer.run.state == "complete"
    assert any(not torch.equal(value, weights[name]) for name, value in student.named_parameters())
    lines = [line for line in metrics_of(trainer.run) if "loss" in line]
    assert [line["network_scale"] for line in lines] == [2.0**15] + [2.0**14] * (len(lines) - 1)
    assert lines[-1]["network_left_out"] == lines[-1]["generator_left_out"] == mean_of(lines) == 2
    assert all(math.isfinite(line["loss"]) for line in lines)


def mean_of(lines: list[dict[str, Any]]) -> float:
    """The most steps left out that any line tells of."""
    return max(line["network_left_out"] for line in lines)


def test_a_loss_that_is_no_number_is_an_error_in_fp16_too(tmp_path: Path, store):
    trainer = trainer_of(tmp_path, store, page(train__precision="fp16"))
    with torch.no_grad():
        trainer.job.networks.student.classifier.bias[0] = math.nan
    with pytest.raises(GkdError, match="first bad term: classification = nan"):
        trainer.fit(None)


def test_gradients_that_overflow_at_any_scale_end_the_run():
    weight = nn.Parameter(torch.zeros(3))
    updates = Updates(torch.optim.SGD([weight], 0.1, 0.9, fused=True), 0.1, 0.0, scaled=True)

    def for_ever() -> None:
        while True:
            updates.scaled((weight * math.inf).sum()).backward()
            assert not updates.move(Group(), [0])

    with pytest.raises(GkdError, match="overflow in fp16 even at a scale of") as caught:
        for_ever()
    assert "bf16" in caught.value.hint
    assert updates.scaler.get_scale() == LEAST_SCALE / 2
    assert torch.equal(weight.detach(), torch.zeros(3))


# ---- the mean of the weights ----


def test_the_mean_follows_its_formula_and_batch_statistics_follow_it():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    mean = Average(network, 0.3)
    wanted = {name: value.double() for name, value in network.state_dict().items()}
    for step in range(6):
        with torch.no_grad():
            for value in network.state_dict().values():
                value.add_(torch.ones_like(value) * (step + 1))
        mean.move()
        keeps = min(0.3, (1 + step) / (10 + step))
        for name, value in network.state_dict().items():
            wanted[name] = keeps * wanted[name] + (1 - keeps) * value
    for name, value in mean.tensors.items():
        if name.endswith("num_batches_tracked"):
            assert value == network.state_dict()[name]
        else:
            torch.testing.assert_close(value.double(), wanted[name], rtol=1e-5, atol=1e-6)
    raw, averaged = copied(network), {name: value.clone() for name, value in mean.tensors.items()}
    with mean.shown():
        assert all(torch.equal(value, averaged[name]) for name, value in network.state_dict().items())
    assert all(torch.equal(value, raw[name]) for name, value in network.state_dict().items())
    assert all(torch.equal(value, averaged[name]) for name, value in mean.tensors.items())


def test_the_mean_is_what_is_validated_saved_and_rebuilt(tmp_path: Path, store):
    seen = []
    trainer = trainer_of(tmp_path, store, page(optim__ema=0.9))
    student = trainer.job.networks.student
    trainer.job.validate = lambda: seen.append(copied(student)) or 0.5
    trainer.fit(None)
    mean, raw = trainer.updates.average.tensors, copied(student)
    assert any(not torch.equal(mean[name], raw[name]) for name in raw)
    assert all(torch.equal(seen[-1][name], mean[name]) for name in raw)
    for path in (trainer.run.last, trainer.run.best):
        file = load_file(path)
        assert all(torch.equal(file[f"network.{name}"], mean[name]) for name in raw)
    scored = rebuild(Run(trainer.run.folder)).state_dict()
    assert all(torch.equal(scored[name], mean[name]) for name in raw)
    plain = trainer_of(tmp_path / "plain", store, page())
    plain.fit(None)
    assert all(torch.equal(value, raw[name]) for name, value in copied(plain.job.networks.student).items())


# ---- stopped and continued, with everything on ----

ALL = {
    "train.precision": "fp16",
    "train.checkpoint_activations": "true",
    "optim.ema": "0.8",
    "optim.label_smoothing": "0.1",
    "optim.schedule": "step",
    "optim.step_epochs": "[1]",
}
CASES = [("step", "corrected"), ("epoch", "official")]


def maker(task: str, schedule: str, recipe: str, folder: Path) -> Callable[..., Trainer]:
    """Trainers of the same run, each as a process of its own would build it."""
    changes = ALL | {"train.schedule": schedule, "recipe": recipe}
    if task == "recognition":
        values = {"true": True, "[1]": [1.0]}
        settings = page(**{key.replace(".", "__"): values.get(text, text) for key, text in changes.items()})
        store = store_of(folder / "store", 5)
    else:
        sets = [f"{key}={value}" for key, value in changes.items()]
        settings = detection_jobs.page(*sets, f"optim.batch_size={1 if recipe == 'official' else 3}")
        store = Store.open(folder)

    def make(root: Path, run: Run | None = None) -> Trainer:
        if task == "recognition":
            trainer = jobs.trainer_of(root, store, settings, run, validate=lambda: 0.5)
        else:
            videos = store.split(1, "train")[:1]
            dataset = detection.training_set(store, videos, settings)
            options = {"dataset": dataset, "validate": lambda: 0.5}
            trainer = detection_jobs.trainer_of(root, store, settings, run, **options)
        trainer.job.networks.student.recompute()
        overflowing(trainer, (1, trainer.schedule.batches))
        return trainer

    return make


@pytest.mark.parametrize(("schedule", "recipe"), CASES)
@pytest.mark.parametrize("task", ["recognition", "detection"])
def test_cut_and_resumed_equals_undisturbed(
    tmp_path: Path, tiny_detection_store: Path, task, schedule, recipe
):
    at = tmp_path if task == "recognition" else tiny_detection_store / "stores/demo-detection-tiny/rgb.h5"
    make = maker(task, schedule, recipe, at)
    whole = make(tmp_path / "whole")
    whole.fit(None)
    assert whole.updates.left_out
    trainer = make(tmp_path / "cut")
    for stop in (2, whole.schedule.steps - 1, None):
        trainer.fit(stop)
        trainer = make(tmp_path / "cut", Run(trainer.run.folder))
        trainer.restore()
    assert trainer.run.state == "complete"
    same(trainer.run, whole.run)
    same_best = [load_file(run.best) for run in (trainer.run, whole.run)]
    assert all(torch.equal(same_best[0][name], value) for name, value in same_best[1].items())
    # the scale that had been halved, the count of the mean's steps
    for ours, theirs in (
        (trainer.updates, whole.updates),
        (trainer.generator_updates, whole.generator_updates),
    ):
        assert ours.numbers() == theirs.numbers()


def test_rates_fall_in_steps_after_the_warm_up():
    settings = OptimSettings(
        schedule="step", step_epochs=[2, 4.5], step_factor=0.5, warmup_epochs=1, epochs=6
    )
    found = [optim.rate_factor(settings, done) for done in (0.5, 1, 1.99, 2, 4.4, 4.5, 6)]
    assert found == [pytest.approx(0.501), 1, 1, 0.5, 0.5, 0.25, 0.25]
