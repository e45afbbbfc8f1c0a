"""Optical flow between neighbouring frames, as two grey pictures (METHOD.md 7)."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from gkdcli.data.video import BadFlow
from gkdcli.settings import FlowMethod

Bytes = NDArray[np.uint8]
_cv2: Any = cv2  # its type stubs know neither flow nor the absent array
_FARNEBACK = {
    "pyr_scale": 0.5, "levels": 3, "winsize": 15, "iterations": 3, "poly_n": 5, "poly_sigma": 1.2, "flags": 0,
}  # fmt: skip


class FlowEstimator:
    """Computes the flow from one frame to the next.

    Args:
        method: `tvl1` is OpenCV's TV-L1 with its own defaults, as the paper's tools use it; `dis` its DIS of
            the medium preset; `farneback` with the parameters customary for it.
        bound: in px per frame; what is faster is cut.

    Attributes:
        parameters: of the method, to be kept with the data.
    """

    def __init__(self, method: FlowMethod, bound: float) -> None:
        cv2.setNumThreads(1)  # the processes of `gkd prepare` share the cores already
        self.bound = bound
        if method == "farneback":
            self._estimator: Any = None
            self.parameters: dict[str, Any] = dict(_FARNEBACK)
            return
        self._estimator = (
            _cv2.optflow.DualTVL1OpticalFlow_create()
            if method == "tvl1"
            else _cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        )
        getters = [
            name for name in dir(self._estimator) if name.startswith("get") and name != "getDefaultName"
        ]
        self.parameters = {name.removeprefix("get"): getattr(self._estimator, name)() for name in getters}

    def between(self, before: Bytes, after: Bytes) -> Bytes:
        """Flow of two grey frames (H, W), quantised: (H, W, 2) uint8, x to the right and y downwards.

        Raises:
            BadFlow: the frames are too small for the method.
        """
        return quantise(self.speeds(before, after), self.bound)

    def speeds(self, before: Bytes, after: Bytes) -> NDArray[np.float32]:
        """As `between`, in px per frame: (H, W, 2), neither cut nor rounded."""
        height, width = before.shape
        if min(height, width) < 3:  # OpenCV's TV-L1 would read beyond the picture
            raise BadFlow(f"no flow can be computed on {width}x{height} px: 3 px are needed")
        try:
            if self._estimator is None:
                flow = _cv2.calcOpticalFlowFarneback(before, after, None, **_FARNEBACK)
            else:
                flow = self._estimator.calc(before, after, None)
        except cv2.error as error:
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
    reference = FlowEstimator("tvl1", bound).speeds(before, after)
    difference = dequantise(stored, bound) - np.clip(np.nan_to_num(reference), -bound, bound)
    return np.asarray(np.hypot(difference[..., 0], difference[..., 1]), np.float32)
