"""Randomness of a step, drawn per sample: it depends on (seed, epoch, part, sample) and on nothing else.

So a resumed run, another batch size or another number of processes sees the same noise and dropout.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_NOISE = 3  # first word of the seeds, see `data.clips._VIEWS`


class Noise:
    """Draws for the samples of one batch; successive calls continue each sample's own stream.

    Args:
        seed: of the run.
        epoch: counted from 1.
        part: 0 for the generator pass, 1 for the network pass.
        samples: one number per sample of the batch, its row in the store.
        device: where the draws are wanted; they are made on the CPU, so that devices agree.
    """

    def __init__(
        self, seed: int, epoch: int, part: int, samples: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        self._device = device
        self._streams = []
        for sample in samples:
            state = np.random.SeedSequence([_NOISE, seed, epoch, part, sample]).generate_state(1, np.uint64)
            self._streams.append(torch.Generator().manual_seed(int(state[0] >> np.uint64(1))))

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal (B, ...)."""
        assert shape[0] == len(self._streams), "one stream per sample"
        drawn = torch.stack([torch.randn(tuple(shape[1:]), generator=g) for g in self._streams])
        return drawn.to(self._device)

    def keep(self, shape: Sequence[int], probability: float) -> Tensor | None:
        """A dropout mask (B, ...), divided by the probability of keeping; None where nothing is dropped."""
        assert shape[0] == len(self._streams), "one stream per sample"
        if probability == 0:
            return None
        drawn = torch.stack([torch.rand(tuple(shape[1:]), generator=g) for g in self._streams])
        return (drawn >= probability).float().div_(1 - probability).to(self._device)
