"""Processes that do one job at a time and may crash: the job is named, the others go on."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Generic, TypeVar

from gkdcli.errors import GkdError

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")
_READY = "ready"


@dataclass(frozen=True)
class Crashed:
    """What a job comes to whose process died; `signal_number` is 0 where it was no signal."""

    signal_number: int

    @property
    def killed(self) -> bool:
        """From outside, by a person or for want of memory, rather than by the job."""
        return self.signal_number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class _Raised:
    trace: str


class Crew(Generic[Job, Outcome]):
    """Up to `size` spawned processes, each calling `function` on one job after another.

    They ignore Ctrl-C and SIGTERM (stopping is the parent's matter) and die with the parent, however it
    dies. Leaving the block kills those still at work.

    Args:
        function: a module-level function; what it raises is a mistake of ours.
        size: processes.
    """

    def __init__(self, function: Callable[[Job], Outcome], size: int) -> None:
        self.size = size
        self._function = function
        self._context = multiprocessing.get_context("spawn")
        self._members: list[_Member[Job]] = []

    def __enter__(self) -> Crew[Job, Outcome]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for member in self._members:
            if member.job is None and member.ready:
                member.connection.close()  # it leaves at the end of its input
            else:
                member.process.kill()
        for member in self._members:
            member.process.join()
            member.connection.close()
        self._members.clear()

    @property
    def busy(self) -> int:
        """Jobs in work."""
        return sum(member.job is not None for member in self._members)

    def give(self, job: Job) -> bool:
        """Hands a job to a process that waits, or to a new one; False where all are at work."""
        member = next((member for member in self._members if member.job is None), None)
        if member is not None and not member.process.is_alive():
            self._bury(member)  # it died between two jobs, the next one has no part in that
            member = None
        if member is None:
            if len(self._members) >= self.size:
                return False
            member = self._start()
        member.job = job
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # died: `collect` finds out
            member.connection.send(job)
        return True

    def collect(self, timeout_sec: float) -> list[tuple[Job, Outcome | Crashed]]:
        """Waits for finished jobs, at most so long.

        Raises:
            GkdError: a process died before it began to work.
            RuntimeError: `function` raised.
        """
        finished: list[tuple[Job, Outcome | Crashed]] = []
        for connection in wait([member.connection for member in self._members], timeout_sec):
            member = next(member for member in self._members if member.connection is connection)
            try:
                message = member.connection.recv()
            except (EOFError, ConnectionResetError):
                finished += self._bury(member)
                continue
            if message == _READY:
                member.ready = True
            elif isinstance(message, _Raised):
                raise RuntimeError(f"a worker process failed on {member.job}:\n{message.trace}")
            elif member.job is not None:
                finished.append((member.job, message))
                member.job = None
        return finished

    def _start(self) -> _Member[Job]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, self._function), daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is the end of our input
        member: _Member[Job] = _Member(process, ours)
        self._members.append(member)
        return member

    def _bury(self, member: _Member[Job]) -> list[tuple[Job, Crashed]]:
        member.process.join()
        member.connection.close()
        self._members.remove(member)
        code = member.process.exitcode or 0
        if not member.ready and code >= 0:
            raise GkdError(
                "a worker process could not start",
                f"process {member.process.pid}, exit code {code}",
                "its own message is above this one",
            )
        return [] if member.job is None else [(member.job, Crashed(max(-code, 0)))]


@dataclass(eq=False)
class _Member(Generic[Job]):
    process: Any
    connection: Connection
    job: Job | None = None
    ready: bool = False


def _work(connection: Connection, function: Callable[[Any], Any]) -> None:
    """The life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        connection.send(_READY)
        while True:
            job = connection.recv()
            try:
                message = function(job)
            except Exception:
                message = _Raised(traceback.format_exc())
            connection.send(message)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _die_with_parent() -> None:
    """A parent that was killed cannot say so; its end of a pipe does."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
