"""`gkd import`: flags -> settings -> one pipeline call."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gkdcli.cli.commands import app, execute
from gkdcli.cli.options import DATA_PANEL, RUN_PANEL, Shared, Which, complete_preset, shared_flags
from gkdcli.console import Console
from gkdcli.errors import usage_error
from gkdcli.resolve import preset_names
from gkdcli.result import Result
from gkdcli.runs import Place


@app.command("import")
@shared_flags
def import_(
    shared: Shared,
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="Weights: written by torch.save, or .safetensors."),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            "--preset",
            metavar="PRESET",
            help="The preset, or your own data set, that the weights are for.",
            autocompletion=complete_preset,
            rich_help_panel=DATA_PANEL,
        ),
    ] = None,
    model: Annotated[
        Which | None,
        typer.Option(
            help="Whose weights these are; the file usually tells.",
            show_default=False,
            rich_help_panel=RUN_PANEL,
        ),
    ] = None,
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
