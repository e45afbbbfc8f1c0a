"""Optical flow between neighbouring frames, as two grey pictures (METHOD.md 7)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from gkdcli.data.video import BadFlow
from gkdcli.settings import TORCH_METHODS, FlowMethod

if TYPE_CHECKING:
    from gkdcli.data.torch_flow import TorchFlow

Bytes = NDArray[np.uint8]
_cv2: Any = cv2  # its type stubs know neither flow nor the absent array
_SMALLEST_PX = 3  # of a side; with less OpenCV's TV-L1 reads beyond the picture
_FARNEBACK = {
    "pyr_scale": 0.5, "levels": 3, "winsize": 15, "iterations": 3, "poly_n": 5, "poly_sigma": 1.2, "flags": 0,
}  # fmt: skip


class FlowEstimator:
    """Computes the flow from each frame to the next.

    Args:
        method: `tvl1` is OpenCV's TV-L1 with its own defaults, as the paper's tools use it, `tvl1-torch` the
            same in PyTorch; `dis` OpenCV's DIS of the medium preset; `farneback` with the parameters
            customary for it; `raft` torchvision's network.
        bound: in px per frame; what is faster is cut.
        device: where `tvl1-torch` and `raft` run, `cpu` or `cuda`.
        batch: how many pairs these take at once.
        weights: the file of RAFT's.

    Attributes:
        parameters: of the method, to be kept with the data.
        colour: whether frames are wanted as RGB.
        frames: how many a block should have.
        note: what the user should know; "" for nothing.

    Raises:
        GkdError: the weights of RAFT are missing or wrong.
    """

    def __init__(
        self, method: FlowMethod, bound: float, *, device: str = "cpu", batch: int = 16, weights: str = ""
    ) -> None:
        cv2.setNumThreads(1)  # the processes of `gkd prepare` share the cores already
        self.bound = bound
        self.colour = method == "raft"
        self.frames = 2
        self.note = ""
        self._estimator: Any = None
        self._torch: TorchFlow | None = None
        self.parameters: dict[str, Any] = dict(_FARNEBACK)
        if method in TORCH_METHODS:
            from gkdcli.data.torch_flow import TorchFlow  # imports PyTorch, which the others do without

            self._torch = TorchFlow(method, device, batch, weights)
            self.parameters, self.note, self.frames = self._torch.parameters, self._torch.note, batch + 1
        elif method != "farneback":
            self._estimator = (
                _cv2.optflow.DualTVL1OpticalFlow_create()
                if method == "tvl1"
                else _cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
            )
            getters = [
                name for name in dir(self._estimator) if name.startswith("get") and name != "getDefaultName"
            ]
            self.parameters = {name.removeprefix("get"): getattr(self._estimator, name)() for name in getters}

    def block(self, frames: Sequence[Bytes]) -> Bytes:
        """Flow between T consecutive frames, quantised.

        Args:
            frames: at least 2, grey (H, W), or RGB (H, W, 3) where `colour`, all of one size.

        Returns:
            (T - 1, H, W, 2) uint8, x to the right and y downwards.

        Raises:
            BadFlow: the frames are too small for the method.
            GkdError: the memory of the device does not suffice.
        """
        return quantise(self.speeds(frames), self.bound)

    def speeds(self, frames: Sequence[Bytes]) -> NDArray[np.float32]:
        """As `block`, in px per frame: (T - 1, H, W, 2), neither cut nor rounded."""
        height, width = frames[0].shape[:2]
        if min(height, width) < _SMALLEST_PX:
            raise BadFlow(f"no flow can be computed on {width}x{height} px: {_SMALLEST_PX} px are needed")
        if self._torch is not None:
            return self._torch.speeds(frames)
        return np.stack([self._between(before, after) for before, after in pairwise(frames)])

    def _between(self, before: Bytes, after: Bytes) -> NDArray[np.float32]:
        try:
            if self._estimator is None:
                flow = _cv2.calcOpticalFlowFarneback(before, after, None, **_FARNEBACK)
            else:
                flow = self._estimator.calc(before, after, None)
        except cv2.error as error:
            height, width = before.shape
            raise BadFlow(f"no flow can be computed on {width}x{height} px: {error.err}") from None
        return np.asarray(flow, np.float32)


def quantise(flow: NDArray[np.float32], bound: float) -> Bytes:
    """Speeds v in px per frame -> round(255 * (v + bound) / (2 * bound)), cut at the bound; 0 is 128."""
    cut = np.clip(np.nan_to_num(flow), -bound, bound)
    return np.asarray(np.rint((cut + bound) * (255 / (2 * bound))), np.uint8)


def dequantise(stored: Bytes, bound: float) -> NDArray[np.float32]:
    """What `quantise` kept of the speeds, in px per frame: right to half a step, bound / 255."""
    return np.asarray(stored.astype(np.float32) * (2 * bound / 255) - bound, np.float32)


def flow_difference(before: Bytes, after: Bytes, stored: Bytes, bound: float) -> NDArray[np.float32]:
    """How far stored flow lies from OpenCV's TV-L1 between the same two frames, cut at the same bound.

    Half a step of the 8 bit, 0.7 * 2 * bound / 255 in length, is there even where the methods agree.

    Args:
        before: grey frame (H, W) uint8.
        after: the next one, (H, W) uint8.
        stored: decoded flow from `before` to `after`, (H, W, 2) uint8.
        bound: of the stored flow, in px per frame.

    Returns:
        End-point differences (H, W) in px.

    Raises:
        BadFlow: the frames are too small for TV-L1.
    """
    reference = FlowEstimator("tvl1", bound).speeds([before, after])[0]
    difference = dequantise(stored, bound) - np.clip(np.nan_to_num(reference), -bound, bound)
    return np.asarray(np.hypot(difference[..., 0], difference[..., 1]), np.float32)
