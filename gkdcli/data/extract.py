"""`gkd prepare`: videos into the parts of a store, in worker processes, one video at a time."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gkdcli.data.annotations import Listing
from gkdcli.data.jobs import Job, Result, work
from gkdcli.data.misfits import misfits
from gkdcli.data.parts import part_path, read_attributes
from gkdcli.data.rejects import PROBLEMS, Reject, cell, read_rejects, write_problems, write_rejects
from gkdcli.data.sources import Problem
from gkdcli.data.store import build_index, mark_unfinished, setting_differences, written_settings
from gkdcli.data.workers import Crashed, Crew, available_cores
from gkdcli.errors import GkdError, Interrupted
from gkdcli.files import digest, disk_is_full, free_bytes, human_bytes, locked, stamp, sweep_temporaries
from gkdcli.settings import MODALITIES, DataSettings

Progress = Callable[[int, int, str, int], None]
_PROBES = 8
_POLL_SEC = 0.2
_GRACE_SEC = 10.0  # for videos in work after Ctrl-C
_RESERVE_BYTES = 256 << 20


@dataclass(frozen=True)
class Report:
    """What one run of `gkd prepare` came to.

    Args:
        prepared: videos written in this run.
        skipped: videos whose parts were there already.
        rejected: (path, reason) of every video that is not in the store.
        frames: written in this run.
        bytes_written: in this run.
        seconds: of wall-clock time.
        unlisted: parts whose video is no longer among the sources; they are kept, and not in the index.
        indexes: the finished index of each modality.
        problems: of the annotations and of how they fit the videos; also in `annotations.problems.tsv`.
        notes: what the user should know about how flow was computed.
    """

    prepared: int
    skipped: int
    rejected: list[tuple[str, str]]
    frames: int
    bytes_written: int
    seconds: float
    unlisted: int
    indexes: dict[str, Path]
    problems: list[Problem]
    notes: list[str]


@dataclass
class _Plan:
    jobs: list[Job] = field(default_factory=list)
    skipped: int = 0
    rejected: dict[str, Reject] = field(default_factory=dict)
    unlisted: int = 0
    attributes: dict[Path, dict[str, Any]] = field(default_factory=dict)  # of the parts that stay


def prepare_parts(
    listing: Listing,
    store_folder: Path,
    dataset: str,
    modalities: Sequence[str],
    data: DataSettings,
    *,
    workers: int = 0,
    progress: Progress | None = None,
    retry: bool = False,
    device: str = "cpu",
) -> Report:
    """Brings the parts of a store up to date with the listed videos, then its indexes.

    Videos whose part is there and whose file is unchanged are skipped, changed ones prepared anew; bad
    ones are recorded in `<modality>.rejected.tsv` and tried again when the file changed or on `retry`.
    What is asked for together stays alike: a video that cannot give one modality is in neither index.
    Whatever stops this, the same call continues.

    Args:
        listing: the videos.
        store_folder: `stores/<dataset>`.
        dataset: its name.
        modalities: "rgb", "flow" or both; both are made in one pass over each video.
        data: how frames are sampled, scaled and stored.
        workers: processes; 0: one per core.
        progress: called as (done, total, name, frames) for each finished video.
        retry: try rejected videos again although their files are the same.
        device: where flow is computed that runs in PyTorch, "cpu" or "cuda".

    Raises:
        GkdError: the store was written under other settings, is in use, or does not fit the disk; flow cannot
            be computed at all.
        Interrupted: Ctrl-C or SIGTERM.
    """
    started = time.monotonic()
    settings = {modality: data.stored(modality) for modality in modalities}
    tables = {modality: store_folder / f"{modality}.rejected.tsv" for modality in modalities}
    try:
        with locked(store_folder / ".lock", f"the store of {dataset}"):
            sweep_temporaries(store_folder)
            for modality in modalities:
                written = written_settings(store_folder, modality)
                _check_settings(store_folder / f"{modality}.h5", written, settings[modality])
            known = (
                {}
                if retry
                else {path: bad for table in tables.values() for path, bad in read_rejects(table).items()}
            )
            plan = _plan(listing, store_folder, modalities, data, known, device)
            tally = _Tally(plan, len(listing.sources), progress)
            if plan.jobs:
                size = min(workers or available_cores(), len(plan.jobs))
                try:
                    with _signals() as signals, Crew(work, size) as crew:
                        _check_disk(crew, plan.jobs, store_folder, signals)
                        for modality in {modality for job in plan.jobs for modality in job.parts}:
                            mark_unfinished(
                                store_folder, dataset, modality, settings[modality], len(listing.sources)
                            )
                        _run(crew, plan.jobs, store_folder, tally, signals)
                finally:
                    sweep_temporaries(store_folder)  # of workers that had to be killed
                    _write_tables(tables, listing, plan)
            _write_tables(tables, listing, plan)
            # a bad file may have a part from when it was good: not in the index
            good = [source for source in listing.sources if str(source.path) not in plan.rejected]
            indexes = {
                modality: build_index(
                    store_folder,
                    dataset,
                    modality,
                    replace(listing, sources=good),
                    settings[modality],
                    plan.attributes,
                )
                for modality in modalities
            }
            problems = [
                *listing.problems,
                *misfits(good, store_folder / modalities[0], data, plan.attributes),
            ]
            write_problems(store_folder / PROBLEMS, problems)
    except OSError as error:
        raise _write_error(store_folder, error) from None
    return Report(
        prepared=tally.prepared,
        skipped=plan.skipped + tally.unchanged,
        rejected=[(path, reject.reason) for path, reject in _rejected(listing, plan)],
        frames=tally.frames,
        bytes_written=tally.bytes,
        seconds=time.monotonic() - started,
        unlisted=plan.unlisted,
        indexes=indexes,
        problems=problems,
        notes=tally.notes,
    )


def _rejected(listing: Listing, plan: _Plan) -> list[tuple[str, Reject]]:
    return [*((path, Reject(reason)) for path, reason in listing.rejects), *plan.rejected.items()]


def _write_tables(tables: Mapping[str, Path], listing: Listing, plan: _Plan) -> None:
    for table in tables.values():
        write_rejects(table, _rejected(listing, plan))


def _plan(
    listing: Listing,
    store_folder: Path,
    modalities: Sequence[str],
    data: DataSettings,
    known: Mapping[str, Reject],
    device: str,
) -> _Plan:
    """What is to be done, judged by the sizes and times of files."""
    plan = _Plan()
    listed: set[Path] = set()
    weights = digest(Path(data.flow_weights)) if "flow" in modalities and data.flow == "raft" else ""
    for source in listing.sources:
        path = str(source.path)
        try:
            parts = {
                modality: part_path(store_folder / modality, source.class_name, source.name)
                for modality in MODALITIES
            }
            stamps = {modality: stamp(source.file(modality)) for modality in modalities}
        except ValueError as error:
            plan.rejected[path] = Reject(str(error))
            continue
        except OSError as error:
            plan.rejected[path] = Reject(f"cannot be read: {error.strerror}")
            continue
        listed.update(parts.values())
        missing, digests = {}, {}
        for modality in modalities:
            found = _attributes(parts[modality])
            size, mtime_ns = stamps[modality]
            if found.get("source_size") == size:
                _check_settings(parts[modality], json.loads(found["settings"]), data.stored(modality))
                if modality == "flow" and weights:
                    _check_weights(parts[modality], found["flow_parameters"], weights)
                if found["source_mtime_ns"] == mtime_ns:
                    plan.attributes[parts[modality]] = found
                    continue
                digests[modality] = found["source_digest"]
            missing[modality] = parts[modality]
        old = known.get(cell(path), Reject(""))
        if not missing:
            plan.skipped += 1
        elif old.size >= 0 and old == Reject.of(source.path, old.reason) and not digests:
            plan.rejected[path] = old
        else:
            beside = next((part for modality, part in parts.items() if modality not in missing), None)
            files = {source.file(modality): stamps[modality][0] for modality in missing}
            plan.jobs.append(Job(source, missing, data, sum(files.values()), digests, beside, device=device))
    for modality in modalities:
        plan.unlisted += sum(part not in listed for part in (store_folder / modality).glob("*/*.h5"))
    return plan


def _attributes(part: Path) -> dict[str, Any]:
    """Of a whole part; empty where there is none."""
    try:
        return read_attributes(part) if part.exists() else {}
    except OSError:
        return {}  # damaged after it was written: prepared anew


class _Tally:
    """Counts results, and reports progress."""

    def __init__(self, plan: _Plan, total: int, progress: Progress | None) -> None:
        self.plan = plan
        self.total = total
        self.done = total - len(plan.jobs)
        self.prepared = self.unchanged = self.frames = self.bytes = 0
        self.notes: list[str] = []
        self._progress = progress

    def add(self, job: Job, result: Result | Crashed) -> None:
        """One finished video."""
        path = job.source.path
        if isinstance(result, Crashed):
            number = result.signal_number
            reason = f"the decoder crashed ({f'signal {number}' if number else 'it ended the process'})"
            self.plan.rejected[str(path)] = Reject(reason) if result.killed else Reject.of(path, reason)
        elif result.reason:
            self.plan.rejected[str(path)] = (
                Reject(result.reason) if result.again else Reject.of(path, result.reason)
            )
        elif result.unchanged:
            self.unchanged += 1
        else:
            self.prepared += 1
            self.frames += result.frames
            self.bytes += result.bytes
            if result.note and result.note not in self.notes:
                self.notes.append(result.note)
        self.done += 1
        if self._progress:
            frames = 0 if isinstance(result, Crashed) else result.frames
            self._progress(self.done, self.total, job.source.name, frames)


def _run(
    crew: Crew[Job, Result], jobs: Sequence[Job], folder: Path, tally: _Tally, signals: list[int]
) -> None:
    """Hands out jobs and collects results until all is done, or something asks to stop."""
    waiting = list(reversed(jobs))
    while (waiting or crew.busy) and not signals:
        while waiting and crew.give(waiting[-1]):
            waiting.pop()
        for job, result in crew.collect(_POLL_SEC):
            if isinstance(result, Result) and result.error:
                raise result.error
            if isinstance(result, Result) and (result.full or result.failure):
                raise _write_error(folder, OSError(errno.ENOSPC if result.full else 0, result.failure))
            tally.add(job, result)
        _watch_disk(folder)
    if signals:
        deadline = time.monotonic() + _GRACE_SEC
        while crew.busy and time.monotonic() < deadline and len(signals) < 2:
            for job, result in crew.collect(_POLL_SEC):
                if isinstance(result, Result) and not (result.full or result.failure or result.error):
                    tally.add(job, result)
        raise Interrupted(
            f"stopped after {tally.done} of {tally.total} videos", str(folder), "the same command continues"
        )


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in a list instead of being ended by them."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _check_settings(where: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """One store, one way of sampling and scaling."""
    differing = setting_differences(old, new) if old else []
    if differing:
        raise GkdError(
            f"the store was written under other settings: {', '.join(differing)}",
            str(where),
            "name another `dataset` in the preset (`--name` for a folder), or take the old settings",
        )


def _check_weights(where: Path, parameters: str, weights: str) -> None:
    """One store, one network."""
    if weights not in parameters and "weights_sha256" in parameters:
        raise GkdError(
            "the flow of this store was computed with other weights of RAFT",
            f"{where}, now data.flow_weights has SHA-256 {weights[:12]}...",
            "name another `dataset` in the preset (`--name` for a folder), or take the old weights",
        )


def _check_disk(crew: Crew[Job, Result], jobs: Sequence[Job], folder: Path, signals: list[int]) -> None:
    """Refuses what will hardly fit, judged by a few of the videos."""
    sample = [replace(job, probe_only=True) for job in jobs[:: max(1, len(jobs) // _PROBES)][:_PROBES]]
    probed = read = 0
    while (sample or crew.busy) and not signals:
        while sample and crew.give(sample[-1]):
            sample.pop()
        for job, result in crew.collect(_POLL_SEC):
            if isinstance(result, Result) and not result.reason:
                probed += job.size
                read += result.bytes
    need = read / max(probed, 1) * sum(job.size for job in jobs)
    free = free_bytes(folder)
    if need > free:
        raise GkdError(
            f"the disk is too small: about {human_bytes(need)} are needed, {human_bytes(free)} are free",
            str(folder),
            "free some space, or keep the store elsewhere with `--root DIR`",
        )


def _watch_disk(folder: Path) -> None:
    usage = shutil.disk_usage(folder)
    if usage.free < min(_RESERVE_BYTES, usage.total // 50):
        raise _full(folder)


def _full(folder: Path) -> GkdError:
    return GkdError(
        "the disk is full",
        f"{folder}, {human_bytes(free_bytes(folder))} free",
        "free some space and run the same command again; it continues",
    )


def _write_error(folder: Path, error: OSError) -> GkdError:
    if disk_is_full(error):
        return _full(folder)
    return GkdError(
        "the store cannot be written",
        f"{error.filename or folder}: {error.strerror or error}",
        "check the permissions and the disk; what was prepared so far is whole",
    )
