"""Batches of clips: in which order, read by this process or by others."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Generator, Iterable, Iterator
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.util import Finalize
from typing import Any, cast

import numpy as np
from torch.utils.data import DataLoader, Dataset

from gkdcli.data.batches import ClipBatch, Clips, Keys
from gkdcli.errors import GkdError

_ORDERS = 2  # first word of their seeds, see `clips._VIEWS`


def training_order(count: int, batch_size: int, seed: int, epoch: int, part: int) -> list[Keys]:
    """The batches of one pass; the last may be smaller (METHOD.md 4)."""
    order = np.random.default_rng([_ORDERS, seed, epoch, part]).permutation(count)
    keys = [(int(position), epoch, part) for position in order]
    return [keys[first : first + batch_size] for first in range(0, count, batch_size)]


def test_order(count: int, batch_size: int) -> list[Keys]:
    """All videos once, in the order of the store."""
    keys = [(position, 0, 0) for position in range(count)]
    return [keys[first : first + batch_size] for first in range(0, count, batch_size)]


test_order.__test__ = False  # type: ignore[attr-defined]


def load(
    dataset: Clips, batches: Iterable[Keys], workers: int, pin: bool = False
) -> Generator[ClipBatch, None, None]:
    """Reads the named batches; close the iterator to end its processes before it is exhausted.

    Args:
        dataset: read from.
        batches: asked for only a little ahead, so that one call can serve a whole run.
        workers: processes that read ahead, started fresh (never forked beside HDF5); 0: this one reads.
        pin: into page-locked memory.

    Raises:
        GkdError: a video is damaged, or a worker was killed.
    """
    return read_ahead(
        cast("Dataset[Any]", dataset),
        workers,
        batch_sampler=batches,
        collate_fn=partial(_collate, dataset),
        pin_memory=pin,
    )


def read_ahead(dataset: Dataset[Any], workers: int, **options: Any) -> Generator[Any, None, None]:
    """What PyTorch's loader yields, with its processes and errors as `load` says.

    Args:
        dataset: whose batches may be a `GkdError`, which is raised here.
        workers: as in `load`.
        options: of the loader.
    """
    loader: DataLoader[Any] = DataLoader(
        dataset,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=_leave_at_once if workers else None,
        **options,
    )
    with _signals_blocked() if workers else contextlib.nullcontext():
        found = iter(loader)
    try:
        for batch in found:
            if isinstance(batch, GkdError):
                raise batch
            yield batch
    except (RuntimeError, EOFError, ConnectionError) as error:
        raise lost_worker(error) or error from None
    finally:
        # now, not when the last traceback lets go of it: until then PyTorch raises errors of dead workers
        with contextlib.suppress(RuntimeError):
            getattr(found, "_shutdown_workers", lambda: None)()


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes started in here never see Ctrl-C or SIGTERM: stopping is this one's matter."""
    resource_tracker.ensure_running()  # it unblocks signals when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_at_once(worker: int) -> None:
    """Has this process end without taking Python down, as the last thing that multiprocessing does in it.

    A thread of it may be copying a batch into shared memory. While Python shuts down it ends threads that
    come back from C++; C++ cannot be left that way, and aborts: "terminate called without an active
    exception".
    """
    Finalize(None, os._exit, args=(0,), exitpriority=-100)


def lost_worker(error: Exception) -> GkdError | None:
    """What PyTorch means where a loading process was killed; None for any other error.

    It may be a RuntimeError raised anywhere in the main thread, not only where a batch is awaited.
    """
    if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
        return None
    return GkdError(
        "a process that loads clips has died",
        (str(error) or "its connection broke").splitlines()[0],
        "it may have run out of memory (main, or shared: /dev/shm): fewer `--workers`, or a smaller batch",
    )


def _collate(dataset: Clips, items: Any) -> ClipBatch | GkdError:
    return items if isinstance(items, GkdError) else dataset.collate(items)
