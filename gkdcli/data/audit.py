"""What a store should be and what it is: every difference is a finding of `gkd prepare --audit`."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gkdcli.data.index import SCHEMA, placed, setting_differences
from gkdcli.data.part_check import Look, Seen
from gkdcli.data.parts import OtherSchema, part_path, read_attributes
from gkdcli.data.rejects import cell, read_reasons
from gkdcli.data.sources import Listing, Source
from gkdcli.data.store import Store, VideoRow
from gkdcli.errors import GkdError
from gkdcli.files import digest, stamp, temporaries

Level = Literal["defect", "notice"]
Key = tuple[str, str]  # class, or folder of an untrimmed video, and name
_AGAIN = "run the same `gkd prepare` again"
_DELETE = f"delete that part and {_AGAIN}: this video alone is prepared anew"
_ONE = f"take one of them out of the list or the folder, and {_AGAIN}"
# of every kind of finding: whether the store is to be mended, and how
KINDS: dict[str, tuple[Level, str]] = {
    "index_unfinished": ("defect", f"{_AGAIN}; it continues"),
    "index_damaged": ("defect", f"{_AGAIN}: it writes the index anew, the parts stay"),
    "index_stale": ("defect", f"{_AGAIN}: it writes the index anew"),
    "other_schema": ("defect", f"{_AGAIN} with this version of gkd"),
    "settings_differ": ("defect", "name another `dataset` in the preset, or take the old settings"),
    "settings_mixed": ("defect", _DELETE),
    "missing": ("defect", _AGAIN),
    "rejected": ("defect", f"replace the file and {_AGAIN}, or take it off the list"),
    "part_missing": ("defect", _AGAIN),
    "not_in_index": ("defect", _AGAIN),
    "not_listed": ("defect", f"list it again; or {_AGAIN}, which takes it out of the index"),
    "source_missing": ("defect", f"put the video back; or {_AGAIN}, which takes it out of the index"),
    "source_changed": ("defect", f"{_AGAIN}: changed videos are prepared anew"),
    "damaged_part": ("defect", _DELETE),
    "label_changed": ("defect", f"{_AGAIN} if the new class is right; what was trained on the old is not"),
    "renamed": ("defect", _AGAIN),
    "split_changed": ("defect", f"{_AGAIN} if the new split is right; old scores do not compare with new"),
    "classes_changed": ("defect", f"{_AGAIN} if the new classes are right; older networks have the old ones"),
    "actions_changed": ("defect", _AGAIN),
    "duplicate_across_subsets": ("defect", f"what is trained on is tested: {_ONE}"),
    "duplicate_across_classes": ("defect", f"one of the classes is wrong: {_ONE}"),
    "duplicate": ("notice", _ONE),
    "length_mismatch": ("defect", "delete both parts and run `gkd prepare` with `--modality both`"),
    "stream_missing": ("defect", "run `gkd prepare` with `--modality both`"),
    "streams_differ": ("defect", "run `gkd prepare` with `--modality both`"),
    "segment_beyond_end": ("defect", "correct the annotation, or look for the whole video"),
    "segment_past_end": ("notice", "it is kept as it is"),
    "segment_length": ("notice", "correct the annotation; without it the action is left out"),
    "unknown_class": ("notice", "correct the annotation; without it the action is left out"),
    "annotation_problem": ("notice", "the store works as it is"),
    "short_video": ("notice", "training and evaluation fill the clip up"),
    "unlisted_part": ("notice", "it is not in the index; delete it if its video is gone for good"),
    "temporary_file": ("notice", "a killed run left it; the next `gkd prepare` removes it"),
    "sources_absent": ("notice", "name their folder, and all is compared"),
}  # fmt: skip


class Finding(NamedTuple):
    """One thing that is not as it should be, or worth knowing.

    Args:
        kind: one of `KINDS`.
        level: whether it is a defect.
        modality: whose store; "" where it is no matter of one.
        video: "class/name"; "" where it is no matter of one.
        path: the file it is about.
        what: is wrong.
        hint: what to do.
    """

    kind: str
    level: Level
    modality: str
    video: str
    path: str
    what: str
    hint: str


def finding(
    kind: str, what: str, modality: str = "", key: Key | None = None, path: Path | str = ""
) -> Finding:
    """With the level and the hint of its kind."""
    level, hint = KINDS[kind]
    return Finding(kind, level, modality, "/".join(key) if key else "", str(path), what, hint)


@dataclass
class Stream:
    """The store of one modality.

    Args:
        modality: "rgb" or "flow".
        index: `stores/<dataset>/<modality>.h5`.
        store: behind it; None where it cannot be read.
        seen: what was found in each part that was opened.
    """

    modality: str
    index: Path
    store: Store | None
    seen: dict[Key, Seen] = field(default_factory=dict)

    @property
    def rows(self) -> dict[Key, VideoRow]:
        """Of the index, by class and name."""
        return {(row.class_name, row.name): row for row in self.store.videos} if self.store else {}

    def part(self, key: Key) -> Path:
        """Where the part of a video lies."""
        return part_path(self.index.with_suffix(""), *key)

    def looks(self, listing: Listing | None) -> list[tuple[Key, Look]]:
        """What is to be opened: each part of a video that the index or the listing names."""
        sources = by_key(listing)
        found = []
        for key in sorted({*self.rows, *sources}):
            try:
                part = self.part(key)
            except ValueError:
                continue  # a name that no store takes: the table of rejects has it
            if part.is_file():
                source = sources.get(key)
                file = source.file(self.modality) if source else None
                found.append((key, Look(self.modality, part, file)))
        return found


def by_key(listing: Listing | None) -> dict[Key, Source]:
    """The sources that can be used, by class and name."""
    return {(source.class_name, source.name): source for source in listing.sources} if listing else {}


def open_stream(index: Path) -> tuple[Stream, list[Finding]]:
    """The store behind an index, and what is wrong with the index itself.

    Raises:
        GkdError: there is neither an index nor a part.
    """
    modality = index.stem
    try:
        return Stream(modality, index, Store.open(index)), []
    except GkdError as error:
        if not index.is_file() and not index.with_suffix("").is_dir():
            raise
        kind = "index_damaged"
        try:
            if not index.is_file() or not read_attributes(index, SCHEMA).get("complete", True):
                kind = "index_unfinished"
        except OtherSchema:
            kind = "other_schema"
        except OSError:
            pass
        return Stream(modality, index, None), [finding(kind, error.what, modality, path=index)]


def settings_findings(stream: Stream, wanted: Mapping[str, Any]) -> Iterator[Finding]:
    """Parts unlike the index, or unlike most parts where there is none; and these unlike the preset."""
    written = {
        key: seen.attributes["settings"] for key, seen in stream.seen.items() if "settings" in seen.attributes
    }
    common = Counter(written.values()).most_common(1)
    if not common:
        return
    usual = stream.store.settings if stream.store else json.loads(common[0][0])
    differing: dict[str, list[str]] = {}
    for key, text in written.items():
        if text not in differing:
            differing[text] = setting_differences(usual, json.loads(text))
        if differing[text]:
            what = f"it was prepared under other settings than the store: {', '.join(differing[text])}"
            yield finding("settings_mixed", what, stream.modality, key, stream.part(key))
    if unlike := setting_differences(usual, wanted):
        what = f"the store was written under other settings: {', '.join(unlike)}"
        yield finding("settings_differ", what, stream.modality, path=stream.index)


def part_findings(stream: Stream) -> Iterator[Finding]:
    """What the parts themselves have shown, and where the index says something else."""
    rows = stream.rows
    for key in rows.keys() - stream.seen.keys():
        what = "the index has it, its part is not there"
        yield finding("part_missing", what, stream.modality, key, stream.part(key))
    for key, seen in stream.seen.items():
        found = {
            "other_schema": seen.other_schema,
            "damaged_part": seen.damage,
            "source_changed": seen.change,
        }
        for kind, what in found.items():
            if what:
                yield finding(kind, what, stream.modality, key, stream.part(key))
        if key in rows and not seen.damage and not seen.other_schema:
            row, part = rows[key], seen.attributes
            names = {"frames": "frame_count", "digest": "source_digest"}
            there = {
                name: part[names.get(name, name)] for name in ("frames", "fps", "width", "height", "digest")
            }
            unlike = [
                f"{name} {_short(getattr(row, name))}, in the part {_short(value)}"
                for name, value in there.items()
                if getattr(row, name) != value
            ]
            if unlike:
                what = f"the index says {'; '.join(unlike)}"
                yield finding("index_stale", what, stream.modality, key, stream.part(key))


def _short(value: Any) -> str:
    """A number, or the beginning of a digest."""
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 15 else str(value)


class Presence:
    """Compares who is listed with who is stored; rejects that name the file of a stored video are `used`."""

    def __init__(self, listing: Listing, scanned: bool) -> None:
        self.listing, self.scanned = listing, scanned
        self.sources = by_key(listing)
        self.used: set[str] = set()
        self._rejects: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for path, reason in listing.rejects:
            self._rejects[cell(Path(path).name)].append((path, reason))

    def findings(self, stream: Stream) -> Iterator[Finding]:
        """Of one modality."""
        rows, modality = stream.rows, stream.modality
        gone = [key for key in rows if key not in self.sources]
        new = {key: source for key, source in self.sources.items() if key not in rows}
        moved = self._moved(stream, gone, new)
        reasons = _reasons(stream.index.with_suffix(".rejected.tsv"))
        for key in gone:
            yield self._gone(stream, key, moved.get(key))
        for key, source in new.items():
            tail = tuple(cell(str(source.path)).split("/")[-2:])
            if key in moved.values():
                continue
            if tail in reasons:
                yield finding("rejected", reasons[tail], modality, key, source.path)
            elif key not in stream.seen:
                yield finding("missing", "it is listed and has no part", modality, key, source.path)
            elif stream.store:
                yield finding("not_in_index", "it has a part, and no row", modality, key, stream.part(key))
        yield from self._unlisted(stream)

    def rejects(self) -> Iterator[Finding]:
        """What is listed and cannot be used; to be asked for last."""
        for path, reason in self.listing.rejects:
            if path not in self.used:
                yield finding("rejected", reason, path=path)

    def _gone(self, stream: Stream, key: Key, now: Key | None) -> Finding:
        """A row whose video is listed no more, or as something else."""
        part = stream.part(key)
        if now is not None:
            kind = "renamed" if now[0] == key[0] else "label_changed"
            what = f"its video is called {'/'.join(now)} now"
            if kind == "label_changed":
                what = f"its video is of `{now[0]}` now: {self.sources[now].path}"
            return finding(kind, what, stream.modality, key, part)
        name = Path(str(stream.seen.get(key, Seen()).attributes.get("source", key[1]))).name
        found = self._rejects.get(name, [])
        same = [item for item in found if Path(item[0]).parent.name == key[0]] or found
        if len(same) == 1:
            self.used.add(same[0][0])
            what = f"{same[0][0]}: {same[0][1]}"
            return finding("source_missing", what, stream.modality, key, part)
        if self.scanned:
            what = f"its video {name} is not in the folder any more"
            return finding("source_missing", what, stream.modality, key, part)
        return finding("not_listed", "the index has it, no list names it", stream.modality, key, part)

    def _moved(self, stream: Stream, gone: Sequence[Key], new: Mapping[Key, Source]) -> dict[Key, Key]:
        """Rows whose video is listed under another class or name: its file is the same."""
        stamps: dict[int, list[tuple[int, Key]]] = defaultdict(list)
        for key, source in new.items() if gone else ():
            try:
                size, mtime_ns = stamp(source.file(stream.modality))
            except OSError:
                continue
            stamps[size].append((mtime_ns, key))
        found: dict[Key, Key] = {}
        for key in gone:
            part = stream.seen.get(key, Seen()).attributes
            for mtime_ns, other in stamps.get(part.get("source_size", -1), ()):
                file = new[other].file(stream.modality)
                same = mtime_ns == part.get("source_mtime_ns") or digest(file) == part.get("source_digest")
                if same and other not in found.values():
                    found[key] = other
                    break
        return found

    def _unlisted(self, stream: Stream) -> Iterator[Finding]:
        known = {*stream.seen}
        parts = {stream.part(key) for key in known}
        for path in sorted(stream.index.with_suffix("").glob("*/*.h5")):
            if path not in parts:
                what = "no list names the video of this part"
                yield finding("unlisted_part", what, stream.modality, path=path)


def _reasons(table: Path) -> dict[tuple[str, ...], str]:
    """Of rejects, by folder and file: a store may be looked at from another folder than it was made in."""
    return {tuple(path.split("/")[-2:]): reason for path, reason in read_reasons(table).items()}


def label_findings(stream: Stream, listing: Listing) -> Iterator[Finding]:
    """Classes, splits and actions that the index has and that are no longer what the annotations say."""
    store = stream.store
    if store is None:
        return
    if store.classes != listing.classes:
        lost, new = set(store.classes) - set(listing.classes), set(listing.classes) - set(store.classes)
        told = [f"{name} is gone" for name in sorted(lost)] + [f"{name} is new" for name in sorted(new)]
        what = f"{len(store.classes)} classes in the index, {len(listing.classes)} in the annotations: "
        what += ", ".join(told[:5]) + (", ..." if len(told) > 5 else "") if told else "their order differs"
        yield finding("classes_changed", what, stream.modality, path=stream.index)
    members: dict[int, dict[int, str]] = defaultdict(dict)
    for (number, subset), videos in store.splits.items():
        for video in videos:
            members[video][number] = subset
    labels = {name: label for label, name in enumerate(listing.classes)}
    sources = by_key(listing)
    for place, (key, row) in enumerate(stream.rows.items()):
        source = sources.get(key)
        if source is None:
            continue
        was, now = members[place], source.splits
        told = [
            f"split {number}: {was.get(number, 'not used')} in the index, {now.get(number, 'not used')} now"
            for number in sorted({*was, *now})
            if was.get(number) != now.get(number)
        ]
        if told:
            yield finding("split_changed", "; ".join(told), stream.modality, key, source.path)
        part = stream.seen.get(key, Seen())
        if source.group != row.group:
            what = f"its group is `{row.group}` in the index, `{source.group}` now"
            yield finding("index_stale", what, stream.modality, key, stream.part(key))
        if listing.ground_truth is not None and part.attributes and not part.damage:
            stored = [
                (*action[:2], store.classes[action.label], *action[3:]) for action in store.segments[place]
            ]
            wanted = [
                (*action[:2], listing.classes[action.label], *action[3:])
                for action in placed(source, part.attributes, labels)
            ]
            if stored != wanted:
                odd = next((b for a, b in zip(stored, wanted, strict=False) if a != b), None)
                which = f"; first that differs: {odd[2]} from {odd[0]:g} to {odd[1]:g} s" if odd else ""
                what = f"{len(stored)} actions in the index, {len(wanted)} in the annotations{which}"
                yield finding("actions_changed", what, stream.modality, key, source.annotated_by)


def temporary_findings(folder: Path) -> Iterator[Finding]:
    """Files of runs that were killed."""
    for path in temporaries(folder):
        yield finding("temporary_file", f"{path.stat().st_size} bytes", path=path)
