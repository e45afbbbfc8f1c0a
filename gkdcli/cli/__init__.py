"""The command line: the only place that prints results and exits."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

from gkdcli.errors import ExitCode, GkdError, usage_error


def main() -> None:
    """Entry point of `gkd` and of `python -m gkdcli`."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs one command line and returns its exit code; nothing escapes but the code."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _run(arguments)
    except BrokenPipeError:  # `gkd ... | head`: the reader has gone, which is its right
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the interpreter flushes it at exit
        return ExitCode.FAILED


def _run(arguments: list[str]) -> int:
    from gkdcli.cli.commands import app
    from gkdcli.console import Console

    try:
        returned = _click_command(app).main(args=arguments, prog_name="gkd", standalone_mode=False)
        sys.stdout.flush()
        return int(returned or 0)
    except GkdError as caught:
        error = caught
    except KeyboardInterrupt:
        error = GkdError("interrupted", hint="run the same command again", code=ExitCode.INTERRUPTED)
    except BrokenPipeError:
        raise
    except Exception as caught:
        translated = _usage(caught, arguments)
        error = translated or _bug(caught)
    Console().error(error)
    if "--json" in arguments:
        emit_json(_named_command(arguments), error=error)
    return int(error.code)


def _click_command(app: Any) -> Any:
    import typer

    return typer.main.get_command(app)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _usage(caught: Exception, arguments: list[str]) -> GkdError | None:
    """A wrong flag or argument, as the parser reports it."""
    import typer

    usage, click_error = typer.BadParameter.__mro__[1:3]  # the parser is vendored by newer typer
    if not isinstance(caught, click_error):
        return None
    text = getattr(caught, "message", "") or str(caught)
    if isinstance(caught, usage) and getattr(caught, "param", None) is not None:
        text = caught.format_message()  # type: ignore[attr-defined]
    command = _named_command(arguments)
    name = f"gkd {command}" if command else "gkd"
    near = getattr(caught, "possibilities", None) or _near_command(text)
    hint = f"did you mean `{near[0]}`? " if near else ""
    what = text.split(" Did you mean")[0].strip().rstrip(".")
    return usage_error(
        what[:1].lower() + what[1:], f"command line of `{name}`", f"{hint}`{name} --help` lists all flags"
    )


def _near_command(text: str) -> list[str]:
    import difflib
    import re

    wrong = re.search(r"No such command '([^']*)'", text)
    return difflib.get_close_matches(wrong.group(1), COMMANDS, n=1) if wrong else []


COMMANDS = ("prepare", "pretrain-attention", "distill", "evaluate", "export")


def _named_command(arguments: list[str]) -> str:
    return next((word for word in arguments if word in COMMANDS), "")


def _bug(caught: Exception) -> GkdError:
    path = Path(tempfile.gettempdir()) / f"gkd-bug-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    path.write_text(
        f"gkd {' '.join(sys.argv[1:])}\n{''.join(traceback.format_exception(caught))}", encoding="utf-8"
    )
    return GkdError(
        f"this is a bug in gkd: {type(caught).__name__}: {caught}",
        f"trace kept in {path}",
        "please report it with that file",
        ExitCode.BUG,
    )


def emit_json(
    command: str,
    *,
    run: str | None = None,
    result: dict[str, Any] | None = None,
    error: GkdError | None = None,
) -> None:
    """The one JSON document on stdout (DESIGN: keys schema, ok, command, version, run, result | error)."""
    from gkdcli.result import jsonable
    from gkdcli.runs import version

    document: dict[str, Any] = {
        "schema": 1,
        "ok": error is None,
        "command": command,
        "version": version(),
        "run": run,
    }
    if result is not None:
        document["result"] = jsonable(result)
    if error is not None:
        document["error"] = {
            "what": error.what,
            "where": error.where,
            "hint": error.hint,
            "code": int(error.code),
        }
    sys.stdout.write(json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()
