"""Recorded figures of the published student, quoted so that parity is tested without the golden files."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gkdcli.losses.distill import ramp
from gkdcli.models.attention import attend
from gkdcli.models.network import build_cvae
from gkdcli.models.recognizer import Recognizer
from gkdcli.models.weights import fit
from gkdcli.settings import Settings
from gkdcli.tasks.recognition import supervised_terms
from gkdcli.training.steps import Networks, generator_terms, network_terms, see, total
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
    "Mixed_5c.encoder.conv.": "cencoder.con1.0.",
    "Mixed_5c.encoder.norm.": "cencoder.con1.1.",
    "Mixed_5c.encoder.": "cencoder.",
    "Mixed_5c.decoder.conv.": "cdecoder.deconv.0.",
    "Mixed_5c.decoder.norm.": "cdecoder.deconv.1.",
    "Mixed_5c.decoder.": "cdecoder.",
}


def official(name: str) -> str:
    ours = next(ours for ours in NAMES if name.startswith(ours))
    return NAMES[ours] + name.removeprefix(ours)


def with_recorded_weights(module: torch.nn.Module, salt: str = "") -> torch.nn.Module:
    tensors = {
        name: torch.from_numpy(filled(salt + official(name), tuple(value.shape)))
        for name, value in module.state_dict().items()
    }
    assert fit(module, tensors).complete
    return module.eval()


def recorded_clip(seed: int) -> torch.Tensor:
    """Random constants on 8x32x32 blocks plus fine noise, (1, 3, 64, 224, 224)."""
    draw = np.random.default_rng(seed)
    coarse = draw.standard_normal((1, 3, 8, 7, 7), dtype=np.float32)
    fine = draw.standard_normal((1, 3, 64, 224, 224), dtype=np.float32)
    for axis, times in zip((2, 3, 4), (8, 32, 32), strict=True):
        coarse = coarse.repeat(times, axis)
    return torch.from_numpy(np.float32(1.5) * coarse + np.float32(0.5) * fine)


def test_student_forward_of_the_published_code():
    model = with_recorded_weights(Recognizer("top-i3d", 101, length=64, crop=224))
    with torch.no_grad():
        features = model.features(recorded_clip(105))
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


class QuotedNoise:
    """The recorded draws of a step."""

    def __init__(self) -> None:
        self.draws = 0

    def normal(self, shape: tuple[int, ...]) -> torch.Tensor:
        drawn = np.random.default_rng(106000 + self.draws).standard_normal(shape, dtype=np.float32)
        self.draws += 1
        return torch.from_numpy(drawn)

    def keep(self, shape: tuple[int, ...], probability: float) -> None:
        return None


def test_terms_of_one_distillation_step_of_the_published_code():
    """Both stages on one clip, batch norm by the clip; gradients need the golden files and more memory."""
    page, noise, clip = Settings(recipe="official"), QuotedNoise(), recorded_clip(106)
    label = {"labels": torch.tensor([10])}
    networks = Networks(*(student := built("top-i3d", "")), *built("i3d", "teacher:"))
    student[0].train()
    with torch.no_grad():
        seen = see(networks.forward, networks.student, clip)
        first = generator_terms(networks, seen, noise, page.distill)
        second = network_terms(
            networks,
            clip,
            seen,
            noise,
            ramp(5, page.distill.ramp_epochs),
            page.distill,
            lambda ours, _, n: supervised_terms(networks.student, ours, None, label, n, page),
        )
    found = {name.split(".")[0]: term.value.item() for name, term in (first | second).items()}
    assert found.pop("cvae_reconstruction") + found.pop("cvae_kl") == pytest.approx(0.8643842, rel=1e-4)
    assert found == pytest.approx(
        {
            "generative_distillation": 0.7844646,
            "classification": 4.5485597,
            "reconstruction": 0.7690767,
            "attention_distillation": 0.0439362,
        },
        rel=1e-4,
    )
    assert total(first).item() == pytest.approx(0.8722289, rel=1e-4)
    assert total(second).item() == pytest.approx(4.6490879, rel=1e-4)


def built(kind: str, salt: str) -> tuple[Recognizer, torch.nn.ModuleDict]:
    network = Recognizer(kind, 101, length=64, crop=224)
    with_recorded_weights(network, salt)
    generators = build_cvae(network)
    with_recorded_weights(generators, salt)
    return network, generators
