"""Optical flow between neighbouring frames, as two grey pictures (METHOD.md 7)."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from gkdcli.data.video import BadVideo
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
            BadVideo: the frames are too small for the method.
        """
        try:
            if self._estimator is None:
                flow = _cv2.calcOpticalFlowFarneback(before, after, None, **_FARNEBACK)
            else:
                flow = self._estimator.calc(before, after, None)
        except cv2.error as error:
            height, width = before.shape
            raise BadVideo(f"no flow can be computed on {width}x{height} px: {error.err}") from None
        return quantise(np.asarray(flow, np.float32), self.bound)


def quantise(flow: NDArray[np.float32], bound: float) -> Bytes:
    """Speeds v in px per frame -> round(255 * (v + bound) / (2 * bound)), cut at the bound; 0 is 128."""
    cut = np.clip(np.nan_to_num(flow), -bound, bound)
    return np.asarray(np.rint((cut + bound) * (255 / (2 * bound))), np.uint8)
