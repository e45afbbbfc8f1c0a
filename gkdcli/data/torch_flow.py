"""Optical flow by the methods that run in PyTorch, many pairs of frames at once, on a CPU or a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gkdcli.data.tvl1 import Compiled, Tvl1, compile_tvl1, tvl1_flow
from gkdcli.data.video import Bytes
from gkdcli.data.workers import beat
from gkdcli.errors import GkdError, usage_error
from gkdcli.settings import FlowMethod

_CPU_PX = 2 << 20  # of the pairs held at once on a CPU, where more gain nothing
_COMPILED_ON = ("cuda",)


class TorchFlow:
    """Speeds between consecutive frames.

    Args:
        method: `tvl1-torch` or `raft`.
        device: where it is computed, `cpu` or `cuda`.
        batch: pairs at once.
        weights: file of RAFT's.

    Attributes:
        parameters: of the method, to be kept with the data.
        note: what the user should know; "" for nothing.

    Raises:
        GkdError: the weights of RAFT are missing or wrong.
    """

    def __init__(self, method: FlowMethod, device: str, batch: int, weights: str) -> None:
        if device == "cpu":
            torch.set_num_threads(1)  # the processes of `gkd prepare` share the cores already
        self.note = ""
        self._method = method
        self._device = torch.device(device)
        self._batch = batch
        self._flow: Callable[[Tensor, Tensor], Tensor]
        try:
            if method == "raft":
                raft = load_raft(weights, device)
                self._flow, self.parameters = raft, raft.parameters
            else:
                compiled, self.note = compiled_tvl1(device)
                self._flow = lambda before, after: tvl1_flow(before, after, compiled=compiled)
                self.parameters = asdict(Tvl1())
        except torch.OutOfMemoryError:
            raise GkdError(
                "out of memory before the first pair of frames",
                f"data.flow = {method} on {device}",
                "processes share the device: `--workers 1`, or `--device cpu`",
            ) from None

    def speeds(self, frames: Sequence[Bytes]) -> NDArray[np.float32]:
        """Of T frames (H, W) or (H, W, 3) RGB: (T - 1, H, W, 2) in px per frame.

        Raises:
            GkdError: the memory does not suffice.
        """
        pixels = frames[0].shape[0] * frames[0].shape[1]
        batch = min(self._batch, max(_CPU_PX // pixels, 1)) if self._device.type == "cpu" else self._batch
        found = []
        try:
            with torch.inference_mode():
                for start in range(0, len(frames) - 1, batch):
                    block = torch.from_numpy(np.stack(frames[start : start + batch + 1])).to(self._device)
                    found.append(self._flow(block[:-1], block[1:]).movedim(1, -1).cpu().numpy())
                    beat()  # a CPU may take minutes for all of large frames
        except RuntimeError as error:
            raise self._out_of_memory(error, frames[0], batch) or error from None
        return np.concatenate(found)

    def _out_of_memory(self, error: RuntimeError, frame: Bytes, batch: int) -> GkdError | None:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            return None
        return GkdError(
            f"out of memory: flow of {batch} pairs of {frame.shape[1]}x{frame.shape[0]} px at once",
            f"data.flow = {self._method} on {self._device}, data.flow_batch = {self._batch}",
            f"`--set data.flow_batch={max(batch // 2, 1)}`; processes share the device: `--workers 1`",
        )


@cache
def load_raft(weights: str, device: str) -> Any:
    """RAFT, read once per process, not once per video.

    Raises:
        GkdError: no file is named, or it is missing or wrong.
    """
    if not weights:
        raise usage_error(
            "RAFT has no weights of its own",
            "data.flow_weights is not set",
            "`--set data.flow_weights=FILE`: torchvision's raft_large or raft_small",
        )
    from gkdcli.data.raft import Raft

    return Raft(Path(weights), torch.device(device))


@cache
def compiled_tvl1(device: str) -> tuple[Compiled | None, str]:
    """Compiled for a GPU, where that is possible, and a note where it is not; on a CPU compiling loses."""
    if device not in _COMPILED_ON:
        return None, ""
    try:
        compiled = compile_tvl1()
        pair = torch.rand(2, 3, 40, 48, device=device)
        with torch.inference_mode():
            tvl1_flow(pair[0], pair[1], compiled=compiled)
        return compiled, ""
    except Exception as error:  # it may come from anywhere between Python and the linker
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return None, f"TV-L1 runs several times slower than it could: nothing can be compiled here ({reason})"
