"""`gkd export`: a run -> weights, card and graph."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from gkdcli.console import Console
from gkdcli.data.store import Store
from gkdcli.errors import GkdError
from gkdcli.export import Graph, write_export
from gkdcli.pipeline.lookup import find_run, open_store, split_videos
from gkdcli.result import Result
from gkdcli.runs import Place, Run
from gkdcli.tasks.detection_scores import agreement
from gkdcli.tasks.trained import rebuild

_CHECKED = 2  # test videos on which a detector's graph is compared
_AGREE = 0.98  # of the detections: a boundary that rounding tips changes single ones


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
    network = rebuild(run)
    check = None
    if place.settings.task == "detection":
        check = partial(_on_whole_videos, place, run, network, store, folder)
    payload = write_export(run, network, place.settings.export, formats, folder, check)
    return Result(payload, str(run.folder), next=f"the card is {folder / 'README.md'}")


def _on_whole_videos(
    place: Place, run: Run, network: Any, store: Store, folder: Path, graph: Graph
) -> dict[str, Any]:
    """Detections of the graph beside those of the live network.

    Raises:
        GkdError: they are not the same.
    """
    videos = split_videos(store, place, "test")[:_CHECKED]
    found = agreement([network, graph], store, videos, run, place.settings)
    if found["found_again"] < _AGREE:
        raise GkdError(
            f"the graph finds {found['found_again']:.1%} of what the live network finds in whole videos",
            str(folder / "model.onnx"),
            "nothing was written; another `--set export.opset=...` may do",
        )
    return found
