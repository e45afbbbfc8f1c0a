"""What a pipeline function hands back to the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from gkdcli.errors import ExitCode, GkdError


@dataclass
class Result:
    """The outcome of one command.

    Args:
        payload: the document behind `result` in JSON; tables are drawn from it.
        run: the run folder it belongs to, if any.
        code: the exit code.
        error: why `code` is not 0 although there is a result (exit codes 1 and 4).
        next: the next sensible command, or a short fact to end with.
        shown: what the table shows, where that is less than the payload, or told in lines.
    """

    payload: dict[str, Any]
    run: str | None = None
    code: ExitCode = ExitCode.DONE
    error: GkdError | None = None
    next: str = ""
    shown: dict[str, Any] | None = None


def jsonable(value: Any) -> Any:
    """The same document with NaN and infinities as null and arrays as lists."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch, without importing either
        return jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
