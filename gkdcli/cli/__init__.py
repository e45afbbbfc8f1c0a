"""The command line: the only place that prints results and exits."""

from __future__ import annotations

import errno
import importlib
import itertools
import os
import signal
import sys
from types import FrameType
from typing import Any

from gkdcli.errors import ExitCode, GkdError, Interrupted, usage_error


def main() -> None:
    """Entry point of `gkd` and of `python -m gkdcli`."""
    signal.signal(signal.SIGTERM, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that the terminal cannot show is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs one command line and returns its exit code; nothing escapes but the code."""
    try:
        error = _attempt(arguments)
        if isinstance(error, int):
            return error
        from gkdcli.console import Console
        from gkdcli.launch import speaks

        if not speaks(error):
            return int(error.code)
        Console().error(error)
        if "--json" in itertools.takewhile(lambda word: word != "--", arguments):
            emit_json(_named_command(arguments), error=error)
        return int(error.code)
    except OSError:  # `gkd ... | head`: the reader has gone, which is its right
        return int(ExitCode.FAILED)


def _attempt(arguments: list[str]) -> int | GkdError:
    """The command's exit code, or what ended it."""
    try:
        return _run(arguments)
    except GkdError as error:
        return error
    except KeyboardInterrupt:
        return Interrupted("interrupted", hint="run the same command again")
    except BrokenPipeError:
        raise
    except Exception as caught:
        return _usage(caught, arguments) or _refusal(caught) or _bug(caught, arguments)


def whole_app() -> Any:
    """The Typer app with all commands, in the order in which `--help` lists them."""
    from gkdcli.cli.commands import app

    for module in ("preparing", "training", "scoring", "importing"):
        importlib.import_module(f"gkdcli.cli.{module}")
    return app


def _run(arguments: list[str]) -> int:
    import typer

    command = typer.main.get_command(whole_app())
    if "_GKD_COMPLETE" in os.environ:  # the shell asks what may come next
        command.main(args=arguments, prog_name="gkd")
    try:
        # not command.main(): that one swallows Ctrl-C and broken pipes
        with command.make_context("gkd", list(arguments), obj=arguments) as context:
            command.invoke(context)
        return int(ExitCode.DONE)
    except typer.Exit as stop:
        return int(stop.exit_code)
    finally:
        sys.stdout.flush()


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
    what = text.split(" Did you mean")[0].replace("Value error, ", "").strip().rstrip(".")
    return usage_error(
        what[:1].lower() + what[1:], f"command line of `{name}`", f"{hint}`{name} --help` lists all flags"
    )


def _near_command(text: str) -> list[str]:
    import difflib
    import re

    from gkdcli.settings import STAGES

    wrong = re.search(r"No such command '([^']*)'", text)
    return difflib.get_close_matches(wrong.group(1), STAGES.values(), n=1) if wrong else []


def _named_command(arguments: list[str]) -> str:
    from gkdcli.settings import STAGES

    return next((word for word in arguments if word in STAGES.values()), "")


_NO_LEAVE = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)


def _refusal(caught: Exception) -> GkdError | None:
    """What system or installation refuse, wherever it happens: no permission, no space, no such package."""
    if isinstance(caught, ImportError) and not (caught.name or "gkdcli").startswith("gkdcli"):
        what = f"this installation is incomplete: {caught}"
        return GkdError(what, f"package {caught.name}", "`gkd --doctor` lists what is missing")
    if not isinstance(caught, OSError) or caught.errno not in _NO_LEAVE + _NO_PLACE:
        return None
    what = f"the system refuses: {caught.strerror}"
    where = os.fsdecode(caught.filename) if isinstance(caught.filename, str | bytes) else "standard output"
    return GkdError(what, where, "check the path, its permissions and the free space")


def _bug(caught: Exception, arguments: list[str]) -> GkdError:
    import tempfile
    import time
    import traceback
    from pathlib import Path

    path = Path(tempfile.gettempdir()) / f"gkd-bug-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    kept = f"trace kept in {path}"
    trace = "".join(traceback.format_exception(caught))
    try:
        path.write_text(f"gkd {' '.join(arguments)}\n{trace}", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        kept = f"the trace could not be kept in {path}: {error.strerror}"
    what = f"this is a bug in gkd: {type(caught).__name__}: {caught}"
    return GkdError(what, kept, "please report it with that file", ExitCode.BUG)


def emit_json(
    command: str,
    *,
    run: str | None = None,
    result: dict[str, Any] | None = None,
    error: GkdError | None = None,
) -> None:
    """The one JSON document on stdout (keys schema, ok, command, version, run, result, error)."""
    import json

    from gkdcli.console import first_rank
    from gkdcli.result import jsonable
    from gkdcli.runs import version

    if error is None and not first_rank():
        return
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
    # ASCII: whatever the locale, and however odd a file's name
    sys.stdout.write(json.dumps(document, allow_nan=False) + "\n")
    sys.stdout.flush()
