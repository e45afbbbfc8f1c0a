"""RAFT of torchvision, with weights from a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import optical_flow

from gkdcli.errors import GkdError
from gkdcli.files import digest

_MULTIPLE_PX = 8  # RAFT sees an eighth of the size
_SMALLEST_PX = 128  # and halves that three times
_UPDATES = 12
_KINDS = ("raft_large", "raft_small")
_HINT = (
    "a state dict of torchvision's raft_large or raft_small, as safetensors or a plain torch file: set"
    " data.flow_weights to its path"
)


class Raft:
    """Flow between colour frames.

    Args:
        path: the weights; their names tell `raft_large` from `raft_small`.
        device: where it runs.

    Attributes:
        parameters: kind, updates and the SHA-256 of the weights, to be kept with the data.

    Raises:
        GkdError: the file is missing, damaged, or of another network.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        state = _read(path)
        kind, network = _network(state, path)
        network.load_state_dict(state, assign=True)
        self._network = network.to(device).eval()
        self.parameters: dict[str, Any] = {
            "kind": kind,
            "updates": _UPDATES,
            "weights_sha256": digest(path),
        }

    def __call__(self, before: Tensor, after: Tensor) -> Tensor:
        """Frames (N, H, W, 3) uint8 RGB, padded to 128 px and a multiple of 8 -> speeds (N, 2, H, W)."""
        height, width = before.shape[1:3]
        down, right = (_missing(side) for side in (height, width))
        border = (right // 2, right - right // 2, down // 2, down - down // 2)
        pictures = [
            functional.pad(frames.movedim(-1, 1).float() / 127.5 - 1, border, mode="replicate")
            for frames in (before, after)
        ]
        speeds: Tensor = self._network(*pictures, num_flow_updates=_UPDATES)[-1]
        return speeds[:, :, border[2] : border[2] + height, border[0] : border[0] + width]


def _missing(side: int) -> int:
    return max(-side % _MULTIPLE_PX, _SMALLEST_PX - side)


def _read(path: Path) -> dict[str, Tensor]:
    where = f"data.flow_weights = {path}"
    if not path.is_file():
        raise GkdError("there is no file of RAFT weights", where, _HINT)
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise GkdError(f"the weights of RAFT cannot be read: {error}", where, _HINT) from None
    except Exception:  # of a damaged or foreign file: almost anything
        what = "the weights of RAFT cannot be read: no torch file, damaged, or with objects in it"
        raise GkdError(what, where, _HINT) from None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise GkdError("the weights of RAFT are no state dict", where, _HINT)
    return dict(state)


def _network(state: Mapping[str, Tensor], path: Path) -> tuple[str, nn.Module]:
    """The kind that the names and shapes of the weights fit, without weights."""
    shapes = {name: value.shape for name, value in state.items()}
    closest = ""
    for kind in _KINDS:
        with torch.device("meta"):
            network: nn.Module = getattr(optical_flow, kind)(weights=None)
        wanted = {name: value.shape for name, value in network.state_dict().items()}
        if shapes == wanted:
            return kind, network
        odd = [name for name in sorted(wanted.keys() | shapes) if wanted.get(name) != shapes.get(name)]
        closest += f"; {kind}: {len(odd)} of {len(wanted)} differ, first {odd[0]}"
    what = "these are no weights of RAFT"
    raise GkdError(what, f"data.flow_weights = {path}{closest}", _HINT)
