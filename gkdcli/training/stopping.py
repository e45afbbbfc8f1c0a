"""How a run stops before its end: asked to, out of memory, or with a loss that is no number."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from gkdcli.console import Console
from gkdcli.errors import GkdError
from gkdcli.settings import Settings


class StopRequest:
    """Ctrl-C or SIGTERM while the block runs: the first is noted in `made`, the second stops at once."""

    def __init__(self, console: Console) -> None:
        self.made = False
        self._console = console
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # no other may handle signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.made:
            raise KeyboardInterrupt
        self.made = True
        self._console.note("stopping after this step; once more stops at once, unsaved")


def not_finite(
    values: Mapping[str, float], moment: str, clips: list[str], settings: Settings, kept: Path | None
) -> GkdError:
    """The error for a loss that is infinite or no number.

    Args:
        values: of the terms, in the order they were computed.
        moment: `epoch 3, step 118`.
        clips: names of the videos in the batch.
        settings: the page.
        kept: the last checkpoint, if there is one.
    """
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
    return GkdError(
        f"out of memory: batch {batch}, clips of {clips.length} frames at {clips.crop}x{clips.crop} px{peak}",
        f"{moment} on {device}",
        hint,
    )
