"""`gkd prepare`: videos into the parts of a store, in worker processes, one video at a time."""

from __future__ import annotations

import errno
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gkdcli.data.annotations import Listing
from gkdcli.data.cluster import Cluster
from gkdcli.data.jobs import Job, Result, draft, work
from gkdcli.data.misfits import misfits
from gkdcli.data.parts import part_path
from gkdcli.data.plan import Plan, check_settings, plan_parts
from gkdcli.data.rejects import PROBLEMS, Reject, write_problems, write_rejects
from gkdcli.data.settling import Settling
from gkdcli.data.shards import Shard, known_rejects, reject_table, remove_traces, store_locked
from gkdcli.data.sources import Problem
from gkdcli.data.store import build_index, mark_unfinished, written_settings
from gkdcli.data.workers import Crashed, Crew, available_cores
from gkdcli.errors import GkdError, Interrupted
from gkdcli.files import disk_is_full, free_bytes, human_bytes, locked, sweep_temporaries
from gkdcli.settings import MODALITIES, DataSettings

Progress = Callable[[int, int, str, int], None]
Hands = Settling | Cluster
_PROBES = 8
_POLL_SEC = 0.2
_GRACE_SEC = 10.0  # for videos in work after Ctrl-C
_RESERVE_BYTES = 256 << 20
_START_SEC = 300.0  # for a thousand shards that mark the store one after the other


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
        indexes: the finished index of each modality; a shard writes none.
        problems: of the annotations and of how they fit the videos; also in `annotations.problems.tsv`.
        notes: what the user should know about how flow was computed.
    """

    prepared: int
    skipped: int
    rejected: list[tuple[str, str]]
    frames: int
    bytes_written: int
    seconds: float
    unlisted: int = 0
    indexes: dict[str, Path] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


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
    shard: Shard | None = None,
    cluster: Cluster | None = None,
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
        workers: processes; 0: one per core, of the cluster where there is one.
        progress: called as (done, total, name, frames) for each finished video.
        retry: try rejected videos again although their files are the same.
        shard: prepare only this share of them, beside the runs that prepare the others; without one, what
            shards have left is merged.
        cluster: whose nodes do the work, instead of processes of this machine.
        device: where flow is computed that runs in PyTorch, "cpu" or "cuda".

    Raises:
        GkdError: the store was written under other settings, is in use, or does not fit the disk; flow cannot
            be computed at all.
        Interrupted: Ctrl-C or SIGTERM.
    """
    started = time.monotonic()
    settings = {modality: data.stored(modality) for modality in modalities}
    tables = {modality: reject_table(store_folder, modality, shard) for modality in modalities}
    whole, own = len(listing.sources), None
    if shard is not None:
        listing = shard.share(listing, modalities)
        own = {*tables.values(), *_parts(listing, store_folder)}
    try:
        with store_locked(store_folder, dataset, shard):
            sweep_temporaries(store_folder, own)
            plan = plan_run(listing, store_folder, modalities, data, retry, device)
            tally = _Tally(plan, len(listing.sources), progress)
            if plan.jobs:
                size = min(workers or available_cores(), len(plan.jobs))
                try:
                    with (
                        _signals() as signals,
                        cluster.open(work, store_folder, plan.jobs, workers)
                        if cluster
                        else Settling(Crew(draft, size, data.timeout)) as crew,
                    ):
                        _check_disk(crew, plan.jobs, store_folder, signals)
                        _mark(store_folder, dataset, settings, plan.jobs, whole)
                        _run(crew, plan.jobs, store_folder, tally, signals)
                finally:
                    sweep_temporaries(store_folder, own)  # of workers that had to be killed
                    _write_tables(tables, listing, plan)
            _write_tables(tables, listing, plan)
            if shard is not None:
                return tally.report(listing, time.monotonic() - started)
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
            remove_traces(store_folder, modalities)
    except OSError as error:
        raise _write_error(store_folder, error) from None
    report = tally.report(listing, time.monotonic() - started)
    return replace(report, unlisted=plan.unlisted, indexes=indexes, problems=problems)


def plan_run(
    listing: Listing,
    store_folder: Path,
    modalities: Sequence[str],
    data: DataSettings,
    retry: bool = False,
    device: str = "cpu",
) -> Plan:
    """What `prepare_parts` would do, with the same arguments; nothing is written.

    Raises:
        GkdError: the store was written under other settings.
    """
    _check_written(store_folder, {modality: data.stored(modality) for modality in modalities})
    known = {} if retry else known_rejects(store_folder, modalities)
    return plan_parts(listing, store_folder, modalities, data, known, device)


def _rejected(listing: Listing, plan: Plan) -> list[tuple[str, Reject]]:
    return [*((path, Reject(reason)) for path, reason in listing.rejects), *plan.rejected.items()]


def _write_tables(tables: Mapping[str, Path], listing: Listing, plan: Plan) -> None:
    for table in tables.values():
        write_rejects(table, _rejected(listing, plan))


def _parts(listing: Listing, store_folder: Path) -> Iterator[Path]:
    """Where the parts of the videos go, of all modalities."""
    for modality in MODALITIES:
        for source in listing.sources:
            with suppress(ValueError):  # a name that the store does not take
                yield part_path(store_folder / modality, source.class_name, source.name)


class _Tally:
    """Counts results, and reports progress."""

    def __init__(self, plan: Plan, total: int, progress: Progress | None) -> None:
        self.plan = plan
        self.total = total
        self.done = total - len(plan.jobs)
        self.prepared = self.unchanged = self.frames = self.bytes = 0
        self.notes: list[str] = []
        self._progress = progress

    def report(self, listing: Listing, seconds: float) -> Report:
        """What it came to; indexes are the caller's matter."""
        return Report(
            prepared=self.prepared,
            skipped=self.plan.skipped + self.unchanged,
            rejected=[(path, reject.reason) for path, reject in _rejected(listing, self.plan)],
            frames=self.frames,
            bytes_written=self.bytes,
            seconds=seconds,
            notes=self.notes,
        )

    def add(self, job: Job, result: Result | Crashed) -> None:
        """One finished video."""
        path = job.source.path
        if isinstance(result, Crashed):
            number = result.signal_number
            reason = f"the decoder crashed ({f'signal {number}' if number else 'it ended the process'})"
            if result.silent_sec:
                reason = f"not one more frame in {result.silent_sec:.0f} s, the limit that data.timeout sets"
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


def _run(crew: Hands, jobs: Sequence[Job], folder: Path, tally: _Tally, signals: list[int]) -> None:
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
            if isinstance(result, Crashed):
                _watch_disk(folder)  # HDF5 may crash where it cannot write: the video has no part in that
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


def _check_written(store_folder: Path, settings: Mapping[str, dict[str, Any]]) -> None:
    for modality, wanted in settings.items():
        check_settings(store_folder / f"{modality}.h5", written_settings(store_folder, modality), wanted)


def _mark(
    store_folder: Path, dataset: str, settings: Mapping[str, Any], jobs: Sequence[Job], expected: int
) -> None:
    """From here on the store is unfinished; of shards with different settings the first comes through."""
    with locked(store_folder / ".start.lock", f"the store of {dataset}", patience_sec=_START_SEC):
        _check_written(store_folder, settings)
        for modality in {modality for job in jobs for modality in job.parts}:
            mark_unfinished(store_folder, dataset, modality, settings[modality], expected)


def _check_disk(crew: Hands, jobs: Sequence[Job], folder: Path, signals: list[int]) -> None:
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
