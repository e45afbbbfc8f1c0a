"""The store: one HDF5 part per video, one index per modality, and the reader that training uses.

A part is written under a temporary name and renamed, so a part that has its name is whole. The index is
derived: links to the parts and tables, written atomically, rebuilt from the parts at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gkdcli.data.annotations import SUBSETS, Listing, Subset
from gkdcli.data.parts import (
    SCHEMA,
    Bytes,
    PartReader,
    PartWriter,
    damaged_part,
    escape,
    part_path,
    plain_value,
    read_attributes,
    unescape,
)
from gkdcli.errors import GkdError
from gkdcli.files import atomic_path
from gkdcli.runs import version

__all__ = [
    "PartWriter",
    "Store",
    "VideoRow",
    "build_index",
    "escape",
    "mark_unfinished",
    "part_path",
    "unescape",
]
_OPEN_PARTS = 32
_ROW = np.dtype(
    [
        ("name", h5py.string_dtype()),
        ("class", h5py.string_dtype()),
        ("label", "<i4"),
        ("frames", "<i8"),
        ("fps", "<f8"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("group", h5py.string_dtype()),
        ("digest", h5py.string_dtype()),
    ]
)


@dataclass(frozen=True, slots=True)
class VideoRow:
    """One video of a store; `fps` is that of the stored frames, `digest` the SHA-256 of the source file."""

    name: str
    class_name: str
    label: int
    frames: int
    fps: float
    width: int
    height: int
    group: str
    digest: str


def mark_unfinished(
    store_folder: Path, dataset: str, modality: str, settings: Mapping[str, Any], expected: int
) -> None:
    """Replaces the index by one that only says what the store will be; `build_index` completes it."""
    with (
        atomic_path(store_folder / f"{modality}.h5") as temporary,
        h5py.File(temporary, "w", locking=False) as file,
    ):
        _describe(file, dataset, modality, settings)
        file.attrs.update(complete=False, expected=expected)


def build_index(
    store_folder: Path, dataset: str, modality: str, listing: Listing, settings: Mapping[str, Any]
) -> Path:
    """Writes `<store_folder>/<modality>.h5` from the parts; listed videos without a part are left out.

    Args:
        store_folder: `stores/<dataset>`.
        dataset: the name of the data set.
        modality: the name of the folder of parts.
        listing: classes and splits; the position of a class is its label.
        settings: `DataSettings.stored(modality)` of the parts.

    Returns:
        The index.

    Raises:
        GkdError: no listed video has a part, or a part is damaged.
    """
    index = store_folder / f"{modality}.h5"
    labels = {name: label for label, name in enumerate(listing.classes)}
    rows: list[tuple[Any, ...]] = []
    links = []
    splits: dict[int, dict[Subset, list[int]]] = {}
    for source in sorted(listing.sources, key=lambda source: (labels[source.class_name], source.name)):
        try:
            part = part_path(store_folder / modality, source.class_name, source.name)
        except ValueError:
            continue
        if not part.exists():
            continue
        try:
            found = read_attributes(part)
        except OSError as error:
            raise damaged_part(part, str(error)) from None
        rows.append(
            (
                escape(source.name),
                escape(source.class_name),
                labels[source.class_name],
                found["frame_count"],
                found["fps"],
                found["width"],
                found["height"],
                source.group,
                found["source_digest"],
            )
        )
        for number, subset in source.splits.items():
            splits.setdefault(number, {name: [] for name in SUBSETS})[subset].append(len(rows) - 1)
        links.append(part.relative_to(store_folder))
    if not rows:
        raise GkdError(
            f"the {modality} store would be empty: every video was rejected",
            str(store_folder / f"{modality}.rejected.tsv"),
            "the reasons are in that file",
        )
    with atomic_path(index) as temporary, h5py.File(temporary, "w", locking=False) as file:
        _describe(file, dataset, modality, settings)
        file.attrs.update(complete=True, expected=len(rows), fingerprint=_fingerprint(rows, splits, settings))
        for row, link in zip(rows, links, strict=True):
            file[f"/videos/{row[1]}/{row[0]}"] = h5py.ExternalLink(str(link), "/")
        file["/tables/videos"] = np.array(rows, _ROW)
        file["/tables/classes"] = np.array([escape(name) for name in listing.classes], h5py.string_dtype())
        for number, subsets in splits.items():
            for subset, members in subsets.items():
                file[f"/splits/{number}/{subset}"] = np.array(members, np.int64)
    return index


def written_settings(store_folder: Path, modality: str) -> dict[str, Any]:
    """`DataSettings.stored(modality)` of what was written so far; empty where nothing was."""
    attributes: dict[str, Any] = {}
    for path in [store_folder / f"{modality}.h5", *(store_folder / modality).glob("*/*.h5")]:
        try:
            attributes = read_attributes(path)
            break
        except OSError:
            continue  # absent or damaged: the next one tells as much
    return dict(json.loads(attributes.get("settings", "{}")))


def _describe(file: Any, dataset: str, modality: str, settings: Mapping[str, Any]) -> None:
    file.attrs.update(
        schema=SCHEMA,
        dataset=dataset,
        modality=modality,
        settings=json.dumps(settings, sort_keys=True),
        version=version(),
    )


def _fingerprint(
    rows: Sequence[tuple[Any, ...]], splits: Mapping[int, Any], settings: Mapping[str, Any]
) -> str:
    """Over names, labels, frame counts, digests of the sources, splits and settings."""
    return hashlib.sha256(json.dumps([rows, splits, settings], sort_keys=True).encode()).hexdigest()


def setting_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`data.fps 0.0 -> 10.0` for each key that differs."""
    keys = sorted({*old, *new})
    return [f"data.{key} {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]


class Store:
    """A finished store, for reading. It may be pickled and forked: files are opened again in each process.

    Attributes:
        classes: names, the position is the label.
        videos: one row per video, ordered by label and name.
        settings: `DataSettings.stored(modality)` when it was written.
        fingerprint: changes with the videos and with the settings.
    """

    def __init__(
        self,
        index: Path,
        head: Mapping[str, Any],
        classes: list[str],
        videos: list[VideoRow],
        splits: dict[tuple[int, str], list[int]],
    ) -> None:
        self.path = index
        self.dataset = str(head["dataset"])
        self.modality = str(head["modality"])
        self.fingerprint = str(head["fingerprint"])
        self.settings: dict[str, Any] = json.loads(head["settings"])
        self.classes = classes
        self.videos = videos
        self._splits = splits
        self._parts: OrderedDict[int, PartReader] = OrderedDict()
        self._pid = os.getpid()
        self._inherited: list[OrderedDict[int, PartReader]] = []

    @classmethod
    def open(cls, index: Path) -> Store:
        """Reads the index `stores/<dataset>/<modality>.h5`.

        Raises:
            GkdError: there is none, it is unfinished, damaged, or of another version.
        """
        dataset, modality = index.parent.name, index.stem
        if not index.is_file():
            parts = index.with_suffix("")
            if parts.is_dir():
                raise _unfinished(index, 0)
            flow = " --modality flow" if modality == "flow" else ""
            raise GkdError(
                f"there is no {modality} store for {dataset}",
                f"looked for {index}",
                f"`gkd prepare {dataset} VIDEOS/{flow}`, or point elsewhere with `--root DIR`",
            )
        try:
            with h5py.File(index, "r", locking=False) as file:
                head = {key: plain_value(value) for key, value in file.attrs.items()}
                if head["schema"] != SCHEMA:
                    raise GkdError(
                        f"the {modality} store was written by another version of gkd",
                        f"{index}: schema {head['schema']}, this version reads {SCHEMA}",
                        f"move {index.parent} away and run `gkd prepare {dataset}` again",
                    )
                if not head["complete"]:
                    raise _unfinished(index, int(head["expected"]))
                table = file["/tables/videos"][:]
                classes = [unescape(name) for name in file["/tables/classes"].asstr()[:]]
                splits = {
                    (int(number), subset): members[:].tolist()
                    for number, group in file["/splits"].items()
                    for subset, members in group.items()
                }
            videos = [_row(cells) for cells in table.tolist()]
            return cls(index, head, classes, videos, splits)
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            raise GkdError(
                f"the index of the {modality} store is damaged",
                f"{index}: {error}",
                f"delete that file and run the same `gkd prepare {dataset}` again; the videos stay",
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_parts": OrderedDict(), "_pid": -1, "_inherited": []}

    def split(self, number: int, subset: str) -> list[int]:
        """Positions in `videos` of one subset ("train" or "test") of a split (from 1).

        Raises:
            GkdError: the store has no such split.
        """
        if (number, subset) not in self._splits:
            known = ", ".join(f"{n} {name}" for n, name in sorted(self._splits))
            raise GkdError(
                f"{self.dataset} has no split {number} {subset}",
                str(self.path),
                f"it has: {known}",
            )
        return self._splits[number, subset]

    def frames(self, video: int, start: int, count: int) -> list[Bytes] | Bytes:
        """Frames [start, start + count) of a video, in one read per stream.

        Returns:
            JPEG: `count` byte arrays, of flow those of x and then those of y. Raw: (count, H, W, C) uint8.

        Raises:
            GkdError: the part is missing or damaged.
        """
        row = self.videos[video]
        assert 0 <= start < start + count <= row.frames, (row, start, count)
        return self._part(video, row).frames(start, count)

    def close(self) -> None:
        """Closes the files this process has open; reading opens them again."""
        if self._pid == os.getpid():
            for part in self._parts.values():
                part.close()
        self._parts = OrderedDict()

    def _part(self, video: int, row: VideoRow) -> PartReader:
        if self._pid != os.getpid():
            self._inherited.append(self._parts)  # never touched again: they belong to the parent
            self._parts, self._pid = OrderedDict(), os.getpid()
        part = self._parts.pop(video, None)
        if part is None:
            path = part_path(self.path.with_suffix(""), row.class_name, row.name)
            part = PartReader(path, row.frames, row.digest)
            if len(self._parts) >= _OPEN_PARTS:
                self._parts.popitem(last=False)[1].close()
        self._parts[video] = part
        return part


def _row(cells: tuple[Any, ...]) -> VideoRow:
    text: list[Any] = [cell.decode() if isinstance(cell, bytes) else cell for cell in cells]
    return VideoRow(unescape(text[0]), unescape(text[1]), *text[2:])


def _unfinished(index: Path, expected: int) -> GkdError:
    """An interrupted `gkd prepare`, with how far it came."""
    parts = list(index.with_suffix("").glob("*/*.h5"))
    of = f" of {expected}" if expected else ""
    newest = max(parts, key=lambda path: path.stat().st_mtime, default=None)
    return GkdError(
        f"the {index.stem} store is unfinished: {len(parts)}{of} videos are in it",
        f"{index}" + (f", last written {unescape(newest.stem)}" if newest else ""),
        "run the same `gkd prepare` again; it continues where it stopped",
    )
