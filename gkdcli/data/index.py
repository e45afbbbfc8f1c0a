"""The index of a store, `stores/<dataset>/<modality>.h5`: links to the parts, and tables; `store` reads it.

It is derived, written atomically, and rebuilt from the parts at any time.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gkdcli.data.parts import SCHEMA as PART_SCHEMA
from gkdcli.data.parts import damaged_part, escape, read_about, read_attributes
from gkdcli.data.segments import Segment
from gkdcli.data.sources import SUBSETS, Listing, Source, Subset
from gkdcli.errors import GkdError
from gkdcli.files import atomic_path
from gkdcli.runs import version

SCHEMA = 3  # of the index; parts have their own
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
_SEGMENT = np.dtype(
    [("video", "<i8"), ("start", "<f8"), ("end", "<f8"), ("label", "<i4"), ("first", "<f8"), ("last", "<f8")]
)


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
    store_folder: Path,
    dataset: str,
    modality: str,
    listing: Listing,
    settings: Mapping[str, Any],
    known: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Writes `<store_folder>/<modality>.h5` from the parts; listed videos without a part are left out.

    Untrimmed videos (a listing with `ground_truth`) have label -1 and their actions in `/tables/segments`.

    Args:
        store_folder: `stores/<dataset>`.
        dataset: the name of the data set.
        modality: the name of the folder of parts.
        listing: classes and splits; the position of a class is its label.
        settings: `DataSettings.stored(modality)` of the parts.
        known: attributes of parts that were read already, by path.

    Returns:
        The index.

    Raises:
        GkdError: no listed video has a part, or a part is damaged.
    """
    index = store_folder / f"{modality}.h5"
    labels = {name: label for label, name in enumerate(listing.classes)}
    untrimmed = listing.ground_truth is not None
    rows: list[tuple[Any, ...]] = []
    segments: list[tuple[Any, ...]] = []
    splits: dict[int, dict[Subset, list[int]]] = {}
    if untrimmed:  # both subsets are there, whatever they hold
        splits[1] = {name: [] for name in SUBSETS}

    def order(source: Source) -> tuple[Any, str]:
        return source.class_name if untrimmed else labels[source.class_name], source.name

    folder = store_folder / modality
    for source in sorted(listing.sources, key=order):
        try:
            name, class_name = escape(source.name), escape(source.class_name)
        except ValueError:
            continue
        part = f"{folder}/{class_name}/{name}.h5"
        try:
            found = (known or {}).get(part) or read_about(part)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise damaged_part(Path(part), str(error)) from None
        rows.append(
            (
                name,
                class_name,
                -1 if untrimmed else labels[source.class_name],
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
        segments += [(len(rows) - 1, *segment) for segment in placed(source, found, labels)]
    if not rows:
        raise GkdError(
            f"the {modality} store would be empty: every video was rejected",
            str(store_folder / f"{modality}.rejected.tsv"),
            "the reasons are in that file",
        )
    hashed: list[Any] = [rows, splits, settings]
    if untrimmed:
        hashed += [segments, listing.classes]
    fingerprint = _fingerprint(hashed)
    with atomic_path(index) as temporary, h5py.File(temporary, "w", locking=False) as file:
        _describe(file, dataset, modality, settings)
        file.attrs.update(complete=True, expected=len(rows), fingerprint=fingerprint)
        _link(file.create_group("videos"), [(row[1], row[0]) for row in rows], modality)
        file["/tables/videos"] = np.array(rows, _ROW)
        file["/tables/segments"] = np.array(segments, _SEGMENT)
        file["/tables/ground_truth"] = json.dumps(_ground_truth(listing, splits, segments))
        file["/tables/classes"] = np.array([escape(name) for name in listing.classes], h5py.string_dtype())
        for number, subsets in splits.items():
            for subset, members in subsets.items():
                file[f"/splits/{number}/{subset}"] = np.array(members, np.int64)
    return index


def _link(videos: Any, names: Sequence[tuple[str, str]], modality: str) -> None:
    """Links to the parts, by (class, name); the low-level call takes a fifth of the time."""
    in_utf8 = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    in_utf8.set_char_encoding(h5py.h5t.CSET_UTF8)
    for class_name, members in itertools.groupby(names, lambda row: row[0]):
        group = videos.create_group(class_name)
        for _, name in members:
            target = f"{modality}/{class_name}/{name}.h5"
            said = None if name.isascii() else in_utf8
            group.id.links.create_external(name.encode(), target.encode(), b"/", said)


def written_settings(store_folder: Path, modality: str) -> dict[str, Any]:
    """`DataSettings.stored(modality)` of what was written so far; empty where nothing was."""
    attributes: dict[str, Any] = {}
    index, parts = store_folder / f"{modality}.h5", (store_folder / modality).glob("*/*.h5")
    for path, schema in itertools.chain([(index, SCHEMA)], ((part, PART_SCHEMA) for part in parts)):
        try:
            attributes = read_attributes(path, schema)
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


def _fingerprint(hashed: Sequence[Any]) -> str:
    """Over names, labels, frame counts, digests of the sources, splits, settings, and segments."""
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()


def placed(source: Source, part: Mapping[str, Any], labels: Mapping[str, int]) -> list[Segment]:
    """The actions of a video, with their places among the stored frames (METHOD 7).

    Frames of the source are scaled by stored / source frames: by the file's own counts where it counts as
    many stored frames as there are, else by those of the part. Where the file gives no frames, or nobody
    knows how many the source has, seconds are multiplied by the rate of the stored frames.

    Args:
        source: with its actions.
        part: attributes of its part.
        labels: of the classes.
    """
    stated, frames, fps = source.stated, int(part["frame_count"]), float(part["fps"])
    ratio = 0.0
    if stated.count and stated.sample_count == frames:
        ratio = stated.sample_count / stated.count
    elif part.get("codec") != "npy" and part.get("source_frames"):
        ratio = frames / int(part["source_frames"])
    segments = []
    for action in source.segments:
        first, last = action.start * fps, action.end * fps
        if ratio and action.first_frame is not None and action.last_frame is not None:
            first, last = action.first_frame * ratio, action.last_frame * ratio
        segments.append(Segment(action.start, action.end, labels[action.class_name], first, last))
    return segments


def _ground_truth(
    listing: Listing,
    splits: Mapping[int, Mapping[Subset, Sequence[int]]],
    segments: Sequence[tuple[Any, ...]],
) -> dict[str, Any]:
    """By subset: what its file holds, and how much of that is in the store."""
    found: dict[str, Any] = {}
    for subset, truth in (listing.ground_truth or {}).items():
        members = set(splits[1][subset])
        there = [row[0] for row in segments if row[0] in members]
        found[subset] = asdict(truth) | {"stored_videos": len(set(there)), "stored_segments": len(there)}
    return found


def setting_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`data.fps 0.0 -> 10.0` for each key that differs."""
    keys = sorted({*old, *new})
    return [f"data.{key} {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]
