"""One loop for both stages of both phases (METHOD.md 4): schedules, checkpoints, resume, interruption."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from lightning_fabric import Fabric
from torch import Tensor

from gkdcli.console import Console
from gkdcli.data.batches import ClipBatch, Clips, splice
from gkdcli.data.clips import normalise
from gkdcli.data.clock import at, spent
from gkdcli.data.loader import load, lost_worker
from gkdcli.errors import ExitCode, GkdError, Interrupted
from gkdcli.files import sweep_temporaries
from gkdcli.losses.distill import ramp
from gkdcli.losses.segments import Divisors
from gkdcli.runs import Run
from gkdcli.settings import Settings
from gkdcli.training import checkpoint
from gkdcli.training.checkpoint import Position, State
from gkdcli.training.journal import Journal
from gkdcli.training.noise import Noise
from gkdcli.training.processes import Group
from gkdcli.training.schedule import GENERATOR, schedule_of
from gkdcli.training.steps import (
    Networks,
    Seen,
    Supervised,
    Term,
    generator_terms,
    held_statistics,
    network_terms,
    see,
    total,
)
from gkdcli.training.stopping import Report, StopRequest, Values, mean_values, not_finite, out_of_memory
from gkdcli.training.teacher_cache import taught
from gkdcli.training.updates import Updates, scales, updates_of

PASSES = ("generator", "network")


class SupervisedTerms(Protocol):
    """A task's own loss terms."""

    def __call__(
        self,
        network: Any,
        seen: Seen,
        spliced: Seen | None,
        targets: dict[str, Tensor],
        noise: Noise,
        settings: Settings,
        divisors: Divisors,
        spliced_part: Tensor | float,
    ) -> Supervised:
        """See the tasks."""


@dataclass
class Job:
    """What is to be trained on what.

    Args:
        networks: all in play; the student and its generators are trained.
        settings: the resolved page.
        dataset: training views.
        supervised: the task's terms.
        score: what `validate` gives, for example `top1`.
        validate: score on the held-out clips, higher is better; None where nothing is held out.
        warm_up: about two validation batches, run before step 1.
        resume_command: what the user types to go on.
    """

    networks: Networks
    settings: Settings
    dataset: Clips
    supervised: SupervisedTerms
    score: str
    validate: Callable[[], float] | None
    warm_up: Callable[[], object]
    resume_command: str


class Trainer:
    """Trains a `Job` in a run folder.

    Every random draw is named by (seed, epoch, pass, sample) and weights, optimisers and position are in the
    checkpoint, so a run that was stopped and continued ends with the very same weights.

    With accumulation the gradients of several batches add up to that of one batch of all their clips, except
    that batch norm knows each batch by itself, and so do the batch-wide sums of recipe `official` and what
    detection divides by: its counts of matched priors and of spliced clips.

    Several processes do the same steps at the same time, each on its part of a batch, and so hold the same
    weights; but for batch norm and for recipe `official`'s sums a batch is one, whoever its clips belong to.
    The first process alone writes, says and validates.

    Args:
        job: what.
        run: where; it is locked by the caller.
        console: who is told.
        fabric: devices.
        group: the processes; default: this one alone.
    """

    def __init__(
        self, job: Job, run: Run, console: Console, fabric: Fabric, group: Group | None = None
    ) -> None:
        self.job, self.run, self.console, self.fabric = job, run, console, fabric
        self.group = group or Group()
        settings, networks = job.settings, job.networks
        for module in (networks.student, networks.generators, networks.teacher, networks.teacher_generators):
            if module is not None:
                fabric.to_device(module)
        for module in (networks.teacher, networks.teacher_generators):
            if module is not None:
                module.eval().requires_grad_(False)
        self.group.spread(networks.student, networks.generators)
        self.updates, self.generator_updates = updates_of(
            networks, settings.optim, scaled=settings.train.precision == "fp16"
        )
        both = networks.generators is not None
        self.shared = both and settings.train.schedule == "step"  # one student forward serves both stages
        self.schedule = schedule_of(settings, len(job.dataset), both, self.group.size, self.group.rank)
        self.position = Position()
        first, tensorboard = self.group.first, settings.train.tensorboard
        self.journal = Journal(run, console, job.score, first, fabric.device, tensorboard)
        self._stop = StopRequest(console, alone=self.group.size == 1)
        self._saved, self._saved_step = 0.0, 0  # when, by the monotonic clock

    @property
    def epoch(self) -> int:
        """The epoch in work, or the one after the last where all are done."""
        return self.schedule.spot(self.position.step).epoch

    def fit(self, max_steps: int | None) -> None:
        """Trains to the last epoch, to `max_steps`, or until interrupted; the run's state says which.

        Raises:
            Interrupted: Ctrl-C or SIGTERM, after a checkpoint.
            GkdError: a loss that is not finite, no memory, no disk.
        """
        last = self.schedule.last_step(max_steps)
        title = f"{self.run.record['stage']} {self.run.record['preset']}"
        with self._failures(), self._stop, self.console.progress(title, last) as tick:
            self.job.warm_up()
            self._saved = time.monotonic()
            started = self._saved - self.position.seconds
            self._give_way(last)
            with self.journal.open(self.position.step), contextlib.closing(self.batches(last)) as batches:
                for batch in self.journal.awaited(batches):
                    closed = self._train_on(batch)
                    self.position.seconds = time.monotonic() - started
                    self.journal.show(tick, self.position.step, self._progress_text())
                    if closed:
                        self._give_way(last)
            self.save()
        complete = self.position.step >= self.schedule.steps
        self._record(state="complete" if complete else "cut", seconds=self.position.seconds)

    def _train_on(self, batch: ClipBatch) -> bool:
        """One step, and what is due after it; True where the optimiser moved."""
        spot = self.schedule.spot(self.position.step)
        closed = self.schedule.closes(spot.batch)
        values = self._step(batch)
        rate, clips = self.updates.optimizer.param_groups[0]["lr"], self.schedule.size(spot.batch)
        also = scales(self.updates, self.generator_updates)
        self.journal.step(self.position, spot.epoch, PASSES[spot.part], rate, values, clips, also)
        self.position.step += 1
        if self.position.step % self.schedule.steps_per_epoch == 0:
            self._end_epoch()
        return closed

    def _give_way(self, last_step: int) -> None:
        """Saves where it is time to, and stops where that was asked for; called between optimiser steps."""
        settings, step = self.job.settings.train, self.position.step
        late = time.monotonic() - self._saved > 60 * settings.checkpoint_minutes
        often = settings.checkpoint_steps
        counted = bool(often) and step // often > self._saved_step // often
        asked, due = self.group.agree(self._stop.made, (late or counted) and self.group.first)
        stop = asked and self.position.step < last_step
        if stop or due:
            self.save()
        if stop:
            self._record(state="interrupted")
            self.group.gather(None)  # nobody leaves before it is saved: torchrun would end the others
            raise Interrupted(
                f"interrupted at epoch {self.epoch}, step {self.position.step}; the state is saved",
                str(self.run.folder),
                f"`{self.job.resume_command}` continues",
            )

    # ---- one step ----

    def _step(self, batch: ClipBatch) -> Values:
        settings, networks, student = self.job.settings, self.job.networks, self.job.networks.student
        spot = self.schedule.spot(self.position.step)
        at("transfer")
        noise = Noise(settings.train.seed, spot.epoch, spot.part, batch.samples, self.fabric.device)
        targets = {name: self.fabric.to_device(value) for name, value in batch.targets.items()}
        clips = normalise(self.fabric.to_device(batch.clips), settings.clips, targets.get("frames"))
        at("losses_and_cvae")
        for updates in filter(None, (self.updates, self.generator_updates)):
            updates.set_rate(self.schedule.rate(self.position.step))
        if not student.training:  # validation has changed that
            student.train()
        if spot.part == GENERATOR:
            # the official code moves the running statistics here too (METHOD.md 8 (10))
            official = settings.recipe == "official"
            with torch.no_grad(), contextlib.nullcontext() if official else held_statistics(student):
                seen = spent("student_forward", see, networks.forward, student, clips)
            return self._generator_stage(seen, noise, batch)
        spliced = splice(clips, targets) if settings.distill.contrast_weight else None
        part: Tensor | float = 1.0
        if settings.distill.contrast_weight and "spliced" in targets:  # asked by all, whatever they have
            part = self.group.part(0 if spliced is None else len(spliced), self.fabric.device)
        if spliced is not None:  # in one pass with the others
            clips = torch.cat([clips, spliced])
        seen = spent("student_forward", see, networks.forward, student, clips)
        own = seen.divided(len(batch.samples))[0]
        before = self._generator_stage(own, noise, batch) if self.shared else {}
        if networks.generators is not None:
            networks.generators.requires_grad_(False)
        terms = network_terms(
            networks,
            clips,
            seen,
            noise,
            ramp(spot.epoch, settings.distill.ramp_epochs or settings.optim.epochs),
            settings.distill,
            lambda ours, more, n: self.job.supervised(
                student, ours, more, targets, n, settings, self.group.divisors, part
            ),
            0 if spliced is None else len(spliced),
            part,
            taught(targets),
        )
        values = self._descend(terms, self.updates, batch)
        return before | values | {"loss": before.get("loss", 0.0) + values["loss"]}

    def _generator_stage(self, seen: Seen, noise: Noise, batch: ClipBatch) -> Values:
        networks = self.job.networks
        assert networks.generators is not None
        assert self.generator_updates is not None
        networks.generators.requires_grad_(True)
        terms = generator_terms(networks, seen, noise, self.job.settings.distill)
        return self._descend(terms, self.generator_updates, batch)

    def _descend(self, terms: dict[str, Term], updates: Updates, batch: ClipBatch) -> Values:
        spot = self.schedule.spot(self.position.step)
        loss = total(terms)
        # one transfer from the device for all of them
        found = torch.stack([*(term.value.detach() for term in terms.values()), loss.detach()])
        values = dict(zip((*terms, "loss"), found.tolist(), strict=True))
        at("backward")
        self.fabric.backward(updates.scaled(loss * self.schedule.share(spot.batch)))
        at("exchange" if self.group.size > 1 else "optimizer")
        # with the gradients still this process's own: what fails up to here, fails before anyone waits for it
        reports = self.group.gather(
            Report(
                values,
                self.schedule.own(spot.batch),
                [self.job.dataset.name_of(sample) for sample in batch.samples[:5]],
                updates.have_gradients(),
            )
        )
        for report in reports:
            if not report.finite:
                kept = self.run.last if self.run.last.is_file() else None
                raise not_finite(report, self._moment(), self.job.settings, kept)
        if self.schedule.closes(spot.batch):
            updates.move(self.group, {*chain(*(report.moved for report in reports))})
        at("losses_and_cvae")
        return mean_values(reports)

    def batches(self, last_step: int) -> Generator[ClipBatch, None, None]:
        """All that is left of the run up to a step, so that workers read ahead across epochs."""
        keys = self.schedule.keys(self.position.step, last_step)
        pin = self.fabric.device.type == "cuda"
        return load(self.job.dataset, keys, self.job.settings.train.workers, pin)

    # ---- what is written ----

    def _end_epoch(self) -> None:
        """Means over the epoch's clips, validation, and a checkpoint."""
        position, epoch = self.position, self.epoch - 1
        means = {name: value / clips for name, (value, clips) in position.sums.items()}
        position.sums = {}
        if not self.group.first:
            return
        score = None
        if self.job.validate is not None:
            with self.updates.shown():
                score = self.job.validate()
            if position.best is None or score >= position.best:
                position.best, position.best_epoch = score, epoch
                checkpoint.save_best(self._state(), self.run, self.job.resume_command)
        self.journal.epoch(position, epoch, means, score)
        self._record()
        if position.step < self.schedule.steps:  # the last one is saved by `fit`
            self.save()

    def _progress_text(self) -> str:
        settings, position = self.job.settings.optim, self.position
        rate = position.step * self.schedule.batch_size / max(position.seconds, 1e-9)
        return f"epoch {min(self.epoch, settings.epochs)}/{settings.epochs}, {rate:.1f} clips/s"

    def _progress(self) -> dict[str, Any]:
        epochs = self.job.settings.optim.epochs
        return {
            "epoch": min(self.epoch, epochs),
            "epochs": epochs,
            "step": self.position.step,
            "best_epoch": self.position.best_epoch or None,
            f"best_held_out_{self.job.score}": self.position.best,
        }

    def _record(self, **fields: Any) -> None:
        if self.group.first:
            self.run.update(progress=self._progress(), **fields)

    def _moment(self) -> str:
        return f"epoch {self.epoch}, step {self.position.step + 1}"

    def save(self) -> None:
        """Writes the checkpoint that `restore` goes back to."""
        if self.group.first:
            self.journal.flush()
            checkpoint.save(
                self._state(), self.run, self.job.resume_command, self.job.settings.train.keep_checkpoints
            )
        self._saved, self._saved_step = time.monotonic(), self.position.step

    def restore(self) -> None:
        """Goes back to the run's last checkpoint; metrics after it are dropped.

        Raises:
            GkdError: the checkpoint is damaged or of another network, or other processes see another one.
        """
        if self.group.first:
            sweep_temporaries(self.run.folder)  # what a killed process left half written
        self.position = checkpoint.restore(self._state(), self.run)
        self._saved_step = self.position.step
        first, *others = self.group.gather(asdict(self.position))
        if any(other != first for other in others):
            raise GkdError(
                "the processes see different checkpoints",
                str(self.run.last),
                "`--root` must lie on a file system that all machines share",
            )
        self.journal.restore(self.position.step, self.epoch)

    def _state(self) -> State:
        networks = self.job.networks
        return State(
            networks.student, networks.generators, self.updates, self.generator_updates, self.position
        )

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Leaves the run in a state that says what happened; names what users can act on."""
        try:
            yield
        except Interrupted:
            raise
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt) or (
                isinstance(error, GkdError) and error.code == ExitCode.INTERRUPTED  # heard of another process
            )
            state = "interrupted" if stopped else "failed"
            with contextlib.suppress(OSError):  # a full disk may be what failed
                self._record(state=state)
                if self.group.first:
                    self.run.log(f"{state}: {error}")
            if isinstance(error, RuntimeError):
                device = self.fabric.device
                known = out_of_memory(error, self._moment(), self.job.settings, device) or lost_worker(error)
                if known:
                    raise known from None
            raise
