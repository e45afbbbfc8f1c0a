"""What a run writes and shows while it goes on: metrics, TensorBoard's events, log lines, the live table."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gkdcli.console import Console, Ticker
from gkdcli.data.batches import ClipBatch
from gkdcli.data.clock import at
from gkdcli.errors import GkdError
from gkdcli.files import human_bytes
from gkdcli.runs import Run
from gkdcli.training import memory, metrics
from gkdcli.training.checkpoint import Position
from gkdcli.training.stopping import Values

SMOOTH = 0.05  # share of the newest step in what the live table shows


class Journal:
    """The written side of a `Trainer`; of several processes the first one's alone writes and shows.

    Args:
        run: where.
        console: who is told.
        score: what validation gives, for example `top1`.
        first: whether this process writes.
        device: whose memory is shown.
        tensorboard: whether events are written too.
    """

    def __init__(
        self, run: Run, console: Console, score: str, first: bool, device: torch.device, tensorboard: bool
    ) -> None:
        self.run, self.console, self.score, self.first, self.device = run, console, score, first, device
        self._tensorboard = tensorboard and first
        self._events: Any = None
        self._table: metrics.Table | None = None
        self._began = time.perf_counter()  # when the step in work did
        self._waited = 0.0  # s, of it
        self._recent = [0.0, 0.0, 0.0]  # clips, s, s waited; old steps fade
        self._smoothed: dict[str, tuple[float, int]] = {}  # a value, and of how many steps
        self._rate = 0.0

    @contextmanager
    def open(self, step: int) -> Iterator[None]:
        """Open for what comes after `step`; what TensorBoard had been told of later ones is taken back."""
        if not self._tensorboard:
            yield
            return
        self._events = require_tensorboard()(self.run.folder / "tensorboard", purge_step=step + 1)
        try:
            yield
        finally:
            self._events.close()
            self._events = None

    def awaited(self, batches: Iterator[ClipBatch]) -> Iterator[ClipBatch]:
        """The same batches, noting how long each but the first is waited for: there processes start."""
        batch = next(batches, None)
        self._began = time.perf_counter()
        while batch is not None:
            yield batch
            at("wait_for_data")
            self._began = time.perf_counter()
            batch = next(batches, None)
            self._waited = time.perf_counter() - self._began

    def step(
        self,
        position: Position,
        epoch: int,
        part: str,
        rate: float,
        values: Values,
        clips: int,
        also: Values,
    ) -> None:
        """Notes the terms of a step of so many clips, `also` what has no mean; `position` is before it."""
        for name, value in values.items():
            if name != "loss":
                total, counted = position.sums.get(name, (0.0, 0))
                position.sums[name] = [total + value * clips, counted + clips]
        if not self.first:
            return
        seconds = time.perf_counter() - self._began
        entry = {
            "step": position.step + 1,
            "epoch": epoch,
            "part": part,
            "learning_rate": rate,
            "seconds": round(position.seconds, 3),
            "step_seconds": round(seconds, 6),
            "wait_seconds": round(self._waited, 6),
        }
        self._write(entry | values | also)
        self._rate = rate
        self._recent = [
            (1 - SMOOTH) * old + new
            for old, new in zip(self._recent, (clips, seconds, self._waited), strict=True)
        ]
        for name, value in values.items():
            mean, count = self._smoothed.get(name, (0.0, 0))
            self._smoothed[name] = mean + (value - mean) * max(SMOOTH, 1 / (count + 1)), count + 1
        if self._events is not None:
            for name, value in values.items():
                tag = name if name == "loss" else f"terms/{name}"
                self._events.add_scalar(tag, value, position.step + 1)
            self._events.add_scalar("learning_rate", rate, position.step + 1)
            self._events.add_scalar("clips_per_sec", clips / max(seconds, 1e-9), position.step + 1)

    def epoch(self, position: Position, epoch: int, means: Values, held_out: float | None) -> None:
        """Notes the means over an epoch's clips, and the score on the held-out ones."""
        entry: dict[str, Any] = {"epoch": epoch, "mean": means}
        text = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
        if held_out is not None:
            entry[f"held_out_{self.score}"] = held_out
            text += f", held-out {self.score} {held_out:.3f}"
        self._write(entry)
        self.run.log(f"epoch {epoch}: {text}")
        self.console.detail(f"epoch {epoch}: {text}")
        if self._events is not None:
            for name, value in means.items():
                self._events.add_scalar(f"epoch/{name}", value, position.step)
            if held_out is not None:
                self._events.add_scalar(f"held_out_{self.score}", held_out, position.step)

    def flush(self) -> None:
        """Before a checkpoint: what comes up to it is written once only."""
        if self._events is not None:
            self._events.flush()

    def restore(self, step: int, epoch: int) -> None:
        """Drops what was noted after a checkpoint, see `metrics.truncate`."""
        if self.first:
            metrics.truncate(self.run.metrics, step, epoch)
            if self.run.metrics.is_file():
                self._csv.rewrite()

    def show(self, tick: Ticker, step: int, text: str) -> None:
        """Progress: a bar with the live table below it, or a plain line."""
        tick(step, text, self._rows)

    def _rows(self) -> list[tuple[str, str]]:
        """The live table; asked for when it is drawn, by another thread."""
        clips, seconds, waited = self._recent
        found = [
            ("clips/s", f"{clips / max(seconds, 1e-9):.1f}"),
            ("data wait", f"{100 * waited / max(seconds, 1e-9):.1f} %"),
            ("learning rate", f"{self._rate:.3g}"),
            ("memory", human_bytes(memory.resident_bytes())),
        ]
        if self.device.type == "cuda":
            found.append(("GPU peak", human_bytes(torch.cuda.max_memory_allocated(self.device))))
        return found + [(name, f"{value:.4f}") for name, (value, _) in list(self._smoothed.items())]

    def _write(self, entry: dict[str, Any]) -> None:
        metrics.append(self.run.metrics, entry)
        self._csv.add(entry)

    @property
    def _csv(self) -> metrics.Table:
        if self._table is None:
            self._table = metrics.Table(self.run.metrics.with_suffix(".csv"), self.run.metrics)
        return self._table


def require_tensorboard() -> Any:
    """TensorBoard's own writer.

    Raises:
        GkdError: it is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise GkdError(
            "TensorBoard is not installed",
            "train.tensorboard = true",
            "`pip install 'gkdcli[tensorboard]'`, or `--set train.tensorboard=false`:"
            " metrics.jsonl and metrics.csv hold the same",
        ) from None
    return SummaryWriter
