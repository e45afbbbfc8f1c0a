"""Where a step's time goes: all of it is told, and looking changes nothing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from gkdcli.data import clock
from gkdcli.data.loader import load
from gkdcli.data.store import Store
from gkdcli.training.profiling import WARM_UP, profile
from tests.training.jobs import page, store_of, trainer_of


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return store_of(tmp_path_factory.mktemp("store"), 9)


def test_time_belongs_to_the_mark_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def work(seconds: float) -> float:
        now[0] += seconds
        return seconds

    assert clock.at("nobody looks") == ""
    with clock.running(clock.Clock(torch.device("cpu"))) as outer:
        clock.at("a")
        work(1)
        assert clock.spent("b", work, 2) == 2
        work(4)
        with clock.running(clock.Clock(torch.device("cpu"))) as inner:
            clock.at("c")
            work(8)
            clock.at("")
        clock.at("d")
    assert dict(inner.seconds) == {"": 0, "c": 8}
    assert dict(outer.seconds) == {"": 0, "a": 13, "b": 2}


@pytest.mark.parametrize("schedule", ["step", "epoch"])
def test_the_parts_make_up_the_step_and_training_is_the_same(tmp_path: Path, store: Store, schedule: str):
    settings = page(train__schedule=schedule, optim__batch_size=2)  # 5 batches in a pass, the last one small
    watched, plain = (trainer_of(tmp_path / name, store, settings) for name in ("watched", "plain"))
    before = sorted(watched.run.folder.iterdir())
    found = profile(watched, 2)
    assert sorted(watched.run.folder.iterdir()) == before
    passes = ["network"] if schedule == "step" else ["generator", "network"]
    assert (found["steps"], found["clips"]) == (2 * len(passes), 3 * len(passes))

    for number in range(len(passes)):
        plain.position.step = 5 * number
        for batch in load(plain.job.dataset, plain.schedule.keys(5 * number, 5 * number + WARM_UP + 2), 0):
            plain._step(batch)
            plain.position.step += 1
    for ours, theirs in (
        (watched.job.networks.student, plain.job.networks.student),
        (watched.job.networks.generators, plain.job.networks.generators),
    ):
        expected = theirs.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())

    for name in passes:
        step = {row["what"]: row for row in found["step"] if row["pass"] == name}
        wanted = {
            "wait_for_data", "transfer", "student_forward", "losses_and_cvae", "backward", "optimizer",
        }  # fmt: skip
        assert set(step) == wanted | ({"teacher_forward"} if name == "network" else set())
        assert sum(row["share"] for row in step.values()) == pytest.approx(1)
        reading = {row["what"]: row["ms"] for row in found["reading"] if row["pass"] == name}
        assert list(reading) == ["read", "decode", "augment", "collate"]
        assert min(reading.values()) > 0
        assert sum(reading.values()) < step["wait_for_data"]["ms"], "this process reads: it waits for itself"
    total = sum(row["ms"] for row in found["step"])
    assert total / len(passes) == pytest.approx(found["step_ms"])
    assert found["clips_per_sec"] == pytest.approx(found["clips"] / found["seconds"])


def test_a_loading_process_tells_its_times(tmp_path: Path, store: Store):
    found = profile(trainer_of(tmp_path, store, page(train__workers=1)), 2)
    assert [row["what"] for row in found["reading"]] == ["read", "decode", "augment", "collate"]
    assert 0 <= found["data_wait"] < 1
