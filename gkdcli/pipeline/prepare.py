"""`gkd prepare`: videos -> store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gkdcli.console import Console
from gkdcli.data.annotations import Listing, read_list, scan_folder
from gkdcli.data.demo import CLASSES, draw_videos
from gkdcli.data.extract import Report, prepare_parts
from gkdcli.data.workers import available_cores
from gkdcli.errors import ExitCode, GkdError
from gkdcli.files import free_bytes, write_text
from gkdcli.resolve import page_to_toml, preset_names
from gkdcli.result import Result
from gkdcli.runs import Place

_LATER = {"ucf101", "hmdb51", "thumos14"}


def prepare(
    place: Place,
    console: Console,
    *,
    videos: Path | None,
    annotations: Path | None,
    retry: bool,
    dry_run: bool,
) -> Result:
    """Decodes a data set's videos into its store; what is there already is kept.

    Args:
        place: where, and with which settings.
        console: who is told.
        videos: folder of the videos; default `datasets/<dataset>/`.
        annotations: a CSV or JSON list; default: the folders say the classes.
        retry: try rejected videos again even if they have not changed.
        dry_run: only list and plan.

    Raises:
        GkdError: no videos, a list that is wrong, settings unlike the store's, no space, a lock.
    """
    settings = place.settings
    if settings.dataset in _LATER or settings.task == "detection":
        raise GkdError(
            f"`gkd prepare {settings.dataset}` cannot read that data set's lists yet",
            "this version prepares demo and folder",
            "`gkd prepare folder VIDEOS --name mine` takes one folder per class",
        )
    if place.modality != "rgb":
        raise GkdError("`gkd prepare` cannot extract flow yet", "--modality flow", "`--modality rgb`")
    folder = videos or place.videos
    workers = settings.data.workers or available_cores()
    if settings.data.source == "drawn":
        if dry_run and not folder.is_dir():
            return Result(_drawing_plan(place, folder))
        if not dry_run:
            _draw(place, console, folder, workers)
    fraction = settings.data.test_fraction
    listing = read_list(annotations, folder, fraction) if annotations else scan_folder(folder, fraction)
    if dry_run:
        return _plan(place, listing, folder)
    if listing.ignored and settings.data.source == "videos":
        console.note(f"{listing.ignored} files in {folder} are no videos by their extension and were ignored")
    with console.progress(f"prepare {settings.dataset}", len(listing.sources)) as tick:
        report = prepare_parts(
            listing,
            place.store_folder,
            settings.dataset,
            place.modality,
            settings.data,
            workers=workers,
            progress=lambda done, total, name, frames: tick(done, name),
            retry=retry,
        )
    _keep_page(place)
    return _result(place, console, listing, report)


def _draw(place: Place, console: Console, folder: Path, workers: int) -> None:
    data = place.settings.data
    counts = {"train": data.draw_train, "test": data.draw_test}
    with console.progress(f"draw {place.settings.dataset}", len(CLASSES) * sum(counts.values())) as tick:
        draw_videos(folder, counts, data.draw_seed, workers, lambda done, total: tick(done))


def _drawing_plan(place: Place, folder: Path) -> dict[str, Any]:
    data = place.settings.data
    return {
        "videos_drawn": len(CLASSES) * (data.draw_train + data.draw_test),
        "classes": len(CLASSES),
        "draw_seed": data.draw_seed,
        "videos": str(folder),
        "store": str(place.store),
    }


def _plan(place: Place, listing: Listing, folder: Path) -> Result:
    """What would be prepared; exit code 1 where a listed file is missing or nothing can be used."""
    source_bytes = sum(source.path.stat().st_size for source in listing.sources if source.path.is_file())
    payload = {
        "videos": str(folder),
        "store": str(place.store),
        "classes": len(listing.classes),
        "listed": len(listing.sources),
        "training": listing.count(place.split, "train"),
        "test": listing.count(place.split, "test"),
        "source_bytes": source_bytes,
        "free_bytes": free_bytes(place.store_folder),
        "workers": place.settings.data.workers or available_cores(),
        "settings": place.settings.data.stored(),
        "rejects": [{"path": path, "reason": reason} for path, reason in listing.rejects],
    }
    if not listing.rejects:
        return Result(payload)
    path, reason = listing.rejects[0]
    error = GkdError(
        f"{len(listing.rejects)} of the listed inputs cannot be used",
        f"first: {path}, {reason}",
        "all of them are in the list above; the others would be prepared",
    )
    return Result(payload, code=ExitCode.FAILED, error=error)


def _keep_page(place: Place) -> None:
    """One's own data set can be named from now on: its store keeps the page it was prepared with."""
    settings = place.settings
    if settings.dataset in preset_names():
        return
    page = dict(place.page) | {"dataset": settings.dataset}
    page["data"] = page.get("data", {}) | settings.data.model_dump(mode="json")
    write_text(place.store_folder / "preset.toml", page_to_toml(page))


def _result(place: Place, console: Console, listing: Listing, report: Report) -> Result:
    payload = {
        "store": str(report.index),
        "classes": len(listing.classes),
        "videos": report.prepared + report.skipped,
        "prepared": report.prepared,
        "kept": report.skipped,
        "rejected": len(report.rejected),
        "frames": report.frames,
        "bytes": report.bytes_written,
        "seconds": round(report.seconds, 1),
        "unlisted": report.unlisted,
    }
    if report.unlisted:
        console.note(
            f"{report.unlisted} parts belong to videos that are no longer listed; they are not in the index"
        )
    then = f"next: `{place.command('pretrain-attention')}`"
    if not report.rejected:
        return Result(payload, next=then)
    tsv = place.store_folder / f"{place.modality}.rejected.tsv"
    path, reason = report.rejected[0]
    listed = len(listing.sources) + len(listing.rejects)
    console.warn(
        f"{len(report.rejected)} of {listed} videos are not in the store",
        f"{tsv}; first: {path}, {reason}",
        "replace the files and run the same command again; changed ones are tried again, all with --retry",
    )
    return Result(payload, code=ExitCode.REJECTS, next=then)
