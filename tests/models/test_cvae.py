"""The CVAE against the layers of the paper, and where its gradients go."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gkdcli.models.cvae import CVAE

SHAPE = (16, 3, 2, 4)  # (C, T', H, W)


@pytest.fixture
def drawn():
    """The CVAE, a feature, an attention map, noise: in float64."""
    torch.manual_seed(0)
    module = CVAE(SHAPE).double()
    feature = torch.rand(2, *SHAPE, dtype=torch.float64)
    attention = torch.rand(2, 16, 3, dtype=torch.float64)
    return module, feature, attention, torch.randn(2, 3, 16, dtype=torch.float64)


def test_forward_equals_the_paper_layer_by_layer(drawn):
    module, feature, attention, noise = drawn
    got = module(feature, attention, noise)
    encoder, decoder = module.encoder, module.decoder
    for batch in range(2):
        low = F.relu(encoder.norm(encoder.conv(feature[batch : batch + 1])))[0, :, :, 0, 0]  # (C, T')
        latents = []
        for time in range(3):
            a = attention[batch, :, time]
            x = torch.cat([low[:, time], a])
            x = encoder.fc3(F.relu(encoder.fc2(F.relu(encoder.fc1(x)))))
            mean, log_var = x[:16], x[16:]
            torch.testing.assert_close(got.mean[batch, time], mean)
            torch.testing.assert_close(got.log_var[batch, time], log_var)
            z = mean + torch.exp(log_var / 2) * noise[batch, time]
            x = torch.cat([z, a])
            latents.append(decoder.fc3(F.relu(decoder.fc2(F.relu(decoder.fc1(x))))))
        x = torch.stack(latents, dim=1)[None, :, :, None, None]
        torch.testing.assert_close(got.feature[batch : batch + 1], F.relu(decoder.norm(decoder.conv(x))))


def test_generation_decodes_attention_plus_noise(drawn):
    module, feature, attention, noise = drawn
    generated = module.generate(attention, noise)
    assert generated.shape == feature.shape
    latent = attention.transpose(1, 2) + noise
    torch.testing.assert_close(generated, module.decoder(latent, attention))


def test_gradient_reaches_attention_and_feature_through_a_frozen_cvae(drawn):
    module, feature, attention, noise = drawn
    module.requires_grad_(False)
    attention.requires_grad_()
    feature.requires_grad_()
    F.mse_loss(module.generate(attention, noise), feature).backward()
    assert attention.grad.abs().min() > 0
    assert feature.grad.abs().min() > 0
    assert all(parameter.grad is None for parameter in module.parameters())


def test_every_parameter_learns_from_a_reconstruction(drawn):
    module, feature, attention, noise = drawn
    result = module(feature, attention, noise)
    (
        F.mse_loss(result.feature, feature) + result.mean.square().mean() + result.log_var.square().mean()
    ).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())


def test_samples_do_not_touch_each_other(drawn):
    module, feature, attention, noise = drawn
    together = module(feature, attention, noise).feature
    alone = module(feature[1:], attention[1:], noise[1:]).feature
    torch.testing.assert_close(together[1:], alone)
