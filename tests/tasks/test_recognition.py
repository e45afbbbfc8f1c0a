"""tasks.recognition: which feature is classified, in training and in evaluation, and by which loss."""

from __future__ import annotations

import pytest
import torch

from gkdcli.losses.distill import classification_loss
from gkdcli.models.attention import attend
from gkdcli.tasks.recognition import build_network, supervised_terms
from gkdcli.training.forward import Forward
from gkdcli.training.noise import Noise
from gkdcli.training.steps import see
from tests.training.jobs import page

LABELS = torch.tensor([1, 0])


@pytest.fixture(scope="module")
def clips() -> torch.Tensor:
    return torch.randn(2, 3, 16, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build_network(page(model__dropout=0.0), "student", 3, "rgb").train()


def terms(network, clips, recipe, labels=LABELS, dropout_noise=None):
    seen = see(Forward(), network, clips)
    noise = dropout_noise or Noise(0, 1, 1, range(len(labels)))
    found = supervised_terms(network, seen, None, {"labels": labels}, noise, page(recipe=recipe))
    return found.terms, seen.features["Mixed_5c"]


@pytest.mark.parametrize(("role", "kind"), [("teacher", "i3d"), ("student", "top-i3d")])
def test_teacher_and_student_differ_in_their_backbone_alone(role, kind):
    network = build_network(page(), role, 5, "rgb")
    assert network.backbone.kind == kind
    assert network.classifier.out_channels == 5
    assert network.dropout == 0.5
    assert build_network(page(), role, 5, "flow").backbone.Conv3d_1a_7x7.conv3d.in_channels == 2
    assert not build_network(page(), role, 5, "rgb", attention=False).attention


@pytest.mark.parametrize(("recipe", "over"), [("official", "batch"), ("corrected", "sample")])
def test_the_attended_feature_is_classified_by_the_recipes_sums_and_loss(network, clips, recipe, over):
    with torch.no_grad():
        found, feature = terms(network, clips, recipe)
        attended = attend(feature, network.attend({"Mixed_5c": feature})["Mixed_5c"], over)
        expected = classification_loss(network.logits(attended), LABELS, recipe)
    assert list(found) == ["classification"]
    assert found["classification"].weight == 1.0
    torch.testing.assert_close(found["classification"].value, expected)


def test_the_sums_over_the_batch_tie_samples_together_those_per_sample_do_not(network, clips):
    """What makes `official` depend on the batch (METHOD.md 8 (5)); batch norm is put aside here."""
    network.eval()
    torch.manual_seed(1)
    feature = torch.rand(2, 64, 2, 1, 1) * torch.tensor([1.0, 5.0])[:, None, None, None, None]
    attention = torch.rand(2, 64, 2) * torch.tensor([0.2, 1.0])[:, None, None]
    for over, tied in (("batch", True), ("sample", False)):
        together = attend(feature, attention, over)
        alone = attend(feature[:1], attention[:1], over)
        assert torch.allclose(together[:1], alone, rtol=1e-4) is not tied
        assert together.sum().item() == pytest.approx(feature.sum().item(), rel=1e-5)
    network.train()


def test_the_plain_student_classifies_the_plain_feature(clips):
    torch.manual_seed(0)
    plain = build_network(page(model__dropout=0.0), "student", 3, "rgb", attention=False).train()
    with torch.no_grad():
        found, feature = terms(plain, clips, "corrected")
        expected = classification_loss(plain.logits(feature), LABELS, "corrected")
    torch.testing.assert_close(found["classification"].value, expected)


def test_dropout_comes_from_the_samples_own_noise(clips):
    torch.manual_seed(0)
    network = build_network(page(model__dropout=0.5), "student", 3, "rgb").eval()
    with torch.no_grad():
        first, _ = terms(network, clips, "corrected", dropout_noise=Noise(0, 1, 1, [4, 5]))
        again, _ = terms(network, clips, "corrected", dropout_noise=Noise(0, 1, 1, [4, 5]))
        other, _ = terms(network, clips, "corrected", dropout_noise=Noise(0, 2, 1, [4, 5]))
    assert torch.equal(first["classification"].value, again["classification"].value)
    assert not torch.equal(first["classification"].value, other["classification"].value)


@pytest.mark.parametrize(
    ("modality", "recipe", "attended"),
    [
        ("rgb", "official", True),
        ("rgb", "corrected", True),
        ("flow", "official", False),
        ("flow", "corrected", True),
    ],
)
def test_evaluation_takes_the_attended_feature_but_for_official_flow(modality, recipe, attended):
    channels = 2 if modality == "flow" else 3
    torch.manual_seed(0)
    network = build_network(page(recipe=recipe), "student", 3, modality).eval()
    clips = torch.randn(2, channels, 16, 32, 32)
    with torch.no_grad():
        found = network.time_logits(clips)
        features = network.features(clips)
        feature = features["Mixed_5c"]
        if attended:  # per clip in every recipe
            feature = attend(feature, network.attend(features)["Mixed_5c"], "sample")
        assert torch.equal(found, network.logits(feature))
    assert found.shape == (2, 3, 1)
