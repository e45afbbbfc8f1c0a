"""What all commands do alike: resolve settings, call the pipeline, print, exit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from gkdcli.cli import emit_json
from gkdcli.cli.options import Shared
from gkdcli.console import Console
from gkdcli.errors import usage_error
from gkdcli.resolve import preset_names
from gkdcli.result import Result
from gkdcli.runs import Place
from gkdcli.settings import STAGES


def execute(
    stage: str,
    shared: Shared,
    preset: str,
    flags: dict[str, tuple[str, Any]],
    call: Callable[[Place, Console], Result],
) -> None:
    """The three acts of every command: settings, one pipeline call, print."""
    from gkdcli.cli.render import render_config

    command = STAGES[stage]
    resolved = shared.resolve(preset, stage, flags)
    if shared.show_config:
        render_config(command, resolved, shared.json)
        return
    console = shared.console()
    finish(command, call(shared.place(resolved, preset), console), shared.json, console)


def finish(command: str, result: Result, as_json: bool, console: Console) -> None:
    """The result on stdout, and on stderr why it is not what was asked for, or what comes next."""
    from gkdcli.cli.render import render_result

    if as_json:
        emit_json(command, run=result.run, result=result.payload, error=result.error)
    else:
        render_result(command, result.payload)
    if result.error is not None:
        console.error(result.error)
    elif result.next:
        console.note(result.next)
    raise typer.Exit(int(result.code))


def one_preset(command: str, argument: str | None, option: str | None) -> str:
    """The preset, named as an argument or with `--preset`."""
    where = f"argument PRESET of `gkd {command}`"
    if argument is not None and option is not None and argument != option:
        what = f"two presets are named, `{argument}` and `{option}`"
        raise usage_error(what, f"{where}, and --preset", "name one of them")
    preset = option if option is not None else argument
    if not preset:
        raise usage_error(
            "no preset is named", where, f"one of {', '.join(preset_names())}, or a path to a .toml"
        )
    return preset
