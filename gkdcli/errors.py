"""The one exception a user sees, and the exit codes (0 to 4, 70, 130)."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What the process returns; the README lists the same table."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    REJECTS = 3
    REQUIREMENT = 4
    BUG = 70
    INTERRUPTED = 130


class GkdError(Exception):
    """A mistake or a misfortune the user can act on.

    Args:
        what: one line, no full stop: what went wrong.
        where: file, line, key, video or flag it concerns.
        hint: a command or a fact that helps.
        code: the exit code it ends the command with.
    """

    def __init__(self, what: str, where: str = "", hint: str = "", code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint
        self.code = code

    def __reduce__(self) -> tuple[type[GkdError], tuple[str, str, str, ExitCode]]:
        """Travels between worker processes with all four fields."""
        return type(self), (self.what, self.where, self.hint, self.code)


def usage_error(what: str, where: str = "", hint: str = "") -> GkdError:
    """A wrong flag, name or setting (exit code 2)."""
    return GkdError(what, where, hint, ExitCode.USAGE)


class Interrupted(GkdError):
    """Ctrl-C or SIGTERM, after what was in flight has been saved (exit code 130)."""

    def __init__(
        self, what: str, where: str = "", hint: str = "", code: ExitCode = ExitCode.INTERRUPTED
    ) -> None:
        super().__init__(what, where, hint, code)
