"""One store prepared by many runs at the same time: `gkd prepare --shard 3/16` on any batch scheduler.

The runs share a folder and nothing else. Each has a lock, temporaries and a table of rejects of its own; the
same command without `--shard` comes after them, makes up what is missing, and writes tables and index.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from gkdcli.data.rejects import Reject, read_rejects
from gkdcli.data.sources import Listing, Source
from gkdcli.errors import GkdError, usage_error
from gkdcli.files import is_locked, lock_holder, locked


@dataclass(frozen=True)
class Shard:
    """Share `number` (from 1) of `count`."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Reads `3/16`.

        Raises:
            GkdError: it is nothing of that kind (exit code 2).
        """
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        shard = cls(int(found[1]), int(found[2])) if found else cls(0, 0)
        if not 1 <= shard.number <= shard.count:
            raise usage_error(
                f"`{text}` is no share of the videos",
                f"--shard {text}",
                "K/N with K from 1 to N: `--shard 1/3`, `--shard 2/3` and `--shard 3/3` are three runs",
            )
        return shard

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def tag(self) -> str:
        """For names of files."""
        return f"{self.number}-of-{self.count}"

    def share(self, listing: Listing, modalities: Sequence[str]) -> Listing:
        """The part of the listing that is this shard's; each video and each reject is in exactly one.

        All videos are put in an order that depends on their names alone, and cut where equal sums of bytes
        are reached. So shares are equal to within one video, no scan's order matters, and where a file
        changes between two runs only videos at the cuts change sides.
        """
        ordered = sorted(listing.sources, key=_order)
        sizes = [1 + _size(source, modalities) for source in ordered]
        twice, before, chosen = 2 * sum(sizes), 0, set()
        for source, size in zip(ordered, sizes, strict=True):
            middle = 2 * before + size
            if middle * self.count // twice == self.number - 1:
                chosen.add(id(source))
            before += size
        sources = [source for source in listing.sources if id(source) in chosen]
        rejects = sorted(listing.rejects)[self.number - 1 :: self.count]
        return replace(listing, sources=sources, rejects=rejects)


def _order(source: Source) -> bytes:
    name = f"{source.class_name}\0{source.name}".encode("utf-8", "surrogateescape")
    return hashlib.sha256(name).digest()


def _size(source: Source, modalities: Sequence[str]) -> int:
    """Bytes of its files; 0 for a folder of images, where each would have to be asked for."""
    try:
        files = {source.file(modality) for modality in modalities}
        return sum(file.stat().st_size for file in files if file.is_file())
    except OSError:
        return 0


@contextmanager
def store_locked(store_folder: Path, dataset: str, shard: Shard | None) -> Iterator[None]:
    """Keeps others off the store; shards of one division share it, each of them runs once.

    Raises:
        GkdError: it is in use; the message names by whom.
    """
    lock, purpose = store_folder / ".lock", f"the store of {dataset}"
    with locked(lock, purpose, shared=shard is not None):
        if shard is None:
            yield
            return
        own = store_folder / f".lock.{shard.tag}"
        with locked(own, f"{purpose} as shard {shard}"):
            for other in sorted(store_folder.glob(".lock.*-of-*")):
                if not other.name.endswith(f"-of-{shard.count}") and is_locked(other):
                    raise GkdError(
                        f"{purpose} is being prepared in another number of shards",
                        f"{other}, held by {lock_holder(other)}",
                        "wait for those, or stop them; then any number of shards continues",
                    )
            yield


def reject_table(store_folder: Path, modality: str, shard: Shard | None) -> Path:
    """`<modality>.rejected.tsv`, or the shard's own."""
    return store_folder / f"{modality}.rejected.{f'{shard.tag}.' if shard else ''}tsv"


def known_rejects(store_folder: Path, modalities: Sequence[str]) -> dict[str, Reject]:
    """What any run has rejected, by the `cell` of the path."""
    known: dict[str, Reject] = {}
    for modality in modalities:
        of_shards = sorted(store_folder.glob(f"{modality}.rejected.*-of-*.tsv"))  # newer than the whole one
        for table in (reject_table(store_folder, modality, None), *of_shards):
            with suppress(FileNotFoundError):  # a shard that has no more rejects removes its own
                known |= read_rejects(table)
    return known


def remove_traces(store_folder: Path, modalities: Sequence[str]) -> None:
    """Tables and locks of shards, once all is merged; the caller holds the store's lock alone."""
    patterns = [".lock.*-of-*", *(f"{modality}.rejected.*-of-*.tsv" for modality in modalities)]
    for pattern in patterns:
        for path in store_folder.glob(pattern):
            path.unlink(missing_ok=True)
