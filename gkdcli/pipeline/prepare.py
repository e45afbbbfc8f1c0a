"""`gkd prepare`: videos -> store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gkdcli.console import Console
from gkdcli.data.annotations import Listing, read_list, scan_folder
from gkdcli.data.demo import CLASSES, draw_videos
from gkdcli.data.demo_detection import DETECTION_CLASSES, draw_untrimmed
from gkdcli.data.detection_files import find_annotations, read_annotations
from gkdcli.data.detection_videos import list_arrays, list_videos
from gkdcli.data.extract import Report, prepare_parts
from gkdcli.data.lists import find_split_lists, read_split_lists
from gkdcli.data.rejects import PROBLEMS
from gkdcli.data.sources import SUBSETS, Problem
from gkdcli.data.store import Store
from gkdcli.data.workers import available_cores
from gkdcli.errors import ExitCode, GkdError, usage_error
from gkdcli.files import free_bytes, stamp, write_text
from gkdcli.resolve import page_to_toml, preset_names, read_page
from gkdcli.result import Result
from gkdcli.runs import Place
from gkdcli.settings import TORCH_METHODS

_SHOWN = 5  # problems in a result; all are in the table


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
    arrays: Path | None = None,
) -> Result:
    """Decodes a data set's videos into its stores; what is there already is kept.

    Args:
        place: where, and with which settings.
        console: who is told.
        modalities: rgb, flow or both, in one pass over each video.
        videos: folder of the videos; default `datasets/<dataset>/`.
        frames: folder of extracted images instead, a folder per video.
        annotations: a CSV or JSON list, or a folder of published split lists; default: lists that lie
            beside the videos where the preset asks for them, else the folders say the classes. Detection: a
            file or a folder of annotated actions; default: those below the videos or beside them.
        retry: try rejected videos again even if they have not changed.
        dry_run: only list and plan.
        arrays: folder of published .npy arrays instead of videos, in detection.

    Raises:
        GkdError: no videos, a list that is wrong, settings unlike the store's, no space, a lock.
    """
    settings = place.settings
    _check_input(place, frames, arrays)
    folder = arrays or frames or videos or place.videos
    workers = settings.data.workers or available_cores()
    if settings.data.source == "drawn":
        if dry_run and not folder.is_dir():
            return Result(_drawing_plan(place, folder))
        if not dry_run:
            _draw(place, console, folder, workers)
    if settings.task == "detection":
        listing = _untrimmed(place, console, folder, annotations, modalities, arrays is not None)
    else:
        listing = _listing(place, console, folder, annotations, frames is not None)
    device = _flow_device(place, modalities)
    if dry_run:
        return _plan(place, listing, folder, modalities, device)
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
    if (frames or arrays) is not None and "flow" in modalities:
        console.note(
            f"{'images' if frames else 'arrays'} of flow, where there are any, are taken as they are: as"
            f" {settings.data.flow} with bound {settings.data.flow_bound:g} (`--flow`, data.flow_bound)"
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
            device=device,
        )
    for note in report.notes:
        console.note(note)
    _keep_page(place, modalities)
    return _result(place, console, listing, report)


def _flow_device(place: Place, modalities: Sequence[str]) -> str:
    """Where flow is computed; what it needs is there.

    Raises:
        GkdError: there is no CUDA device, though it was asked for; the weights are missing or wrong.
    """
    data = place.settings.data
    if "flow" not in modalities or data.flow not in TORCH_METHODS:
        return "cpu"
    from gkdcli.data.torch_flow import load_raft  # PyTorch comes with it
    from gkdcli.tasks.trained import chosen_device

    if data.flow == "raft":
        load_raft(data.flow_weights, "cpu")
    return chosen_device(place.settings).type


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


def _check_input(place: Place, frames: Path | None, arrays: Path | None) -> None:
    """Refuses what the task or the data set cannot be made of."""
    settings = place.settings
    drawn, detection = settings.data.source == "drawn", settings.task == "detection"
    for flag, given in (("--from-frames", frames), ("--from-npy", arrays)):
        if given is None:
            continue
        what = hint = ""
        if drawn:
            kind = "extracted images" if flag == "--from-frames" else "arrays"
            what = f"this data set draws its own videos and takes no {kind}"
            hint = "`gkd prepare folder --from-frames DIR --name mine`"
        elif detection and flag == "--from-frames":
            what = "extracted images say no frame rate, so actions cannot be found in them"
            hint = "name the folder of the videos, or of .npy arrays with `--from-npy`"
        elif not detection and flag == "--from-npy":
            what = "arrays are read for detection only"
            hint = "`gkd prepare thumos14 --from-npy DIR`; recognition takes videos or `--from-frames`"
        if what:
            raise usage_error(what, f"{flag} {given}", hint)


def _untrimmed(
    place: Place,
    console: Console,
    folder: Path,
    annotations: Path | None,
    modalities: Sequence[str],
    arrays: bool,
) -> Listing:
    """Annotated videos of a detection set; who says what is done in them is said."""
    if annotations is None and place.settings.data.source == "drawn":
        annotations = folder / "annotations.json"
    if annotations is not None and not annotations.exists():
        what = "there is no such annotation file or folder"
        raise usage_error(what, f"--annotations {annotations}", "name what holds the annotated actions")
    found = read_annotations(find_annotations(annotations, [folder, place.videos]))
    listing = list_arrays(found, folder, modalities) if arrays else list_videos(found, folder)
    for subset in SUBSETS:
        truth = found.ground_truth[subset]
        if not truth.videos:
            console.warn(
                f"no video is annotated for {subset}ing",
                found.files.get(subset) or str(annotations or folder),
                "the store can be prepared, but training and evaluation need one subset each",
            )
            continue
        console.note(
            f"annotations for {subset}ing: {found.files[subset]}: {truth.videos} videos, {truth.segments}"
            f" segments, {truth.duplicates} duplicates (`--annotations PATH` names others)"
        )
        if truth.without:
            console.note(
                f"{len(truth.without)} listed {subset} videos are not in it, so they have no ground truth:"
                f" {_first_few(truth.without)}"
            )
    return listing


def _first_few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _draw(place: Place, console: Console, folder: Path, workers: int) -> None:
    data = place.settings.data
    counts = {"train": data.draw_train, "test": data.draw_test}
    if place.settings.task == "detection":
        with console.progress(f"draw {place.settings.dataset}", sum(counts.values())) as tick:
            draw_untrimmed(folder, counts, data.draw_seed, workers, lambda done, total: tick(done))
        return
    with console.progress(f"draw {place.settings.dataset}", len(CLASSES) * sum(counts.values())) as tick:
        draw_videos(folder, counts, data.draw_seed, workers, lambda done, total: tick(done))


def _drawing_plan(place: Place, folder: Path) -> dict[str, Any]:
    data = place.settings.data
    detection = place.settings.task == "detection"
    times = 1 if detection else len(CLASSES)
    return {
        "videos_drawn": times * (data.draw_train + data.draw_test),
        "classes": len(DETECTION_CLASSES if detection else CLASSES),
        "draw_seed": data.draw_seed,
        "videos": str(folder),
        "store": str(place.store),
    }


def _plan(place: Place, listing: Listing, folder: Path, modalities: Sequence[str], device: str) -> Result:
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
    if "flow" in modalities:
        payload["flow_device"] = device
    if listing.ground_truth is not None:
        truths = {subset: asdict(truth) for subset, truth in listing.ground_truth.items()}
        payload |= {"ground_truth": truths, **_problem_rows(listing.problems, len(listing.problems))}
    if not listing.rejects:
        return Result(payload)
    path, reason = listing.rejects[0]
    error = GkdError(
        f"{len(listing.rejects)} of the listed inputs cannot be used",
        f"first: {path}, {reason}",
        "all of them are in the list above; the others would be prepared",
    )
    return Result(payload, code=ExitCode.FAILED, error=error)


def _keep_page(place: Place, modalities: Sequence[str]) -> None:
    """One's own data set can be named from now on: its store keeps the page it was prepared with."""
    settings, path = place.settings, place.store_folder / "preset.toml"
    if settings.dataset in preset_names():
        return
    page = dict(place.page) | {"dataset": settings.dataset}
    page["data"] = page.get("data", {}) | settings.data.model_dump(mode="json")
    if "flow" not in modalities and path.is_file():  # what the flow store was made with stays
        kept = read_page(path).get("data", {})
        page["data"] |= {
            key: kept[key] for key in ("flow", "flow_bound", "flow_batch", "flow_weights") if key in kept
        }
    write_text(path, page_to_toml(page))


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
    if listing.ground_truth is not None:
        payload |= _said_problems(place, console, report)
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


def _said_problems(place: Place, console: Console, report: Report) -> dict[str, Any]:
    """Ground truth and problems of the annotations, for the payload; problems are warned of."""
    (index, *_) = report.indexes.values()
    table = place.store_folder / PROBLEMS
    if report.problems:
        first = report.problems[0]
        line = f" line {first.line}" if first.line else ""
        console.warn(
            f"{len(report.problems)} problems of the annotations",
            f"{table}; first: {first.file}{line}, {first.video or 'no video'}: {first.reason}",
            "each is in that table, with what was done about it; the store works as it is",
        )
    truth = Store.open(index).ground_truth
    return {"ground_truth": truth, "problem_table": str(table) if report.problems else None} | _problem_rows(
        report.problems, _SHOWN
    )


def _problem_rows(problems: Sequence[Problem], shown: int) -> dict[str, Any]:
    return {"problems": len(problems), "first_problems": [row._asdict() for row in problems[:shown]]}
