"""What moves the weights: an optimiser with its rate and, in fp16, its scale; and the mean of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gkdcli.data.clock import at
from gkdcli.errors import GkdError
from gkdcli.settings import OptimSettings
from gkdcli.training import optim
from gkdcli.training.processes import Group

LEAST_SCALE = 2.0**-10  # below it something else than fp16's range is at fault


class Updates:
    """The optimiser of one stage.

    In fp16 small gradients would be 0. So the loss is multiplied by a scale that is halved where a gradient
    overflows, whereupon the step is left out, and doubled after 2000 good steps. Each stage has a scale of
    its own.

    Args:
        optimizer: of the stage.
        rate: its learning rate, before the schedule's factor.
        clip_norm: see `OptimSettings`.
        scaled: whether gradients are those of fp16.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, rate: float, clip_norm: float, scaled: bool = False
    ) -> None:
        self.optimizer, self.rate, self.clip_norm = optimizer, rate, clip_norm
        self.parameters: list[nn.Parameter] = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]
        device = self.parameters[0].device.type
        self.scaler = torch.amp.GradScaler(device, enabled=scaled)
        self.left_out = 0  # steps, since a gradient overflowed
        self.average: Average | None = None

    def set_rate(self, factor: float) -> None:
        """Sets the learning rate to that of a moment of the schedule."""
        optim.set_rate(self.optimizer, self.rate * factor)

    def scaled(self, loss: Tensor) -> Tensor:
        """What backward begins with."""
        found: Tensor = self.scaler.scale(loss)
        return found

    def have_gradients(self) -> list[int]:
        """Numbers of the parameters that have one."""
        return [number for number, parameter in enumerate(self.parameters) if parameter.grad is not None]

    def move(self, group: Group, needed: Iterable[int]) -> bool:
        """One step by the gradients of all processes; True where the weights moved.

        Args:
            group: all of its processes do this.
            needed: numbers of the parameters that have a gradient in any of them.

        Raises:
            GkdError: gradients overflow however small the scale is.
        """
        group.sum_gradients(self.parameters, sorted(needed))
        at("optimizer")
        moved = not self.scaler.is_enabled() or self._unscale()
        if moved:
            optim.clip(self.optimizer, self.clip_norm)
            self.optimizer.step()
            if self.average is not None:
                self.average.move()
        self.optimizer.zero_grad()
        return moved

    def _unscale(self) -> bool:
        """Gradients as they would be without a scale; False where one is no number.

        The step is left out here and not by `GradScaler.step`: that one asks fused optimisers to do so, which
        then have begun a state without filling it.
        """
        before = self.scaler.get_scale()
        self.scaler.unscale_(self.optimizer)
        self.scaler.update()
        scale = self.scaler.get_scale()
        if scale >= before:
            return True
        self.left_out += 1
        if scale < LEAST_SCALE:
            raise GkdError(
                f"gradients overflow in fp16 even at a scale of {scale:g}",
                f"{self.left_out} steps have been left out so far",
                "`--set train.precision=bf16`, which has float32's range, or a lower learning rate",
            )
        return False

    def numbers(self) -> dict[str, Any]:
        """Everything but tensors that a continuation needs."""
        scale = self.scaler.state_dict() | {"left_out": self.left_out} if self.scaler.is_enabled() else {}
        return scale | ({"averaged": self.average.steps} if self.average else {})

    def restore(self, numbers: dict[str, Any]) -> None:
        """The reverse of `numbers`."""
        if self.scaler.is_enabled():
            self.left_out = numbers["left_out"]
            self.scaler.load_state_dict(numbers)
        if self.average is not None:
            self.average.steps = numbers["averaged"]

    def shown(self) -> contextlib.AbstractContextManager[None]:
        """The network is as it is scored for as long as the block runs."""
        return self.average.shown() if self.average is not None else contextlib.nullcontext()


def updates_of(networks: Any, settings: OptimSettings, scaled: bool) -> tuple[Updates, Updates | None]:
    """Those of the network, and of the CVAEs where there are any."""
    network = optim.network_optimizer(networks.student.parameters(), settings)
    ours = Updates(network, settings.learning_rate, settings.clip_norm, scaled)
    if settings.ema:
        ours.average = Average(networks.student, settings.ema)
    if networks.generators is None:
        return ours, None
    generator = optim.generator_optimizer(networks.generators.parameters(), settings)
    return ours, Updates(generator, settings.generator_lr, settings.clip_norm, scaled)


def scales(network: Updates, generator: Updates | None) -> dict[str, float]:
    """Of each stage in fp16 the scale and the steps left out so far, for the log."""
    found: dict[str, float] = {}
    for name, updates in (("network", network), ("generator", generator)):
        if updates is not None and updates.scaler.is_enabled():
            found |= {f"{name}_scale": updates.scaler.get_scale(), f"{name}_left_out": updates.left_out}
    return found


class Average:
    """A running mean of a network's weights, moved after each of its optimiser's steps.

    mean <- d mean + (1 - d) weights, where d is the decay, but at most (1 + n) / (10 + n) after n steps: a
    fresh network's weights are soon forgotten. Batch norm's running statistics are averaged alike, so that
    they are of about the averaged weights; counters are copied.

    Args:
        network: whose.
        decay: d.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network, self.decay = network, decay
        self.steps = 0
        self.tensors = {name: value.clone() for name, value in network.state_dict().items()}

    @torch.no_grad()
    def move(self) -> None:
        """Takes the weights as they are now into the mean."""
        part = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        means, values = [], []
        for name, value in self.network.state_dict().items():
            if value.is_floating_point():
                means.append(self.tensors[name])
                values.append(value)
            else:
                self.tensors[name].copy_(value)
        torch._foreach_lerp_(means, values, part)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """The network has the mean as its weights for as long as the block runs."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, value in self.network.state_dict().items():
            kept = value.clone()
            value.copy_(self.tensors[name])
            self.tensors[name].copy_(kept)
