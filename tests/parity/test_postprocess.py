"""From head outputs to the published submission: fusion, decoding, soft-NMS (golden 12)."""

from __future__ import annotations

import gzip
import json
from typing import Any

import numpy as np
import pytest

from gkdcli.evaluation.decode import Heads, decode, fuse_heads
from gkdcli.evaluation.nms import soft_nms
from tests.parity.golden import FOLDER, needs_golden, recorded


def windows(figures: dict[str, np.ndarray], video: str, stream: str) -> tuple[Heads, list[int]]:
    prefix = f"{video}/{stream}/off"
    offsets = sorted({int(name[len(prefix) :].split("/")[0]) for name in figures if name.startswith(prefix)})
    return Heads(*(
        np.stack([figures[f"{prefix}{offset}/{name}"] for offset in offsets]) for name in Heads._fields
    )), offsets  # fmt: skip


def detections(figures: dict[str, np.ndarray], streams: list[str], sigma: float) -> dict[str, Any]:
    found = {}
    for video, (fps, sample_fps, *_) in zip(figures["video_names"], figures["video_info"], strict=True):
        each = [windows(figures, str(video), stream) for stream in streams]
        heads = fuse_heads([part[0] for part in each], [1.0] * len(each))
        candidates = decode(
            heads,
            np.array(each[0][1]),
            figures["priors"],
            clip_frames=int(figures["clip_length"]),
            fps=min(fps, sample_fps),
            threshold=float(figures["conf_thresh"]),
        )
        kept, scores = soft_nms(
            candidates.segments,
            candidates.scores,
            sigma=sigma,
            top_k=int(figures["top_k"]),
            recipe="official",
            groups=candidates.labels,
        )
        found[str(video)] = (candidates.labels[kept], scores, candidates.segments[kept])
    return found


@needs_golden
@pytest.mark.parametrize(
    ("case", "streams", "sigma"),
    [
        ("rgb_sigma0.1", ["rgb"], 0.1),
        ("rgb_sigma0.5", ["rgb"], 0.5),
        ("fusion_sigma0.1", ["rgb", "flow"], 0.1),
    ],
)
def test_recorded_submissions(case: str, streams: list[str], sigma: float) -> None:
    wanted = json.loads(gzip.decompress((FOLDER / "12_postprocess_expected.json.gz").read_bytes()))[case]
    found = detections(recorded("12_postprocess_windows"), streams, sigma)
    assert wanted["results"].keys() == found.keys()
    classes = sorted({entry["label"] for entries in wanted["results"].values() for entry in entries})
    assert len(classes) == 20
    for video, entries in wanted["results"].items():
        labels, scores, segments = found[video]
        assert [classes[label] for label in labels] == [entry["label"] for entry in entries]
        np.testing.assert_allclose(scores, [entry["score"] for entry in entries], rtol=0, atol=1e-5)
        np.testing.assert_allclose(segments, [entry["segment"] for entry in entries], rtol=0, atol=1e-5)
