"""data.loader: orders, and that it makes no difference who reads."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch

from gkdcli.data.batches import ClipBatch, Keys
from gkdcli.data.clips import ClipDataset
from gkdcli.data.loader import load, lost_worker, test_order, training_order
from gkdcli.data.parts import part_path
from gkdcli.data.store import Store
from gkdcli.errors import GkdError
from gkdcli.settings import ClipSettings
from tests.stores import Video, make_store, picture

CLIPS = ClipSettings(length=16, crop=32, mean=[0.45], std=[0.225])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    videos = [Video("ab"[seed % 2], f"v{seed}", picture(seed, 18)) for seed in range(9)]
    return make_store(tmp_path_factory.mktemp("store"), videos)


def test_an_epoch_takes_every_video_once_the_last_batch_may_be_small():
    batches = training_order(10, 4, 2020, 3, 1)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert sorted(key[0] for batch in batches for key in batch) == list(range(10))
    assert {key[1:] for batch in batches for key in batch} == {(3, 1)}


def test_orders_differ_by_seed_epoch_and_part_and_by_nothing_else():
    def order(*where: int) -> list[int]:
        return [key[0] for batch in training_order(50, 7, *where) for key in batch]

    orders = [order(1, 1, 0), order(1, 1, 1), order(1, 2, 0), order(2, 1, 0)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert order(1, 1, 0) == [key[0] for batch in training_order(50, 3, 1, 1, 0) for key in batch]


def test_the_test_order_is_that_of_the_store():
    assert test_order(5, 2) == [[(0, 0, 0), (1, 0, 0)], [(2, 0, 0), (3, 0, 0)], [(4, 0, 0)]]


def test_batch_size_and_order_do_not_change_a_clip(store):
    dataset = ClipDataset(store, range(9), CLIPS, "corrected", seed=5)
    found: dict[int, torch.Tensor] = {}
    for size in (1, 4, 9):
        for batch in load(dataset, training_order(9, size, size, 1, 1), workers=0):
            for clip, video in zip(batch.clips, batch.samples, strict=True):
                assert torch.equal(found.setdefault(video, clip), clip)
    assert len(found) == 9


def test_workers_read_the_same_batches_and_leave_stopping_to_their_parent(store):
    """Ctrl-C reaches a whole process group: the step in work can still be finished."""
    dataset = ClipDataset(store, range(9), CLIPS, "corrected", seed=5)
    keys = [keys for epoch in (1, 2) for keys in training_order(9, 2, 1, epoch, 1)]
    alone = list(load(dataset, keys, workers=0))
    batches = load(dataset, itertools.chain(keys, itertools.cycle(keys)), workers=2)
    found = [next(batches)]
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGINT)
        os.kill(process.pid, signal.SIGTERM)
    found += itertools.islice(batches, 9)
    batches.close()
    assert multiprocessing.active_children() == [], "a closed loader leaves no process behind"
    for ours, theirs in zip(found, alone, strict=True):
        assert ours.samples == theirs.samples
        assert torch.equal(ours.targets["labels"], theirs.targets["labels"])
        assert torch.equal(ours.clips, theirs.clips)


class Large:
    """Batches that are made at once, and take a while to travel."""

    def __len__(self) -> int:
        return 1

    def __getitems__(self, keys: Keys) -> Keys:
        return keys

    def collate(self, items: Keys) -> ClipBatch:
        return ClipBatch(torch.zeros(60_000_000, dtype=torch.uint8), {}, [0])

    def name_of(self, sample: int) -> str:
        return "large"


def test_workers_end_in_peace_where_a_batch_is_on_its_way():
    """Not by an abort in C++, which says so on stderr and means nothing."""
    batches = load(Large(), [[(0, 0, 0)]] * 9, workers=2)
    next(batches)
    processes = multiprocessing.active_children()
    batches.close()
    assert [process.exitcode for process in processes] == [0, 0]


def test_an_error_in_a_worker_arrives_as_it_is_and_the_worker_goes(tmp_path: Path):
    store = make_store(tmp_path, [Video("a", f"v{seed}", picture(seed, 18)) for seed in range(8)])
    part = part_path(tmp_path / "stores/drawn/rgb", "a", "v5")
    part.write_bytes(part.read_bytes()[:2000])
    dataset = ClipDataset(store, range(8), CLIPS, "corrected", seed=None)
    batches = load(dataset, test_order(8, 2), workers=1)
    assert next(batches).samples == [0, 1]
    with pytest.raises(GkdError, match="damaged") as caught:
        list(batches)
    assert "v5" in caught.value.where
    assert "Traceback" not in str(caught.value)
    assert multiprocessing.active_children() == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_killed_worker_is_told(store):
    """PyTorch raises its error wherever the main thread is, be it a destructor."""
    dataset = ClipDataset(store, range(9), CLIPS, "corrected", seed=None)
    batches = load(dataset, test_order(9, 1) * 50, workers=1)
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises((GkdError, RuntimeError)) as caught:
        list(batches)
    found = caught.value if isinstance(caught.value, GkdError) else lost_worker(caught.value)
    for error in (found, lost_worker(EOFError()), lost_worker(ConnectionResetError(104, "reset by peer"))):
        assert "has died" in error.what
        assert error.where
        assert "--workers" in error.hint
    assert lost_worker(RuntimeError("some other matter")) is None
