"""Finished parts get their names in threads, so that no worker waits for the disk to have them."""

from __future__ import annotations

from concurrent import futures
from types import TracebackType

from gkdcli.data.jobs import Job, Result, settle
from gkdcli.data.workers import Crashed, Crew

_AHEAD = 2  # parts per process that may wait: where the disk is the slowest, all wait for it


class Settling:
    """A crew whose jobs are `jobs.draft`, seen as one whose jobs are `jobs.work`.

    A job counts as in work until its parts have their names. Leaving the block waits for those on their way.

    Args:
        crew: entered and left with this.
    """

    def __init__(self, crew: Crew[Job, Result]) -> None:
        self._crew = crew
        self._threads = futures.ThreadPoolExecutor(crew.size, "settle")
        self._waiting: dict[futures.Future[Result], Job] = {}

    def __enter__(self) -> Settling:
        self._crew.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._crew.__exit__(kind, error, trace)
        self._threads.shutdown()

    @property
    def busy(self) -> int:
        """Jobs in work, and those whose parts wait for the disk."""
        return self._crew.busy + len(self._waiting)

    def give(self, job: Job) -> bool:
        """See `Crew.give`."""
        return len(self._waiting) < _AHEAD * self._crew.size and self._crew.give(job)

    def collect(self, timeout_sec: float) -> list[tuple[Job, Result | Crashed]]:
        """See `Crew.collect`."""
        finished: list[tuple[Job, Result | Crashed]] = []
        if self._crew.busy:
            for job, result in self._crew.collect(timeout_sec):
                if isinstance(result, Result) and result.drafts:
                    self._waiting[self._threads.submit(settle, result)] = job
                else:
                    finished.append((job, result))
        else:
            futures.wait(self._waiting, timeout_sec, futures.FIRST_COMPLETED)
        for settled in [one for one in self._waiting if one.done()]:
            finished.append((self._waiting.pop(settled), settled.result()))
        return finished
