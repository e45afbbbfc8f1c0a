"""One loop for both stages of both phases (METHOD.md 4): schedules, checkpoints, resume, interruption."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from gkdcli.console import Console, Ticker
from gkdcli.data.clips import ClipBatch, ClipDataset, load, normalise, training_order
from gkdcli.errors import GkdError, Interrupted
from gkdcli.losses.distill import ramp
from gkdcli.runs import Run
from gkdcli.settings import Settings
from gkdcli.training import checkpoint, optim
from gkdcli.training.checkpoint import Position
from gkdcli.training.noise import Noise
from gkdcli.training.steps import Networks, Term, generator_terms, network_terms, total

GENERATOR, NETWORK = 0, 1  # the part of an epoch, and of a seed


class SupervisedTerms(Protocol):
    """A task's own loss terms."""

    def __call__(
        self,
        network: Any,
        features: dict[str, Tensor],
        maps: dict[str, Tensor],
        labels: Tensor,
        noise: Noise,
        recipe: Any,
    ) -> dict[str, Term]: ...


@dataclass
class Job:
    """What is to be trained on what.

    Args:
        networks: all in play; the student and its generators are trained.
        settings: the resolved page.
        dataset: training views.
        supervised: the task's terms.
        validate: score on the held-out clips, higher is better; None where nothing is held out.
        warm_up: two validation batches, run before step 1.
        resume_command: what the user types to go on.
    """

    networks: Networks
    settings: Settings
    dataset: ClipDataset
    supervised: SupervisedTerms
    validate: Callable[[], float] | None
    warm_up: Callable[[], None]
    resume_command: str


class Trainer:
    """Trains a `Job` in a run folder.

    Args:
        job: what.
        run: where; it is locked by the caller.
        console: who is told.
        fabric: devices.
    """

    def __init__(self, job: Job, run: Run, console: Console, fabric: Fabric) -> None:
        self.job, self.run, self.console, self.fabric = job, run, console, fabric
        settings, networks = job.settings, job.networks
        for module in (networks.student, networks.generators, networks.teacher, networks.teacher_generators):
            if module is not None:
                fabric.to_device(module)
        for module in (networks.teacher, networks.teacher_generators):
            if module is not None:
                module.eval().requires_grad_(False)
        self.optimizer = optim.network_optimizer(networks.student.parameters(), settings.optim)
        self.generator_optimizer = (
            optim.generator_optimizer(networks.generators.parameters(), settings.optim)
            if networks.generators is not None
            else None
        )
        self.position = Position()
        self.interrupted = False
        alternating = [GENERATOR, NETWORK] if settings.train.schedule == "epoch" else [NETWORK]
        self.parts = alternating if networks.generators is not None else [NETWORK]
        self.shared = networks.generators is not None and settings.train.schedule == "step"

    @property
    def steps_per_epoch(self) -> int:
        """Batches of all parts of an epoch."""
        batch = self.job.settings.optim.batch_size
        return len(self.parts) * -(-len(self.job.dataset) // batch)

    def fit(self, max_steps: int | None) -> None:
        """Trains to the last epoch, to `max_steps`, or until interrupted; the run's state says which.

        Raises:
            Interrupted: Ctrl-C or SIGTERM, after a checkpoint.
            GkdError: a loss that is not finite, no memory, no disk.
        """
        epochs = self.job.settings.optim.epochs
        steps = min(epochs * self.steps_per_epoch, max_steps or 10**12)
        self.job.warm_up()
        title = f"{self.run.record['stage']} {self.run.record['preset']}"
        with self._signals(), self._failures(), self.console.progress(title, steps) as tick:
            started = time.monotonic() - self.position.seconds
            saved = time.monotonic()
            for batch in self._batches(steps):
                terms = self._step(batch)
                self.position.step += 1
                self.position.seconds = time.monotonic() - started
                self._log(terms)
                self._tick(tick)
                at_boundary = self._advance()
                due = time.monotonic() - saved > 60 * self.job.settings.train.checkpoint_minutes
                if at_boundary and (due or self.interrupted):
                    self.save()
                    saved = time.monotonic()
                if at_boundary and self.interrupted:
                    self.run.update(state="interrupted", progress=self._progress())
                    raise Interrupted(
                        f"interrupted at epoch {self.position.epoch}, step {self.position.step}; the state is saved",
                        str(self.run.folder),
                        f"`{self.job.resume_command}` continues",
                    )
            self.save()
        complete = self.position.epoch > epochs
        self.run.update(
            state="complete" if complete else "cut", progress=self._progress(), seconds=self.position.seconds
        )

    # ---- one step ----

    def _step(self, batch: ClipBatch) -> dict[str, Term]:
        settings, networks, where = self.job.settings, self.job.networks, self.position
        part = self.parts[where.part]
        noise = Noise(settings.train.seed, where.epoch, part, batch.videos, self.fabric.device)
        clips = normalise(self.fabric.to_device(batch.clips), settings.clips)
        labels = self.fabric.to_device(batch.labels)
        self._set_rates()
        networks.student.train()
        if part == GENERATOR:
            # the official code moves the running statistics here too (FINDINGS 10)
            hold = (
                contextlib.nullcontext()
                if settings.recipe == "official"
                else _held_statistics(networks.student)
            )
            with torch.no_grad(), hold:
                features = networks.student.features(clips)
                maps = networks.student.attend(features)
            return self._generator_stage(features, maps, noise, batch)
        features = networks.student.features(clips)
        maps = networks.student.attend(features)
        terms = self._generator_stage(features, maps, noise, batch) if self.shared else {}
        if networks.generators is not None:
            networks.generators.requires_grad_(False)
        weight = ramp(where.epoch, settings.distill.ramp_epochs or settings.optim.epochs)
        found = network_terms(
            networks,
            clips,
            features,
            maps,
            noise,
            weight,
            settings.distill,
            lambda f, m, n: self.job.supervised(networks.student, f, m, labels, n, settings.recipe),
        )
        self._descend(found, self.optimizer, batch)
        return terms | found

    def _generator_stage(
        self, features: dict[str, Tensor], maps: dict[str, Tensor], noise: Noise, batch: ClipBatch
    ) -> dict[str, Term]:
        networks = self.job.networks
        assert networks.generators is not None
        assert self.generator_optimizer is not None
        networks.generators.requires_grad_(True)
        terms = generator_terms(networks, features, maps, noise, self.job.settings.distill)
        self._descend(terms, self.generator_optimizer, batch)
        return terms

    def _descend(self, terms: dict[str, Term], optimizer: torch.optim.Optimizer, batch: ClipBatch) -> None:
        loss = total(terms)
        if not torch.isfinite(loss):
            self._refuse(terms, batch)
        self.fabric.backward(loss / self.job.settings.optim.accumulation)
        if self._closes_accumulation():
            optimizer.step()
            optimizer.zero_grad()

    def _refuse(self, terms: dict[str, Term], batch: ClipBatch) -> None:
        bad = next(
            (f"{name} = {t.value.item()}" for name, t in terms.items() if not torch.isfinite(t.value)), "sum"
        )
        rows = self.job.dataset.store.videos
        names = ", ".join(f"{rows[video].class_name}/{rows[video].name}" for video in batch.videos[:4])
        kept = (
            f"state kept in {self.run.last.name}" if self.run.last.is_file() else "nothing was saved before"
        )
        rate = (
            self.job.settings.optim.generator_lr if "cvae" in bad else self.job.settings.optim.learning_rate
        )
        key = "generator_lr" if "cvae" in bad else "learning_rate"
        raise GkdError(
            f"the loss stopped being finite at epoch {self.position.epoch}, step {self.position.step + 1};"
            f" first bad term: {bad}",
            f"clips {names}{' ...' if len(batch.videos) > 4 else ''}; {kept}",
            f"start a new run, gentler: `--set optim.{key}={rate / 10:g}`",
        )

    def _set_rates(self) -> None:
        settings = self.job.settings.optim
        done = self.position.step / self.steps_per_epoch
        factor = optim.rate_factor(settings, done)
        optim.set_rate(self.optimizer, settings.learning_rate * factor)
        if self.generator_optimizer is not None:
            optim.set_rate(self.generator_optimizer, settings.generator_lr * factor)

    # ---- order and position ----

    def _batches(self, last_step: int) -> Iterator[ClipBatch]:
        """The rest of the run's batches; `position` says which epoch and part the current one belongs to."""
        settings, where = self.job.settings, self.position
        while where.epoch <= settings.optim.epochs and where.step < last_step:
            part = self.parts[where.part]
            order = training_order(
                len(self.job.dataset), settings.optim.batch_size, settings.train.seed, where.epoch, part
            )
            rest = order[where.batch :][: last_step - where.step]
            pin = self.fabric.device.type == "cuda"
            yield from load(self.job.dataset, rest, settings.train.workers, pin)

    def _closes_accumulation(self) -> bool:
        batches = self.steps_per_epoch // len(self.parts)
        done = self.position.batch + 1
        return done % self.job.settings.optim.accumulation == 0 or done == batches

    def _advance(self) -> bool:
        """Moves past the batch just done; at the end of an epoch validates and saves. True where a step closed."""
        where = self.position
        boundary = self._closes_accumulation()
        where.batch += 1
        if where.batch == self.steps_per_epoch // len(self.parts):
            where.batch, where.part = 0, where.part + 1
            if where.part == len(self.parts):
                self._end_epoch()
        return boundary

    def _end_epoch(self) -> None:
        where = self.position
        means = {name: value / self.steps_per_epoch * len(self.parts) for name, value in where.sums.items()}
        entry: dict[str, Any] = {"epoch": where.epoch, "mean": means}
        if self.job.validate is not None:
            score = self.job.validate()
            entry["held_out_top1"] = score
            if where.best is None or score >= where.best:
                where.best, where.best_epoch = score, where.epoch
                checkpoint.save_best(self._state(), self.run, self.job.resume_command)
        self._write_metrics(entry)
        text = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
        held = f", held-out top-1 {entry['held_out_top1']:.3f}" if "held_out_top1" in entry else ""
        self.run.log(f"epoch {where.epoch}: {text}{held}")
        self.console.detail(f"epoch {where.epoch}: {text}{held}")
        where.epoch, where.part, where.sums = where.epoch + 1, 0, {}
        self.run.update(progress=self._progress())
        if where.epoch <= self.job.settings.optim.epochs:  # the last one is saved by `fit`
            self.save()

    # ---- what is written ----

    def _log(self, terms: dict[str, Term]) -> None:
        where = self.position
        entry: dict[str, Any] = {
            "step": where.step,
            "epoch": where.epoch,
            "part": ("generator", "network")[self.parts[where.part]],
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "seconds": round(where.seconds, 3),
        }
        for name, term in terms.items():
            value = term.value.item()
            entry[name] = value
            where.sums[name] = where.sums.get(name, 0.0) + value
        entry["loss"] = sum(term.weight * entry[name] for name, term in terms.items())
        self._write_metrics(entry)

    def _write_metrics(self, entry: dict[str, Any]) -> None:
        with open(self.run.metrics, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(entry) + "\n")

    def _tick(self, tick: Ticker) -> None:
        where = self.position
        rate = where.step * self.job.settings.optim.batch_size / max(where.seconds, 1e-9)
        tick(where.step, f"epoch {where.epoch}/{self.job.settings.optim.epochs}, {rate:.1f} clips/s")

    def _progress(self) -> dict[str, Any]:
        epochs = self.job.settings.optim.epochs
        return {
            "epoch": min(self.position.epoch, epochs),
            "epochs": epochs,
            "step": self.position.step,
            "best_epoch": self.position.best_epoch or None,
            "best_held_out_top1": self.position.best,
        }

    def save(self) -> None:
        """Writes the checkpoint that `restore` goes back to."""
        checkpoint.save(self._state(), self.run, self.job.resume_command)

    def restore(self) -> None:
        """Goes back to the run's last checkpoint; metrics after it are dropped.

        Raises:
            GkdError: the checkpoint is damaged or of another network.
        """
        self.position = checkpoint.restore(self._state(), self.run)

    def _state(self) -> checkpoint.State:
        networks = self.job.networks
        return checkpoint.State(
            networks.student, networks.generators, self.optimizer, self.generator_optimizer, self.position
        )

    # ---- manners ----

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C or SIGTERM once: the step is finished and saved; twice: stops at once."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            self.console.note("stopping after this step; once more stops at once, unsaved")

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except Interrupted:
            raise
        except (torch.OutOfMemoryError, RuntimeError) as error:
            self.run.update(state="failed", progress=self._progress())
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            raise self._out_of_memory() from None
        except BaseException as error:
            state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            self.run.update(state=state, progress=self._progress())
            self.run.log(f"{state}: {error}")
            raise

    def _out_of_memory(self) -> GkdError:
        settings = self.job.settings
        batch, accumulation = settings.optim.batch_size, settings.optim.accumulation
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        spent = f", peak {peak / 2**30:.1f} GB" if peak else ""
        half = max(batch // 2, 1)
        return GkdError(
            f"out of memory: batch {batch}, clips of {settings.clips.length} frames at {settings.clips.crop} px{spent}",
            f"epoch {self.position.epoch}, step {self.position.step + 1} on {self.fabric.device}",
            f"the same effective batch: `--set optim.batch_size={half} --set optim.accumulation"
            f"={accumulation * -(-batch // half)}`",
        )


@contextlib.contextmanager
def _held_statistics(network: nn.Module) -> Iterator[None]:
    """Batch norm normalises with the batch's statistics but leaves its running ones alone (FINDINGS 10)."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm3d)]
    before = [
        (norm.momentum, norm.num_batches_tracked.clone())
        for norm in norms
        if norm.num_batches_tracked is not None
    ]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked = tracked
