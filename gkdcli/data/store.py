"""The store: one HDF5 part per video, one index per modality, and the reader that training uses.

A part is written under a temporary name and renamed, so a part that has its name is whole. The index is
derived: links to the parts and tables, written atomically, rebuilt from the parts at any time.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py

from gkdcli.data.index import SCHEMA, build_index, mark_unfinished, setting_differences, written_settings
from gkdcli.data.parts import (
    Bytes,
    PartReader,
    PartWriter,
    escape,
    part_path,
    plain_value,
    unescape,
)
from gkdcli.data.segments import Segment
from gkdcli.errors import GkdError

__all__ = [
    "PartWriter",
    "Store",
    "VideoRow",
    "build_index",
    "escape",
    "mark_unfinished",
    "part_path",
    "setting_differences",
    "unescape",
    "written_settings",
]
_OPEN_PARTS = 32


class VideoRow(NamedTuple):
    """One video of a store; `fps` is that of the stored frames, `digest` the SHA-256 of the source file.

    An untrimmed video has label -1, and the folder of its subset in place of a class.
    """

    name: str
    class_name: str
    label: int
    frames: int
    fps: float
    width: int
    height: int
    group: str
    digest: str


class Store:
    """A finished store, for reading. It may be pickled and forked: files are opened again in each process.

    Attributes:
        classes: names, the position is the label.
        videos: one row per video, ordered by label and name; untrimmed ones by subset and name.
        segments: of each video its actions, in the order of the file; empty where videos have one class each.
        ground_truth: of untrimmed videos, by subset ("train", "test"): `GroundTruth` as a dict, and as
            `stored_videos` and `stored_segments` how much of it is in the store.
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
        segments: Sequence[tuple[Segment, ...]] = (),
        ground_truth: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = index
        self.dataset = str(head["dataset"])
        self.modality = str(head["modality"])
        self.fingerprint = str(head["fingerprint"])
        self.settings: dict[str, Any] = json.loads(head["settings"])
        self.classes = classes
        self.videos = videos
        self.segments = list(segments) or [()] * len(videos)
        self.ground_truth: dict[str, Any] = dict(ground_truth or {})
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
                        f"run `gkd prepare {dataset}` again: it keeps the parts and writes a new index",
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
                rows = file["/tables/segments"][:].tolist()
                ground_truth = json.loads(file["/tables/ground_truth"].asstr()[()])
            videos = _rows(table)
            segments: list[list[Segment]] = [[] for _ in videos]
            for video, *cells in rows:
                segments[video].append(Segment(*cells))
            actions = [tuple(found) for found in segments]
            return cls(index, head, classes, videos, splits, actions, ground_truth)
        except (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
            raise GkdError(
                f"the index of the {modality} store is damaged",
                f"{index}: {error}",
                f"delete that file and run the same `gkd prepare {dataset}` again; the videos stay",
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_parts": OrderedDict(), "_pid": -1, "_inherited": []}

    @property
    def splits(self) -> Mapping[tuple[int, str], Sequence[int]]:
        """Positions in `videos` by number of the split (from 1) and subset."""
        return self._splits

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


def _rows(table: Any) -> list[VideoRow]:
    """Column by column: a hundred thousand rows should not be waited for."""
    name, class_name, *others = (table[key].tolist() for key in table.dtype.names)
    names = [unescape(cell.decode()) for cell in name]
    known: dict[bytes, str] = {cell: unescape(cell.decode()) for cell in set(class_name)}
    label, frames, fps, width, height, group, digest = others
    texts = [[cell.decode() for cell in column] for column in (group, digest)]
    columns = names, map(known.__getitem__, class_name), label, frames, fps, width, height, *texts
    return list(map(VideoRow._make, zip(*columns, strict=True)))


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
