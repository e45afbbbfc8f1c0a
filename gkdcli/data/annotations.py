"""Which videos there are, what each shows, and which of them are tested: folders and lists."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from gkdcli.data.json_keys import Twice, object_or_twice
from gkdcli.data.names import check_text, short, video_stem
from gkdcli.data.sources import SUBSETS, Listing, Source, Subset
from gkdcli.errors import GkdError

__all__ = ["SUBSETS", "Listing", "Source", "Subset", "read_list", "scan_folder"]
_COLUMNS = ("video", "class", "subset")
_LIST_HINT = "a list is CSV with the header `video,class` or `video,class,subset`, or JSON with the same keys"


def scan_folder(videos: Path, test_fraction: float, frames: bool = False) -> Listing:
    """Lists `VIDEOS/<class>/<video>` or `VIDEOS/{train,test}/<class>/<video>`.

    A video is a file, or with `frames` a folder of images.

    The first layout is divided here, see `_divide`; the second is taken as given. Hidden files are
    skipped, other files that are no videos are counted; what looks meant but cannot be used is a reject.

    Raises:
        GkdError: no such folder, no videos in it, or a layout that can be read in two ways.
    """
    if not videos.is_dir():
        raise GkdError(
            "there is no folder of videos", str(videos), "name the folder that holds one folder per class"
        )
    scan = _Scan(frames)
    top = _entries(videos)
    folders = [path for path in top if path.is_dir()]
    for path in top:
        if not path.is_dir():
            scan.file_without_class(path)
    split = {path.name.lower(): path for path in folders if path.name.lower() in SUBSETS}
    if split and all(_holds_only_folders(path) for path in split.values()):
        if len(split) < 2 or len(folders) > 2:
            raise GkdError(
                "cannot tell which folders are classes",
                f"{videos} holds {', '.join(path.name for path in folders[:6])}",
                "use VIDEOS/<class>/<video>, or VIDEOS/{train,test}/<class>/<video> and no third folder",
            )
        for subset in SUBSETS:
            for path in _entries(split[subset]):
                if path.is_dir():
                    scan.class_folder(path, subset)
                else:
                    scan.file_without_class(path)
        listing = scan.listing()
        _need_both_subsets(listing.sources, str(videos))
    else:
        for path in folders:
            scan.class_folder(path, "train")
        listing = scan.listing()
        listing = replace(listing, sources=_divide(listing.sources, test_fraction))
    if not listing.sources:
        raise GkdError(
            "there are no videos to prepare",
            str(videos) + (f"; first: {': '.join(listing.rejects[0])}" if listing.rejects else ""),
            "name the folder that holds one folder of videos per class",
        )
    return listing


def read_list(path: Path, videos: Path, test_fraction: float, frames: bool = False) -> Listing:
    """Lists the videos that a CSV or JSON file names, with paths relative to `videos`.

    A video is called by its path without extension, and without the leading folder of its class; with
    `frames` it is a folder of images. Listed files that do not exist are rejects.

    Raises:
        GkdError: anything else that is wrong with the file, with its line (JSON: entry).
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise GkdError("the list of videos cannot be read", f"{path}: {error}", _LIST_HINT) from None
    rows = list(_json_rows(path, text) if path.suffix.lower() == ".json" else _csv_rows(path, text))
    if not rows:
        raise GkdError("the list names no videos", str(path), _LIST_HINT)
    if len({"subset" in row for _, row in rows}) > 1:
        first = next(place for place, row in rows if ("subset" in row) != ("subset" in rows[0][1]))
        raise GkdError("some entries have a subset and some have none", f"{path} {first}", _LIST_HINT)
    seen: dict[str, tuple[str, str]] = {}
    taken: dict[tuple[str, str], str] = {}
    sources: list[Source] = []
    rejects: list[tuple[str, str]] = []
    for place, row in rows:
        source = _listed(row, f"{path} {place}", videos, frames)
        video, where = row["video"], f"{path} {place}, {short(row['video'])}"
        known = seen.setdefault(str(source.path), (source.class_name, place))
        if known[1] != place:
            what = (
                "is listed twice"
                if known[0] == source.class_name
                else f"is also of class `{short(known[0])}`"
            )
            raise GkdError(f"a video {what}", f"{where}; first at {known[1]}", "keep one of the two")
        other = taken.setdefault((source.class_name, source.name), place)
        if other != place:
            raise GkdError(
                f"two videos of a class would both be called `{short(source.name)}`",
                f"{where}; first at {other}",
                "rename one of the two files",
            )
        sources.append(source)
        if not _exists(source.path, frames):
            rejects.append((video, "there is no such folder" if frames else "there is no such file"))
    classes = sorted({source.class_name for source in sources})
    sources.sort(key=lambda source: (source.class_name, source.name))
    if "subset" not in rows[0][1]:
        sources = _divide(sources, test_fraction)
    else:
        _need_both_subsets(sources, str(path))
    present = [source for source in sources if _exists(source.path, frames)]
    if not present:
        raise GkdError(
            "none of the listed videos exists",
            f"{path}; looked under {videos}, first for {short(rows[0][1]['video'])}",
            "paths in the list are relative to the folder of videos",
        )
    return Listing(classes, present, rejects)


class _Scan:
    """Collects what a walk over folders meets."""

    def __init__(self, frames: bool) -> None:
        self.frames = frames
        self.found: dict[tuple[str, str], list[Source]] = defaultdict(list)
        self.rejects: list[tuple[str, str]] = []
        self.ignored = 0

    def class_folder(self, folder: Path, subset: Subset) -> None:
        """Takes every video directly in `folder` as one of class `folder.name`."""
        videos = 0
        for entry in _scanned(folder):
            name = entry.name if self.frames else video_stem(entry.name)
            is_folder = _is(entry.is_dir)
            if is_folder and not self.frames:
                self.rejects.append((entry.path, "a folder within the folder of a class is not read"))
            elif name is None or is_folder != self.frames:
                self.ignored += 1
            elif not is_folder and not _is(entry.is_file):
                self.rejects.append((entry.path, "not a file, or a link that leads nowhere"))
            else:
                source = Source(Path(entry.path), folder.name, name, {1: subset})
                self.found[folder.name, name].append(source)
                videos += 1
        if not videos:
            self.rejects.append((str(folder), "a class folder without videos"))

    def file_without_class(self, path: Path) -> None:
        """A video beside the class folders is a reject, another file is only counted."""
        if video_stem(path.name) is not None and not self.frames:
            self.rejects.append((str(path), "lies beside the class folders, so its class is unknown"))
        else:
            self.ignored += 1

    def listing(self) -> Listing:
        """Everything found; videos of one class that share a name are all rejects."""
        sources = []
        for _, same in sorted(self.found.items()):
            if len(same) == 1:
                sources += same
            for source in same if len(same) > 1 else ():
                others = ", ".join(str(other.path) for other in same if other is not source)
                self.rejects.append((str(source.path), f"has the same name and class as {others}"))
        return Listing(
            sorted({class_name for class_name, _ in self.found}), sources, self.rejects, self.ignored
        )


def _entries(folder: Path) -> list[Path]:
    return [folder / entry.name for entry in _scanned(folder)]


def _scanned(folder: Path) -> list[os.DirEntry[str]]:
    """In the order of names, hidden ones left out; entries know what they are without another look."""
    try:
        with os.scandir(folder) as entries:
            return sorted(
                (entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name
            )
    except OSError as error:
        raise GkdError(
            "a folder cannot be read", f"{folder}: {error.strerror}", "check its permissions"
        ) from None


def _is(kind: Callable[[], bool]) -> bool:
    """`is_dir` or `is_file` of an entry; False of a link to itself."""
    try:
        return kind()
    except OSError:
        return False


def _holds_only_folders(folder: Path) -> bool:
    """Whether `train` or `test` is a subset and not a class of that name."""
    entries = _entries(folder)
    return any(path.is_dir() for path in entries) and not any(
        video_stem(path.name) is not None for path in entries if not path.is_dir()
    )


def _exists(path: Path, folder: bool) -> bool:
    try:
        return path.is_dir() if folder else path.is_file()
    except (OSError, ValueError):  # a name no file can have: too long, a NUL, half a character
        return False


def _divide(sources: list[Source], test_fraction: float) -> list[Source]:
    """Tests a share of each class, at least one video and not all, chosen by a hash of the names.

    Neither the order of files nor the rest of the folder matters; a class of one video is trained on, as all
    sources are to begin with.
    """
    by_class: dict[str, list[Source]] = defaultdict(list)
    for source in sources:
        by_class[source.class_name].append(source)
    tested: set[tuple[str, str]] = set()
    for members in by_class.values():
        count = min(max(round(len(members) * test_fraction), 1), len(members) - 1)
        members.sort(key=_draw)
        tested |= {(source.class_name, source.name) for source in members[:count]}
    return [
        replace(source, splits={1: "test"}) if (source.class_name, source.name) in tested else source
        for source in sources
    ]


def _draw(source: Source) -> bytes:
    return hashlib.sha256(f"{source.class_name}/{source.name}".encode("utf-8", "surrogateescape")).digest()


def _need_both_subsets(sources: list[Source], where: str) -> None:
    for subset in SUBSETS:
        if not any(source.splits[1] == subset for source in sources):
            raise GkdError(
                f"no video belongs to `{subset}`",
                where,
                "both subsets need videos; name no subsets to have the videos divided",
            )


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields (place, cells by column) of each row that is not blank."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    try:
        for raw in reader:
            cells = [cell.strip() for cell in raw]
            place = f"line {reader.line_num}"
            if not any(cells):
                continue
            if not header:
                header = cells
                _check_columns(set(header), f"{path} {place}")
                if len(set(header)) < len(header):
                    raise GkdError("a column appears twice", f"{path} {place}", _LIST_HINT)
            elif len(cells) != len(header):
                what = f"a row has {len(cells)} cells, the header {len(header)}"
                raise GkdError(what, f"{path} {place}", "quote names that contain commas")
            else:
                yield place, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise GkdError("not a CSV file", f"{path} line {reader.line_num}: {error}", _LIST_HINT) from None


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        document = json.loads(text, object_pairs_hook=object_or_twice)
    except ValueError as error:
        raise GkdError("not a JSON file", f"{path}: {error}", _LIST_HINT) from None
    except RecursionError:
        raise GkdError("the JSON is nested too deeply", str(path), _LIST_HINT) from None
    if not isinstance(document, list):
        raise GkdError("a list of videos in JSON is an array of objects", str(path), _LIST_HINT)
    for number, entry in enumerate(document, start=1):
        place = f"entry {number}"
        if isinstance(entry, Twice):
            check_text(entry.key, f"{path} {place}")
            raise GkdError(f"an entry has the key `{short(entry.key)}` twice", f"{path} {place}", _LIST_HINT)
        if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
            raise GkdError("an entry is not an object of strings", f"{path} {place}", _LIST_HINT)
        _check_columns(set(entry), f"{path} {place}")
        yield place, {key: value.strip() for key, value in entry.items()}


def _check_columns(names: set[str], where: str) -> None:
    unknown = sorted(names - set(_COLUMNS))
    if unknown:
        check_text(unknown[0], where)
        raise GkdError(f"`{short(unknown[0])}` is not a column of a list of videos", where, _LIST_HINT)
    missing = [name for name in _COLUMNS[:2] if name not in names]
    if missing:
        raise GkdError(f"there is no column `{missing[0]}`", where, _LIST_HINT)


def _listed(row: dict[str, str], where: str, videos: Path, frames: bool) -> Source:
    """One row, checked."""
    refuse: Callable[[str, str], GkdError] = lambda what, hint: GkdError(what, where, hint)  # noqa: E731
    empty = [name for name, value in row.items() if not value]
    if empty:
        raise refuse(f"the cell `{empty[0]}` is empty", _LIST_HINT)
    check_text("".join(row.values()), where)
    subset: Any = row.get("subset", "train")
    if subset not in SUBSETS:
        raise refuse(f"`{short(subset)}` is not a subset", "use train or test")
    inside = PurePosixPath(row["video"])
    if inside.is_absolute() or ".." in inside.parts:
        raise refuse(
            f"`{short(row['video'])}` leads out of the folder of videos", f"use a path relative to {videos}"
        )
    parts = (inside if frames else inside.with_suffix("")).parts if inside.name else ()
    if len(parts) > 1 and parts[0] == row["class"]:
        parts = parts[1:]
    if not parts:
        raise refuse(f"`{short(row['video'])}` names no file", _LIST_HINT)
    return Source(videos / inside, row["class"], "/".join(parts), {1: subset})
