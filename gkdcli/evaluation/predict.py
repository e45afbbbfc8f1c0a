"""Model x store -> predictions, kept so that scoring runs again in an instant."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gkdcli.console import Ticker
from gkdcli.data.clips import ClipDataset, normalise
from gkdcli.data.loader import load, test_order
from gkdcli.data.parts import plain_value
from gkdcli.errors import GkdError
from gkdcli.files import atomic_path


@dataclass
class Predictions:
    """Logits of some videos.

    Args:
        logits: (N, classes, T' - 1), float32.
        labels: (N,), int64.
        videos: `class/name` of each.
        made_with: identifies store, weights and settings; plain values.
    """

    logits: NDArray[np.float32]
    labels: NDArray[np.int64]
    videos: list[str]
    made_with: Mapping[str, Any]


def predict(
    dataset: ClipDataset,
    forward: Callable[[Tensor], Tensor],
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    tick: Ticker,
    limit: int | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Runs `forward` over the test views of a dataset, in order.

    Args:
        dataset: of test views.
        forward: normalised clips (B, C, T, H, W) -> (B, classes, T' - 1).
        batch_size: clips per pass.
        workers: of the loader.
        device: where `forward` runs.
        tick: told how many videos are done.
        limit: stop after so many videos.

    Returns:
        Logits (N, classes, T' - 1) and labels (N,).

    Raises:
        GkdError: a video is damaged, or the device has too little memory.
    """
    count = len(dataset) if limit is None else min(limit, len(dataset))
    logits, labels, done = [], [], 0
    with contextlib.closing(load(dataset, test_order(count, batch_size), workers)) as batches:
        for batch in batches:
            try:
                with torch.inference_mode():
                    found = forward(normalise(batch.clips.to(device), dataset.clips)).float().cpu()
            except torch.OutOfMemoryError:
                raise GkdError(
                    f"out of memory in evaluation: batch {batch_size} of {tuple(batch.clips.shape[1:])}",
                    str(device),
                    f"`--set eval.batch_size={max(batch_size // 2, 1)}`; the scores do not depend on it",
                ) from None
            logits.append(found.numpy())
            labels.append(batch.targets["labels"].numpy())
            done += len(batch.samples)
            tick(done)
    return np.concatenate(logits), np.concatenate(labels)


def save_predictions(path: Path, predictions: Predictions) -> None:
    """Writes `predictions.h5`, atomically."""
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        file["logits"] = predictions.logits
        file["labels"] = predictions.labels
        names = [name.encode("utf-8", "surrogateescape") for name in predictions.videos]
        file["videos"] = np.array(names, dtype=h5py.string_dtype())
        file.attrs.update(schema=1, **predictions.made_with)


def load_predictions(path: Path) -> Predictions:
    """Reads `predictions.h5`.

    Raises:
        GkdError: there is none, or it is damaged.
    """
    if not path.is_file():
        raise GkdError("there are no saved predictions to score again", str(path), "drop --rescore once")
    try:
        with h5py.File(path, "r") as file:
            return Predictions(
                file["logits"][:],
                file["labels"][:],
                file["videos"].asstr(errors="surrogateescape")[:].tolist(),
                {name: plain_value(value) for name, value in file.attrs.items() if name != "schema"},
            )
    except (OSError, RuntimeError, KeyError) as error:
        raise GkdError(
            f"the saved predictions are damaged: {error}", str(path), "drop --rescore once"
        ) from None
