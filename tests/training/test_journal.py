"""What a run writes while it goes on: each step once, whatever happened to the run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from gkdcli.data.store import Store
from gkdcli.errors import GkdError
from gkdcli.runs import Run
from gkdcli.tasks import recognition
from gkdcli.training import metrics
from gkdcli.training.journal import require_tensorboard
from tests.training.jobs import (
    TERMS,
    assert_the_table_is_the_lines,
    metrics_of,
    page,
    rows_of,
    store_of,
    trainer_of,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return store_of(tmp_path_factory.mktemp("store"), 5)


def crashing(step: int) -> Any:
    """Supervised terms that fail in one step."""
    calls = 0

    def supervised(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step:
            raise ZeroDivisionError
        return recognition.supervised_terms(*arguments)

    return supervised


def test_the_table_has_the_lines_though_passes_have_other_terms(tmp_path: Path, store: Store):
    trainer = trainer_of(tmp_path, store, page(train__schedule="epoch"), validate=lambda: 0.5)
    trainer.fit(2)
    early = list(rows_of(trainer.run)[0])
    assert early == [*metrics.FIRST, *TERMS["generator"]]
    trainer.fit(None)
    rows = rows_of(trainer.run)
    assert list(rows[0]) == [*early, *TERMS["network"], "held_out_top1"], "no column has moved"
    assert {row["row"] for row in rows} == {"step", "epoch"}
    assert_the_table_is_the_lines(trainer.run)


@pytest.mark.parametrize("torn", ["", '{"step": 5, "epo'])
def test_after_a_crash_and_resume_every_step_is_there_once(tmp_path: Path, store: Store, torn: str):
    """Lines, table and events; the crash comes after a checkpoint, and tears the last line."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = page(train__tensorboard=True)
    trainer = trainer_of(tmp_path, store, settings, supervised=crashing(6), validate=lambda: 0.5)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(None)
    assert len(metrics_of(trainer.run)) == 6  # five steps, three of them in the checkpoint's epoch
    with open(trainer.run.metrics, "a", encoding="utf-8") as handle:
        handle.write(torn)
    again = trainer_of(tmp_path, store, settings, Run(trainer.run.folder), validate=lambda: 0.25)
    again.restore()
    assert again.position.step == 3
    assert len(rows_of(again.run)) == 4
    again.fit(None)
    assert [line["step"] for line in metrics_of(again.run) if "step" in line] == [1, 2, 3, 4, 5, 6]
    assert_the_table_is_the_lines(again.run)
    found = events.EventAccumulator(str(again.run.folder / "tensorboard"))
    found.Reload()
    lines = metrics_of(again.run)
    for tag, name in (("loss", "loss"), ("terms/classification", "classification")):
        assert [(event.step, event.value) for event in found.Scalars(tag)] == [
            (line["step"], pytest.approx(line[name])) for line in lines if "step" in line
        ]
    assert [(event.step, event.value) for event in found.Scalars("held_out_top1")] == [(3, 0.5), (6, 0.25)]


def test_without_tensorboard_the_extra_is_named_and_no_events_are_written(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
):
    trainer = trainer_of(tmp_path, store, page())
    trainer.fit(1)
    assert not (trainer.run.folder / "tensorboard").exists()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(GkdError, match="TensorBoard is not installed") as caught:
        require_tensorboard()
    assert "gkdcli[tensorboard]" in caught.value.hint
