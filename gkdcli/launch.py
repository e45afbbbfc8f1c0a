"""Processes that torchrun started together: what they know of each other, and which one speaks at the end."""

from __future__ import annotations

import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gkdcli.errors import ExitCode, GkdError

PATIENCE = 5.0  # s that other processes leave the first one to say why a run ends


@dataclass(frozen=True)
class Launch:
    """What torchrun tells one of its processes; as it stands, a process of its own.

    Args:
        rank: number of this process among all, from 0.
        size: how many there are.
        local_size: how many on this machine.
        id: of the torchrun job; "" where there is none.
        restarts: how often torchrun has started the processes again.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1
    id: str = ""
    restarts: int = 0

    def typed(self, command: str) -> str:
        """A `gkd ...` command as it was typed for this many processes."""
        if self.size == 1:
            return command
        nodes = self.size // self.local_size
        machines = f"--nnodes {nodes} ... " if nodes > 1 else ""
        words = command.removeprefix("gkd ")
        return f"torchrun {machines}--nproc-per-node {self.local_size} -m gkdcli {words}"


def launched() -> Launch:
    """What the environment says. Where anything torchrun sets is missing it says nothing.

    RANK or WORLD_SIZE alone are left behind by many programs, and nobody would come to such a meeting.
    """
    given = os.environ
    words = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
    if not given.keys() >= {*words, "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"}:
        return Launch()
    try:
        rank, size, _, local_size, restarts = (int(given[word]) for word in words)
    except ValueError:
        return Launch()
    if not 0 <= rank < size or not 0 < local_size <= size:
        return Launch()
    return Launch(rank, size, local_size, given["TORCHELASTIC_RUN_ID"], restarts)


def agent() -> str:
    """The torchrun that started this process, unlike any other: two jobs may bear the same id."""
    parent = os.getppid()
    try:
        # the 22nd word: when it started; the second one, a name in brackets, may have blanks in it
        began = Path(f"/proc/{parent}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        began = ""
    return f"{socket.gethostname()}:{parent}:{began}"


class Others(Protocol):
    """The way to the other processes, once they have met."""

    def speaks(self, error: GkdError) -> bool:
        """See `speaks`."""


_met: list[Others] = []


def enter(others: Others | None) -> None:
    """From now on `speaks` asks the others; None: there are none any more."""
    _met[:] = [] if others is None else [others]


def speaks(error: GkdError) -> bool:
    """Whether this process says why the command ends: exactly one of them does, the first if it can.

    torchrun sends SIGTERM to all others as soon as one has failed; that must not end the one that speaks.
    """
    launch = launched()
    if launch.size == 1:
        return True
    if _met or launch.rank == 0:
        ignore_signals()
        return _met[0].speaks(error) if _met else True
    if error.code == ExitCode.INTERRUPTED:
        return False
    # they have not met: a mistake that all of them see is told by the first, and torchrun ends this one
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    time.sleep(PATIENCE)
    return True


def ignore_signals() -> None:
    """For a process that is about to end by itself."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
