"""What training is fed with, in either task: batches of clips, and who provides them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

Keys = list[tuple[int, int, int]]  # (position in a dataset, epoch, part)


@dataclass
class ClipBatch:
    """Clips of one step.

    Args:
        clips: (B, C, T, H, W), uint8.
        targets: what the task knows about them, by name; each (B, ...).
        samples: a number of each that seeds its noise.
    """

    clips: Tensor
    targets: dict[str, Tensor]
    samples: list[int]

    def pin_memory(self) -> ClipBatch:
        """The same in page-locked memory; the loader asks for it where clips go to a GPU."""
        pinned = {name: value.pin_memory() for name, value in self.targets.items()}
        return ClipBatch(self.clips.pin_memory(), pinned, self.samples)


class Clips(Protocol):
    """A dataset of clips, named by (position, epoch, part)."""

    def __len__(self) -> int:
        """How many."""

    def __getitems__(self, keys: Keys) -> Any:
        """Of a batch, or the error that reading one of them met."""

    def collate(self, items: Any) -> ClipBatch:
        """A batch of what `__getitems__` returns."""

    def name_of(self, sample: int) -> str:
        """Which clip a message means."""

    def digest(self) -> str:
        """Changes with the clips' order and with all that is seen of them but what settings say."""


def splice(clips: Tensor, targets: dict[str, Tensor]) -> Tensor | None:
    """The spliced versions (b, C, T, H, W) of those of `clips` (B, C, T, H, W) that have one (METHOD.md 5).

    Args:
        clips: on any device.
        targets: with `spliced` (B,), whether there is one, and `splices` (B, T), which frame comes when.
    """
    if "spliced" not in targets or not targets["spliced"].any():
        return None
    rows = targets["spliced"].nonzero()[:, 0]
    order = targets["splices"][rows][:, None, :, None, None]
    chosen = clips[rows]
    return chosen.gather(2, order.expand(-1, chosen.shape[1], -1, *chosen.shape[3:]))
