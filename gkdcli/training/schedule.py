"""The order of a run: epochs of one or two passes over the clips, batches, and groups of batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from gkdcli.data.batches import Keys
from gkdcli.data.loader import training_order
from gkdcli.settings import OptimSettings, Settings
from gkdcli.training.optim import rate_factor

GENERATOR, NETWORK = 0, 1  # the passes of an epoch, as their seeds know them


def passes(generators: bool, schedule: str) -> tuple[int, ...]:
    """The passes of an epoch: schedule `step`, or a network without CVAE, has one (METHOD.md 4)."""
    return (GENERATOR, NETWORK) if generators and schedule == "epoch" else (NETWORK,)


def schedule_of(
    settings: Settings, clips: int, generators: bool, processes: int = 1, rank: int = 0
) -> Schedule:
    """The order of a run over so many training clips; `generators`: whether CVAEs are trained."""
    parts = passes(generators, settings.train.schedule)
    drop_last = settings.task == "detection"  # as published (METHOD.md 4)
    return Schedule(clips, parts, settings.train.seed, settings.optim, drop_last, processes, rank)


class Spot(NamedTuple):
    """Of a step: its epoch (from 1), pass, and batch within the pass (from 0)."""

    epoch: int
    part: int
    batch: int


@dataclass(frozen=True)
class Schedule:
    """Pure arithmetic: where a run stands is the caller's.

    A *step* is one batch. Batches whose gradients add up (`optim.accumulation`) form a group within a pass,
    the last of a pass may be shorter; the optimiser moves where a group closes.

    Several processes share each batch, `optim.batch_size` clips each. A smaller one is divided as evenly as
    may be; who would get nothing takes its last clip, with weight 0.

    Args:
        clips: training videos.
        parts: the passes of an epoch, as the numbers that seeds know them by.
        seed: of the order.
        optim: settings.
        drop_last: a last batch that is not full is left out, as detection does.
        processes: how many share a batch.
        rank: which of them this is, from 0.
    """

    clips: int
    parts: tuple[int, ...]
    seed: int
    optim: OptimSettings
    drop_last: bool = False
    processes: int = 1
    rank: int = 0

    @property
    def batch_size(self) -> int:
        """Clips of a full batch, of all processes."""
        return self.optim.batch_size * self.processes

    @property
    def batches(self) -> int:
        """Of one pass."""
        if self.drop_last:
            return self.clips // self.batch_size
        return -(-self.clips // self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of all passes."""
        return len(self.parts) * self.batches

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.optim.epochs * self.steps_per_epoch

    def spot(self, step: int) -> Spot:
        """Where a step lies; steps count from 0 over the whole run."""
        passes, batch = divmod(step, self.batches)
        epoch, number = divmod(passes, len(self.parts))
        return Spot(epoch + 1, self.parts[number], batch)

    def closes(self, batch: int) -> bool:
        """Whether the optimiser moves after this batch of a pass, counted from 0."""
        return (batch + 1) % self.optim.accumulation == 0 or batch + 1 == self.batches

    def share(self, batch: int) -> float:
        """The weight of this process's mean loss in that of the group: its part of the group's clips."""
        first = batch - batch % self.optim.accumulation
        group = self._clips_before(first + self.optim.accumulation) - self._clips_before(first)
        return self.own(batch) / group

    def size(self, batch: int) -> int:
        """How many clips a batch has."""
        return self._clips_before(batch + 1) - self._clips_before(batch)

    def own(self, batch: int) -> int:
        """How many clips of a batch are this process's."""
        each, more = divmod(self.size(batch), self.processes)
        return each + (self.rank < more)  # an earlier process never has fewer than a later one

    def _first(self, batch: int) -> int:
        """Where they begin among the batch's clips."""
        each, more = divmod(self.size(batch), self.processes)
        return self.rank * each + min(self.rank, more)

    def _clips_before(self, batch: int) -> int:
        return min(min(batch, self.batches) * self.batch_size, self.clips)

    def rate(self, step: int) -> float:
        """The factor of both learning rates, the same for all batches of a group."""
        done = step - self.spot(step).batch % self.optim.accumulation
        return rate_factor(self.optim, done / self.steps_per_epoch)

    def last_step(self, max_steps: int | None) -> int:
        """Where to stop: at the end, or at the first closed group from `max_steps` on.

        A stop within a group would lose the gradients it has gathered, and a continuation would differ.
        """
        if max_steps is None or max_steps >= self.steps:
            return self.steps
        passes, rest = divmod(max_steps, self.batches)
        groups = -(-rest // self.optim.accumulation)
        return passes * self.batches + min(groups * self.optim.accumulation, self.batches)

    def keys(self, step: int, last_step: int) -> Iterator[Keys]:
        """The batches of steps [step, last_step), this process's part of each."""
        while step < last_step:
            epoch, part, batch = self.spot(step)
            order = training_order(self.clips, self.batch_size, self.seed, epoch, part)
            chosen = order[batch : self.batches][: last_step - step]
            for number, keys in enumerate(chosen, batch):
                first = self._first(number)
                yield keys[first : first + self.own(number)] or keys[-1:]
            step += len(chosen)
