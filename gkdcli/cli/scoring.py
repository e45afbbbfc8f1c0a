"""`gkd evaluate` and `gkd export`: flags -> settings -> one pipeline call."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from gkdcli.cli.commands import app, execute, one_preset
from gkdcli.cli.options import (
    DATA_PANEL,
    OUTPUT_PANEL,
    RUN_PANEL,
    Format,
    FusionWeights,
    Model,
    PresetArgument,
    PresetOption,
    RunFolder,
    Scored,
    Shared,
    Tiou,
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
    model: Annotated[
        Scored,
        typer.Option(
            help="Which network; all: the student, and the newest teacher and plain student beside it.",
            rich_help_panel=RUN_PANEL,
        ),
    ] = Scored.student,
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
    rescore: Annotated[
        bool,
        typer.Option(
            "--rescore", help="Score saved predictions again; no network runs.", rich_help_panel=RUN_PANEL
        ),
    ] = False,
    predictions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Detection: score this .json or .json.gz instead of a network; no store is needed.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None,
    ground_truth: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Of --predictions: ActivityNet JSON; default: thumos_gt.json under datasets/<dataset>/.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None,
    tiou: Tiou = None,
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
            help="Also write scores and per-video predictions as JSON; of --predictions also pictures.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
) -> None:
    """Scores a trained network on the test videos, or a file of detections."""
    runs = {"run": run, "rgb_run": rgb_run, "flow_run": flow_run}
    _check_fusion_flags(fusion, shared.modality.value, runs, fusion_weights)
    if predictions is not None:
        odd = {
            "--model": model != Scored.student,
            "--run": run is not None,
            "--fusion": fusion,
            "--rescore": rescore,
        }
        if named := [flag for flag, is_given in odd.items() if is_given]:
            hint = "a file is scored as it is; no network has a part in it"
            raise usage_error(f"{named[0]} does not go with --predictions", named[0], hint)
    elif ground_truth is not None:
        hint = "networks are scored against the annotations in the store"
        raise usage_error("--ground-truth does not go without --predictions", "--ground-truth", hint)
    flags: dict[str, tuple[str, Any]] = {
        "eval.fusion_weights": ("--fusion-weights", _pair("--fusion-weights", fusion_weights)),
        "eval.tiou": ("--tiou", None if tiou is None else thresholds("--tiou", tiou)),
    }

    def call(*given: Any) -> Result:
        if predictions is not None:
            from gkdcli.pipeline.score_file import score_file

            place, console = given
            return score_file(
                place,
                console,
                predictions=predictions,
                ground_truth=ground_truth,
                require=require or [],
                output=output,
                dry_run=shared.dry_run,
            )
        if tiou is not None and given[0].settings.task != "detection":
            raise usage_error(
                "--tiou is of detection only", f"--tiou {tiou}", "drop it, or name another preset"
            )
        from gkdcli.pipeline.evaluate import evaluate

        *places, console = given
        return evaluate(
            places,
            console,
            model="teacher" if model == Scored.teacher else "student",
            runs=[rgb_run, flow_run] if fusion else [run],
            compare=model == Scored.all,
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


def _pair(flag: str, text: str | None) -> list[float] | None:
    """`1,1.5` -> [1.0, 1.5]."""
    if text is None:
        return None
    try:
        rgb, flow = (float(word) for word in text.split(","))
    except ValueError:
        raise usage_error(f"`{text}` is no pair of numbers", f"{flag} {text}", "for example 1,1.5") from None
    return [rgb, flow]


def thresholds(flag: str, text: str) -> list[float]:
    """`0.1,0.5` -> [0.1, 0.5]; `0.1:0.9:0.1` -> [0.1, 0.2, ... 0.9], the end included.

    Raises:
        GkdError: neither of them (exit code 2).
    """
    try:
        if ":" not in text:
            return [float(word) for word in text.split(",")]
        start, stop, step = (float(word) for word in text.split(":"))
        count = math.floor((stop - start) / step + 1e-6) + 1
        if step > 0 and 1 <= count <= 1000:
            return [round(start + step * number, 10) for number in range(count)]
    except (ValueError, ArithmeticError):
        pass
    what = f"`{text}` is neither a list nor a range of thresholds"
    raise usage_error(what, f"{flag} {text}", "for example 0.3,0.5 or 0.1:0.9:0.1 (start:stop:step)")


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
