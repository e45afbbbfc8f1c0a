"""Fills the cache of the teacher's attention: shows how far it is, shares the work, survives being killed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from gkdcli.console import Console, Ticker, counted
from gkdcli.data.batches import ClipBatch, Clips, Keys, splice
from gkdcli.data.clips import normalise
from gkdcli.data.loader import load
from gkdcli.errors import GkdError, Interrupted
from gkdcli.files import (
    atomic_path,
    disk_is_full,
    free_bytes,
    human_bytes,
    is_locked,
    locked,
    sweep_temporaries,
    write_json,
)
from gkdcli.runs import Place, Run
from gkdcli.settings import Settings
from gkdcli.training.forward import Forward
from gkdcli.training.processes import Group
from gkdcli.training.schedule import NETWORK
from gkdcli.training.steps import Maps, Networks, Taught, has_spliced, see
from gkdcli.training.teacher_cache import (
    CachedClips,
    bytes_per_view,
    fingerprint_of,
    views_of,
)

_WAIT = 7 * 86400.0  # s: another run may be computing the same


def let_it_teach(
    networks: Networks,
    clips: Clips,
    place: Place,
    teacher_run: Run,
    run: Run | None,
    device: torch.device,
    group: Group,
    console: Console,
) -> tuple[Clips, str]:
    """Has the teacher say what the run will want to know of it, and lets it go.

    Args:
        networks: all in play; those of a run with a cache have no teacher, only its CVAEs.
        clips: the training clips.
        place: where.
        teacher_run: the teacher's.
        run: the one that is continued; None for a new one.
        device: where.
        group: the processes of the run.
        console: who is told.

    Returns:
        The clips, which now bring the teacher's maps; and the fingerprint of those.

    Raises:
        GkdError: it is no longer the teacher that the run began with, or see `fill`.
    """
    settings, teacher = place.settings, networks.teacher
    fingerprint = fingerprint_of(teacher, clips, settings)
    if run is not None and run.record.get("teacher_cache") != fingerprint:
        raise GkdError(
            "the teacher, or what it is shown of the clips, has changed since this run began",
            f"{teacher_run.folder}, {run.folder}",
            "start a new run: the attention is computed anew, under a name of its own",
        )
    cache = CachedClips(
        clips,
        place.store_folder / f"{place.modality}.attention" / fingerprint,
        {tap: (shape[0], shape[1]) for tap, shape in teacher.shapes.items()},
        settings.train.teacher_cache,
        has_spliced(settings),
    )
    fill(cache, teacher.eval(), networks.forward, settings, device, group, console, teacher_run.folder)
    networks.teacher = None
    return cache, fingerprint


def fill(
    cache: CachedClips,
    teacher: Any,
    forward: Forward,
    settings: Settings,
    device: torch.device,
    group: Group,
    console: Console,
    teacher_folder: Path,
) -> None:
    """Computes the parts that are missing; the processes share them out.

    A part is written when all of it is known, so a run that is killed loses no more than that.

    Args:
        cache: to be filled.
        teacher: its network, in evaluation mode.
        forward: how it is run in training.
        settings: of the run.
        device: where.
        group: the processes of the run.
        console: who is told.
        teacher_folder: of its run, noted beside the parts for people.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; what was written stays.
        GkdError: no disk, or a clip that cannot be read.
    """
    views = views_of(settings)
    whole = f"{counted(views, 'view')} of {counted(len(cache), 'clip')}"
    if not group.share(lambda: cache.missing(views)):
        console.note(f"the teacher's attention is there: {whole}, {cache.folder}")
        return
    with _alone(cache.folder, console) if group.first else contextlib.nullcontext():
        missing = group.share(lambda: _begin(cache, views, settings, whole, console, teacher_folder))
        mine = missing[group.rank :: group.size]
        clips = sum(len(cache.positions(number)) for _, number in missing)
        try:
            with console.progress("the teacher's attention", clips) as tick:
                _compute(cache, mine, teacher, forward, settings, device, _scaled(tick, group.size, clips))
        except KeyboardInterrupt:
            raise Interrupted(
                "interrupted while the teacher's attention was computed; what is done stays",
                str(cache.folder),
                "the same command goes on from there",
            ) from None
        group.gather(None)


def _scaled(tick: Ticker, size: int, most: int) -> Ticker:
    """Tells what all processes have done, of which this one sees its own share."""
    return lambda done, text="", rows=None: tick(min(done * size, most), text, rows)


@contextlib.contextmanager
def _alone(folder: Path, console: Console) -> Iterator[None]:
    """Two runs that start together compute it once."""
    lock = folder / ".lock"
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock.touch()
    if is_locked(lock):
        console.note(f"waiting: another command is computing the same attention, {folder}")
    with locked(lock, "the teacher's attention", patience_sec=_WAIT):
        yield


def _begin(
    cache: CachedClips,
    views: int,
    settings: Settings,
    whole: str,
    console: Console,
    teacher_folder: Path,
) -> list[tuple[int, int]]:
    """What is to be computed, after saying how much that is."""
    missing = cache.missing(views)
    each, free = bytes_per_view(cache.shapes, settings), free_bytes(cache.folder)
    wanted = each * sum(len(cache.positions(number)) for _, number in missing)
    console.note(
        f"the teacher's attention: {whole}, {human_bytes(each)} each; {human_bytes(wanted)} to compute,"
        f" {human_bytes(free)} free, {cache.folder}"
    )
    others = [path for path in cache.folder.parent.iterdir() if path.is_dir() and path != cache.folder]
    if others:
        size = sum(file.stat().st_size for path in others for file in path.glob("view*.h5"))
        console.note(
            f"beside it: {human_bytes(size)} of other teachers or other views; delete what no run needs"
        )
    if wanted > free:
        raise GkdError(
            f"the disk has too little room: {human_bytes(wanted)} needed, {human_bytes(free)} free",
            str(cache.folder),
            f"`--teacher-cache` with fewer views than {views}; without it the teacher runs in every step",
        )
    with _writing(cache.folder):
        sweep_temporaries(cache.folder)
        write_json(cache.folder / "about.json", {"teacher": str(teacher_folder)})
    return missing


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Names what users can act on where a file cannot be written."""
    try:
        yield
    except OSError as error:
        full = disk_is_full(error)
        raise GkdError(
            "the disk is full" if full else f"the teacher's attention cannot be written: {error}",
            str(folder),
            "make room, then run the same command again: what is there stays"
            if full
            else "it is kept beside the store, which must be writable; or do without `--teacher-cache`",
        ) from None


def _compute(
    cache: CachedClips,
    parts: Sequence[tuple[int, int]],
    teacher: Any,
    forward: Forward,
    settings: Settings,
    device: torch.device,
    tick: Ticker,
) -> None:
    if not parts:
        return
    done = 0
    batches_of = {part: _batches(cache, *part, settings.eval.batch_size) for part in parts}
    keys = [batch for part in parts for batch in batches_of[part]]
    pin = device.type == "cuda"
    teacher.to(device)
    with contextlib.closing(load(cache.clips, keys, settings.train.workers, pin)) as batches:
        for part in parts:
            maps: list[tuple[Taught, Tensor | None]] = []
            for batch in islice(batches, len(batches_of[part])):
                maps.append(_teach(batch, teacher, forward, settings, cache.spliced, device))
                done += len(batch.samples)
                tick(done)
            _write(cache, *part, maps)


def _batches(cache: CachedClips, view: int, number: int, size: int) -> list[Keys]:
    """What is read of the clips of a part, in batches."""
    clips = [(position, view, NETWORK) for position in cache.positions(number)]
    return [clips[first : first + size] for first in range(0, len(clips), size)]


def _teach(
    batch: ClipBatch, teacher: Any, forward: Forward, settings: Settings, spliced: bool, device: torch.device
) -> tuple[Taught, Tensor | None]:
    """The teacher's maps, float16, and which clips (B,) have a spliced version."""
    targets = {name: value.to(device) for name, value in batch.targets.items()}
    clips = normalise(batch.clips.to(device), settings.clips, targets.get("frames"))
    more = splice(clips, targets) if spliced else None
    with torch.inference_mode():
        seen = see(forward, teacher, clips if more is None else torch.cat([clips, more]))
    ours, theirs = (_halves(part.maps) for part in seen.divided(len(clips)))
    return Taught(ours, theirs), batch.targets["spliced"] if spliced else None


def _halves(maps: Maps) -> Maps:
    return {tap: value.half().cpu() for tap, value in maps.items()}


def _write(cache: CachedClips, view: int, number: int, maps: Sequence[tuple[Taught, Tensor | None]]) -> None:
    """A part: maps (R, C, T') by tap; of spliced clips those there are, and in which row, -1 for none."""
    path = cache.part(number, view)
    with (
        _writing(cache.folder),
        atomic_path(path) as temporary,
        h5py.File(temporary, "w", locking=False) as file,
    ):
        file.attrs["fingerprint"] = cache.folder.name
        for tap in cache.shapes:
            file[tap] = torch.cat([given.maps[tap] for given, _ in maps]).numpy()
            if cache.spliced:
                file[f"spliced.{tap}"] = torch.cat([given.spliced[tap] for given, _ in maps]).numpy()
        if cache.spliced:
            has = torch.cat([flags for _, flags in maps if flags is not None]).numpy()
            file["spliced_row"] = np.where(has, np.cumsum(has) - 1, -1)
