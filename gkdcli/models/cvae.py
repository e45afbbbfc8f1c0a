"""The conditional VAE that reconstructs a tap's feature given its attention (METHOD.md 3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkdcli.models.layers import collapse, groups, spread


class Reconstruction(NamedTuple):
    """What one pass through the CVAE gives: feature (B, C, T', H, W), mean and log-variance (B, T', C)."""

    feature: Tensor
    mean: Tensor
    log_var: Tensor


class Encoder(nn.Module):
    """Feature and attention to the distribution of the latent."""

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, (1, height, width))
        self.norm = nn.GroupNorm(groups(channels), channels)
        self.fc1 = nn.Linear(2 * channels, channels)
        self.fc2 = nn.Linear(channels, channels)
        self.fc3 = nn.Linear(channels, 2 * channels)

    def forward(self, feature: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        """Feature (B, C, T', H, W), attention (B, C, T') -> mean and log-variance, each (B, T', C)."""
        x = F.relu(self.norm(collapse(self.conv, feature)))  # (B, C, T'): H and W are gone
        x = torch.cat([x, attention], dim=1).transpose(1, 2)  # (B, T', 2C)
        x = self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))
        mean, log_var = x.chunk(2, dim=-1)
        return mean, log_var


class Decoder(nn.Module):
    """Latent and attention to the feature."""

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2 * channels, channels)
        self.fc2 = nn.Linear(channels, channels)
        self.fc3 = nn.Linear(channels, channels)
        self.conv = nn.ConvTranspose3d(channels, channels, (1, height, width))
        self.norm = nn.GroupNorm(groups(channels), channels)

    def forward(self, latent: Tensor, attention: Tensor) -> Tensor:
        """Latent (B, T', C), attention (B, C, T') -> feature (B, C, T', H, W)."""
        x = torch.cat([latent, attention.transpose(1, 2)], dim=-1)  # (B, T', 2C)
        x = self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))
        return F.relu(self.norm(spread(self.conv, x.transpose(1, 2))))


class CVAE(nn.Module):
    """Encoder and decoder of one tap; the prior of the latent given the attention a is N(a, I).

    Noise is an argument, (B, T', C) standard normal, so that the caller seeds it per sample.

    Args:
        tap_shape: (C, T', H, W) of the tap.
    """

    def __init__(self, tap_shape: tuple[int, int, int, int]) -> None:
        super().__init__()
        channels, _, height, width = tap_shape
        self.encoder = Encoder(channels, height, width)
        self.decoder = Decoder(channels, height, width)

    def forward(self, feature: Tensor, attention: Tensor, noise: Tensor) -> Reconstruction:
        """Encodes, draws z = mean + exp(log_var / 2) * noise, decodes."""
        mean, log_var = self.encoder(feature, attention)
        latent = mean + torch.exp(0.5 * log_var) * noise
        return Reconstruction(self.decoder(latent, attention), mean, log_var)

    def generate(self, attention: Tensor, noise: Tensor) -> Tensor:
        """Decodes z = a + noise, a draw from the prior: (B, C, T') -> (B, C, T', H, W)."""
        generated: Tensor = self.decoder(attention.transpose(1, 2) + noise, attention)
        return generated
