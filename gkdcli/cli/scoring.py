"""`gkd evaluate` and `gkd export`: flags -> settings -> one pipeline call."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gkdcli.cli.commands import app, execute, one_preset
from gkdcli.cli.options import (
    OUTPUT_PANEL,
    RUN_PANEL,
    Format,
    FusionWeights,
    Model,
    PresetArgument,
    PresetOption,
    RunFolder,
    Shared,
    Which,
    run_option,
    shared_flags,
)
from gkdcli.console import Console
from gkdcli.errors import usage_error
from gkdcli.result import Result
from gkdcli.runs import Place
from gkdcli.settings import MODALITIES


@app.command("evaluate")
@shared_flags
def evaluate(
    shared: Shared,
    preset: PresetArgument = None,
    preset_option: PresetOption = None,
    model: Model = Which.student,
    run: RunFolder = None,
    fusion: Annotated[
        bool,
        typer.Option(
            "--fusion",
            help="Score the rgb and the flow network, and both together.",
            rich_help_panel=RUN_PANEL,
        ),
    ] = False,
    rgb_run: Annotated[Path | None, run_option("--rgb-run", "the rgb network in --fusion")] = None,
    flow_run: Annotated[Path | None, run_option("--flow-run", "the flow network in --fusion")] = None,
    fusion_weights: FusionWeights = None,
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
    runs = {"run": run, "rgb_run": rgb_run, "flow_run": flow_run}
    _check_fusion_flags(fusion, shared.modality.value, runs, fusion_weights)
    flags = {"eval.fusion_weights": ("--fusion-weights", _numbers("--fusion-weights", fusion_weights))}

    def call(*given: Any) -> Result:
        from gkdcli.pipeline.evaluate import evaluate

        *places, console = given
        return evaluate(
            places,
            console,
            model=model.value,
            runs=[rgb_run, flow_run] if fusion else [run],
            compare=compare,
            rescore=rescore,
            require=require or [],
            output=output,
            dry_run=shared.dry_run,
        )

    execute(
        "evaluate",
        shared,
        one_preset("evaluate", preset, preset_option),
        flags,
        call,
        MODALITIES if fusion else (),
    )


def _check_fusion_flags(
    fusion: bool, modality: str, runs: dict[str, Path | None], weights: str | None
) -> None:
    """Flags that only one of the two ways to evaluate knows."""
    if fusion:
        odd = "--modality flow" if modality != "rgb" else "--run" if runs["run"] else ""
        hint = "fusion takes both streams; name their runs with --rgb-run and --flow-run"
    else:
        given = [name for name in ("rgb_run", "flow_run") if runs[name]]
        odd = f"--{given[0].replace('_', '-')}" if given else "--fusion-weights" if weights else ""
        hint = "add --fusion, or name one network with --run"
    if odd:
        raise usage_error(f"{odd} does not go {'with' if fusion else 'without'} --fusion", odd, hint)


def _numbers(flag: str, text: str | None) -> list[float] | None:
    """`1,1.5` -> [1.0, 1.5]."""
    if text is None:
        return None
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise usage_error(f"`{text}` is no list of numbers", f"{flag} {text}", "for example 1,1.5") from None


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
