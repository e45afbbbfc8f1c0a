"""evaluation.predict: predictions do not depend on how they are made, and survive on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gkdcli.console import silent
from gkdcli.data.clips import ClipDataset, normalise
from gkdcli.data.store import Store
from gkdcli.errors import GkdError
from gkdcli.evaluation.predict import Predictions, load_predictions, predict, save_predictions
from gkdcli.tasks import recognition
from tests.training.jobs import page, settle, store_of

SETTINGS = page()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return store_of(tmp_path_factory.mktemp("store"), 7)


@pytest.fixture(scope="module")
def dataset(store: Store) -> ClipDataset:
    return ClipDataset(store, [6, 1, 3, 0, 2, 4], SETTINGS.clips, "corrected", seed=None)


@pytest.fixture(scope="module")
def network(dataset: ClipDataset):
    torch.manual_seed(0)
    found = recognition.build_network(SETTINGS, "student", 3, "rgb")
    settle(found, normalise(torch.stack([dataset[n, 0, 0][0] for n in range(6)]), SETTINGS.clips))
    return found.double()  # what remains of a difference is not rounding


def run(dataset, network, batch_size, recipe="corrected", limit=None, ticks=None):
    return predict(
        dataset,
        lambda clips: network.time_logits(clips.double()),
        batch_size=batch_size,
        workers=0,
        device=torch.device("cpu"),
        tick=lambda done, text="": ticks.append(done) if ticks is not None else None,
        limit=limit,
    )


@pytest.mark.parametrize("recipe", ["official", "corrected"])
def test_batch_size_does_not_change_predictions(dataset, network, recipe):
    """Training by recipe `official` sums over the batch; evaluation never does."""
    whole, labels = run(dataset, network, 6, recipe)
    assert whole.shape == (6, 3, 1)
    assert whole.dtype == np.float32
    assert np.ptp(whole, axis=0).max() > 1e-3
    for size in (1, 4):
        other, same = run(dataset, network, size, recipe)
        np.testing.assert_allclose(other, whole, rtol=0, atol=1e-6)
        assert np.array_equal(same, labels)


def test_predictions_are_those_of_the_test_views_in_order(dataset, network, store):
    ticks: list[int] = []
    logits, labels = run(dataset, network, 4, ticks=ticks)
    assert ticks == [4, 6]
    assert labels.tolist() == [store.videos[video].label for video in dataset.videos]
    for place in range(6):
        clip = normalise(dataset[place, 0, 0][0][None], SETTINGS.clips)
        with torch.no_grad():
            alone = network.time_logits(clip.double())
        np.testing.assert_allclose(logits[place], alone[0].numpy(), rtol=0, atol=1e-6)


def test_a_limit_stops_early(dataset, network):
    assert len(run(dataset, network, 4, limit=2)[0]) == 2
    assert len(run(dataset, network, 4, limit=99)[0]) == 6


def test_spent_memory_names_the_setting_that_needs_less(dataset):
    def greedy(clips: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(GkdError, match="out of memory in evaluation") as caught:
        predict(
            dataset,
            greedy,
            batch_size=4,
            workers=0,
            device=torch.device("cpu"),
            tick=silent,
        )
    assert "--set eval.batch_size=2" in caught.value.hint


# ---- on disk ----


@pytest.fixture
def saved() -> Predictions:
    rng = np.random.default_rng(0)
    names = ["run/a", "ünï/日本", "b/\udc80 no text"]
    made_with = {"fingerprint": "f" * 64, "weights": "w" * 64}
    return Predictions(rng.normal(size=(3, 4, 2)).astype(np.float32), np.array([2, 0, 1]), names, made_with)


def test_predictions_come_back_as_they_were(saved, tmp_path: Path):
    path = tmp_path / "predictions.h5"
    save_predictions(path, saved)
    found = load_predictions(path)
    assert np.array_equal(found.logits, saved.logits)
    assert found.logits.dtype == np.float32
    assert np.array_equal(found.labels, saved.labels)
    assert (found.videos, found.made_with) == (saved.videos, saved.made_with)
    assert [entry.name for entry in tmp_path.iterdir()] == ["predictions.h5"]


def test_missing_and_damaged_predictions_say_what_to_do(saved, tmp_path: Path):
    path = tmp_path / "predictions.h5"
    with pytest.raises(GkdError, match="no saved predictions") as caught:
        load_predictions(path)
    assert caught.value.hint == "drop --rescore once"
    save_predictions(path, saved)
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"\0" * 5000, whole.replace(b"logits", b"l0gits")):
        path.write_bytes(broken)
        with pytest.raises(GkdError, match="damaged") as caught:
            load_predictions(path)
        assert caught.value.where == str(path)
