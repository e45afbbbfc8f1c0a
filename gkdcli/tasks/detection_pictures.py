"""Pictures of what was found in whole videos; without torch, so that files of detections have them too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gkdcli.evaluation.detection import Detections, Floats, GroundTruth
from gkdcli.report_detection import Timeline, draw_profile, draw_timelines

_SHOWN = 3  # videos in the picture of timelines


def draw_found(
    scores: Mapping[str, Any],
    truth: GroundTruth,
    found: Detections,
    durations: Floats,
    folder: Path,
    name: str,
) -> list[Path]:
    """What is wrong, and timelines of the first videos with actions.

    Args:
        scores: with what `evaluation.profile.what_is_wrong` returns.
        truth: what there is.
        found: what was found.
        durations: (V,) seconds, of the videos of `truth`; 0 where unknown.
        folder: of the pictures.
        name: what their names begin with.

    Returns:
        The pictures; where no video has an action there are no timelines.
    """
    profile, timelines = (folder / f"{name}{kind}.png" for kind in ("profile", "timelines"))
    draw_profile(scores["false_positives"], scores["recall_by_length"], profile)
    lines = [
        Timeline(
            truth.videos[video], _rows(truth, truth, video), _rows(truth, found, video), durations[video]
        )
        for video in np.unique(truth.video)[:_SHOWN]
    ]
    draw_timelines(lines, timelines)
    return [profile, timelines] if lines else [profile]


def _rows(truth: GroundTruth, of: GroundTruth | Detections, video: int) -> list[Any]:
    """Start, end and class, and the score of a detection, of those in one video whose class is known."""
    own = np.flatnonzero((of.video == video) & (of.labels >= 0))
    scores = (
        [(score,) for score in of.scores[own].tolist()] if isinstance(of, Detections) else [()] * len(own)
    )
    spans, labels = of.segments[own].tolist(), of.labels[own].tolist()
    return [
        (*span, truth.classes[label], *score)
        for span, label, score in zip(spans, labels, scores, strict=True)
    ]
