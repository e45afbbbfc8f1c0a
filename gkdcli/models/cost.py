"""What a network costs: parameters and multiply-adds, counted on the meta device (no memory, no time)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Cost:
    """Parameters, and multiply-adds of one forward pass of one clip in units of 10^9."""

    parameters: int
    gmac: float


def cost(build: Callable[[], nn.Module], clip: tuple[int, int, int, int]) -> Cost:
    """Counts a network.

    Args:
        build: makes it; called on the meta device.
        clip: (C, T, H, W) of its input.
    """
    with torch.device("meta"):
        network = build().eval().to("meta")
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            network(torch.empty(1, *clip))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Cost(parameters, counter.get_total_flops() / 2 / 1e9)
