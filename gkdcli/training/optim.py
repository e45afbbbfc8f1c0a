"""Optimisers and learning rates of both stages (METHOD.md 4)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gkdcli.settings import OptimSettings


def network_optimizer(parameters: Iterable[nn.Parameter], settings: OptimSettings) -> torch.optim.Optimizer:
    """SGD with momentum or Adam, with coupled weight decay; fused: one pass over memory instead of many."""
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.algorithm == "sgd":
        return torch.optim.SGD(wanted, rate, settings.momentum, weight_decay=decay, fused=True)
    return torch.optim.Adam(wanted, rate, weight_decay=decay, fused=True)


def generator_optimizer(parameters: Iterable[nn.Parameter], settings: OptimSettings) -> torch.optim.Optimizer:
    """Adam of the CVAE, without weight decay."""
    first, second = settings.generator_betas
    return torch.optim.Adam(list(parameters), settings.generator_lr, (first, second), fused=True)


def rate_factor(settings: OptimSettings, epochs_done: float) -> float:
    """What the learning rates are multiplied with, from the fractional number of epochs done.

    Linear warm-up over `warmup_epochs`, then constant, or half a cosine down to 0 at the last epoch, or
    `step_factor` for each of `step_epochs` that is over.
    """
    if epochs_done < settings.warmup_epochs:
        return min((epochs_done + 1e-3) / settings.warmup_epochs, 1.0)
    if settings.schedule == "constant":
        return 1.0
    if settings.schedule == "step":
        over = sum(epochs <= epochs_done for epochs in settings.step_epochs)
        return float(settings.step_factor**over)
    span = max(settings.epochs - settings.warmup_epochs, 1e-9)
    return 0.5 * (1 + math.cos(math.pi * min((epochs_done - settings.warmup_epochs) / span, 1.0)))


def clip(optimizer: torch.optim.Optimizer, norm: float) -> None:
    """Scales the gradients of all parameters down to a 2-norm; 0 leaves them."""
    if norm:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, norm)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """The optimiser's state as named tensors, for safetensors: `<prefix><parameter number>.<name>`."""
    return {
        f"{prefix}{number}.{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for number, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], prefix: str) -> None:
    """The reverse of `optimizer_tensors`; the state lies in memory as the parameters do, for speed."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(prefix):
            number, _, name = key.removeprefix(prefix).partition(".")
            like = parameters[int(number)]
            if value.shape == like.shape:
                value = torch.empty_like(like).copy_(value)
            state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
