"""Tables of bad videos, `<modality>.rejected.tsv`, and of bad annotations, `annotations.problems.tsv`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gkdcli.data.sources import Problem
from gkdcli.files import stamp, write_text

PROBLEMS = "annotations.problems.tsv"
_HEADER = "path\treason\tsize\tmodified_ns"


@dataclass(frozen=True)
class Reject:
    """A bad video, and its file as it was when it was tried; -1: try again in any case."""

    reason: str
    size: int = -1
    mtime_ns: int = -1

    @classmethod
    def of(cls, path: Path, reason: str) -> Reject:
        """A reject that stands for as long as the file is the same."""
        try:
            return cls(reason, *stamp(path))
        except OSError:
            return cls("the file has disappeared")


def write_rejects(path: Path, rows: Sequence[tuple[str, Reject]]) -> None:
    """Writes the table atomically; removes it where there are no rejects."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    lines = [f"{cell(name)}\t{cell(bad.reason)}\t{bad.size}\t{bad.mtime_ns}" for name, bad in rows]
    write_text(path, "\n".join([_HEADER, *lines]) + "\n")


def write_problems(path: Path, problems: Sequence[Problem]) -> None:
    """Writes the table atomically; removes it where there are no problems."""
    if not problems:
        path.unlink(missing_ok=True)
        return
    lines = [
        "\t".join(Problem._fields),
        *("\t".join(cell(str(value or "")) for value in row) for row in problems),
    ]
    write_text(path, "\n".join(lines) + "\n")


def read_rejects(path: Path) -> dict[str, Reject]:
    """By the `cell` of the path; a line that is not ours is as if absent, so its video is tried again."""
    known = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
        cells = line.split("\t")
        if len(cells) == 4 and cells[2].isdecimal() and cells[3].isdecimal():
            known[cells[0]] = Reject(cells[1], int(cells[2]), int(cells[3]))
    return known


def read_reasons(path: Path) -> dict[str, str]:
    """Why each video of the table was refused, by the `cell` of its path."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = [line.split("\t") for line in text.split("\n")[1:]]
    return {cells[0]: cells[1] for cells in lines if len(cells) == 4}


def cell(text: str) -> str:
    """Text of one cell; bytes of file names that are no UTF-8 become readable ASCII."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return text.replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")
