"""Images on their way into a part: their number and length are known only when the last has come."""

from __future__ import annotations

import hashlib
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from gkdcli.data.workers import beat

_HELD_BYTES = 16 << 20


class Spool:
    """The JPEGs of one stream: in memory, or beyond 16 MB in an unnamed file of `folder`.

    Attributes:
        offsets: where each begins among all of them, and the length of all.
        sum: SHA-256 of all so far.
    """

    def __init__(self, folder: Path) -> None:
        self.offsets = [0]
        self.sum = hashlib.sha256()
        self._folder = folder
        self._held: list[bytes] = []
        self._spilled = 0
        self._spool: Any = None

    def append(self, image: bytes) -> None:
        """One more."""
        self._held.append(image)
        self.sum.update(image)
        self.offsets.append(self.offsets[-1] + len(image))
        if self.offsets[-1] - self._spilled > _HELD_BYTES:
            self._spill()

    def write(self, frames: Any) -> None:
        """All images back to back into a dataset of that length."""
        if not self._spilled:
            frames[:] = np.frombuffer(b"".join(self._held), np.uint8)
            return
        self._spill()
        self._spool.seek(0)
        for start in range(0, self.offsets[-1], _HELD_BYTES):
            beat()
            block = np.frombuffer(self._spool.read(_HELD_BYTES), np.uint8)
            frames[start : start + len(block)] = block

    def close(self) -> None:
        """The file goes."""
        if self._spool is not None:
            self._spool.close()

    def _spill(self) -> None:
        if self._spool is None:
            self._spool = TemporaryFile(dir=self._folder)  # noqa: SIM115
        self._spool.write(b"".join(self._held))
        self._held.clear()
        self._spilled = self.offsets[-1]
