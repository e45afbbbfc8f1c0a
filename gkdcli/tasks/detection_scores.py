"""Detection: what trained networks find in whole videos, and how that is scored, written and drawn."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gkdcli.console import Progress, Ticker
from gkdcli.data.store import Store
from gkdcli.errors import GkdError
from gkdcli.evaluation.decode import decode, fuse_heads
from gkdcli.evaluation.detection import (
    Detections,
    Floats,
    GroundTruth,
    beyond_end,
    class_priors,
    detection_scores,
    shuffled,
)
from gkdcli.evaluation.nms import soft_nms
from gkdcli.evaluation.profile import what_is_wrong
from gkdcli.evaluation.submission import write_submission
from gkdcli.evaluation.windows import (
    Forward,
    VideoWindows,
    WindowFile,
    count_windows,
    predict_windows,
    save_windows,
)
from gkdcli.models.detector import Detector, priors
from gkdcli.runs import Run
from gkdcli.settings import ClipSettings, Settings
from gkdcli.tasks.detection_pictures import draw_found

SCORE = "average_map"  # what validation gives
SUMMARY = ("average_map", "average_map_official")
load = WindowFile


def held_out_score(
    network: Detector,
    store: Store,
    videos: Sequence[int],
    settings: Settings,
    device: torch.device,
    limit: int | None = None,
) -> float:
    """Average mAP over whole videos, or over the first ones until `limit` windows, read by this process."""
    network.eval()
    chosen = list(videos)
    if limit is not None:
        length, stride = settings.clips.length, settings.eval.stride
        before = itertools.accumulate(
            (count_windows(store, [one], length, stride) for one in videos), initial=0
        )
        chosen = [video for video, windows in zip(chosen, before, strict=False) if windows < limit]
    workers = settings.train.workers if limit is None else 0
    found = _windows(network, store, chosen, settings.clips, settings, device, workers, lambda *_: None)
    detections = _detections(((one,) for one in found), store, chosen, settings, settings)
    truth = _truth(store, chosen)
    scores = detection_scores(truth, _of_known(detections, truth, store, chosen), settings.eval.tiou)
    return float(np.nan_to_num(scores["average_map"]))


def predict_run(
    path: Path,
    run: Run,
    network: Detector,
    store: Store,
    videos: list[int],
    settings: Settings,
    made_with: Mapping[str, Any],
    device: torch.device,
    progress: Progress,
) -> None:
    """Writes what a run's network says of all windows of some videos; arguments as of `recognition`."""
    clips, workers = run.settings.clips, settings.train.workers
    with progress(count_windows(store, videos, clips.length, settings.eval.stride)) as tick:
        found = _windows(network, store, videos, clips, settings, device, workers, tick)
        save_windows(path, found, made_with)


def score(
    streams: Sequence[WindowFile], store: Store, videos: list[int], settings: Settings, run: Run
) -> tuple[dict[str, Any], Detections]:
    """MAP and what is wrong, of one stream or of the fusion of two, and the detections that they are of.

    Raises:
        GkdError: the streams are of other videos or windows.
    """
    detections = _detections(_alike(streams), store, videos, settings, run.settings)
    truth = _truth(store, videos)
    stated = store.ground_truth.get("test", {})
    known, tiou = _of_known(detections, truth, store, videos), settings.eval.tiou
    scores = detection_scores(truth, known, tiou, stated.get("file", ""))
    # of what the file states, some videos may not be in the store
    scores["ground_truth"] |= {f"{key}_in_file": stated.get(key) for key in ("videos", "segments")}
    scores["ground_truth"]["beyond_end"] = beyond_end(truth, _durations(store, videos, truth))
    by_chance = detection_scores(truth, shuffled(known, settings.train.seed), tiou)
    priors_alone = detection_scores(truth, _class_priors(store, videos, truth), tiou)
    averages = {
        "average_map_of_shuffled_scores": by_chance["average_map"],
        "average_map_of_class_priors": priors_alone["average_map"],
    }
    return scores | averages | what_is_wrong(truth, known), detections


def _class_priors(store: Store, videos: Sequence[int], truth: GroundTruth) -> Detections:
    """What someone finds who knows only how frequent and how long the training videos' actions are."""
    tested = set(videos)
    actions = [
        one for video in range(len(store.videos)) if video not in tested for one in store.segments[video]
    ]
    labels = np.array([one.label for one in actions], np.int64)
    lengths = np.array([one.end - one.start for one in actions], np.float64)
    return class_priors(labels, lengths, _durations(store, videos, truth))


def _durations(store: Store, videos: Sequence[int], truth: GroundTruth) -> Floats:
    """(V,) seconds, of the videos of the ground truth."""
    known, rows = set(truth.videos), (store.videos[video] for video in videos)
    return np.array([row.frames / row.fps for row in rows if row.name in known])


def _of_known(detections: Detections, truth: GroundTruth, store: Store, videos: Sequence[int]) -> Detections:
    """Videos by their place in the ground truth, -1 where it does not know them."""
    places = {name: place for place, name in enumerate(truth.videos)}
    place = np.array([places.get(store.videos[video].name, -1) for video in videos], np.int64)
    return detections._replace(video=place[detections.video])


def write_output(
    path: Path, payload: Mapping[str, Any], found: Detections, store: Store, videos: list[int], run: Run
) -> None:
    """The detections in the official form, which other evaluators read."""
    names = [store.videos[video].name for video in videos]
    write_submission(path, names, store.classes, found, store.dataset)


def draw(
    scores: Mapping[str, Any], found: Detections, store: Store, videos: list[int], folder: Path, name: str
) -> None:
    """What is wrong, and timelines of the first videos with actions."""
    truth = _truth(store, videos)
    known = _of_known(found, truth, store, videos)
    draw_found(scores, truth, known, _durations(store, videos, truth), folder, name)


def agreement(
    forwards: Sequence[Forward], store: Store, videos: Sequence[int], run: Run, settings: Settings
) -> dict[str, Any]:
    """How far two ways to compute a detector find the same in whole videos.

    Args:
        forwards: the live network and the exported graph: normalised clips -> the five outputs.
        store: read from.
        videos: rows of the store.
        run: of the network.
        settings: how detections are chosen.

    Returns:
        `videos`, `windows`, `detections` of the first, and `found_again`: the share of these that the second
        finds too, within 0.01 s and 0.001 of the score.
    """
    clips, device = run.settings.clips, torch.device("cpu")
    both = []
    for forward in forwards:
        found = _windows(forward, store, videos, clips, settings, device, 0, lambda *_: None)
        both.append(_detections(((one,) for one in found), store, videos, settings, run.settings))
    ours, theirs = (np.column_stack([each.video, each.labels, each.segments, each.scores]) for each in both)
    near = np.array([0.5, 0.5, 0.01, 0.01, 0.001])
    again = sum(bool((np.abs(theirs - row) <= near).all(axis=1).any()) for row in ours)
    return {
        "videos": len(videos),
        "windows": count_windows(store, videos, clips.length, settings.eval.stride),
        "detections": len(ours),
        "found_again": again / len(ours) if len(ours) else 1.0,
    }


def _alike(streams: Sequence[WindowFile]) -> Iterator[list[VideoWindows]]:
    """Of each video what all streams say; readers by several processes finish videos in another order.

    Raises:
        GkdError: the streams are of other videos or windows.
    """
    first = streams[0]
    files = ", ".join(str(stream.path) for stream in streams)
    places = [{name: place for place, name in enumerate(stream.names)} for stream in streams]
    for other in places[1:]:
        if other.keys() != places[0].keys():
            raise GkdError(
                f"the two streams are of other videos: {len(first)} and {len(other)}",
                files,
                "prepare both together: `gkd prepare ... --modality both`",
            )
    for name in first.names:
        row = [stream[place[name]] for stream, place in zip(streams, places, strict=True)]
        if any(not np.array_equal(one.offsets, row[0].offsets) for one in row[1:]):
            raise GkdError(
                f"the two streams see other windows of video {name}",
                files,
                "both need the same eval.stride; `--set eval.stride=...` sets that of both",
            )
        yield row


def protocol(run: Run, settings: Settings) -> dict[str, Any]:
    """How videos were seen and detections chosen."""
    chosen = settings.eval
    return {
        "views": "all windows, centre crop",
        "stride_frames": chosen.stride,
        "nms_sigma": chosen.nms_sigma,
        "score_threshold": chosen.score_threshold,
        "top_k": chosen.top_k,
    }


def seen_by(settings: Settings) -> dict[str, str]:
    """What of the settings saved predictions depend on."""
    return {"stride": str(settings.eval.stride)}


def fuses_plain(run: Run) -> bool:
    """Whether fusion takes the plain feature, as the released fused test does of flow (METHOD.md 5)."""
    return bool(run.record["modality"] == "flow" and run.record["recipe"] == "official")


def _windows(
    network: Forward,
    store: Store,
    videos: Sequence[int],
    clips: ClipSettings,
    settings: Settings,
    device: torch.device,
    workers: int,
    tick: Ticker,
) -> Iterator[VideoWindows]:
    return predict_windows(
        store,
        videos,
        network,
        clips,
        stride=settings.eval.stride,
        batch_size=settings.eval.batch_size,
        workers=workers,
        device=device,
        tick=tick,
    )


def _detections(
    videos: Iterable[Sequence[VideoWindows]],
    store: Store,
    chosen: Sequence[int],
    settings: Settings,
    trained: Settings,
) -> Detections:
    """What stays of all candidates, by video's place in `chosen`, of networks as they were `trained`.

    The `videos` may come in any order.
    """
    places = {store.videos[video].name: place for place, video in enumerate(chosen)}
    wanted, parts = settings.eval, {}
    for streams in videos:
        first = streams[0]
        heads = first.heads
        if len(streams) > 1:
            heads = fuse_heads([stream.heads for stream in streams], wanted.fusion_weights)
        frames = trained.clips.length
        found = decode(
            heads,
            first.offsets,
            priors(frames).numpy(),
            clip_frames=frames,
            fps=first.fps,
            threshold=wanted.score_threshold,
        )
        kept, scores = soft_nms(
            found.segments,
            found.scores,
            sigma=wanted.nms_sigma,
            floor=wanted.nms_floor,
            top_k=wanted.top_k,
            recipe=trained.recipe,
            groups=found.labels,
        )
        place = places[first.name]
        parts[place] = (np.full(len(kept), place), found.segments[kept], found.labels[kept], scores)
    ordered = (parts[place] for place in sorted(parts))
    return Detections(*(np.concatenate(each) for each in zip(*ordered, strict=True)))


def _truth(store: Store, videos: Sequence[int]) -> GroundTruth:
    """The annotated actions of some videos; those that the annotations do not know are left out."""
    without = {name for subset in store.ground_truth.values() for name in subset.get("without", ())}
    known = [video for video in videos if store.videos[video].name not in without]
    rows = [(place, one) for place, video in enumerate(known) for one in store.segments[video]]
    return GroundTruth(
        store.classes,
        [store.videos[video].name for video in known],
        np.array([place for place, _ in rows], np.int64),
        np.array([(one.start, one.end) for _, one in rows], np.float64).reshape(-1, 2),
        np.array([one.label for _, one in rows], np.int64),
    )
