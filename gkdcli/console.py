"""Notes, warnings and progress, all on stderr. Results go to stdout through `gkdcli.cli` alone."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from gkdcli.errors import GkdError
from gkdcli.launch import launched

Rows = Callable[[], Sequence[tuple[str, str]]]


class Ticker(Protocol):
    """What `Console.progress` yields: call it with what is done so far, and a short text."""

    def __call__(self, done: int, text: str = "", rows: Rows | None = None) -> None:
        """Shows that `done` of the whole is done; a bar with names and values below it, if there are any."""


def silent(done: int, text: str = "", rows: Rows | None = None) -> None:
    """A ticker that shows nothing."""


class Progress(Protocol):
    """Makes a ticker for so many steps: `Console.progress` with its title given."""

    def __call__(self, total: int) -> AbstractContextManager[Ticker]:
        """For use in a `with`."""


@dataclass
class Console:
    """The manners of one command.

    Args:
        quiet: only warnings and errors.
        verbose: details too.
        progress: "auto" draws a bar on a terminal and prints plain lines elsewhere; "bar", "plain", "off".
    """

    quiet: bool = False
    verbose: bool = False
    progress_style: str = "auto"
    warnings: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """One line of information."""
        if not self.quiet and first_rank():
            self._line(text)

    def detail(self, text: str) -> None:
        """One line that only `-v` asks for."""
        if self.verbose and first_rank():
            self._line(text)

    def warn(self, what: str, where: str = "", hint: str = "") -> None:
        """Something the user should know although the command goes on."""
        self.warnings.append(what)
        if first_rank():
            self._line(message("warning", what, where, hint))

    def error(self, error: GkdError) -> None:
        """The reason why the command ends; of several processes the caller knows which one says it."""
        self._line(message("error", error.what, error.where, error.hint))

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Ticker]:
        """Shows how far a long work is: a bar on a terminal, a plain line every ten seconds elsewhere."""
        style = self.progress_style
        if style == "auto":
            style = "bar" if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" else "plain"
        if self.quiet or style == "off" or not first_rank():
            yield silent
        elif style == "bar":
            yield from _bar(title, total)
        else:
            yield from self._plain(title, total)

    def _plain(self, title: str, total: int) -> Iterator[Ticker]:
        start = last = time.monotonic()

        def tick(done: int, text: str = "", rows: Rows | None = None) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last < 10 and done < total:
                return
            last = now
            left = (now - start) / max(done, 1) * (total - done)
            eta = f", {left:.0f} s left" if done < total else f" in {now - start:.0f} s"
            self._line(f"{title}: {done}/{total}{eta}{f' ({text})' if text else ''}")

        yield tick

    @staticmethod
    def _line(text: str) -> None:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def _bar(title: str, total: int) -> Iterator[Ticker]:
    from rich.columns import Columns
    from rich.console import Console as RichConsole
    from rich.console import RenderableType
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    shown: list[Rows] = []

    class Board(Progress):
        def get_renderables(self) -> Iterator[RenderableType]:
            yield from super().get_renderables()
            if rows := shown[-1]() if shown else ():
                left, right = (max(map(len, words)) for words in zip(*rows, strict=True))
                cells = [Text(f"{name:<{left}}  {value:>{right}}") for name, value in rows]
                yield Columns(cells, padding=(0, 3))

    with Board(*columns, console=RichConsole(stderr=True), transient=True, refresh_per_second=4) as bar:
        task = bar.add_task(title, total=total, text="")

        def tick(done: int, text: str = "", rows: Rows | None = None) -> None:
            shown[:] = [rows] if rows is not None else []
            bar.update(task, completed=done, text=text)

        yield tick


def message(kind: str, what: str, where: str = "", hint: str = "") -> str:
    """`error: ...`, `where: ...`, `hint: ...`, one line each; empty parts are left out.

    Control characters become blanks: a video's name cannot break the layout, or colour the terminal.
    """
    lines = [f"{kind}: {what}", where and f"where: {where}", hint and f"hint: {hint}"]
    return "\n".join(re.sub(r"[\x00-\x1f\x7f]", " ", line) for line in lines if line)


def counted(count: int, one: str, more: str = "") -> str:
    """`1 video`, `2 videos`; `more` where an `s` is not all that changes: `1 video is`, `2 videos are`."""
    return f"{count} {one if count == 1 else more or one + 's'}"


def first_rank() -> bool:
    """Whether this process speaks: in a multi-process run only rank 0 does."""
    return launched().rank == 0
