"""The commands: flags -> settings -> one pipeline call -> the result printed.

Nothing heavy is imported above function level: `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from gkdcli.cli import emit_json
from gkdcli.cli.options import (
    OUTPUT_PANEL,
    RUN_PANEL,
    Backbone,
    BatchSize,
    Epochs,
    Format,
    Init,
    LearningRate,
    MaxSteps,
    Model,
    PresetArgument,
    PresetOption,
    Resume,
    RunFolder,
    Shared,
    Which,
    shared_flags,
)
from gkdcli.console import Console
from gkdcli.errors import usage_error
from gkdcli.resolve import preset_names
from gkdcli.result import Result
from gkdcli.runs import Place, version
from gkdcli.settings import STAGES

app = typer.Typer(
    name="gkd",
    help="Distils a large video action network into a small one, by teaching it where the large one looks.",
    epilog="A preset names data set and figures: `gkd prepare demo`, `gkd pretrain-attention demo`, ...",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _execute(
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
    _finish(command, call(shared.place(resolved, preset), console), shared.json, console)


def _finish(command: str, result: Result, as_json: bool, console: Console) -> None:
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


def _one_preset(command: str, argument: str | None, option: str | None) -> str:
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


@app.command("prepare")
@shared_flags
def prepare(
    shared: Shared,
    preset: PresetArgument = None,
    videos: Annotated[
        Path | None,
        typer.Argument(metavar="VIDEOS", help="Folder of the videos; default: datasets/<dataset>/."),
    ] = None,
    preset_option: PresetOption = None,
    name: Annotated[
        str | None,
        typer.Option(help="Name of your own data set.", show_default=False, rich_help_panel=RUN_PANEL),
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="CSV or JSON list: video, class and, if you like, subset.",
            rich_help_panel=RUN_PANEL,
        ),
    ] = None,
    retry: Annotated[
        bool,
        typer.Option(
            "--retry", help="Try rejected videos again even if unchanged.", rich_help_panel=RUN_PANEL
        ),
    ] = False,
) -> None:
    """Decodes videos into a store of frames (HDF5)."""
    if preset_option is not None and preset is not None and videos is None:
        videos, preset = Path(preset), None  # `gkd prepare --preset ucf101 VIDEOS`
    flags = {"name": ("--name", name), "dataset": ("--name", name)}

    def call(place: Place, console: Console) -> Result:
        from gkdcli.pipeline.prepare import prepare

        return prepare(
            place, console, videos=videos, annotations=annotations, retry=retry, dry_run=shared.dry_run
        )

    _execute("prepare", shared, _one_preset("prepare", preset, preset_option), flags, call)


@app.command("pretrain-attention")
@shared_flags
def pretrain_attention(
    shared: Shared,
    preset: PresetArgument = None,
    preset_option: PresetOption = None,
    backbone: Backbone = None,
    init: Init = None,
    resume: Resume = False,
    max_steps: MaxSteps = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
) -> None:
    """Trains the teacher, its attention and its CVAE (phase 1)."""
    _train(
        "pretrain",
        shared,
        _one_preset("pretrain-attention", preset, preset_option),
        init,
        epochs,
        batch_size,
        lr,
        backbone=backbone,
        resume=resume,
        max_steps=max_steps,
    )


@app.command("distill")
@shared_flags
def distill(
    shared: Shared,
    preset: PresetArgument = None,
    preset_option: PresetOption = None,
    backbone: Backbone = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="The teacher's run folder; default: the newest that fits.",
            rich_help_panel=RUN_PANEL,
        ),
    ] = None,
    init: Init = None,
    resume: Resume = False,
    max_steps: MaxSteps = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
) -> None:
    """Trains the student to reproduce the teacher's generated features and attention (phase 2)."""
    _train(
        "distill",
        shared,
        _one_preset("distill", preset, preset_option),
        init,
        epochs,
        batch_size,
        lr,
        backbone=backbone,
        teacher=teacher,
        resume=resume,
        max_steps=max_steps,
    )


def _train(
    stage: str,
    shared: Shared,
    preset: str,
    init: str | None,
    epochs: int | None,
    batch_size: int | None,
    lr: float | None,
    **request: Any,
) -> None:
    flags = {
        "train.init": ("--init", init),
        "optim.epochs": ("--epochs", epochs),
        "optim.batch_size": ("--batch-size", batch_size),
        "optim.learning_rate": ("--lr", lr),
    }

    def call(place: Place, console: Console) -> Result:
        from gkdcli.pipeline.train import train

        return train(place, console, stage, dry_run=shared.dry_run, **request)

    _execute(stage, shared, preset, flags, call)


@app.command("evaluate")
@shared_flags
def evaluate(
    shared: Shared,
    preset: PresetArgument = None,
    preset_option: PresetOption = None,
    model: Model = Which.student,
    run: RunFolder = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Score the newest teacher, plain and distilled student, side by side.",
            rich_help_panel=RUN_PANEL,
        ),
    ] = False,
    rescore: Annotated[
        bool,
        typer.Option(
            "--rescore", help="Score saved predictions again; no network runs.", rich_help_panel=RUN_PANEL
        ),
    ] = False,
    require: Annotated[
        list[str] | None,
        typer.Option(
            metavar="'top1>=0.6'",
            help="Exit 4 if the scores miss this; repeat for more.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write scores and per-video predictions as JSON.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
) -> None:
    """Scores a trained network on the test videos."""

    def call(place: Place, console: Console) -> Result:
        from gkdcli.pipeline.evaluate import evaluate

        return evaluate(
            place,
            console,
            model=model.value,
            run_path=run,
            compare=compare,
            rescore=rescore,
            require=require or [],
            output=output,
            dry_run=shared.dry_run,
        )

    _execute("evaluate", shared, _one_preset("evaluate", preset, preset_option), {}, call)


@app.command("export")
@shared_flags
def export(
    shared: Shared,
    preset: PresetArgument = None,
    preset_option: PresetOption = None,
    formats: Annotated[
        list[Format] | None,
        typer.Option(
            "--format",
            help="Repeat for more; default: safetensors.",
            show_default=False,
            rich_help_panel=RUN_PANEL,
        ),
    ] = None,
    model: Model = Which.student,
    run: RunFolder = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Default: exports/<preset>/<model>-<modality>/.", rich_help_panel=OUTPUT_PANEL
        ),
    ] = None,
) -> None:
    """Writes a trained network with its card, for use elsewhere."""

    def call(place: Place, console: Console) -> Result:
        from gkdcli.pipeline.export import export

        return export(
            place,
            console,
            model=model.value,
            run_path=run,
            out=out,
            dry_run=shared.dry_run,
            formats=[chosen.value for chosen in formats or [Format.safetensors]],
        )

    _execute("export", shared, _one_preset("export", preset, preset_option), {}, call)


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

        _finish("doctor", examine(), as_json, Console())
    if as_json:  # `gkd --json distill ...` is `gkd distill ... --json`
        context.default_map = {command: {"json": True} for command in STAGES.values()}
    if context.invoked_subcommand is None:
        if as_json:
            raise usage_error(
                "no command is named", "command line of `gkd`", f"one of {', '.join(STAGES.values())}"
            )
        typer.echo(context.get_help())
        raise typer.Exit
