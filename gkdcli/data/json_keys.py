"""JSON objects that have a key twice, of which a plain dict would keep the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Twice:
    """Stands for such an object; `key` is the first that comes again."""

    key: str


def object_or_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Twice:
    """For `json.loads(..., object_pairs_hook=object_or_twice)`."""
    taken = dict(pairs)
    if len(taken) == len(pairs):
        return taken
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return Twice(key)
        seen.add(key)
    raise AssertionError("fewer keys than pairs, and none twice")
