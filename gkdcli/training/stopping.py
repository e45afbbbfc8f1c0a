"""How a run stops before its end: asked to, out of memory, or with a loss that is no number."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

from gkdcli.console import Console
from gkdcli.errors import GkdError
from gkdcli.launch import ignore_signals
from gkdcli.settings import Settings

Values = dict[str, float]  # of the terms of a step, and of their weighted sum, `loss`


class Report(NamedTuple):
    """What a process tells the others of its part of a batch.

    Args:
        values: of the terms in the order they were computed, and their weighted sum.
        clips: how many of the clips count as this process's.
        names: of the first five.
        moved: numbers of the parameters that have gradients.
    """

    values: Values
    clips: int
    names: list[str]
    moved: list[int]

    @property
    def finite(self) -> bool:
        """Whether all values are numbers."""
        return all(map(math.isfinite, self.values.values()))


def mean_values(reports: Sequence[Report]) -> Values:
    """Means over the clips of all processes; a term that some did not have is 0 there."""
    if len(reports) == 1:
        return reports[0].values
    clips = sum(report.clips for report in reports)
    names = dict.fromkeys(name for report in reports for name in report.values)
    return {
        name: sum(report.clips * report.values.get(name, 0.0) for report in reports) / clips for name in names
    }


class StopRequest:
    """Ctrl-C or SIGTERM while the block runs: the first is noted in `made`, the second stops at once.

    Of several processes one signal may reach each twice, from the terminal and from torchrun; and torchrun
    sends them one where another process has failed, which is not worth a word. So there each is noted only,
    and after a failure none is heeded: the process ends anyway, and may be about to say why.

    Args:
        console: who is told.
        alone: whether this is the only process.
    """

    def __init__(self, console: Console, alone: bool = True) -> None:
        self.made = False
        self._console = console
        self._alone = alone
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # no other may handle signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is not None and not self._alone and self._before:
            ignore_signals()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._alone:
            self.made = True
            return
        if self.made:
            raise KeyboardInterrupt
        self.made = True
        self._console.note("stopping after this step; once more stops at once, unsaved")


def not_finite(report: Report, moment: str, settings: Settings, kept: Path | None) -> GkdError:
    """The error for a loss that is infinite or no number.

    Args:
        report: of the process that has it.
        moment: `epoch 3, step 118`.
        settings: the page.
        kept: the last checkpoint, if there is one.
    """
    values, clips = report.values, report.names
    bad = next((name for name, value in values.items() if not math.isfinite(value)), "their sum")
    of_generator = bad.startswith(("cvae_", "generative_"))
    key = "generator_lr" if of_generator else "learning_rate"
    rate = settings.optim.generator_lr if of_generator else settings.optim.learning_rate
    more = " ..." if len(clips) > 4 else ""
    start = f"--init {kept} " if kept else ""
    return GkdError(
        f"the loss stopped being finite at {moment}; first bad term: {bad} = {values.get(bad, math.inf)}",
        f"clips {', '.join(clips[:4])}{more}; "
        + (f"the state before is kept in {kept}" if kept else "no checkpoint had been written"),
        f"start a new run{' from there' if kept else ''}, gentler: `{start}--set optim.{key}={rate / 10:g}`",
    )


def out_of_memory(
    error: RuntimeError, moment: str, settings: Settings, device: torch.device
) -> GkdError | None:
    """The error for spent memory, with the settings that need less; None for any other error."""
    if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
        return None
    clips, batch, times = settings.clips, settings.optim.batch_size, settings.optim.accumulation
    peak = f", peak {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GB" if device.type == "cuda" else ""
    smaller = max((size for size in range(1, batch) if batch % size == 0), default=0)
    hint = (
        f"the same effective batch: `--batch-size {smaller}"
        f" --set optim.accumulation={times * batch // smaller}`"
        if smaller
        else "a smaller network or clip: `--set model.width=...`, `--set clips.crop=...`"
    )
    if not settings.train.checkpoint_activations:
        hint += "; or the same result in more time: `--set train.checkpoint_activations=true`"
    return GkdError(
        f"out of memory: batch {batch}, clips of {clips.length} frames at {clips.crop}x{clips.crop} px{peak}",
        f"{moment} on {device}",
        hint,
    )
