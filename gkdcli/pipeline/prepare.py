"""`gkd prepare`: videos -> store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gkdcli.console import Console
from gkdcli.data.annotations import Listing, read_list, scan_folder
from gkdcli.data.demo import CLASSES, draw_videos
from gkdcli.data.extract import Report, prepare_parts
from gkdcli.data.lists import find_split_lists, read_split_lists
from gkdcli.data.workers import available_cores
from gkdcli.errors import ExitCode, GkdError
from gkdcli.files import free_bytes, stamp, write_text
from gkdcli.resolve import page_to_toml, preset_names
from gkdcli.result import Result
from gkdcli.runs import Place


def prepare(
    place: Place,
    console: Console,
    *,
    modalities: Sequence[str],
    videos: Path | None,
    frames: Path | None,
    annotations: Path | None,
    retry: bool,
    dry_run: bool,
) -> Result:
    """Decodes a data set's videos into its stores; what is there already is kept.

    Args:
        place: where, and with which settings.
        console: who is told.
        modalities: rgb, flow or both, in one pass over each video.
        videos: folder of the videos; default `datasets/<dataset>/`.
        frames: folder of extracted images instead, a folder per video.
        annotations: a CSV or JSON list, or a folder of published split lists; default: lists that lie
            beside the videos where the preset asks for them, else the folders say the classes.
        retry: try rejected videos again even if they have not changed.
        dry_run: only list and plan.

    Raises:
        GkdError: no videos, a list that is wrong, settings unlike the store's, no space, a lock.
    """
    settings = place.settings
    if settings.task == "detection":
        raise GkdError(
            f"`gkd prepare {settings.dataset}` cannot read that data set's annotations yet",
            "this version prepares recognition: demo, folder, hmdb51, ucf101",
            "`gkd prepare folder VIDEOS --name mine` takes one folder per class",
        )
    folder = frames or videos or place.videos
    workers = settings.data.workers or available_cores()
    if settings.data.source == "drawn":
        if dry_run and not folder.is_dir():
            return Result(_drawing_plan(place, folder))
        if not dry_run:
            _draw(place, console, folder, workers)
    listing = _listing(place, console, folder, annotations, frames is not None)
    if dry_run:
        return _plan(place, listing, folder, modalities)
    if not listing.sources:
        raise GkdError(
            f"none of the {len(listing.rejects)} listed videos can be used",
            f"looked under {folder}; first: {listing.rejects[0][0]}, {listing.rejects[0][1]}",
            "name the folder of the videos, `--annotations` the lists; `--dry-run` lists what is missing",
        )
    if listing.ignored and settings.data.source != "drawn":
        console.note(f"{listing.ignored} files in {folder} are no videos by their extension and were ignored")
    if listing.unlisted:
        console.note(f"{listing.unlisted} videos in {folder} are in no list and were ignored")
    if frames is not None and "flow" in modalities:
        console.note(
            f"images of flow are taken as they are, as {settings.data.flow} with bound"
            f" {settings.data.flow_bound:g} (`--flow`, data.flow_bound)"
        )
    with console.progress(f"prepare {settings.dataset}", len(listing.sources)) as tick:
        report = prepare_parts(
            listing,
            place.store_folder,
            settings.dataset,
            modalities,
            settings.data,
            workers=workers,
            progress=lambda done, total, name, frames: tick(done, name),
            retry=retry,
        )
    _keep_page(place)
    return _result(place, console, listing, report)


def _listing(place: Place, console: Console, folder: Path, annotations: Path | None, frames: bool) -> Listing:
    data = place.settings.data
    if annotations is None and data.source == "listed":
        annotations = find_split_lists(folder) or find_split_lists(place.videos)
        if annotations is None:
            raise GkdError(
                f"there are no split lists of {place.settings.dataset}",
                f"looked in {' and '.join(sorted({str(folder), str(place.videos)}))}, and one folder below",
                "unpack them there (UCF101: ucfTrainTestlist; HMDB51: testTrainMulti_7030_splits), or name"
                " their folder with `--annotations DIR`",
            )
        console.note(f"split lists: {annotations} (`--annotations DIR` names others)")
    if annotations is None:
        return scan_folder(folder, data.test_fraction, frames)
    if annotations.is_dir():
        return read_split_lists(annotations, folder, frames=frames)
    return read_list(annotations, folder, data.test_fraction, frames)


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


def _plan(place: Place, listing: Listing, folder: Path, modalities: Sequence[str]) -> Result:
    """What would be prepared; exit code 1 where a listed file is missing or nothing can be used."""
    data = place.settings.data
    source_bytes = sum(stamp(source.path)[0] for source in listing.sources if source.path.exists())
    payload = {
        "videos": str(folder),
        "store": str(place.store),
        "modalities": list(modalities),
        "classes": len(listing.classes),
        "listed": len(listing.sources) + len(listing.rejects),
        "usable": len(listing.sources),
        "rejected": len(listing.rejects),
        "unlisted": listing.unlisted,
        "splits": sorted({number for source in listing.sources for number in source.splits}),
        "training": listing.count(place.split, "train"),
        "test": listing.count(place.split, "test"),
        "source_bytes": source_bytes,
        "free_bytes": free_bytes(place.store_folder),
        "workers": data.workers or available_cores(),
        "settings": data.stored("flow" if "flow" in modalities else "rgb"),
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
        "store": str(next(iter(report.indexes.values()))),
        "stores": {modality: str(index) for modality, index in report.indexes.items()},
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
    tsv = next(iter(report.indexes.values())).with_suffix(".rejected.tsv")
    path, reason = report.rejected[0]
    listed = len(listing.sources) + len(listing.rejects)
    console.warn(
        f"{len(report.rejected)} of {listed} videos are not in the store",
        f"{tsv}; first: {path}, {reason}",
        "replace the files and run the same command again; changed ones are tried again, all with --retry",
    )
    return Result(payload, code=ExitCode.REJECTS, next=then)
