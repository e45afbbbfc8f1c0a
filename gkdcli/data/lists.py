"""Folders of split lists, and the videos or frame folders on disk that they name."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from gkdcli.data import split_files
from gkdcli.data.annotations import Listing, Source
from gkdcli.data.names import video_stem
from gkdcli.data.split_files import Files, Lists, Lookup, group_of
from gkdcli.errors import GkdError

_IMAGES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
_DATASETS = "datasets"


class _Kind(NamedTuple):
    files: str
    pattern: re.Pattern[str]
    read: Callable[[Path, Files, Lookup], Lists]


# the data sets' own lists come first: they are taken where several kinds lie side by side
_KINDS = (
    _Kind(
        "trainlist01.txt and testlist01.txt",
        re.compile(r"(train|test)list0?([1-3])\.txt"),
        split_files.read_ucf101,
    ),
    _Kind("<class>_test_split1.txt", re.compile(r"(.+)_test_split([1-3])\.txt"), split_files.read_hmdb51),
    _Kind(
        "<name>_train.txt and <name>_test.txt",
        re.compile(r"(.+)_(train|test|val)\.txt"),
        split_files.read_labelled,
    ),
    _Kind(
        "train_rgb_split1.txt and val_rgb_split1.txt",
        re.compile(r"(train|val)_(rgb|flow)_split([1-3])\.txt"),
        split_files.read_two_stream,
    ),
)
_Found = Mapping[str, list[os.DirEntry[str]]]


def read_split_lists(lists: Path, videos: Path, *, frames: bool = False) -> Listing:
    """Reads a folder of split lists and looks for what they name under `videos`.

    Known are the lists of UCF101, HMDB51 and the two-stream networks, and `<name>_{train,test,val}.txt`.
    What is listed but cannot be used is a reject; `videos` need not exist.

    Args:
        lists: the folder of the list files.
        videos: holds `<class>/<video>`, or one folder that holds them.
        frames: videos are folders of images: `<class>/<video>/`, or `<video>/` without class folders.

    Raises:
        GkdError: no lists, of two kinds, or anything wrong in one, with its line; an unreadable folder.
    """
    kinds = _kinds(lists, _names(_entries(lists)))
    if len(kinds) != 1:
        known = "; ".join(kind.files for kind in _KINDS)
        if not kinds:
            raise GkdError("there are no split lists", str(lists), f"known lists: {known}")
        both = " and ".join(f"`{min(kinds[kind]).name}`" for kind in list(kinds)[:2])
        what = "a folder holds split lists of two kinds"
        raise GkdError(what, f"{lists}: {both}", "keep each kind in a folder of its own")
    for kind, files in kinds.items():
        parsed = kind.read(lists, files, lambda stems: _class_folders(videos, stems, frames))
    return _Match(parsed, videos, frames).listing()


def find_split_lists(folder: Path) -> Path | None:
    """The folder of split lists that belongs to a folder of videos, None if there is none.

    Looks in `folder`, in the folders in it, and then in the same way in the parent, unless that is the
    folder of all data sets.

    Raises:
        GkdError: two folders hold lists of the same kind; an unreadable folder.
    """
    found = _lists_in(folder, beside=False)
    parent = Path(os.path.abspath(folder)).parent
    if found or parent.name == _DATASETS or parent == parent.parent:
        return found
    return _lists_in(parent, beside=True)


def _lists_in(folder: Path, *, beside: bool) -> Path | None:
    entries = _entries(folder)
    if _kinds(folder, _names(entries)):
        return folder
    by_kind: dict[_Kind, list[Path]] = defaultdict(list)
    for entry in sorted(filter(_is_folder, entries), key=lambda entry: entry.name):
        path = folder / entry.name
        for kind in _kinds(path, _list_names(path, beside=beside)) if not _hidden(entry) else ():
            by_kind[kind].append(path)
    for kind in _KINDS:
        if len(by_kind[kind]) > 1:
            both = " and ".join(map(str, by_kind[kind][:2]))
            raise GkdError(
                "two folders hold split lists of the same kind", both, "name one with `--annotations`"
            )
        if by_kind[kind]:
            return by_kind[kind][0]
    return None


def _list_names(folder: Path, *, beside: bool) -> list[str]:
    """Names of the files; none as soon as one shows that this is no folder of lists.

    Folders of frames are many and large, and so are not read to their ends. `beside` the videos a
    folder with folders in it is another data set, with lists of its own.
    """
    names = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                media = (
                    video_stem(entry.name) is not None or os.path.splitext(entry.name)[1].lower() in _IMAGES
                )
                if media or (beside and not _hidden(entry) and _is_folder(entry)):
                    return []
                names.append(entry.name)
    except OSError:  # not ours to read, so not ours to take lists from
        return []
    return names


def _kinds(folder: Path, names: Iterable[str]) -> dict[_Kind, dict[Path, re.Match[str]]]:
    """The files of each kind of list that is there."""
    kinds: dict[_Kind, dict[Path, re.Match[str]]] = defaultdict(dict)
    for name in sorted(names):
        for kind in _KINDS if not name.startswith(".") else ():
            match = kind.pattern.fullmatch(name)
            if match:
                kinds[kind][folder / name] = match
                break
    return dict(kinds)


class _Match:
    """Brings listed videos and a folder of videos together."""

    def __init__(self, lists: Lists, videos: Path, frames: bool) -> None:
        self.lists, self.frames = lists, frames
        self.stems = Counter(stem for _, stem in lists.videos)
        self.root, self.top = self._find_root(videos)
        self.folders = _pair(lists.classes, _folder_names(self.top))
        taken = set(self.folders.values())
        flat = [entry for entry in self.top if frames and entry.name not in taken and _may_be_folder(entry)]
        self.flat = {entry.name: entry for entry in flat if entry.name in self.stems}
        self.rejects: list[tuple[str, str]] = []
        self.sources: list[Source] = []
        self.ignored = self.unlisted = 0

    def listing(self) -> Listing:
        """Matches class after class."""
        stems: dict[str, list[str]] = defaultdict(list)
        for class_name, stem in sorted(self.lists.videos):
            stems[class_name].append(stem)
        for class_name in sorted(self.lists.classes):
            found: _Found = {}
            if class_name in self.folders:
                entries = _entries(self.root / self.folders[class_name])
                found, ignored = _videos(entries, self.frames)
                self.ignored += ignored
            for stem in stems[class_name]:
                self._match(class_name, stem, found.get(stem, []))
            self._count_unlisted(found, stems[class_name])
        self._count_others()
        self.sources.sort(key=lambda source: (source.class_name, source.name))
        classes = [self._spelling(name) for name in self.lists.classes]
        return Listing(classes, self.sources, self.rejects, self.ignored, self.unlisted)

    def _spelling(self, class_name: str) -> str:
        return class_name if self.lists.spelled else self.folders.get(class_name, class_name)

    def _match(self, class_name: str, stem: str, found: list[os.DirEntry[str]]) -> None:
        listed = self.lists.videos[class_name, stem]
        expected = (
            self.root / self.folders.get(class_name, class_name) / (stem if self.frames else listed.file)
        )
        kind = "folder" if self.frames else "file"
        found = [*found, self.flat[stem]] if stem in self.flat else found
        reason = ""
        if not found:
            reason = f"there is no such {kind}"
        elif len(found) > 1:
            names = ", ".join(sorted(str(Path(entry.path).relative_to(self.root)) for entry in found))
            reason = f"there are several of that name: {names}"
        elif stem in self.flat and self.stems[stem] > 1:
            reason = f"`{stem}` is listed for several classes, and the folder does not say for which it is"
        elif not (_is_folder if self.frames else _is_file)(found[0]):
            reason = f"not a {kind}, or a link that leads nowhere"
        if reason:
            self.rejects.append((found[0].path if len(found) == 1 else str(expected), reason))
            return
        name = self._spelling(class_name)
        self.sources.append(Source(Path(found[0].path), name, stem, listed.splits, group_of(name, stem)))

    def _count_unlisted(self, found: _Found, listed: Collection[str]) -> None:
        known = set(listed)
        self.unlisted += sum(
            not _hidden(entry) for stem, entries in found.items() if stem not in known for entry in entries
        )

    def _count_others(self) -> None:
        """Videos beside the class folders, and in folders that are no class of the lists."""
        taken = {*self.folders.values(), *self.flat}
        for entry in self.top:
            if _hidden(entry) or entry.name in taken:
                continue
            if not _is_folder(entry):
                self.unlisted += not self.frames and video_stem(entry.name) is not None
                continue
            inside = _entries(self.root / entry.name, strict=False)
            found, _ = _videos(inside, self.frames)
            self._count_unlisted(found, ())
            if self.frames and not found:
                self.unlisted += any(os.path.splitext(image.name)[1].lower() in _IMAGES for image in inside)

    def _find_root(self, videos: Path) -> tuple[Path, list[os.DirEntry[str]]]:
        """`videos`, or the folder in it that holds more class folders, then more of the listed videos."""
        best, top = videos, _entries(videos)
        most, names = self._worth(top), _folder_names(top)
        # neither a class nor a video holds class folders, and both are large
        for name in sorted(names - set(_pair(self.lists.classes, names).values()) - set(self.stems)):
            inside = _entries(videos / name, strict=False)
            if not name.startswith(".") and self._worth(inside) > most:
                best, top, most = videos / name, inside, self._worth(inside)
        return best, top

    def _worth(self, entries: list[os.DirEntry[str]]) -> tuple[int, int]:
        names = _folder_names(entries)
        return len(_pair(self.lists.classes, names)), len(names & self.stems.keys()) if self.frames else 0


def _pair(classes: Iterable[str], folders: Collection[str]) -> dict[str, str]:
    """The folder of each class: the same name, or one that differs in case and can mean no other class."""
    paired = {name: name for name in classes if name in folders}
    loose: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for name in classes:
        if name not in paired:
            loose[name.casefold()][0].append(name)
    for name in folders:
        if name not in paired:
            loose[name.casefold()][1].append(name)
    return paired | {names[0]: same[0] for names, same in loose.values() if len(names) == len(same) == 1}


def _class_folders(videos: Path, stems: Collection[str], frames: bool) -> dict[str, set[str]]:
    """In which class folders the videos lie, under `videos` or the first folder in it that has any."""
    names = sorted(_folder_names(_entries(videos)) - set(stems))
    for root in (videos, *(videos / name for name in names)):
        lying: dict[str, set[str]] = defaultdict(set)
        for folder in _folder_names(_entries(root, strict=False)) - set(stems):
            for stem in _videos(_entries(root / folder, strict=False), frames)[0]:
                if stem in stems:
                    lying[stem].add(folder)
        if lying:
            return lying
    return {}


def _videos(entries: Iterable[os.DirEntry[str]], frames: bool) -> tuple[_Found, int]:
    """What may be videos by name without extension, and how many other files there are."""
    found: dict[str, list[os.DirEntry[str]]] = defaultdict(list)
    others = 0
    for entry in entries:
        stem = video_stem(entry.name) if not frames else entry.name if _may_be_folder(entry) else None
        if stem is not None:
            found[stem].append(entry)
        else:
            others += not _hidden(entry) and not _is_folder(entry)
    return found, others


def _entries(folder: Path, *, strict: bool = True) -> list[os.DirEntry[str]]:
    """What lies in a folder; nothing where there is none, or (not `strict`) where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        if not strict:
            return []
        where = f"{folder}: {error.strerror}"
        raise GkdError("a folder cannot be read", where, "check its permissions") from None


def _names(entries: Iterable[os.DirEntry[str]]) -> list[str]:
    return [entry.name for entry in entries]


def _folder_names(entries: Iterable[os.DirEntry[str]]) -> set[str]:
    return {entry.name for entry in entries if _is_folder(entry)}


def _hidden(entry: os.DirEntry[str]) -> bool:
    return entry.name.startswith(".")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _may_be_folder(entry: os.DirEntry[str]) -> bool:
    """A folder, or a link that may have been meant to lead to one."""
    return _is_folder(entry) or (entry.is_symlink() and not _is_file(entry))
