"""The app, the three acts of every command, and the options of `gkd` itself.

Nothing heavy is imported above function level: `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from gkdcli.cli import emit_json
from gkdcli.cli.options import Shared
from gkdcli.console import Console, first_rank
from gkdcli.errors import usage_error
from gkdcli.launch import launched
from gkdcli.resolve import preset_names
from gkdcli.result import Result
from gkdcli.runs import STAGE_FOLDER, version
from gkdcli.settings import STAGES

app = typer.Typer(
    name="gkd",
    help="Distils a large video action network into a small one, by teaching it where the large one looks.",
    epilog="A preset names data set and figures: `gkd prepare demo`, `gkd pretrain-attention demo`, ...",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def execute(
    stage: str,
    shared: Shared,
    preset: str,
    flags: dict[str, tuple[str, Any]],
    call: Callable[..., Result],
    modalities: Sequence[str] = (),
) -> None:
    """The three acts of every command: settings, one pipeline call, print.

    `call` is given a place for each of the modalities (default: that of `--modality`), and the console.
    """
    from gkdcli.cli.render import render_config

    command = STAGES[stage]
    if stage not in STAGE_FOLDER and launched().size > 1:
        raise usage_error(
            f"`gkd {command}` runs in one process",
            f"torchrun started {launched().size} of them",
            f"`gkd {command} ...`, without torchrun; training alone is shared",
        )
    asked = modalities or (shared.modality.value,)
    resolved = {modality: shared.resolve(preset, stage, flags, modality) for modality in asked}
    if shared.show_config:
        render_config(command, resolved[asked[0]], shared.json)
        return
    console = shared.console()
    places = [shared.place(page, preset, modality) for modality, page in resolved.items()]
    finish(command, call(*places, console), shared.json, console)


def finish(command: str, result: Result, as_json: bool, console: Console) -> None:
    """The result on stdout, and on stderr why it is not what was asked for, or what comes next."""
    from gkdcli.cli.render import render_result

    if not first_rank():
        raise typer.Exit(int(result.code))
    if as_json:
        emit_json(command, run=result.run, result=result.payload, error=result.error)
    else:
        render_result(command, result.payload if result.shown is None else result.shown)
    if result.error is not None:
        console.error(result.error)
    elif result.next:
        console.note(result.next)
    raise typer.Exit(int(result.code))


def one_preset(command: str, argument: str | None, option: str | None) -> str:
    """The preset that argument or option name.

    Raises:
        GkdError: neither, or two different ones (exit code 2).
    """
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


@app.callback(invoke_without_command=True)
def root_options(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    doctor: Annotated[
        bool, typer.Option("--doctor", help="Check versions, devices, decoder, HDF5 and disk, and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Options of `gkd` itself."""
    if show_version:
        if as_json:
            emit_json("", result={"version": version()})
        else:
            typer.echo(f"gkd {version()}")
        raise typer.Exit
    if doctor:
        from gkdcli.doctor import examine

        finish("doctor", examine(), as_json, Console())
    if as_json:  # `gkd --json distill ...` is `gkd distill ... --json`
        context.default_map = {command: {"json": True} for command in STAGES.values()}
    if context.invoked_subcommand is None:
        if as_json:
            raise usage_error(
                "no command is named", "command line of `gkd`", f"one of {', '.join(STAGES.values())}"
            )
        typer.echo(context.get_help())
        raise typer.Exit
