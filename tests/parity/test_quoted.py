"""Recorded figures of the published student, quoted so that parity is tested without the golden files."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gkdcli.models.attention import attend
from gkdcli.models.recognizer import Recognizer
from gkdcli.models.weights import fit
from tests.parity.golden import filled

# Ours -> official, for the student's tensors.
NAMES = {
    "classifier.": "backbone._model.logits.conv3d.",
    "backbone.": "backbone._model.",
    "attention.Mixed_5c.squeeze.": "deconv1.0.",
    "attention.Mixed_5c.squeeze_norm.": "deconv1.1.",
    "attention.Mixed_5c.expand.": "Att_Head_5c.0.conv1d.",
    "attention.Mixed_5c.expand_norm.": "Att_Head_5c.1.",
    "attention.Mixed_5c.time.": "Att_Head_5c.3.",
}


def official(name: str) -> str:
    ours = next(ours for ours in NAMES if name.startswith(ours))
    return NAMES[ours] + name.removeprefix(ours)


def recorded_clip() -> torch.Tensor:
    """Random constants on 8x32x32 blocks plus fine noise, (1, 3, 64, 224, 224)."""
    draw = np.random.default_rng(105)
    coarse = draw.standard_normal((1, 3, 8, 7, 7), dtype=np.float32)
    fine = draw.standard_normal((1, 3, 64, 224, 224), dtype=np.float32)
    for axis, times in zip((2, 3, 4), (8, 32, 32), strict=True):
        coarse = coarse.repeat(times, axis)
    return torch.from_numpy(np.float32(1.5) * coarse + np.float32(0.5) * fine)


def test_student_forward_of_the_published_code():
    model = Recognizer("top-i3d", 101, length=64, crop=224).eval()
    tensors = {
        n: torch.from_numpy(filled(official(n), tuple(v.shape))) for n, v in model.state_dict().items()
    }
    assert fit(model, tensors).complete
    with torch.no_grad():
        features = model.features(recorded_clip())
        feature, attention = features["Mixed_5c"], model.attend(features)["Mixed_5c"]
        plain = model.logits(feature)[0].double()
        attended = model.logits(attend(feature, attention, over="batch"))[0].double()
    assert attention[0, 0, :4].tolist() == pytest.approx(
        [0.8418782, 0.2809324, 0.9604310, 0.4823373], abs=1e-5
    )
    assert attended[:4, 0].tolist() == pytest.approx([58.09200, 16.14867, 19.28070, 7.763077], abs=1e-2)
    assert attended[:4, 6].tolist() == pytest.approx([61.74574, 10.72519, 43.69891, 0.4401764], abs=1e-2)
    assert plain[:4, 0].tolist() == pytest.approx([61.85192, 14.21871, 22.37795, 6.461782], abs=1e-2)
    assert attended.norm().item() == pytest.approx(935.5118, rel=1e-5)
    assert plain.norm().item() == pytest.approx(926.0250, rel=1e-5)
