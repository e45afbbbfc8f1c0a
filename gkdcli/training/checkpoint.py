"""Checkpoints: one safetensors file with weights, optimisers and position, renamed into place."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from gkdcli.errors import GkdError
from gkdcli.files import disk_is_full
from gkdcli.models.weights import fit, load_metadata, load_tensors, require_fit, save_tensors
from gkdcli.runs import Run
from gkdcli.training import optim


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
    optimizer: torch.optim.Optimizer
    generator_optimizer: torch.optim.Optimizer | None
    position: Position

    def weights(self) -> dict[str, Tensor]:
        """`network.*` and, where there are generators, `generator.*`."""
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        if self.generators is not None:
            tensors |= {f"generator.{name}": value for name, value in self.generators.state_dict().items()}
        return tensors


def save(state: State, run: Run, resume_command: str) -> None:
    """Writes `last.safetensors`; the one before it stays whole if that fails.

    Raises:
        GkdError: the disk is full or cannot be written to, or a weight is no number.
    """
    _require_finite(state, run)
    tensors = state.weights() | optim.optimizer_tensors(state.optimizer, "optim.network.")
    if state.generator_optimizer is not None:
        tensors |= optim.optimizer_tensors(state.generator_optimizer, "optim.generator.")
    _write(run.last, tensors, {"position": json.dumps(asdict(state.position))}, resume_command)


def save_best(state: State, run: Run, resume_command: str) -> None:
    """Writes `best.safetensors`: weights only.

    Raises:
        GkdError: the disk is full or cannot be written to, or a weight is no number.
    """
    _require_finite(state, run)
    _write(run.best, state.weights(), {"epoch": str(state.position.best_epoch)}, resume_command)


def _require_finite(state: State, run: Run) -> None:
    """A gradient can overflow though the loss did not: such weights would only waste a checkpoint."""
    weights = {name: value for name, value in state.weights().items() if value.is_floating_point()}
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
        position = Position(**json.loads(load_metadata(run.last)["position"]))
    except (KeyError, ValueError, TypeError):
        raise GkdError(
            "these weights are no checkpoint to go on from", str(run.last), f"start anew: `--init {run.last}`"
        ) from None
    for module, prefix in ((state.network, "network."), (state.generators, "generator.")):
        if module is not None:
            require_fit(fit(module, tensors, prefix), str(run.last), "network of this run")
    optim.restore_optimizer(state.optimizer, tensors, "optim.network.")
    if state.generator_optimizer is not None:
        optim.restore_optimizer(state.generator_optimizer, tensors, "optim.generator.")
    return position
