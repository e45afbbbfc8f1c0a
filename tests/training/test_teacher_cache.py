"""The teacher's attention out of the cache equals the teacher's own; no stale or broken one is ever used."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from safetensors.torch import load_file

from gkdcli.console import Console
from gkdcli.data.loader import load
from gkdcli.data.store import Store
from gkdcli.errors import GkdError, Interrupted
from gkdcli.files import locked
from gkdcli.runs import Place, Run
from gkdcli.settings import Settings
from gkdcli.tasks import detection
from gkdcli.training import teacher_cache, teacher_views
from gkdcli.training.processes import Group
from gkdcli.training.steps import Seen
from gkdcli.training.teacher_cache import CachedClips, fingerprint_of
from gkdcli.training.trainer import Trainer
from tests.training import detection_jobs, jobs
from tests.training.jobs import metrics_of, store_of, untimed

CPU = torch.device("cpu")
ROUNDING = 2.0**-12  # of float16 between 1/2 and 1, the coarsest that attention meets


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return store_of(tmp_path_factory.mktemp("cache"), 5)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_cache, "CLIPS", 2)


def page(views: int, **changes: Any) -> Settings:
    """One clip at a time, so that the teacher meets the same batches whoever asks it."""
    return jobs.page(
        train__teacher_cache=views,
        optim__batch_size=1,
        eval={"batch_size": 1},
        **{"optim__epochs": 3} | changes,
    )


def teach(trainer: Trainer, root: Path, run: Run | None = None) -> CachedClips:
    """What `gkd distill --teacher-cache` does before it trains."""
    job, place = trainer.job, Place(root, trainer.job.settings)
    teacher_run = Run(root / "teacher")
    found, _ = teacher_views.let_it_teach(
        job.networks, job.dataset, place, teacher_run, run, CPU, Group(), Console(quiet=True)
    )
    job.dataset = found
    return found


def rounded(trainer: Trainer) -> Trainer:
    """Its teacher's maps go through float16, as those of the cache do."""
    teacher = trainer.job.networks.teacher
    attend = teacher.attend
    teacher.attend = lambda features: {tap: a.half().float() for tap, a in attend(features).items()}
    return trainer


def recognising(root: Path, store: Store, views: int, **changes: Any) -> Trainer:
    return jobs.trainer_of(root, store, page(views, **changes))


def detecting(root: Path, store: Store, views: int, **_: Any) -> Trainer:
    sets = (*detection_jobs.OFFICIAL, "train.schedule=epoch", "eval.batch_size=1", "optim.epochs=1")
    settings = detection_jobs.page(*sets, f"train.teacher_cache={views}")
    dataset = detection.training_set(store, store.split(1, "train")[:1], settings)
    return detection_jobs.trainer_of(root, store, settings, dataset=dataset)


@pytest.mark.parametrize("task", ["recognition", "detection"])
def test_a_run_with_as_many_views_as_epochs_equals_one_without_cache(
    tmp_path: Path, request, store, task
) -> None:
    """Metrics and weights to the bit, where the teacher's own maps are rounded likewise; and what that is."""
    made: Callable[..., Trainer] = recognising if task == "recognition" else detecting
    if task == "detection":
        folder = request.getfixturevalue("tiny_detection_store")
        store = Store.open(folder / "stores" / "demo-detection-tiny" / "rgb.h5")
    own = rounded(made(tmp_path / "own", store, 0))
    own.fit(None)
    exact = made(tmp_path / "exact", store, 0)
    exact.fit(1 + exact.schedule.batches)
    cached = made(tmp_path / "cached", store, own.job.settings.optim.epochs)
    teach(cached, tmp_path)
    assert cached.job.networks.teacher is None
    cached.fit(None)

    lines = untimed(metrics_of(cached.run))
    assert lines == untimed(metrics_of(own.run))
    weights, wanted = load_file(cached.run.last), load_file(own.run.last)
    assert [name for name in wanted if not torch.equal(weights[name], wanted[name])] == []
    names = {name for line in lines for name in line if name.startswith("attention_distillation")}
    assert len(names) == (1 if task == "recognition" else 4)  # of spliced clips too

    ours = next(line for line in lines if line["part"] == "network")
    theirs = next(line for line in metrics_of(exact.run) if line.get("part") == "network")
    for name in names & ours.keys():  # before any step: |(s - t)^2 - (s - t')^2| <= 2 |s - t| e + e^2
        bound = 2 * theirs[name] ** 0.5 * ROUNDING + ROUNDING**2
        assert abs(ours[name] - theirs[name]) <= bound


def test_views_are_taken_in_turn_by_the_network_pass_alone(tmp_path: Path, store) -> None:
    trainer = recognising(tmp_path, store, 2)
    plain = trainer.job.dataset
    cache = teach(trainer, tmp_path)

    def clip(dataset: Any, epoch: int, part: int) -> torch.Tensor:
        return next(load(dataset, [[(3, epoch, part)]], workers=0))

    for epoch, view in ((1, 1), (2, 2), (3, 1), (8, 2)):
        batch = clip(cache, epoch, 1)
        assert torch.equal(batch.clips, clip(plain, view, 1).clips)
        assert torch.equal(batch.targets["teacher.Mixed_5c"][0], cache.read(3, view)["teacher.Mixed_5c"])
        generator = clip(cache, epoch, 0)
        assert torch.equal(generator.clips, clip(plain, epoch, 0).clips)
        assert set(generator.targets) == {"labels"}


def test_the_teacher_is_asked_once_and_a_larger_cache_asks_for_the_difference(
    tmp_path: Path, store, monkeypatch
) -> None:
    asked = []
    see = teacher_views.see

    def counting(forward: Any, network: Any, clips: torch.Tensor) -> Seen:
        asked.append(len(clips))
        return see(forward, network, clips)

    monkeypatch.setattr(teacher_views, "see", counting)
    for views, new in ((2, 10), (2, 0), (3, 5), (1, 0), (100, 0)):  # there are 3 epochs
        asked.clear()
        cache = teach(recognising(tmp_path / f"{views}{new}", store, views), tmp_path)
        assert sum(asked) == new
    assert len(list(cache.folder.glob("view*.h5"))) == 3 * 3
    assert not list(cache.folder.glob(".*.tmp"))


def test_an_interrupted_computation_goes_on_to_the_same_bits(tmp_path: Path, store, monkeypatch) -> None:
    whole = teach(recognising(tmp_path / "whole", store, 2), tmp_path / "whole")
    calls = 0
    see = teacher_views.see

    def stopping(*arguments: Any) -> Seen:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return see(*arguments)

    trainer = recognising(tmp_path / "other", store, 2)
    with monkeypatch.context() as patch:
        patch.setattr(teacher_views, "see", stopping)
        with pytest.raises(Interrupted, match="what is done stays"):
            teach(trainer, tmp_path / "other")
    folder = tmp_path / "other" / "stores" / "drawn" / "rgb.attention" / whole.folder.name
    kept = [path.name for path in folder.glob("view*.h5")]
    assert kept == ["view0001-00000.h5"]  # two of its clips; the third was not a part yet
    before = (folder / kept[0]).stat().st_mtime_ns
    other = teach(recognising(tmp_path / "again", store, 2), tmp_path / "other")
    assert (folder / kept[0]).stat().st_mtime_ns == before
    for view in (1, 2):
        for position in range(len(other)):
            ours, theirs = other.read(position, view), whole.read(position, view)
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "changes",
    [
        {"train__seed": 1},
        {"recipe": "official"},
        {"clips": {"length": 16, "crop": 32, "mean": [0.45], "std": [0.225], "scales": [1.0]}},
    ],
)
def test_another_view_is_another_cache(tmp_path: Path, store, changes) -> None:
    ours, theirs = (recognising(tmp_path / str(n), store, 2, **more) for n, more in enumerate(({}, changes)))
    prints = [
        fingerprint_of(ours.job.networks.teacher, trainer.job.dataset, trainer.job.settings)
        for trainer in (ours, theirs)
    ]
    assert prints[0] != prints[1]


def test_a_run_does_not_go_on_with_another_teacher_and_a_new_one_computes_its_own(
    tmp_path: Path, store
) -> None:
    first = recognising(tmp_path / "a", store, 1)
    cache = teach(first, tmp_path)
    first.run.update(teacher_cache=cache.folder.name)
    teach(recognising(tmp_path / "b", store, 1), tmp_path, first.run)
    other = recognising(tmp_path / "c", store, 1)
    with torch.no_grad():
        next(other.job.networks.teacher.attention.parameters()).view(-1)[0] += 1e-3
    with pytest.raises(GkdError, match="has changed since this run began"):
        teach(other, tmp_path, first.run)
    assert teach(other, tmp_path).folder != cache.folder


def test_damaged_and_foreign_parts_are_named_and_not_used(tmp_path: Path, store) -> None:
    cache = teach(recognising(tmp_path, store, 2), tmp_path)
    part = cache.part(1, 1)
    part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(GkdError, match="cannot be read") as caught:
        next(load(cache, [[(2, 1, 1)]], workers=0))
    assert caught.value.where == str(part)
    shutil.copy(cache.part(0, 1), part)
    with h5py.File(part, "r+") as file:
        file.attrs["fingerprint"] = "0123"
    with pytest.raises(GkdError, match="of another teacher"):
        cache.read(2, 1)
    part.unlink()
    again = teach(recognising(tmp_path / "again", store, 2), tmp_path)
    assert torch.isfinite(again.read(2, 1)["teacher.Mixed_5c"]).all()


def test_too_little_room_is_said_before_anything_is_computed(tmp_path: Path, store, monkeypatch) -> None:
    monkeypatch.setattr(teacher_views, "free_bytes", lambda folder: 100)
    with pytest.raises(GkdError, match="too little room"):
        teach(recognising(tmp_path, store, 2), tmp_path)


def test_two_runs_that_start_together_compute_it_once(tmp_path: Path, store, monkeypatch) -> None:
    cache = teach(recognising(tmp_path / "a", store, 1), tmp_path)
    cache.part(0, 1).unlink()
    monkeypatch.setattr(teacher_views, "_WAIT", 0.05)
    with (
        locked(cache.folder / ".lock", "the teacher's attention"),
        pytest.raises(GkdError, match="another command"),
    ):
        teach(recognising(tmp_path / "b", store, 1), tmp_path)


# ---- as users type it ----


def test_the_command_trains_and_resumes_with_it_and_refuses_another_number_of_views(
    gkd, tiny_trained: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(tiny_trained, tmp_path / "root", symlinks=False)
    words = ("distill", "demo-tiny", "--root", root, "--epochs", 2)
    first = gkd(*words, "--teacher-cache", 2, "--max-steps", 1).must()
    assert "the teacher's attention: 2 views of" in first.err
    refused = gkd(*words, "--resume", "--teacher-cache", 3)
    assert refused.code == 2
    assert "train.teacher_cache 2 -> 3" in refused.err
    again = gkd(*words, "--resume").must()
    assert "the teacher's attention is there" in again.err
    run = Run(Path(again.err.split("continuing ")[1].split(" at epoch")[0]))
    assert run.state == "complete"
    assert (root / "stores/demo-tiny/rgb.attention" / run.record["teacher_cache"]).is_dir()
    alone = gkd(*words, "--teacher-cache", 2, "--set", "distill.method=none", "--max-steps", 1).must()
    assert "train.teacher_cache is not used" in alone.err


@pytest.mark.slow
def test_killed_at_work_it_goes_on_and_no_part_is_half_written(tiny_trained: Path, tmp_path: Path) -> None:
    root = shutil.copytree(tiny_trained, tmp_path / "root", symlinks=False)
    command = [sys.executable, "-m", "gkdcli", "distill", "demo-tiny", "--root", str(root)]
    command += ["--epochs", "60", "--max-steps", "1", "--teacher-cache", "60", "--set", "eval.batch_size=1"]
    folder = root / "stores/demo-tiny/rgb.attention"
    for parts in (1, 5, 20):
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        while len(list(folder.glob("*/view*.h5"))) < parts and process.poll() is None:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        for path in folder.glob("*/view*.h5"):
            with h5py.File(path) as file:
                assert torch.from_numpy(file["Mixed_5c"][:]).isfinite().all()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(list(folder.glob("*/view*.h5"))) == 60
    assert not list(folder.glob("*/.*.tmp"))
    assert "60 views" in done.stderr
