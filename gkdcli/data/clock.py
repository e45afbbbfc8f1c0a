"""Where time goes: marks in trainer, stages and reading, heeded while a `Clock` runs, for `--profile`."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """Adds up the time between marks, each mark saying what follows it.

    Args:
        device: on a GPU every mark waits until its work is done, so that time is where the work was.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device
        self._place = ""
        self._since = time.perf_counter()

    def at(self, place: str) -> str:
        """From now on time is spent in `place`; returns where it was spent until now."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        before, self._place = self._place, place
        self.seconds[before] += now - self._since
        self._since = now
        return before

    def restart(self, place: str) -> None:
        """Forgets all, and begins in `place`."""
        self.at(place)
        self.seconds.clear()


_running: Clock | None = None


@contextmanager
def running(clock: Clock) -> Iterator[Clock]:
    """Has `at` go by this clock for as long as the block runs; one around it goes on by itself."""
    global _running
    before, _running = _running, clock
    try:
        yield clock
    finally:
        _running = before


def at(place: str) -> str:
    """A mark, see `Clock.at`; where no clock is running, next to nothing."""
    return _running.at(place) if _running is not None else ""


def spent(place: str, work: Callable[..., Any], *inputs: Any) -> Any:
    """The result of `work`, whose time is spent in `place`; what follows belongs where this was called."""
    before = at(place)
    result = work(*inputs)
    at(before)
    return result
