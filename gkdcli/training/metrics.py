"""`metrics.jsonl`: one JSON object per step, and one per epoch with the means over its clips."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gkdcli.files import write_text


def append(path: Path, entry: Mapping[str, Any]) -> None:
    """Adds a line."""
    with open(path, "a", encoding="utf-8") as handle:
        handle.write(json.dumps(entry) + "\n")


def truncate(path: Path, step: int, epoch: int) -> None:
    """Keeps the lines up to a checkpoint: what came after it will come again.

    Args:
        path: of the file.
        step: the last one done.
        epoch: the one in work; the means of those before it are kept.
    """
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # cut short by a kill
            break
        if entry["epoch"] < epoch if "mean" in entry else entry["step"] <= step:
            kept.append(line)
    write_text(path, "".join(f"{line}\n" for line in kept))
