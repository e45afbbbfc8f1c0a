"""Detection through the trainer, on the drawn demo's store: order, resume, logs, held-out videos, padding."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gkdcli.data.segments import Segment
from gkdcli.data.store import Store
from gkdcli.errors import Interrupted
from gkdcli.evaluation.windows import WindowFile
from gkdcli.models.weights import load_metadata
from gkdcli.runs import Run
from gkdcli.settings import Settings
from gkdcli.tasks import detection
from gkdcli.tasks.trained import norms_of
from gkdcli.training.metrics import FIRST
from gkdcli.training.trainer import Trainer
from tests.stores import Video, make_store, picture
from tests.training import detection_jobs
from tests.training.detection_jobs import OFFICIAL, page
from tests.training.jobs import changed, copied, metrics_of, untimed

RUNS = {
    "step, corrected": ("train.schedule=step", "optim.batch_size=3"),
    "epoch, corrected": ("train.schedule=epoch", "optim.batch_size=3"),
    "epoch, official": ("train.schedule=epoch", *OFFICIAL),
    "step, frozen norms": ("train.schedule=step", "optim.batch_size=3"),
}
GENERATOR = [f"{name}.{tap}" for name in ("cvae_reconstruction", "cvae_kl", "generative_distillation")
             for tap in ("Mixed_5c", "Mixed_4f")]  # fmt: skip
HEAD = ["location", "classification", "refined_location", "refined_classification", "quality", "start", "end"]
NETWORK = [*HEAD, "background", *(f"{name}.{tap}" for name in ("reconstruction", "attention_distillation")
                                  for tap in ("Mixed_5c", "Mixed_4f"))]  # fmt: skip
SPLICED = [
    "boundary_contrast",
    *(f"attention_distillation.{tap}.spliced" for tap in ("Mixed_5c", "Mixed_4f")),
]


@pytest.fixture(scope="module")
def store(tiny_detection_store: Path) -> Store:
    return Store.open(tiny_detection_store / "stores" / "demo-detection-tiny" / "rgb.h5")


@pytest.fixture(scope="module")
def videos(store: Store) -> list[int]:
    """Two training videos: a handful of clips."""
    return store.split(1, "train")[:2]


def trainer_of(
    root: Path, store: Store, videos: list[int], name: str, run: Run | None = None, **options: Any
) -> Trainer:
    settings = page(*RUNS[name])
    dataset = detection.training_set(store, videos, settings)
    options = {"validate": lambda: 0.5} | options
    trainer = detection_jobs.trainer_of(root, store, settings, run, dataset=dataset, **options)
    began = "from the teacher" if "frozen" in name else "from scratch"
    trainer.job.networks.student.hold_norms(norms_of(settings, began))
    return trainer


@pytest.fixture(scope="module")
def undisturbed(store, videos, tmp_path_factory) -> Callable[[str], Trainer]:
    @functools.cache
    def train(name: str) -> Trainer:
        trainer = trainer_of(tmp_path_factory.mktemp("whole"), store, videos, name)
        trainer.fit(None)
        assert trainer.run.state == "complete"
        return trainer

    return train


def interrupted(root: Path, store: Store, videos: list[int], name: str, run: Run, place: int) -> Trainer:
    """Goes on with a run until Ctrl-C comes in a step of the network pass."""

    def supervised(*arguments: Any) -> Any:
        if trainer.position.step == place:
            os.kill(os.getpid(), signal.SIGINT)
        return detection.supervised_terms(*arguments)

    trainer = trainer_of(root, store, videos, name, run, supervised=supervised)
    trainer.restore()
    with pytest.raises(Interrupted):
        trainer.fit(None)
    return trainer


@pytest.mark.parametrize("name", RUNS)
def test_a_run_interrupted_within_an_epoch_goes_on_to_the_same_bits(
    tmp_path: Path, store, videos, undisturbed, name
):
    """Weights, optimisers, metrics and means; FINDINGS 3: the published code ends after its first batch."""
    whole = undisturbed(name)
    batches, steps = whole.schedule.batches, whole.schedule.steps_per_epoch
    assert batches >= 2
    trainer = trainer_of(tmp_path, store, videos, name)
    trainer.fit(1)
    run = Run(trainer.run.folder)
    for place in (max(steps - batches, 1), 2 * steps - batches):  # in the network pass of either epoch
        assert interrupted(tmp_path, store, videos, name, run, place).position.step == place + 1
    trainer = trainer_of(tmp_path, store, videos, name, run)
    trainer.restore()
    trainer.fit(None)
    for ours, theirs in ((trainer.run.last, whole.run.last), (trainer.run.best, whole.run.best)):
        found, expected = load_file(ours), load_file(theirs)
        assert found.keys() == expected.keys()
        assert [key for key in found if not torch.equal(found[key], expected[key])] == []
    assert untimed(metrics_of(trainer.run)) == untimed(metrics_of(whole.run))


def test_an_epoch_takes_full_batches_of_different_clips(store, videos, undisturbed):
    """The last partial batch is left out (METHOD.md 4), another one each time."""
    trainer = undisturbed("epoch, corrected")
    count = len(trainer.job.dataset)
    assert count % 3
    trainer.position.step = 0
    batches = list(trainer.batches(trainer.schedule.steps))
    assert {len(batch.samples) for batch in batches} == {3}
    assert len(batches) == 2 * 2 * (count // 3)
    left_out = set()
    for first in range(0, len(batches), count // 3):
        taken = [sample for batch in batches[first : first + count // 3] for sample in batch.samples]
        assert len(set(taken)) == len(taken) == count - count % 3
        left_out.add(frozenset(range(count)) - frozenset(taken))
    assert len(left_out) > 1


@pytest.mark.parametrize("name", RUNS)
def test_every_term_is_logged_and_their_weighted_sum_is_the_loss(undisturbed, name):
    run, settings = undisturbed(name).run, page(*RUNS[name])
    weights = {
        "location": 10.0,
        "refined_location": 10.0,
        "background": 35.0,
        "boundary_contrast": 0.1,
        "attention_distillation": 10.0,
        "generative_distillation": 0.01,
    }
    steps = [line for line in metrics_of(run) if "mean" not in line]
    shared = settings.train.schedule == "step"
    for line in steps:
        names = set(line) - {*FIRST}
        wanted = set(GENERATOR) if line["part"] == "generator" else set(NETWORK)
        wanted |= set(GENERATOR) if shared else set()
        wanted |= set(SPLICED) if line["part"] == "network" and "boundary_contrast" in names else set()
        assert names == wanted
        weights["reconstruction"] = 0.5 * line["epoch"] / 2  # ramp over all epochs
        total = sum(weights.get(name.split(".")[0], 1.0) * line[name] for name in names)
        assert line["loss"] == pytest.approx(total, rel=1e-5)
    spliced = [line for line in steps if "boundary_contrast" in line]
    assert spliced


@pytest.mark.parametrize("name", RUNS)
def test_means_are_over_the_clips_that_have_a_term(undisturbed, name):
    """Some batches have no splice; they count for nothing in the contrast, not as zeros."""
    lines = metrics_of(undisturbed(name).run)
    lacking = 0
    for epoch in (1, 2):
        steps = [line for line in lines if line["epoch"] == epoch and "mean" not in line]
        (means,) = (line["mean"] for line in lines if line["epoch"] == epoch and "mean" in line)
        assert set(means) == {name for line in steps for name in line} - {*FIRST}
        for term, mean in means.items():
            values = [line[term] for line in steps if term in line]  # all batches are of the same size
            assert mean == pytest.approx(sum(values) / len(values), rel=1e-6)
        network = [line for line in steps if line["part"] == "network"]
        lacking += sum("boundary_contrast" not in line for line in network)
    if "official" in name:  # batches of one
        assert lacking


def test_frozen_norms_stay_as_they_were_and_all_else_moves(store, videos, tmp_path):
    """FINDINGS 7, by the optimiser and its weight decay."""
    trainer = trainer_of(tmp_path, store, videos, "step, frozen norms")
    student = trainer.job.networks.student
    before = copied(student)
    trainer.fit(2)
    moved = changed(student, before)
    norms = {name for name in before if ".bn." in name}
    assert norms
    assert not moved & norms
    for part in ("backbone.", "attention.", "head."):
        own = {name for name in before if name.startswith(part)} - norms
        assert len(moved & own) > 0.8 * len(own), part  # some of these few channels are silent


# ---- held-out videos ----


def test_the_average_map_of_held_out_videos_chooses_the_best_epoch(store, videos, tmp_path):
    scores = iter([0.4, 0.2])
    kept = []

    def validate() -> float:
        kept.append(copied(trainer.job.networks.student))
        return next(scores)

    trainer = trainer_of(tmp_path, store, videos, "step, corrected", validate=validate)
    trainer.fit(None)
    found = [line["held_out_average_map"] for line in metrics_of(trainer.run) if "mean" in line]
    assert found == [0.4, 0.2]
    progress = trainer.run.record["progress"]
    assert (progress["best_epoch"], progress["best_held_out_average_map"]) == (1, 0.4)
    assert load_metadata(trainer.run.best) == {"epoch": "1"}
    best = load_file(trainer.run.best)
    assert all(torch.equal(best[f"network.{name}"], value) for name, value in kept[0].items())
    assert changed(trainer.job.networks.student, kept[0])


def test_the_held_out_score_is_that_of_evaluation(store, tmp_path, undisturbed):
    """Both ways over the same windows, of a network whose score is not 0."""
    settings = page("eval.tiou=[0.05]", "eval.score_threshold=0.001")
    trainer = undisturbed("step, corrected")
    network, device = trainer.job.networks.student.eval(), torch.device("cpu")
    videos = store.split(1, "test")
    held = detection.held_out_score(network, store, videos, settings, device)
    run = trainer.run
    progress = partial(trainer.console.progress, "test")
    path = tmp_path / "predictions.h5"
    detection.predict_run(path, run, network, store, videos, settings, {}, device, progress)
    scores, _ = detection.score([WindowFile(path)], store, videos, settings, run)
    assert scores["average_map"] == pytest.approx(held)
    assert held > 0.001
    limited = detection.held_out_score(network, store, videos, settings, device, limit=1)
    assert limited == detection.held_out_score(network, store, videos[:1], settings, device)
    assert not network.training


# ---- short videos (METHOD.md 8 (16)) ----


@pytest.mark.parametrize("name", ["step, corrected", "epoch, official"])
def test_what_follows_a_short_video_is_0_after_normalisation_or_black(tmp_path: Path, name):
    settings = page(*RUNS[name], "optim.batch_size=1")
    short = make_store(tmp_path, [Video("train", f"v{n}", picture(n, 100)) for n in range(2)], "raw")
    short.segments = [(Segment(2.0, 6.0, n, 20.0, 60.0),) for n in range(2)]
    short.classes = ["a", "b"]
    dataset = detection.training_set(short, [0, 1], settings)
    trainer = detection_jobs.trainer_of(tmp_path, short, settings, dataset=dataset)
    seen: list[torch.Tensor] = []
    trainer.job.networks.student.backbone.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].clone())
    )
    with torch.no_grad():
        shown = [batch.targets for batch in trainer.batches(2)]
    assert not any(targets["spliced"].any() for targets in shown)  # 40 frames hold no piece of 40
    trainer.fit(2)
    assert len(seen) == 2
    black = -settings.clips.mean[0] / settings.clips.std[0]
    for clips in seen:
        assert clips.shape[2] == 128
        expected = 0.0 if settings.recipe == "corrected" else black
        torch.testing.assert_close(clips[:, :, 100:], torch.full_like(clips[:, :, 100:], expected))
        assert clips[:, :, :100].std() > 0.1


def test_what_is_spliced_out_of_padding_is_0_too(tmp_path: Path):
    """Frames are marked before they are rearranged."""
    short = make_store(tmp_path, [Video("train", "v", picture(0, 60))], "raw")
    short.segments = [(Segment(1.0, 5.0, 0, 10.0, 50.0), Segment(5.2, 5.6, 1, 52.0, 56.0))]
    short.classes = ["a", "b"]
    for seed in range(20):  # until a piece of what follows the video comes into the action
        settings = page("optim.batch_size=1", f"train.seed={seed}")
        dataset = detection.training_set(short, [0], settings)
        trainer = detection_jobs.trainer_of(tmp_path / str(seed), short, settings, dataset=dataset)
        (batch,) = trainer.batches(1)
        order = batch.targets["splices"][0]
        moved = order >= 60
        if moved[:50].any():
            break
    assert batch.targets["spliced"].all()
    assert moved[:50].any()
    seen: list[torch.Tensor] = []
    trainer.job.networks.student.backbone.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].clone())
    )
    trainer.fit(1)
    (both,) = seen  # in one pass
    clip, spliced = both.split(1)
    assert torch.equal(spliced, clip[:, :, order])
    assert not spliced[:, :, moved].any()
    assert (spliced[:, :, ~moved].flatten(3).std((1, 3)) > 0.1).all()


def test_the_settings_of_these_runs_are_a_users(store):
    """`page` resolves what a user would."""
    settings = page()
    assert isinstance(settings, Settings)
    assert (settings.task, settings.clips.length, settings.model.width) == ("detection", 128, 0.0625)
    assert settings.dataset == store.dataset
