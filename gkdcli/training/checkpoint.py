"""Checkpoints: one safetensors file with weights, optimisers and position, renamed into place.

Where weights are averaged, `network.*` is the mean, which everything else reads; the weights that training
goes on with are `optim.raw.<number>` then.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from gkdcli.errors import GkdError
from gkdcli.files import atomic_path, disk_is_full
from gkdcli.models.weights import fit, load_metadata, load_tensors, require_fit, save_tensors
from gkdcli.runs import Run
from gkdcli.training import optim
from gkdcli.training.updates import Average, Updates

_RAW = "optim.raw."


@dataclass
class Position:
    """Where a run stands: everything to go on from that is not a tensor."""

    step: int = 0  # batches done; `Schedule.spot` says in which epoch and pass that is
    seconds: float = 0.0
    best: float | None = None
    best_epoch: int = 0
    sums: dict[str, list[float]] = field(default_factory=dict)  # of the epoch in work: each term's, and clips


@dataclass
class State:
    """All that changes while a run goes on."""

    network: nn.Module
    generators: nn.ModuleDict | None
    updates: Updates
    generator_updates: Updates | None
    position: Position

    def weights(self) -> dict[str, Tensor]:
        """`network.*`, their mean where there is one, and, where there are generators, `generator.*`."""
        average = self.updates.average
        chosen = average.tensors if average else self.network.state_dict()
        tensors = {f"network.{name}": value for name, value in chosen.items()}
        if self.generators is not None:
            tensors |= {f"generator.{name}": value for name, value in self.generators.state_dict().items()}
        return tensors

    def raw(self) -> dict[str, Tensor]:
        """The weights that training goes on with, where `weights` has their mean."""
        values = self.network.state_dict().values() if self.updates.average else ()
        return {f"{_RAW}{number}": value for number, value in enumerate(values)}

    def stages(self) -> dict[str, Updates]:
        """Those in use by name."""
        generator = {"generator": self.generator_updates} if self.generator_updates else {}
        return {"network": self.updates, **generator}


def save(state: State, run: Run, resume_command: str, keep: int = 1) -> None:
    """Writes `last.safetensors`; the one before it stays whole if that fails.

    Args:
        state: to be written.
        run: where.
        resume_command: what the user types to go on.
        keep: how many there are in the end; those before it are `step-<number>.safetensors`.

    Raises:
        GkdError: the disk is full or cannot be written to, or a weight is no number.
    """
    _require_finite(state, run)
    tensors = state.weights() | state.raw()
    numbers: dict[str, Any] = {}
    for name, updates in state.stages().items():
        tensors |= optim.optimizer_tensors(updates.optimizer, f"optim.{name}.")
        numbers[name] = updates.numbers()
    position = {"position": json.dumps(asdict(state.position)), "updates": json.dumps(numbers)}
    if keep > 1:
        _set_aside(run, state.position.step)
    _write(run.last, tensors, position, resume_command)
    for old in kept(run)[: -(keep - 1) or None]:
        old.unlink(missing_ok=True)


def save_best(state: State, run: Run, resume_command: str) -> None:
    """Writes `best.safetensors`: weights only.

    Raises:
        GkdError: the disk is full or cannot be written to, or a weight is no number.
    """
    _require_finite(state, run)
    _write(run.best, state.weights(), {"epoch": str(state.position.best_epoch)}, resume_command)


def kept(run: Run) -> list[Path]:
    """Checkpoints before the last one, as they were written."""
    found = [path for path in run.folder.iterdir() if re.fullmatch(r"step-\d+\.safetensors", path.name)]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))


def _set_aside(run: Run, step: int) -> None:
    """Gives `last` a second name, and leaves it the first until another takes that."""
    if not run.last.is_file():
        return
    before = json.loads(load_metadata(run.last)["position"])["step"]
    path = run.folder / f"step-{before:06}.safetensors"
    if before == step or path.exists():
        return
    try:
        os.link(run.last, path)
    except OSError:  # a file system without links
        with atomic_path(path) as temporary:
            shutil.copy2(run.last, temporary)


def _require_finite(state: State, run: Run) -> None:
    """A gradient can overflow though the loss did not: such weights would only waste a checkpoint."""
    tensors = state.weights() | state.raw()
    weights = {name: value for name, value in tensors.items() if value.is_floating_point()}
    good = torch.stack([value.isfinite().all() for value in weights.values()]).tolist()
    if not all(good):
        name = list(weights)[good.index(False)]
        raise GkdError(
            f"training diverged: {name} is not finite after step {state.position.step}",
            f"{run.folder}; "
            + (f"{run.last.name} is of before" if run.last.is_file() else "nothing was saved"),
            "start a new run with a lower optim.learning_rate and optim.generator_lr",
        )


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], resume_command: str) -> None:
    try:
        save_tensors(path, tensors, metadata)
    except (OSError, SafetensorError) as error:
        full = disk_is_full(error)
        raise GkdError(
            "the disk is full; the checkpoint could not be written" if full else f"cannot write: {error}",
            f"{path}; the checkpoint before it is whole" if path.is_file() else str(path),
            f"make room, then `{resume_command}`",
        ) from None


def restore(state: State, run: Run) -> Position:
    """Loads `last.safetensors` into networks and optimisers.

    Returns:
        Where the run stood; the beginning where it was killed before its first checkpoint.

    Raises:
        GkdError: the checkpoint is damaged or of another network.
    """
    if not run.last.is_file():
        return Position()
    tensors = load_tensors(run.last)
    try:
        metadata = load_metadata(run.last)
        position = Position(**json.loads(metadata["position"]))
        numbers = json.loads(metadata.get("updates", "{}"))
    except (KeyError, ValueError, TypeError):
        raise GkdError(
            "these weights are no checkpoint to go on from", str(run.last), f"start anew: `--init {run.last}`"
        ) from None
    for module, prefix in ((state.network, "network."), (state.generators, "generator.")):
        if module is not None:
            require_fit(fit(module, tensors, prefix), str(run.last), "network of this run")
    if state.updates.average is not None:
        _restore_average(state, state.updates.average, tensors)
    for name, updates in state.stages().items():
        optim.restore_optimizer(updates.optimizer, tensors, f"optim.{name}.")
        updates.restore(numbers.get(name, {}))
    return position


def _restore_average(state: State, average: Average, tensors: dict[str, Tensor]) -> None:
    """What was loaded into the network is the mean; the weights themselves lie beside it."""
    with torch.no_grad():
        for number, (name, value) in enumerate(state.network.state_dict().items()):
            average.tensors[name].copy_(value)
            value.copy_(tensors[f"{_RAW}{number}"])
