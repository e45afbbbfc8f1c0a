"""`gkd prepare`: videos -> store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gkdcli.console import Console, counted
from gkdcli.data.annotations import Listing
from gkdcli.data.cluster import Cluster
from gkdcli.data.demo import CLASSES
from gkdcli.data.demo_detection import DETECTION_CLASSES
from gkdcli.data.extract import Report, plan_run, prepare_parts
from gkdcli.data.forecast import Forecast, forecast
from gkdcli.data.jobs import Job
from gkdcli.data.rejects import PROBLEMS
from gkdcli.data.shards import Shard, reject_table
from gkdcli.data.sources import Problem
from gkdcli.data.store import Store
from gkdcli.data.workers import available_cores
from gkdcli.errors import ExitCode, GkdError
from gkdcli.files import free_bytes, human_bytes, stamp, write_text
from gkdcli.pipeline.videos import check_input, draw, read_listing
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
    shard: Shard | None = None,
    merge: str = "",
    executor: str = "local",
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
        shard: only this share of the videos; the other shards run elsewhere.
        merge: the command that completes the store when all shards have run.
        executor: "local" or "ray".

    Raises:
        GkdError: no videos, a list that is wrong, settings unlike the store's, no space, a lock.
    """
    settings = place.settings
    check_input(place, frames, arrays)
    folder = arrays or frames or videos or place.videos
    workers = settings.data.workers or available_cores()
    if settings.data.source == "drawn":
        if dry_run and not folder.is_dir():
            return Result(_drawing_plan(place, folder))
        if not dry_run:
            draw(place, console, folder, workers)
    listing = read_listing(
        place,
        console,
        folder,
        annotations=annotations,
        modalities=modalities,
        frames=frames is not None,
        arrays=arrays is not None,
    )
    device = _flow_device(place, modalities)
    if dry_run:
        share = shard.share(listing, modalities) if shard else listing
        return _plan(place, console, share, folder, modalities, retry, device)
    if not listing.sources:
        raise GkdError(
            f"none of the {counted(len(listing.rejects), 'listed video')} can be used",
            f"looked under {folder}; first: {listing.rejects[0][0]}, {listing.rejects[0][1]}",
            "name the folder of the videos, `--annotations` the lists; `--dry-run` lists what is missing",
        )
    if listing.ignored and settings.data.source != "drawn":
        ignored = counted(listing.ignored, "file that is no video", "files that are no videos")
        console.note(f"ignored in {folder}: {ignored} by extension")
    if listing.unlisted:
        unlisted = counted(listing.unlisted, "video that is in no list", "videos that are in no list")
        console.note(f"ignored in {folder}: {unlisted}")
    if (frames or arrays) is not None and "flow" in modalities:
        console.note(
            f"{'images' if frames else 'arrays'} of flow, where there are any, are taken as they are: as"
            f" {settings.data.flow} with bound {settings.data.flow_bound:g} (`--flow`, data.flow_bound)"
        )
    cluster = Cluster(console.note) if executor == "ray" else None
    if settings.data.gpu_share and cluster is None:
        console.warn(
            "data.gpu_share is for tasks of a cluster; the processes of this machine have no use for it",
            f"data.gpu_share is {settings.data.gpu_share:g}",
            "`--executor ray` reads it",
        )
    title, count = f"prepare {settings.dataset}", len(listing.sources)
    if shard is not None:
        title, count = f"{title}, shard {shard}", len(shard.share(listing, modalities).sources)
    with console.progress(title, count) as tick:
        report = prepare_parts(
            listing,
            place.store_folder,
            settings.dataset,
            modalities,
            settings.data,
            workers=settings.data.workers,
            progress=lambda done, total, name, frames: tick(done, name + _nodes(cluster, console.verbose)),
            retry=retry,
            shard=shard,
            cluster=cluster,
            device=device,
        )
    for note in report.notes:
        console.note(note)
    _keep_page(place, modalities)
    result = (
        _shard_result(place, console, shard, report, merge)
        if shard
        else _result(place, console, listing, report)
    )
    if cluster is not None:
        result.payload["nodes"] = dict(cluster.videos)
    return result


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


def _nodes(cluster: Cluster | None, verbose: bool) -> str:
    """For progress: how many nodes have worked, or what each of them has done."""
    if cluster is None:
        return ""
    if not verbose:
        return f", from {counted(len(cluster.videos), 'node')}"
    return "; " + ", ".join(f"{node} {count}" for node, count in sorted(cluster.videos.items()))


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


def _plan(
    place: Place,
    console: Console,
    listing: Listing,
    folder: Path,
    modalities: Sequence[str],
    retry: bool,
    device: str,
) -> Result:
    """What would be prepared, and what that would take.

    Exit code 1 where a listed file is missing, nothing can be used, or the disk is too small.
    """
    data = place.settings.data
    source_bytes = sum(stamp(source.path)[0] for source in listing.sources if source.path.exists())
    workers, free = data.workers or available_cores(), free_bytes(place.store_folder)
    plan = plan_run(listing, place.store_folder, modalities, data, retry, device)
    cost = _forecast(console, plan.jobs, workers)
    payload = {
        "videos": str(folder),
        "store": str(place.store),
        "modalities": list(modalities),
        "classes": len(listing.classes),
        "listed": len(listing.sources) + len(listing.rejects),
        "usable": len(listing.sources),
        "kept": plan.skipped,
        "rejected": len(listing.rejects),
        "unlisted": listing.unlisted,
        "splits": sorted({number for source in listing.sources for number in source.splits}),
        "training": listing.count(place.split, "train"),
        "test": listing.count(place.split, "test"),
        "source_bytes": source_bytes,
        "free_bytes": free,
        "workers": workers,
        "settings": data.stored("flow" if "flow" in modalities else "rgb"),
        "forecast": None if cost is None else cost.row(),
        "rejects": [{"path": path, "reason": reason} for path, reason in listing.rejects],
    }
    if "flow" in modalities:
        payload["flow_device"] = device
    if listing.ground_truth is not None:
        truths = {subset: asdict(truth) for subset, truth in listing.ground_truth.items()}
        payload |= {"ground_truth": truths, **_problem_rows(listing.problems, len(listing.problems))}
    error = None
    if cost is not None and cost.bytes_high > free:
        needed, there = human_bytes(cost.bytes), human_bytes(free)
        error = GkdError(
            f"the disk {'is' if cost.bytes > free else 'may be'} too small:"
            f" about {needed} are needed, {there} are free",
            str(place.store_folder),
            "free some space, or keep the store elsewhere with `--root DIR`",
        )
        if cost.bytes <= free:
            console.warn(error.what, error.where, error.hint)
            error = None
    if listing.rejects:
        path, reason = listing.rejects[0]
        error = GkdError(
            f"{len(listing.rejects)} of the listed inputs cannot be used",
            f"first: {path}, {reason}",
            "all of them are in the list above; the others would be prepared",
        )
    return Result(payload) if error is None else Result(payload, code=ExitCode.FAILED, error=error)


def _forecast(console: Console, jobs: Sequence[Job], workers: int) -> Forecast | None:
    """What the run would take; None, and a warning, where that cannot be measured."""
    if jobs:
        console.note(f"preparing a few of {len(jobs)} videos in a temporary folder, to forecast the cost")
    try:
        return forecast(jobs, workers)
    except GkdError as error:
        console.warn(error.what, error.where, error.hint)
        return None


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


def _shard_result(place: Place, console: Console, shard: Shard, report: Report, merge: str) -> Result:
    """What became of one share of the videos."""
    payload = {
        "store": str(place.store_folder),
        "shard": str(shard),
        "videos": report.prepared + report.skipped,
        "prepared": report.prepared,
        "kept": report.skipped,
        "rejected": len(report.rejected),
        "frames": report.frames,
        "bytes": report.bytes_written,
        "seconds": round(report.seconds, 1),
    }
    then = f"next: `{merge}`, once all {shard.count} shards have ended; the store is unfinished until then"
    if not report.rejected:
        return Result(payload, next=then)
    path, reason = report.rejected[0]
    console.warn(
        f"{len(report.rejected)} videos of shard {shard} are not in the store",
        f"{reject_table(place.store_folder, place.modality, shard)}; first: {path}, {reason}",
        "replace the files and run the same command again, or go on: they are left out",
    )
    return Result(payload, code=ExitCode.REJECTS, next=then)


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
        parts = counted(report.unlisted, "part belongs to a video", "parts belong to videos")
        console.note(f"{parts} no longer listed: left out of the index")
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
            f"{counted(len(report.problems), 'problem')} of the annotations",
            f"{table}; first: {first.file}{line}, {first.video or 'no video'}: {first.reason}",
            "each is in that table, with what was done about it; the store works as it is",
        )
    truth = Store.open(index).ground_truth
    return {"ground_truth": truth, "problem_table": str(table) if report.problems else None} | _problem_rows(
        report.problems, _SHOWN
    )


def _problem_rows(problems: Sequence[Problem], shown: int) -> dict[str, Any]:
    rows = [row._asdict() | {"line": row.line or None} for row in problems[:shown]]
    return {"problems": len(problems), "first_problems": rows}
