"""`metrics.jsonl`: an object per step, one per epoch with the means over its clips; and `metrics.csv`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gkdcli.files import write_text

FIRST = ("row", "step", "epoch", "part", "learning_rate", "seconds", "step_seconds", "wait_seconds", "loss")


def append(path: Path, entry: Mapping[str, Any]) -> None:
    """Adds a line."""
    with open(path, "a", encoding="utf-8") as handle:
        handle.write(json.dumps(entry) + "\n")


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines up to one that a kill has cut short; none where there is no file yet."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as handle:
        for line in handle:
            try:
                yield json.loads(line)
            except ValueError:
                return


def truncate(path: Path, step: int, epoch: int) -> None:
    """Keeps the lines up to a checkpoint: what came after it will come again.

    Args:
        path: of the file.
        step: the last one done.
        epoch: the one in work; the means of those before it are kept.
    """
    if not path.is_file():
        return
    kept = [
        entry
        for entry in read(path)
        if (entry["epoch"] < epoch if "mean" in entry else entry["step"] <= step)
    ]
    write_text(path, "".join(f"{json.dumps(entry)}\n" for entry in kept))


class Table:
    """`metrics.csv`: the lines of `metrics.jsonl` as rows, for spreadsheets.

    A column keeps its place for good. A term that shows up later (the other pass, a spliced clip) becomes the
    last column: then, and when a run is continued, the file is written anew from the lines.

    Args:
        path: of the table.
        lines: `metrics.jsonl`, where an entry already is when it is added here.
    """

    def __init__(self, path: Path, lines: Path) -> None:
        self.path = path
        self.lines = lines
        self.columns: dict[str, None] = {}  # none are known before the first row

    def add(self, entry: Mapping[str, Any]) -> None:
        """Adds a row."""
        row = _row(entry)
        if row.keys() <= self.columns.keys():
            with open(self.path, "a", encoding="utf-8", newline="") as handle:
                csv.DictWriter(handle, self.columns, lineterminator="\n").writerow(row)
        else:
            self.rewrite()

    def rewrite(self) -> None:
        """Makes the whole table from the lines."""
        rows = [_row(entry) for entry in read(self.lines)]
        self.columns = dict.fromkeys([*FIRST, *(name for row in rows for name in row)])
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path, text.getvalue())


def _row(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A line with its means, if it has them, in the columns of the terms."""
    means = entry.get("mean")
    rest = {name: value for name, value in entry.items() if name != "mean"}
    return {"row": "step" if means is None else "epoch", **rest, **(means or {})}
