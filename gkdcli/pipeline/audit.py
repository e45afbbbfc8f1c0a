"""`gkd prepare --audit`: a store compared with its videos and annotations; nothing is changed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from gkdcli.console import Console
from gkdcli.data.audit import (
    KINDS,
    Finding,
    Presence,
    Stream,
    finding,
    label_findings,
    open_stream,
    part_findings,
    settings_findings,
    temporary_findings,
)
from gkdcli.data.audit_across import annotation_findings, count, duplicates, short_videos, stream_findings
from gkdcli.data.flow_sample import Measured, draw_pairs, measure, summary
from gkdcli.data.part_check import Seen, check
from gkdcli.data.sources import Listing
from gkdcli.data.workers import Crashed, Crew, available_cores
from gkdcli.errors import ExitCode, GkdError
from gkdcli.files import kept_as_is
from gkdcli.pipeline.videos import check_input, read_listing
from gkdcli.result import Result
from gkdcli.runs import Place
from gkdcli.settings import MODALITIES

_POLL_SEC = 0.2
_SHOWN = 4  # findings of a kind in the table; -v shows all, and JSON has them
Job = TypeVar("Job")
Outcome = TypeVar("Outcome")


def audit(
    place: Place,
    console: Console,
    *,
    modalities: Sequence[str],
    videos: Path | None,
    frames: Path | None,
    annotations: Path | None,
    arrays: Path | None = None,
    flow_sample: int = 0,
) -> Result:
    """Reads every part of a store and compares it with everything it should agree with.

    Where the default folder of videos is not there, as on a machine that a store was copied to, what needs
    them is left out. The other arguments are those of `prepare`.

    Args:
        place: where, and with which settings.
        console: who is told.
        modalities: whose stores; the other one is only compared by its index.
        videos: folder of the videos.
        frames: folder of extracted images instead.
        annotations: who says what the videos show.
        arrays: folder of published arrays instead.
        flow_sample: pairs of frames on which stored flow is compared with TV-L1; 0: none.

    Raises:
        GkdError: there is no store, another command is at work on it, or the listing is wrong.
    """
    started = time.monotonic()
    check_input(place, frames, arrays)
    folder = arrays or frames or videos or place.videos
    by_hand = any(path is not None for path in (videos, frames, arrays, annotations))
    with kept_as_is(place.store_folder / ".lock", f"the store of {place.settings.dataset}"):
        findings: list[Finding] = []
        streams = {}
        for modality in modalities:
            streams[modality], found = open_stream(place.store_folder / f"{modality}.h5")
            findings += found
        beside = _beside(place, streams)
        if flow_sample and ("rgb" not in beside or beside["rgb"].store is None):
            raise GkdError(
                "flow can be compared with TV-L1 only where its frames are stored too",
                f"--flow-sample {flow_sample}; there is no finished {place.store_folder / 'rgb.h5'}",
                "run `gkd prepare` with `--modality both` first",
            )
        listing = None
        if by_hand or folder.is_dir():
            listing = read_listing(
                place,
                console,
                folder,
                annotations=annotations,
                modalities=modalities,
                frames=frames is not None,
                arrays=arrays is not None,
            )
        if listing is None or not listing.sources:
            what = "there are no videos here, so sources, classes, splits and actions are not compared"
            findings.append(finding("sources_absent", what, path=folder))
            listing = None
        scanned = annotations is None and place.settings.data.source != "listed"
        _look(place, console, list(streams.values()), listing)
        findings += _compare(place, list(streams.values()), listing, scanned)
        if {*MODALITIES} <= beside.keys():
            findings += stream_findings(beside["rgb"], beside["flow"])
        sample = None
        if flow_sample:
            sample = _sample(place, console, beside["rgb"], beside["flow"], flow_sample)
    order = list(KINDS)
    findings.sort(key=lambda found: (found.level, order.index(found.kind), found.video, found.path))
    return _result(place, console, list(streams.values()), listing, findings, sample, started)


def _beside(place: Place, streams: dict[str, Stream]) -> dict[str, Stream]:
    """The streams that are audited, and the other one where there is a finished store of it."""
    there = dict(streams)
    for modality in MODALITIES:
        index = place.store_folder / f"{modality}.h5"
        if modality not in there and index.is_file():
            there[modality] = open_stream(index)[0]
    return there


def _look(place: Place, console: Console, streams: Sequence[Stream], listing: Listing | None) -> None:
    """Opens all parts, in processes."""
    looks = {look: (stream, key) for stream in streams for key, look in stream.looks(listing)}
    for look, seen in _each(place, console, f"audit {place.settings.dataset}", check, list(looks)):
        stream, key = looks[look]
        if isinstance(seen, Crashed):
            seen = Seen(damage=f"reading it crashed the process (signal {seen.signal_number})")
        stream.seen[key] = seen


def _each(
    place: Place, console: Console, title: str, function: Callable[[Job], Outcome], jobs: Sequence[Job]
) -> Iterator[tuple[Job, Outcome | Crashed]]:
    """What a function comes to for each job, in worker processes, in no order."""
    waiting = list(reversed(jobs))
    size = min(place.settings.data.workers or available_cores(), max(len(jobs), 1))
    with console.progress(title, len(jobs)) as tick, Crew(function, size) as crew:
        done = 0
        while waiting or crew.busy:
            while waiting and crew.give(waiting[-1]):
                waiting.pop()
            for job, outcome in crew.collect(_POLL_SEC):
                done += 1
                tick(done)
                yield job, outcome


def _compare(
    place: Place, streams: Sequence[Stream], listing: Listing | None, scanned: bool
) -> Iterator[Finding]:
    """All that is found in what was read."""
    settings = place.settings
    untrimmed = settings.task == "detection"
    presence = Presence(listing, scanned and not untrimmed) if listing else None
    for stream in streams:
        yield from settings_findings(stream, settings.data.stored(stream.modality))
        yield from part_findings(stream)
        if presence:
            yield from presence.findings(stream)
        if listing:
            yield from label_findings(stream, listing)
    if presence:
        yield from presence.rejects()
    if listing and listing.ground_truth is not None:
        yield from annotation_findings(streams[0], listing, settings.data)
    yield from duplicates(streams, listing, untrimmed)
    yield from short_videos(streams[0], settings.clips.length, untrimmed)
    yield from temporary_findings(place.store_folder)


def _sample(place: Place, console: Console, rgb: Stream, flow: Stream, number: int) -> list[dict[str, Any]]:
    pairs = draw_pairs(rgb, flow, number, place.settings.train.seed)
    results = []
    for pair, found in _each(place, console, f"TV-L1 of {place.settings.dataset}", measure, pairs):
        if isinstance(found, Crashed):
            found = Measured.failed(f"{pair.flow}: computing crashed (signal {found.signal_number})")
        results.append((pair, found))
    results.sort(key=lambda result: (result[0].flow, result[0].start))
    rows = summary(results)
    for row in rows:
        if row["failed"]:
            what = f"{row['failed']} of {row['failed'] + row['pairs']} pairs could not be compared with TV-L1"
            console.warn(what, row["first_failure"])
    if not rows:
        where = f"{flow.index} and {rgb.index.name}"
        console.warn("there is no pair of frames to be compared with TV-L1", where)
    return rows


def _result(
    place: Place,
    console: Console,
    streams: Sequence[Stream],
    listing: Listing | None,
    findings: Sequence[Finding],
    sample: list[dict[str, Any]] | None,
    started: float,
) -> Result:
    defects = [found for found in findings if found.level == "defect"]
    videos, classes = count(streams, listing)
    about = {
        "store": str(place.store_folder),
        "parts": sum(len(stream.seen) for stream in streams),
        "listed": len(listing.sources) + len(listing.rejects) if listing else None,
        "unlisted_videos": listing.unlisted if listing else None,
        "defects": len(defects),
        "notices": len(findings) - len(defects),
        "seconds": round(time.monotonic() - started, 1),
    }
    payload = about | {
        "modalities": [stream.modality for stream in streams],
        "kinds": dict(Counter(found.kind for found in findings)),
        "videos": videos,
        "classes": classes,
        "findings": [found._asdict() for found in findings],
    }
    unlike = [row for row in classes if console.verbose or _differs(row)]
    shown = about | {"videos": videos, "classes": unlike}
    if sample is not None:
        payload["flow_sample"] = sample
        shown["flow_sample"] = [{key: row[key] for key in row if key != "first_failure"} for row in sample]
    shown |= _told(findings, console.verbose)
    if not defects:
        return Result(payload, shown=shown, next=f"next: `{place.command('pretrain-attention')}`")
    first = defects[0]
    error = GkdError(
        f"{len(defects)} defect{'s' if len(defects) > 1 else ''} in the store of {place.settings.dataset}",
        f"first: {first.video or first.path}: {first.what}",
        "what to do about each kind is said above; `--json` lists every one",
    )
    return Result(payload, shown=shown, code=ExitCode.FAILED, error=error)


def _differs(row: dict[str, Any]) -> bool:
    """Whether a line of the counts has more than one number in it."""
    numbers = {value for key, value in row.items() if key in ("listed", *MODALITIES) and value is not None}
    return len(numbers) > 1


def _told(findings: Sequence[Finding], all_of_them: bool) -> dict[str, tuple[str, ...]]:
    """Findings in lines, by kind."""
    told = {}
    for kind, group in groupby(findings, key=lambda found: found.kind):
        same = list(group)
        alike: dict[tuple[str, str], list[Finding]] = {}  # of both streams
        for found in same:
            alike.setdefault((found.video or found.path, found.what), []).append(found)
        lines = []
        for (where, what), found_twice in alike.items():
            whose = ", ".join(
                sorted({found.modality for found in found_twice if found.modality}, reverse=True)
            )
            lines.append(f"{whose} {where}: {what}".strip())
        if len(lines) > _SHOWN and not all_of_them:
            lines[_SHOWN:] = [f"... and {len(lines) - _SHOWN} more (-v shows all)"]
        level = same[0].level + ("s" if len(same) > 1 else "")
        told[f"{kind}: {len(same)} {level}"] = (*lines, f"hint: {same[0].hint}")
    return told
