"""`--profile N`: where the time of a training step goes, in the networks and in reading."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from dataclasses import replace
from typing import Any

from gkdcli.data.batches import ClipBatch
from gkdcli.data.clock import Clock, running
from gkdcli.data.timed import TimedBatch, TimedClips
from gkdcli.training.trainer import PASSES, Trainer

WARM_UP = 3  # steps before those that count: processes start, kernels are chosen, optimisers get their states
STEP = (
    "wait_for_data", "transfer", "student_forward", "teacher_forward", "losses_and_cvae", "backward",
    "exchange", "optimizer",
)  # fmt: skip
READING = ("read", "decode", "augment", "collate")


def profile(trainer: Trainer, steps: int) -> dict[str, Any]:
    """Takes `steps` steps of each pass of an epoch, after a warm-up, and leaves nothing behind on disk.

    They are those of the run's beginning. On a GPU each part is waited for, so that such a step is slower
    than one of training. Reading is told per batch and process: with workers it goes on beside the steps.

    Args:
        trainer: fresh; its networks have moved afterwards.
        steps: of each pass, at most so many as it has.

    Returns:
        `steps`, `warm_up_steps`, `seconds` (of all that count), `clips`, `step_ms` (mean), `clips_per_sec`,
        `data_wait` (share of the step) and two tables of milliseconds: `step`, `reading`.
    """
    trainer.job = replace(trainer.job, dataset=TimedClips(trainer.job.dataset))
    schedule = trainer.schedule
    tables: dict[str, list[dict[str, Any]]] = {"step": [], "reading": []}
    seconds = waited = 0.0
    done = clips = 0
    for number, part in enumerate(schedule.parts):
        trainer.position.step = first = number * schedule.batches
        several = len(schedule.parts) > 1
        last = min(first + WARM_UP + steps, (number + 1) * schedule.batches if several else schedule.steps)
        spent, reading, counted = _steps(trainer, last)
        clips += sum(schedule.size(schedule.spot(step).batch) for step in range(last - counted, last))
        done += counted
        seconds += sum(spent.values())
        waited += spent["wait_for_data"]
        name = PASSES[part]
        tables["step"] += _rows(name, spent, STEP, counted)
        tables["reading"] += _rows(name, reading, READING, counted)
    return {
        "steps": done,
        "warm_up_steps": WARM_UP * len(schedule.parts),
        "seconds": seconds,
        "clips": clips,
        "step_ms": 1e3 * seconds / done,
        "clips_per_sec": clips / seconds,
        "data_wait": waited / seconds,
        **tables,
    }


def _steps(trainer: Trainer, last: int) -> tuple[dict[str, float], dict[str, float], int]:
    """Trains up to a step: seconds by part of the step, and of reading, and of how many steps they are."""
    reading: dict[str, float] = defaultdict(float)
    warm_up = min(WARM_UP, last - trainer.position.step - 1)
    counted = last - trainer.position.step - warm_up
    with (
        contextlib.closing(trainer.batches(last)) as batches,
        running(Clock(trainer.fabric.device)) as clock,
    ):
        for number, batch in enumerate(trainer.journal.awaited(batches)):
            trainer._step(batch)
            trainer.position.step += 1
            if number >= warm_up:
                _add(reading, batch)
            elif number + 1 == warm_up:
                clock.restart("wait_for_data")
        clock.at("")
    return clock.seconds, reading, counted


def _add(reading: dict[str, float], batch: ClipBatch) -> None:
    assert isinstance(batch, TimedBatch)
    for name, seconds in batch.seconds.items():
        reading[name] += seconds


def _rows(part: str, spent: dict[str, float], names: tuple[str, ...], steps: int) -> list[dict[str, Any]]:
    """A pass's rows of a table; what takes no time at all is left out."""
    total = sum(spent[name] for name in names)
    return [
        {"pass": part, "what": name, "ms": 1e3 * spent[name] / steps, "share": spent[name] / total}
        for name in names
        if spent[name]
    ]
