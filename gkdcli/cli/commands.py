"""The commands: flags -> settings -> one pipeline call -> the result printed.

Nothing heavy is imported above function level: `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gkdcli.cli import emit_json
from gkdcli.cli.execute import execute, finish, one_preset
from gkdcli.cli.options import (
    OUTPUT_PANEL,
    RUN_PANEL,
    Backbone,
    BatchSize,
    Dataset,
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
    WeightsFile,
    Which,
    WhoseWeights,
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

    execute("prepare", shared, one_preset("prepare", preset, preset_option), flags, call)


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
        one_preset("pretrain-attention", preset, preset_option),
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
        one_preset("distill", preset, preset_option),
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

    execute(stage, shared, preset, flags, call)


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

    execute("evaluate", shared, one_preset("evaluate", preset, preset_option), {}, call)


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

    execute("export", shared, one_preset("export", preset, preset_option), {}, call)


@app.command("import")
@shared_flags
def import_(
    shared: Shared,
    file: WeightsFile = None,
    dataset: Dataset = None,
    model: WhoseWeights = None,
) -> None:
    """Brings in weights of others: published checkpoints, Kinetics I3D, safetensors."""
    if not dataset:
        raise usage_error(
            "no data set is named", "--dataset of `gkd import`", f"one of {', '.join(preset_names())}"
        )
    if file is None and not shared.show_config:
        raise usage_error("no file is named", "argument FILE of `gkd import`", "a .pt, .ckpt or .safetensors")

    def call(place: Place, console: Console) -> Result:
        from gkdcli.pipeline.imports import import_weights

        assert file is not None
        return import_weights(
            place, console, file=file, model=model.value if model else None, dry_run=shared.dry_run
        )

    execute("import", shared, dataset, {}, call)


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
