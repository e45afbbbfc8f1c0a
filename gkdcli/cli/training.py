"""`gkd pretrain-attention` and `gkd distill`: flags -> settings -> one pipeline call."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gkdcli.cli.commands import app, execute, one_preset
from gkdcli.cli.options import (
    RUN_PANEL,
    Backbone,
    BatchSize,
    Epochs,
    Init,
    LearningRate,
    MaxSteps,
    PresetArgument,
    PresetOption,
    Profile,
    Resume,
    Shared,
    TeacherCache,
    shared_flags,
)
from gkdcli.console import Console
from gkdcli.errors import usage_error
from gkdcli.result import Result
from gkdcli.runs import Place


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
    profile: Profile = None,
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
        profile=profile,
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
    teacher_cache: TeacherCache = None,
    init: Init = None,
    resume: Resume = False,
    max_steps: MaxSteps = None,
    profile: Profile = None,
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
        teacher_cache=teacher_cache,
        resume=resume,
        max_steps=max_steps,
        profile=profile,
    )


def _train(
    stage: str,
    shared: Shared,
    preset: str,
    init: str | None,
    epochs: int | None,
    batch_size: int | None,
    lr: float | None,
    teacher_cache: int | None = None,
    **request: Any,
) -> None:
    for flag, given in (("--resume", request["resume"]), ("--max-steps", request["max_steps"])):
        if given and request["profile"]:
            raise usage_error(
                f"{flag} does not go with --profile", flag, "a profile has no run to continue or cut"
            )
    flags = {
        "train.init": ("--init", init),
        "optim.epochs": ("--epochs", epochs),
        "optim.batch_size": ("--batch-size", batch_size),
        "optim.learning_rate": ("--lr", lr),
        "train.teacher_cache": ("--teacher-cache", teacher_cache),
    }

    def call(place: Place, console: Console) -> Result:
        from gkdcli.pipeline.train import train

        return train(place, console, stage, dry_run=shared.dry_run, **request)

    execute(stage, shared, preset, flags, call)
