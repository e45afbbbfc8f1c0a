"""The recognition network: classifier, dropout mask, export graph."""

from __future__ import annotations

import pytest
import torch

from gkdcli.models.attention import attend
from gkdcli.models.network import build_cvae
from gkdcli.models.recognizer import Recognizer


def network(kind: str = "top-i3d", attention: str | None = "official") -> Recognizer:
    torch.manual_seed(0)
    model = Recognizer(kind, 5, length=32, crop=64, width=0.125, attention=attention).eval()
    model.train()(torch.randn(4, 3, 32, 64, 64))  # batch norm sees data, so that features depend on the clip
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm3d):
            part.momentum = None
            part.reset_running_stats()
    model(torch.randn(4, 3, 32, 64, 64))
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Recognizer:
    return network()


@pytest.fixture(scope="module")
def clip() -> torch.Tensor:
    return torch.randn(2, 3, 32, 64, 64, generator=torch.Generator().manual_seed(1))


def test_logits_average_pairs_of_time_steps(model, clip):
    with torch.no_grad():
        feature = model.features(clip)["Mixed_5c"]
        got = model.logits(feature)
    weight, bias = model.classifier.weight.flatten(1), model.classifier.bias
    assert got.shape == (2, 5, 3)
    for time in range(3):
        pooled = feature[:, :, time : time + 2].mean((2, 3, 4))
        torch.testing.assert_close(got[:, :, time], pooled @ weight.T + bias)


def test_keep_multiplies_what_the_classifier_sees(model, clip):
    with torch.no_grad():
        feature = model.features(clip)["Mixed_5c"]
        assert model.dropout_shape(2) == (2, feature.shape[1], 3, 1, 1)
        nothing = model.logits(feature, torch.zeros(model.dropout_shape(2)))
        everything = model.logits(feature, torch.ones(model.dropout_shape(2)))
        torch.testing.assert_close(nothing, model.classifier.bias[None, :, None].expand(2, 5, 3))
        torch.testing.assert_close(everything, model.logits(feature))


def test_forward_classifies_the_feature_attended_per_sample(model, clip):
    with torch.no_grad():
        features = model.features(clip)
        attention = model.attend(features)
        assert set(attention) == {"Mixed_5c"}
        attended = attend(features["Mixed_5c"], attention["Mixed_5c"], over="sample")
        together = model(clip)
        torch.testing.assert_close(together, model.logits(attended).mean(dim=2))
        torch.testing.assert_close(together[1:], model(clip[1:]), rtol=1e-4, atol=1e-5)


def test_without_attention_there_is_none(clip):
    plain = network("i2d", attention=None)
    assert not any(name.startswith("attention") for name in plain.state_dict())
    with torch.no_grad():
        features = plain.features(clip)
        assert plain.attend(features) == {}
        torch.testing.assert_close(plain(clip), plain.logits(features["Mixed_5c"]).mean(dim=2))


@pytest.mark.parametrize("kind", ["i3d", "top-i3d", "bottom-i3d", "i2d"])
def test_every_parameter_of_every_kind_learns(kind):
    torch.manual_seed(0)
    model = Recognizer(kind, 3, length=16, crop=32, channels=2, width=0.0625)
    model(torch.randn(3, 2, 16, 32, 32)).square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert idle == []


def test_cvae_serves_the_taps_in_use_only(model):
    cvae = build_cvae(model)
    assert list(cvae) == ["Mixed_5c"]
    assert sum(p.numel() for p in cvae.parameters()) > 0


@pytest.mark.parametrize(("kind", "count"), [("i3d", 39_681_190), ("top-i3d", 37_823_014)])
def test_sizes_of_the_published_networks_with_buffers(kind, count):
    with torch.device("meta"):
        model = Recognizer(kind, 101, length=64, crop=224)
    assert sum(value.numel() for value in model.state_dict().values()) == count


def test_graph_is_exportable_with_a_free_batch_size():
    model = Recognizer("top-i3d", 4, length=16, crop=64, width=0.125).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        model, (torch.randn(2, 3, 16, 64, 64),), dynamic_shapes={"clip": {0: batch}}
    )
    for count in (1, 3):
        clip = torch.randn(count, 3, 16, 64, 64)
        torch.testing.assert_close(program.module()(clip), model(clip))
