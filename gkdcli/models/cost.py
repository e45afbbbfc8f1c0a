"""What a network costs: parameters and multiply-adds, counted on the meta device (no memory, no time)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, UntypedStorage, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Cost:
    """What a forward pass of one clip takes, in float32.

    Args:
        parameters: how many.
        gmac: multiply-adds in units of 10^9.
        kept_bytes: what is kept for a backward pass, without the parameters.
        largest_bytes: the largest tensor of it.
    """

    parameters: int
    gmac: float
    kept_bytes: int
    largest_bytes: int


def cost(build: Callable[[], nn.Module], clip: tuple[int, int, int, int]) -> Cost:
    """Counts a network.

    Args:
        build: makes it; called on the meta device.
        clip: (C, T, H, W) of its input.
    """
    with torch.device("meta"):
        network = build().eval().to("meta")
        counter = FlopCounterMode(display=False)
        kept: dict[int, UntypedStorage] = {}  # by address of what PyTorch knows it by

        def keep(value: Tensor) -> Tensor:
            storage = value.untyped_storage()
            kept[storage._cdata] = storage
            return value

        with counter, saved_tensors_hooks(keep, lambda value: value):
            network(torch.empty(1, *clip))
    for parameter in network.parameters():
        kept.pop(parameter.untyped_storage()._cdata, None)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    sizes = [storage.nbytes() for storage in kept.values()]
    return Cost(parameters, counter.get_total_flops() / 2 / 1e9, sum(sizes), max(sizes, default=0))
