"""training.trainer: runs that are stopped and continued end with the very same bits; logs; failures."""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gkdcli.data.clips import normalise
from gkdcli.data.loader import load
from gkdcli.data.store import Store
from gkdcli.errors import GkdError, Interrupted
from gkdcli.models.weights import load_metadata
from gkdcli.runs import Run
from gkdcli.settings import Settings
from gkdcli.tasks import recognition
from gkdcli.training.trainer import Trainer
from tests.training.jobs import (
    TERMS,
    changed,
    copied,
    metrics_of,
    page,
    settle,
    store_of,
    trainer_of,
    untimed,
)

FINE = 1e-9  # minutes: a checkpoint after every step


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return store_of(tmp_path_factory.mktemp("store"), 7)


@pytest.fixture(scope="module")
def undisturbed(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Settings], Run]:
    """A run of a page from start to end, made once."""

    @functools.cache
    def train(text: str) -> Run:
        settings = Settings.model_validate_json(text)
        trainer = trainer_of(tmp_path_factory.mktemp("whole"), store, settings, validate=lambda: 0.5)
        trainer.fit(None)
        assert trainer.run.state == "complete"
        return trainer.run

    return lambda settings: train(settings.model_dump_json())


def assert_same(run: Run, other: Run) -> None:
    """Weights, optimisers, best weights and metrics; everything but the times."""
    for path, theirs in ((run.last, other.last), (run.best, other.best)):
        ours, expected = load_file(path), load_file(theirs)
        assert ours.keys() == expected.keys()
        different = [name for name in ours if not torch.equal(ours[name], expected[name])]
        assert different == []
    assert untimed(metrics_of(run)) == untimed(metrics_of(other))


def resumed(trainer: Trainer, store: Store, settings: Settings, **options: Any) -> Trainer:
    """A new process in miniature: everything built again, then restored."""
    again = trainer_of(
        trainer.run.folder.parents[3],
        store,
        settings,
        Run(trainer.run.folder),
        validate=lambda: 0.5,
        **options,
    )
    again.restore()
    return again


# ---- stopped and continued ----


@pytest.mark.parametrize(
    ("schedule", "accumulation", "stops"),
    [
        ("step", 1, [1, 3, 4, 6]),  # within an epoch, at its end
        ("step", 2, [1, 4, 5]),  # a stop waits for the gradients it has begun to gather
        ("epoch", 1, [2, 4, 6, 8, 13]),  # within a pass, between the two passes
        ("epoch", 3, [1, 4, 9]),
    ],
)
def test_cut_and_resumed_equals_undisturbed(
    tmp_path: Path, store, undisturbed, schedule, accumulation, stops
):
    settings = page(train__schedule=schedule, optim__accumulation=accumulation)
    trainer = trainer_of(tmp_path, store, settings, validate=lambda: 0.5)
    for stop in stops:
        trainer.fit(stop)
        assert trainer.run.state == "cut"
        assert stop <= trainer.position.step < stop + accumulation
        trainer = resumed(trainer, store, settings)
    trainer.fit(None)
    assert trainer.run.state == "complete"
    assert_same(trainer.run, undisturbed(settings))


@pytest.mark.parametrize(
    ("schedule", "algorithm", "minutes", "crash"),
    [
        ("step", "adam", FINE, 5),
        ("step", "sgd", FINE, 2),
        ("epoch", "adam", FINE, 6),
        ("step", "adam", 10, 6),  # back to the end of the epoch before
        ("step", "adam", 10, 2),  # back to the start
    ],
)
def test_crashed_and_resumed_equals_undisturbed(
    tmp_path: Path, store, undisturbed, schedule, algorithm, minutes, crash
):
    settings = page(train__schedule=schedule, train__checkpoint_minutes=minutes, optim__algorithm=algorithm)
    calls = 0

    def crashing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == crash:
            raise ZeroDivisionError("the plug is pulled")
        return recognition.supervised_terms(*arguments)

    trainer = trainer_of(tmp_path, store, settings, supervised=crashing, validate=lambda: 0.5)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(None)
    assert trainer.run.state == "failed"
    trainer = resumed(trainer, store, settings)
    expected = {
        FINE: (crash - 1)
        + (4 if schedule == "epoch" else 0)
        + (4 if crash > 4 and schedule == "epoch" else 0)
    }
    assert trainer.position.step == expected.get(minutes, 4 if crash > 4 else 0)
    trainer.fit(None)
    assert_same(trainer.run, undisturbed(page(train__schedule=schedule, optim__algorithm=algorithm)))


def test_a_loading_process_and_checkpoints_do_not_change_a_run(tmp_path: Path, store, undisturbed):
    """It reads ahead across epochs, a checkpoint follows every step, and it goes when the run is stopped."""
    settings = page(train__workers=1, train__checkpoint_minutes=FINE)
    trainer = trainer_of(tmp_path, store, settings, supervised=signalling(6), validate=lambda: 0.5)
    with pytest.raises(Interrupted, match="epoch 2, step 6"):
        trainer.fit(None)
    assert multiprocessing.active_children() == []
    trainer = resumed(trainer, store, page())
    trainer.fit(None)
    assert_same(trainer.run, undisturbed(page()))


def signalling(call: int, number: int = signal.SIGINT) -> Callable[..., Any]:
    """Supervised terms that, at one call, send this process a signal."""
    calls = 0

    def supervised(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return recognition.supervised_terms(*arguments)

    return supervised


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path: Path, store, undisturbed, number):
    settings = page(optim__accumulation=2)
    before = signal.getsignal(number)
    trainer = trainer_of(tmp_path, store, settings, supervised=signalling(3, number), validate=lambda: 0.5)
    with pytest.raises(Interrupted, match="epoch 2, step 4") as caught:  # the group of the third ends there
        trainer.fit(None)
    assert signal.getsignal(number) is before
    assert "--resume" in caught.value.hint
    assert trainer.run.state == "interrupted"
    trainer = resumed(trainer, store, settings)
    assert trainer.position.step == 4
    trainer.fit(None)
    assert_same(trainer.run, undisturbed(settings))


def test_a_signal_in_minute_zero_stops_before_the_first_step(tmp_path: Path, store):
    trainer = trainer_of(tmp_path, store, page())
    trainer.job.warm_up = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted, match="step 0"):
        trainer.fit(None)
    assert trainer.run.state == "interrupted"


def test_a_signal_during_the_last_step_changes_nothing(tmp_path: Path, store):
    trainer = trainer_of(tmp_path, store, page(), validate=lambda: os.kill(os.getpid(), signal.SIGINT) or 0.5)
    with pytest.raises(Interrupted):  # validation ends both epochs
        trainer.fit(None)
    again = resumed(trainer, store, page())
    again.job.validate = lambda: os.kill(os.getpid(), signal.SIGINT) or 0.5
    again.fit(None)
    assert again.run.state == "complete"


def test_the_second_signal_stops_at_once_unsaved(tmp_path: Path, store):
    def twice(*arguments: Any) -> Any:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    trainer = trainer_of(tmp_path, store, page(), supervised=twice)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(None)
    assert trainer.run.state == "interrupted"
    assert not trainer.run.last.exists()


def test_checkpoints_come_as_often_as_asked_for(tmp_path: Path, store, monkeypatch):
    for minutes, expected in ((FINE, {10, 11}), (10.0, {2})):  # steps, epochs and the end; epochs alone
        trainer = trainer_of(tmp_path / str(minutes), store, page(train__checkpoint_minutes=minutes))
        saved = []
        save = trainer.save
        monkeypatch.setattr(trainer, "save", lambda s=save, saved=saved: (saved.append(1), s()))
        trainer.fit(None)
        assert len(saved) in expected


def test_checkpoints_come_by_steps_and_so_many_are_kept(tmp_path: Path, store):
    """A step-N is what `last` was after N steps, and a run goes on from it as from that."""
    often = page(train__checkpoint_steps=3, train__keep_checkpoints=3)
    trainer = trainer_of(tmp_path, store, often)
    trainer.fit(None)
    folder = trainer.run.folder

    def there() -> list[str]:
        return sorted(path.name for path in folder.glob("*.safetensors"))

    # saved after 3, 4 (an epoch's end), 6, 8
    assert there() == ["last.safetensors", "step-000004.safetensors", "step-000006.safetensors"]
    end = load_file(trainer.run.last)
    trainer.run.last.unlink()  # what was loaded still lies in it
    shutil.copy(folder / "step-000006.safetensors", trainer.run.last)
    (folder / ".last.safetensors.1234.tmp").write_bytes(b"of a killed process")
    again = trainer_of(tmp_path, store, page(train__keep_checkpoints=1), Run(folder))
    again.restore()
    assert again.position.step == 6
    assert list(folder.glob(".*.tmp")) == []
    again.fit(None)
    found = load_file(trainer.run.last)
    assert all(torch.equal(found[name], value) for name, value in end.items())
    assert there() == ["last.safetensors"]


def test_a_checkpoint_of_foreign_make_is_refused(tmp_path: Path, store):
    from safetensors.torch import save_file

    trainer = trainer_of(tmp_path, store, page())
    trainer.fit(1)
    tensors = load_file(trainer.run.last)
    save_file(tensors, trainer.run.last, {"position": '{"epoch": 3}'})
    with pytest.raises(GkdError, match="no checkpoint to go on from"):
        trainer.restore()
    trainer.run.last.write_bytes(b"\x00" * 100)
    with pytest.raises(GkdError, match="damaged"):
        trainer.restore()


@pytest.mark.parametrize("keep", [1, 2])
def test_a_full_disk_keeps_the_checkpoint_before_and_the_error(store, small_disk: Path, keep: int):
    settings = page(train__checkpoint_minutes=FINE, train__keep_checkpoints=keep)
    trainer = trainer_of(small_disk, store, settings)
    trainer.fit(1)
    good = load_file(trainer.run.last)
    with open(small_disk / "filling", "wb") as handle:
        handle.write(b"\0" * (os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize - 200_000))
    with pytest.raises(GkdError, match="disk is full") as caught:
        trainer.fit(None)
    assert "--resume" in caught.value.hint
    assert "the checkpoint before it is whole" in caught.value.where
    kept = load_file(trainer.run.last)
    assert all(torch.equal(kept[name], good[name]) for name in good)
    assert list(trainer.run.folder.glob(".*.tmp")) == []


def test_a_file_that_may_not_grow_leaves_the_checkpoint_before(tmp_path: Path, store):
    """A limit on the size of files stands for a full disk where mounting is not allowed."""
    trainer = trainer_of(tmp_path, store, page())
    trainer.fit(1)
    good = trainer.run.last.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2, limits[1]))
    try:
        with pytest.raises(GkdError, match="cannot write") as caught:
            trainer.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "the checkpoint before it is whole" in caught.value.where
    assert trainer.run.last.read_bytes() == good
    assert list(trainer.run.folder.glob(".*.tmp")) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 4 MB."""
    import subprocess

    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


# ---- accumulation ----


def frozen_statistics(trainer: Trainer) -> None:
    """Batch norm by its running statistics: then the gradient of a batch is the mean over its clips."""
    student = trainer.job.networks.student
    (batch,) = load(trainer.job.dataset, [[(video, 1, 1) for video in range(7)]], workers=0)
    settle(student, normalise(batch.clips, trainer.job.settings.clips))
    for module in student.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.train = lambda mode=True, norm=module: norm


@pytest.mark.parametrize(("small", "times", "large"), [(2, 2, 4), (1, 3, 3), (2, 3, 6), (3, 5, 15)])
def test_accumulated_batches_equal_one_large_batch(tmp_path: Path, store, small, times, large):
    """7 clips: the last group is short and so is its last batch. Weights stand still, gradients are noted."""
    found: list[list[torch.Tensor]] = []
    for name, size, accumulation in (("small", small, times), ("large", large, 1)):
        settings = page(
            optim__batch_size=size,
            optim__accumulation=accumulation,
            train__schedule="epoch",
            optim__epochs=1,
        )
        trainer = trainer_of(tmp_path / name, store, settings)
        frozen_statistics(trainer)
        played, noted = trainer.job.networks, []

        def note(module: torch.nn.Module, noted: list = noted) -> None:
            noted.append(torch.cat([parameter.grad.flatten() for parameter in module.parameters()]))

        trainer.generator_updates.optimizer.step = functools.partial(note, played.generators)
        trainer.updates.optimizer.step = functools.partial(note, played.student)
        trainer.fit(None)
        found.append(noted)
    assert len(found[0]) == len(found[1]) == 2 * math.ceil(7 / large)
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() < 2e-3 * theirs.norm()


# ---- what is written ----


@pytest.mark.parametrize("schedule", ["step", "epoch"])
def test_every_term_is_logged_under_its_own_name(undisturbed, schedule):
    settings = page(train__schedule=schedule)
    lines = metrics_of(undisturbed(settings))
    weights = {
        "generative_distillation.Mixed_5c": settings.distill.generative_weight,
        "attention_distillation.Mixed_5c": settings.distill.beta,
    }
    steps = [line for line in lines if "mean" not in line]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    for line in steps:
        expected = TERMS[line["part"]] if schedule == "epoch" else [*TERMS["generator"], *TERMS["network"]]
        terms = {
            name: value for name, value in line.items() if name.endswith("5c") or name == "classification"
        }
        assert sorted(terms) == sorted(expected)
        weights["reconstruction.Mixed_5c"] = 0.5 * min(line["epoch"], 4) / 4
        total = sum(weights.get(name, 1.0) * value for name, value in terms.items())
        assert line["loss"] == pytest.approx(total, rel=1e-5)
    parts = [line["part"] for line in steps if line["epoch"] == 1]
    assert parts == (["network"] * 4 if schedule == "step" else ["generator"] * 4 + ["network"] * 4)


def test_the_reconstruction_weight_ramps_up_over_the_whole_run_where_told_so(tmp_path: Path, store):
    trainer = trainer_of(tmp_path, store, page(distill__ramp_epochs=0, distill__beta=0.0))
    trainer.fit(None)
    for line in metrics_of(trainer.run):
        if "loss" in line:
            rest = line["loss"] - line["classification"] - line["cvae_kl.Mixed_5c"]
            rest -= line["cvae_reconstruction.Mixed_5c"] + 0.01 * line["generative_distillation.Mixed_5c"]
            weight = rest / line["reconstruction.Mixed_5c"]
            assert weight == pytest.approx(0.5 * line["epoch"] / 2, rel=1e-3)


@pytest.mark.parametrize("schedule", ["step", "epoch"])
def test_epoch_means_are_means_over_clips(undisturbed, schedule):
    lines = metrics_of(undisturbed(page(train__schedule=schedule)))
    sizes = [2, 2, 2, 1]
    for epoch in (1, 2):
        (mean,) = [line["mean"] for line in lines if "mean" in line and line["epoch"] == epoch]
        steps = [line for line in lines if "mean" not in line and line["epoch"] == epoch]
        assert sorted(mean) == sorted([*TERMS["generator"], *TERMS["network"]])
        for name, value in mean.items():
            terms = [line[name] for line in steps if name in line]
            assert len(terms) == 4
            assert value == pytest.approx(sum(n * term for n, term in zip(sizes, terms, strict=True)) / 7)


def test_the_best_epoch_is_kept_beside_the_last(tmp_path: Path, store):
    scores = iter([0.25, 0.75, 0.5])
    settings = page(optim__epochs=3)
    trainer = trainer_of(tmp_path, store, settings, validate=lambda: next(scores))
    trainer.fit(4)
    assert trainer.run.record["progress"]["best_epoch"] == 1
    trainer.fit(8)
    second = copied(trainer.job.networks.student)
    trainer.fit(None)
    progress = trainer.run.record["progress"]
    assert (progress["best_epoch"], progress["best_held_out_top1"]) == (2, 0.75)
    best, last = load_file(trainer.run.best), load_file(trainer.run.last)
    assert load_metadata(trainer.run.best) == {"epoch": "2"}
    assert all(torch.equal(best[f"network.{name}"], value) for name, value in second.items())
    assert any(not torch.equal(best[name], last[name]) for name in best)
    assert {name.split(".")[0] for name in best} == {"network", "generator"}
    held = [line["held_out_top1"] for line in metrics_of(trainer.run) if "mean" in line]
    assert held == [0.25, 0.75, 0.5]


def test_without_held_out_videos_the_last_weights_count(tmp_path: Path, store):
    trainer = trainer_of(tmp_path, store, page(optim__epochs=1))
    trainer.fit(None)
    assert not trainer.run.best.exists()
    assert "held_out_top1" not in metrics_of(trainer.run)[-1]


@pytest.mark.parametrize("schedule", ["step", "epoch"])
def test_one_training_video_is_enough(tmp_path: Path, schedule):
    trainer = trainer_of(tmp_path, store_of(tmp_path, 1), page(train__schedule=schedule, optim__batch_size=4))
    trainer.fit(None)
    assert trainer.run.state == "complete"
    assert trainer.position.step == (2 if schedule == "step" else 4)
    assert all(math.isfinite(line["loss"]) for line in metrics_of(trainer.run) if "loss" in line)


def test_rates_of_both_optimisers_follow_the_schedule(tmp_path: Path, store):
    settings = page(optim__generator_lr=5e-3)
    trainer = trainer_of(tmp_path, store, settings)
    rates = []
    for batch in load(trainer.job.dataset, trainer.schedule.keys(0, 8), 0):
        trainer._train_on(batch)
        rates.append(
            tuple(u.optimizer.param_groups[0]["lr"] for u in (trainer.updates, trainer.generator_updates))
        )
    factors = [trainer.schedule.rate(step) for step in range(8)]
    assert rates == [(1e-3 * factor, 5e-3 * factor) for factor in factors]
    assert [line["learning_rate"] for line in metrics_of(trainer.run) if "loss" in line] == [
        r[0] for r in rates
    ]


# ---- failures ----


def test_a_loss_that_is_no_number_names_term_clips_and_the_kept_state(tmp_path: Path, store):
    trainer = trainer_of(tmp_path, store, page(), validate=lambda: 0.5)
    trainer.fit(4)
    good = load_file(trainer.run.last)
    with torch.no_grad():
        trainer.job.networks.student.classifier.bias[0] = math.nan
    with pytest.raises(GkdError) as caught:
        trainer.fit(None)
    error = caught.value
    assert (
        error.what == "the loss stopped being finite at epoch 2, step 5; first bad term: classification = nan"
    )
    (keys,) = trainer.schedule.keys(4, 5)
    for position, _, _ in keys:
        row = store.videos[position]
        assert f"{row.class_name}/{row.name}" in error.where
    assert f"the state before is kept in {trainer.run.last}" in error.where
    assert f"--init {trainer.run.last} --set optim.learning_rate=0.0001" in error.hint
    assert trainer.run.state == "failed"
    kept = load_file(trainer.run.last)
    assert all(torch.equal(kept[name], good[name]) for name in good)
    assert "stopped being finite" in (trainer.run.folder / "log.txt").read_text()


def test_a_bad_term_of_the_generator_names_its_own_learning_rate(tmp_path: Path, store):
    trainer = trainer_of(tmp_path, store, page())
    with torch.no_grad():
        trainer.job.networks.generators["Mixed_5c"].encoder.fc3.bias[:] = 200.0  # exp overflows
    with pytest.raises(GkdError, match=r"step 1; first bad term: cvae_") as caught:
        trainer.fit(None)
    assert "optim.generator_lr=0.0001" in caught.value.hint
    assert "no checkpoint had been written" in caught.value.where
    assert "--init" not in caught.value.hint


def test_weights_that_are_no_numbers_are_never_saved(tmp_path: Path, store):
    trainer = trainer_of(tmp_path, store, page())
    trainer.fit(1)
    good = trainer.run.last.read_bytes()
    with torch.no_grad():
        trainer.job.networks.student.classifier.weight.fill_(math.inf)
    with pytest.raises(GkdError, match=r"training diverged: network.classifier.weight"):
        trainer.save()
    assert trainer.run.last.read_bytes() == good


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
@pytest.mark.parametrize(
    ("batch", "times", "hint"),
    [
        (6, 1, "--batch-size 3 --set optim.accumulation=2"),
        (5, 2, "--batch-size 1 --set optim.accumulation=10"),
        (1, 1, "--set model.width="),
    ],
)
def test_spent_memory_names_batch_clip_and_what_keeps_the_effective_batch(
    tmp_path: Path, store, error, batch, times, hint
):
    def greedy(*_: Any) -> Any:
        raise error

    settings = page(optim__batch_size=batch, optim__accumulation=times)
    trainer = trainer_of(tmp_path, store, settings, supervised=greedy)
    with pytest.raises(GkdError) as caught:
        trainer.fit(None)
    assert caught.value.what == f"out of memory: batch {batch}, clips of 16 frames at 32x32 px"
    assert caught.value.where == "epoch 1, step 1 on cpu"
    assert hint in caught.value.hint
    assert trainer.run.state == "failed"


def test_minute_zero_comes_before_step_1(tmp_path: Path, store):
    def broken() -> None:
        raise GkdError("a video is damaged")

    trainer = trainer_of(tmp_path, store, page())
    before = copied(trainer.job.networks.student)
    trainer.job.warm_up = broken
    with pytest.raises(GkdError, match="damaged"):
        trainer.fit(None)
    assert trainer.run.state == "failed"
    assert changed(trainer.job.networks.student, before) == set()
