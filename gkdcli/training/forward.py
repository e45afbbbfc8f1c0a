"""How networks are run in training: in float32, bf16 or fp16, plain or compiled; losses are in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from gkdcli.errors import GkdError

LOWER = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Forward:
    """Runs forward passes of training; evaluation and export do without.

    Modules are not wrapped, so that their weights keep their names, and a checkpoint does not tell how the
    run went on.

    Args:
        precision: `bf16` or `fp16` takes what gains by it in this one (autocast); outputs come back in
            float32. Gradients of fp16 need `updates.Updates` with a scaler.
        compiled: whether backbones go through `torch.compile`.
        device: where networks are.

    Raises:
        GkdError: nothing can be compiled on this machine.
    """

    def __init__(
        self,
        precision: Literal["32", "bf16", "fp16"] = "32",
        compiled: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.lower = LOWER.get(precision)
        self.autocast = self.lower is not None
        self.device = device or torch.device("cpu")
        self.compiled = compiled
        self._graphs: dict[int, Callable[[Tensor], dict[str, Tensor]]] = {}
        if compiled:
            _require_compiler(self.device)

    def __call__(self, function: Callable[..., Any], *inputs: Tensor) -> Any:
        """The outputs of a module, or of a method of one, in the precision of the weights."""
        if not self.autocast:
            return function(*inputs)
        with torch.autocast(self.device.type, self.lower):
            return _widened(function(*inputs))

    def features(self, network: Any, clips: Tensor) -> dict[str, Tensor]:
        """Taps of a network, {"Mixed_5c": (B, C, T', H', W')}, of clips (B, channels, T, H, W)."""
        run = network.features
        if self.compiled:
            # of each size its own graph: full batches, the last one, and those with spliced clips
            if id(network) not in self._graphs:
                self._graphs[id(network)] = torch.compile(run, dynamic=False)
            run = self._graphs[id(network)]
        features: dict[str, Tensor] = self(run, clips)
        return features


def _widened(output: Any) -> Any:
    """bf16 and fp16 tensors as float32, in dictionaries and named tuples too."""
    if isinstance(output, Tensor):
        return output.float() if output.dtype in LOWER.values() else output
    if isinstance(output, dict):
        return {name: _widened(value) for name, value in output.items()}
    return type(output)(*map(_widened, output))


def _require_compiler(device: torch.device) -> None:
    """Compiles a line of code, so that a missing compiler shows before a run begins."""
    try:
        torch.compile(lambda x: x.relu() + 1)(torch.ones(8, device=device))
    except Exception as error:  # it may come from anywhere between Python and the linker
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise GkdError(
            f"nothing can be compiled on this machine: {reason[0]}",
            "train.compile = true",
            "torch.compile needs a C++ compiler and Python's headers (Debian: g++, python3-dev);"
            " `--set train.compile=false` does without",
        ) from None
