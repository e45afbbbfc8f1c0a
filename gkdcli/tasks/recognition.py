"""Recognition: how its networks are built, its own loss terms, what it is trained on and validated by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gkdcli.console import Progress, silent
from gkdcli.data.clips import ClipDataset
from gkdcli.data.store import Store
from gkdcli.evaluation.fusion import fuse
from gkdcli.evaluation.predict import Predictions, load_predictions, predict, save_predictions
from gkdcli.evaluation.scores import class_scores, recognition_scores
from gkdcli.files import write_json
from gkdcli.losses.distill import classification_loss
from gkdcli.models.attention import attend
from gkdcli.models.recognizer import Recognizer
from gkdcli.report import draw_confusion
from gkdcli.result import jsonable
from gkdcli.runs import Run
from gkdcli.settings import CHANNELS, Role, Settings
from gkdcli.training.noise import Noise
from gkdcli.training.steps import Seen, Supervised, Term

SCORE = "top1"  # what validation gives
SUMMARY = ("top1", "top5", "mean_class_top1")
load = load_predictions


def build_network(
    settings: Settings, role: Role, classes: int, modality: str, attention: bool = True
) -> Recognizer:
    """The teacher or the student of a page; the plain student has no attention (METHOD.md 8)."""
    return Recognizer(
        settings.model.teacher if role == "teacher" else settings.model.student,
        classes,
        length=settings.clips.length,
        crop=settings.clips.crop,
        channels=CHANNELS[modality],
        width=settings.model.width,
        dropout=settings.model.dropout,
        bn_momentum=settings.model.bn_momentum,
        attention=settings.model.attention if attention else None,
        channels_last=settings.train.channels_last,
        scores_attended=not (modality == "flow" and settings.recipe == "official"),
    )


def supervised_terms(
    network: Recognizer,
    seen: Seen,
    spliced: Seen | None,
    targets: dict[str, Tensor],
    noise: Noise,
    settings: Settings,
    *_: object,
) -> Supervised:
    """Cross-entropy on the attended feature, or on the plain one of a network without (METHOD.md 4, 8).

    A mean over clips, which needs no more than the processes' shares of them.
    """
    assert spliced is None, "a matter of detection"
    feature, labels = seen.features["Mixed_5c"], targets["labels"]
    if seen.maps:
        over: Literal["batch", "sample"] = "batch" if settings.recipe == "official" else "sample"
        feature = attend(feature, seen.maps["Mixed_5c"], over)
    keep = noise.keep(network.dropout_shape(len(labels)), network.dropout)
    logits = network.logits(feature, keep)
    loss = classification_loss(logits, labels, settings.recipe, settings.optim.label_smoothing)
    return Supervised({"classification": Term(1.0, loss)})


def training_set(store: Store, videos: Sequence[int], settings: Settings) -> ClipDataset:
    """A random view of each video."""
    return ClipDataset(store, videos, settings.clips, settings.recipe, settings.train.seed)


def held_out_score(
    network: Recognizer,
    store: Store,
    videos: Sequence[int],
    settings: Settings,
    device: torch.device,
    limit: int | None = None,
) -> float:
    """Top-1 on the middle window of each video, or of the first `limit` ones, read by this process."""
    network.eval()
    logits, labels = predict(
        ClipDataset(store, videos, settings.clips, settings.recipe, seed=None),
        network.time_logits,
        batch_size=settings.eval.batch_size,
        device=device,
        workers=settings.train.workers if limit is None else 0,
        tick=silent,
        limit=limit,
    )
    return float((class_scores(logits, settings.recipe).argmax(1) == labels).mean())


def predict_run(
    path: Path,
    run: Run,
    network: Recognizer,
    store: Store,
    videos: list[int],
    settings: Settings,
    made_with: Mapping[str, Any],
    device: torch.device,
    progress: Progress,
) -> None:
    """Writes the logits of a run's network on some videos.

    Args:
        path: of the predictions.
        run: whose clip settings are taken.
        network: of the run, on the device.
        store: read from.
        videos: rows of the store.
        settings: batch size and workers.
        made_with: identifies the predictions.
        device: where the network is.
        progress: made for a number of steps, gives what is told of them.
    """
    with progress(len(videos)) as tick:
        logits, labels = predict(
            ClipDataset(store, videos, run.settings.clips, run.settings.recipe, seed=None),
            network.time_logits,
            batch_size=settings.eval.batch_size,
            workers=settings.train.workers,
            device=device,
            tick=tick,
        )
    names = [f"{store.videos[video].class_name}/{store.videos[video].name}" for video in videos]
    save_predictions(path, Predictions(logits, labels, names, made_with))


def score(
    streams: Sequence[Predictions], store: Store, videos: list[int], settings: Settings, run: Run
) -> tuple[dict[str, Any], Predictions]:
    """Scores of one stream or of the fusion of two, and the logits that they are of."""
    fused = fuse(streams, settings.eval.fusion_weights)
    return recognition_scores(fused.logits, fused.labels, store.classes, run.record["recipe"]), fused


def remarks(scores: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What the user should know of the scores: nothing."""
    return []


def protocol(run: Run, settings: Settings) -> dict[str, Any]:
    """What of a video was seen."""
    return {"views": "middle window, centre crop"}


def seen_by(settings: Settings) -> dict[str, str]:
    """What of the settings saved predictions depend on: nothing."""
    return {}


def fuses_plain(run: Run) -> bool:
    """Whether fusion takes the plain feature of a network with attention: its own choice counts there too."""
    return False


def write_output(
    path: Path, payload: Mapping[str, Any], found: Predictions, store: Store, videos: list[int], run: Run
) -> None:
    """The scores, and the prediction for each video."""
    scores = class_scores(found.logits, run.record["recipe"])
    each = [
        {
            "video": name,
            "class": store.classes[label],
            "predicted": store.classes[int(row.argmax())],
            "score": float(row.max()),
        }
        for name, label, row in zip(found.videos, found.labels, scores, strict=True)
    ]
    write_json(path, jsonable({**payload, "predictions": each}))


def draw(
    scores: Mapping[str, Any], found: Predictions, store: Store, videos: list[int], folder: Path, name: str
) -> None:
    """The confusion of classes."""
    draw_confusion(scores["confusion"], store.classes, folder / f"{name}confusion.png")
