"""Clips that tell how long their reading took, in whatever process: for `--profile`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from gkdcli.data.batches import ClipBatch, Clips, Keys
from gkdcli.data.clock import Clock, running
from gkdcli.errors import GkdError


@dataclass
class TimedBatch(ClipBatch):
    """A batch, and the seconds that its process spent on it: read, decode, augment, collate."""

    seconds: dict[str, float] = field(default_factory=dict)

    def pin_memory(self) -> TimedBatch:
        """As `ClipBatch.pin_memory`."""
        return TimedBatch(**vars(ClipBatch.pin_memory(self)) | {"seconds": self.seconds})


class TimedClips:
    """The same clips, in timed batches.

    Args:
        clips: of either task.
    """

    def __init__(self, clips: Clips) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitems__(self, keys: Keys) -> tuple[Any, Clock]:
        """What the clips give, and the clock that ran; what is neither read nor decoded is augmented."""
        with running(Clock(torch.device("cpu"))) as clock:
            clock.at("augment")
            return self.clips.__getitems__(keys), clock

    def collate(self, items: Any) -> Any:
        """A timed batch of what `__getitems__` returns, or the error in it."""
        found, clock = items
        if isinstance(found, GkdError):
            return found
        clock.at("collate")
        batch = self.clips.collate(found)
        clock.at("")
        return TimedBatch(**vars(batch), seconds=dict(clock.seconds))

    def name_of(self, sample: int) -> str:
        """Which clip a message means."""
        return self.clips.name_of(sample)

    def digest(self) -> str:
        """That of the clips."""
        return self.clips.digest()
