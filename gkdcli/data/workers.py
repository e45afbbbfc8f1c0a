"""Processes that do one job at a time and may crash: the job is named, the others go on."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Generic, TypeVar

from gkdcli.errors import GkdError

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")
_READY, _BEAT = "ready", "beat"
_BEAT_SEC = 0.1


@dataclass(frozen=True)
class Crashed:
    """What a job comes to whose process died.

    Args:
        signal_number: that ended it; 0 where it was no signal.
        silent_sec: for so long it had not called `beat`, and so was killed by us; 0 otherwise.
    """

    signal_number: int
    silent_sec: float = 0.0

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
        patience_sec: a process that works for so long without calling `beat` is killed; 0: never.
    """

    def __init__(self, function: Callable[[Job], Outcome], size: int, patience_sec: float = 0.0) -> None:
        self.size = size
        self._patience_sec = patience_sec
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
        member.job, member.silent_sec = job, 0.0
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
        before = time.monotonic()
        heard = wait([member.connection for member in self._members], timeout_sec)
        # a wait that took longer than it should have was one of a sleeping machine, or after Ctrl-Z
        waited = min(time.monotonic() - before, timeout_sec)
        for connection in heard:
            member = next(member for member in self._members if member.connection is connection)
            try:
                message = member.connection.recv()
            except (EOFError, ConnectionResetError):
                finished += self._bury(member)
                continue
            member.silent_sec = 0.0
            if message in (_READY, _BEAT):
                member.ready = True
            elif isinstance(message, _Raised):
                raise RuntimeError(f"a worker process failed on {member.job}:\n{message.trace}")
            elif member.job is not None:
                finished.append((member.job, message))
                member.job = None
        return finished + self._dismiss([one for one in self._members if one.connection not in heard], waited)

    def _dismiss(self, silent: list[_Member[Job]], waited_sec: float) -> list[tuple[Job, Crashed]]:
        """Kills those of the silent whose time is up."""
        finished: list[tuple[Job, Crashed]] = []
        for member in silent:
            member.silent_sec += waited_sec if member.ready else 0.0
            if member.job is not None and 0 < self._patience_sec <= member.silent_sec:
                member.process.kill()
                finished += [(job, Crashed(0, member.silent_sec)) for job, _ in self._bury(member)]
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
    silent_sec: float = 0.0  # while we listened


def _work(connection: Connection, function: Callable[[Any], Any]) -> None:
    """The life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _pulse.connection = connection
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
        os._exit(0)  # Python would take a fifth of a second to tidy up


class _Pulse:
    """Of this process, if it is a member of a crew."""

    connection: Connection | None = None
    last = 0.0


_pulse = _Pulse()


def beat() -> None:
    """A job calls this whenever it got on, see `Crew.patience_sec`; cheap, and nothing outside of a crew."""
    now = time.monotonic()
    if _pulse.connection is not None and now - _pulse.last >= _BEAT_SEC:
        _pulse.last = now
        _pulse.connection.send(_BEAT)


def _die_with_parent() -> None:
    """A parent that was killed cannot say so; its end of a pipe does."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
