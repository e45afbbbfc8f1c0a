"""`gkd prepare`: flags -> settings -> one pipeline call."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from gkdcli.cli.commands import app, execute, one_preset
from gkdcli.cli.options import (
    DATA_PANEL,
    RUN_PANEL,
    Executor,
    Flow,
    PreparedModality,
    PresetArgument,
    PresetOption,
    Shared,
    shared_flags,
)
from gkdcli.errors import usage_error
from gkdcli.result import Result
from gkdcli.runs import Place
from gkdcli.settings import MODALITIES


@app.command("prepare")
@shared_flags
def prepare(
    context: typer.Context,
    shared: Shared,
    preset: PresetArgument = None,
    videos: Annotated[
        Path | None,
        typer.Argument(metavar="VIDEOS", help="Folder of the videos; default: datasets/<dataset>/."),
    ] = None,
    preset_option: PresetOption = None,
    modality: Annotated[
        PreparedModality,
        typer.Option(help="What is stored; both in one pass over each video.", rich_help_panel=DATA_PANEL),
    ] = PreparedModality.rgb,
    name: Annotated[
        str | None,
        typer.Option(help="Name of your own data set.", show_default=False, rich_help_panel=RUN_PANEL),
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="CSV or JSON list (video, class, perhaps subset), or a folder of published split lists;"
            " detection: ActivityNet JSON, or a folder of the THUMOS14 files.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None,
    from_frames: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Extracted images instead of videos: image_%05d.jpg, img_%05d.jpg, flow_{x,y}_%05d.jpg.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None,
    from_npy: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Published arrays instead of videos: {validation,test}_npy/, {validation,test}_flow_npy/.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None,
    flow: Flow = None,
    retry: Annotated[
        bool,
        typer.Option(
            "--retry", help="Try rejected videos again even if unchanged.", rich_help_panel=RUN_PANEL
        ),
    ] = False,
    audit: Annotated[
        bool,
        typer.Option(
            "--audit",
            help="Check the finished store against videos and annotations; change nothing.",
            rich_help_panel=RUN_PANEL,
        ),
    ] = False,
    flow_sample: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="--audit: compare N stored flows, drawn by --seed, with TV-L1; 0: none.",
            rich_help_panel=RUN_PANEL,
        ),
    ] = 0,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="K/N",
            help="Prepare only the K-th of N shares of the videos, beside the other N - 1 runs on the same"
            " folder. No shard merges: when all have ended, the same command without --shard does.",
            show_default=False,
            rich_help_panel=RUN_PANEL,
        ),
    ] = None,
    executor: Annotated[
        Executor,
        typer.Option(
            help="Processes of this machine, or the Ray cluster that RAY_ADDRESS names (without it: a Ray of"
            " its own on this machine).",
            rich_help_panel=RUN_PANEL,
        ),
    ] = Executor.local,
) -> None:
    """Decodes videos into a store of frames, of optical flow, or both (HDF5)."""
    from gkdcli.data.shards import Shard

    if preset_option is not None and preset is not None and videos is None:
        videos, preset = Path(preset), None  # `gkd prepare --preset ucf101 VIDEOS`
    named = {"argument VIDEOS": videos, "--from-frames": from_frames, "--from-npy": from_npy}
    given = {flag: path for flag, path in named.items() if path is not None}
    if len(given) > 1:
        kinds = {"argument VIDEOS": "videos", "--from-frames": "extracted images", "--from-npy": "arrays"}
        what = f"{' and '.join(kinds[flag] for flag in given)} are both named"
        where = ", and ".join(f"{flag} {path}" for flag, path in given.items())
        raise usage_error(what, where, "name one of them")
    if flow is not None and modality == PreparedModality.rgb:
        raise usage_error(
            "--flow says how flow is computed, but only rgb is prepared",
            f"--flow {flow.value}",
            "add `--modality both` or `--modality flow`",
        )
    if audit:
        refused = {
            "--retry": retry,
            "--dry-run": shared.dry_run,
            "--flow": flow is not None,
            "--shard": shard is not None,
            "--executor": executor != Executor.local,
        }
        if given_too := [flag for flag, is_given in refused.items() if is_given]:
            what = f"{given_too[0]} has no part in an audit, which changes nothing"
            raise usage_error(what, f"--audit {' '.join(given_too)}", "leave it out, or --audit")
    if flow_sample and not audit:
        what = "--flow-sample is a part of the audit"
        raise usage_error(what, f"--flow-sample {flow_sample}", "add `--audit`")
    if flow_sample and modality == PreparedModality.rgb:
        what = "--flow-sample compares stored flow, but only rgb is audited"
        raise usage_error(what, f"--flow-sample {flow_sample}", "add `--modality both` or `--modality flow`")
    flags = {
        "name": ("--name", name),
        "dataset": ("--name", name),
        "data.flow": ("--flow", flow.value if flow else None),
    }
    share = Shard.parse(shard) if shard is not None else None
    modalities = MODALITIES if modality == PreparedModality.both else (modality.value,)

    def call(place: Place, *rest: Any) -> Result:
        *others, console = rest
        for other in others:
            if other.settings.data != place.settings.data:
                what = "rgb and flow have different [data] settings, so one pass cannot make both"
                raise usage_error(what, "--modality both", "prepare one after the other")
        inputs: dict[str, Any] = {
            "modalities": modalities,
            "videos": videos,
            "frames": from_frames,
            "arrays": from_npy,
            "annotations": annotations,
        }
        if audit:
            from gkdcli.pipeline.audit import audit as look_through

            return look_through(place, console, flow_sample=flow_sample, **inputs)
        from gkdcli.pipeline.prepare import prepare

        return prepare(
            place,
            console,
            retry=retry,
            dry_run=shared.dry_run,
            shard=share,
            merge=_without_shard(context.obj),
            executor=executor.value,
            **inputs,
        )

    execute("prepare", shared, one_preset("prepare", preset, preset_option), flags, call, modalities)


def _without_shard(arguments: Sequence[str]) -> str:
    """The same command for all videos."""
    words = iter(arguments)
    kept = []
    for word in words:
        if word == "--shard":
            next(words)
        elif word != "--retry" and not word.startswith("--shard="):
            kept.append(word)
    return shlex.join(["gkd", *kept])
