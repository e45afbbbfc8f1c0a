"""`gkd export`: a run -> weights, card and graph."""

from __future__ import annotations

from pathlib import Path

from gkdcli.console import Console
from gkdcli.export import write_export
from gkdcli.pipeline.lookup import find_run, open_store
from gkdcli.result import Result
from gkdcli.runs import Place
from gkdcli.tasks.trained import rebuild


def export(
    place: Place,
    console: Console,
    *,
    model: str,
    run_path: Path | None,
    formats: list[str],
    out: Path | None,
    dry_run: bool,
) -> Result:
    """Writes a run's network with its card."""
    store = open_store(place)
    run = find_run(place, console, model, run_path, store, dry_run=dry_run)
    folder = out or place.root / "exports" / place.settings.name / f"{model}-{place.modality}"
    if dry_run:
        return Result({"run": str(run.folder), "formats": formats, "folder": str(folder)}, str(run.folder))
    payload = write_export(run, rebuild(run), place.settings.export, formats, folder)
    return Result(payload, str(run.folder), next=f"the card is {folder / 'README.md'}")
