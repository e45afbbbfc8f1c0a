"""What only several videos, both streams, or annotations and videos show together, and how many there are."""

from __future__ import annotations

import contextlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from gkdcli.data.audit import Finding, Key, Stream, by_key, finding
from gkdcli.data.misfits import misfits
from gkdcli.data.sources import SUBSETS, Listing, Problem
from gkdcli.files import digest, stamp
from gkdcli.settings import DataSettings

# problems are told in words; those that are known by their words have a kind of their own
_PROBLEMS = (
    (re.compile(r" is wholly beyond the end, "), "segment_beyond_end"),
    (re.compile(r" is beyond the end, "), "segment_past_end"),
    (re.compile(r" (no|a negative) length; left out$"), "segment_length"),
    (re.compile(r"` is not a class; left out$"), "unknown_class"),
)


def duplicates(streams: Sequence[Stream], listing: Listing | None, untrimmed: bool) -> Iterator[Finding]:
    """Videos of one content, by the digest of their files; said once for both streams.

    Args:
        streams: the stores.
        listing: adds videos that are not stored yet; only where one of their size is stored they are read.
        untrimmed: videos have no class of their own.
    """
    said: set[tuple[Key, ...]] = set()
    for stream in streams:
        members = _members(stream, listing)
        for group in _same(stream, listing):
            if group in said:
                continue
            said.add(group)
            others = ", ".join("/".join(key) for key in group[1:])
            numbers = sorted({number for key in group for number in members[key]})
            leaks = [
                number for number in numbers if {members[key].get(number) for key in group} >= set(SUBSETS)
            ]
            classes = sorted({key[0] for key in group})
            what = f"it has the same content as {others}"
            path = stream.part(group[0])
            if leaks:
                told = f"{what}, and split {', '.join(map(str, leaks))} trains on one and tests another"
                yield finding("duplicate_across_subsets", told, stream.modality, group[0], path)
            if len(classes) > 1 and not untrimmed:
                told = f"{what}, and they are of {' and '.join(f'`{name}`' for name in classes)}"
                yield finding("duplicate_across_classes", told, stream.modality, group[0], path)
            elif not leaks:
                yield finding("duplicate", what, stream.modality, group[0], path)


def _same(stream: Stream, listing: Listing | None) -> Iterator[tuple[Key, ...]]:
    """Groups of videos of one content."""
    rows, sources = stream.rows, by_key(listing)
    by_digest: dict[str, list[Key]] = defaultdict(list)
    for key, row in rows.items():
        if listing is None or key in sources:
            by_digest[row.digest].append(key)
    sizes = {seen.attributes.get("source_size") for seen in stream.seen.values()}
    for key, source in sources.items():
        file = source.file(stream.modality)
        with contextlib.suppress(OSError):  # what cannot be read is found elsewhere
            if key not in rows and stamp(file)[0] in sizes:
                by_digest[digest(file)].append(key)
    yield from (tuple(sorted(keys)) for keys in by_digest.values() if len(keys) > 1)


def _members(stream: Stream, listing: Listing | None) -> dict[Key, dict[int, str]]:
    """The subset of each video by split: as the index has it, else as it is listed."""
    members: dict[Key, dict[int, str]] = {key: dict(source.splits) for key, source in by_key(listing).items()}
    if stream.store is not None:
        keys = list(stream.rows)
        members |= {key: {} for key in keys}
        for (number, subset), places in stream.store.splits.items():
            for place in places:
                members[keys[place]][number] = subset
    return members


def stream_findings(rgb: Stream, flow: Stream) -> Iterator[Finding]:
    """Where the two streams of a video do not show the same moments, or one is missing."""
    rows, others = rgb.rows, flow.rows
    if rgb.store is None or flow.store is None:
        return
    for one, key in [(flow, key) for key in rows.keys() - others.keys()] + [
        (rgb, key) for key in others.keys() - rows.keys()
    ]:
        there = "rgb" if one is flow else "flow"
        what = f"its {there} is stored, its {one.modality} is not"
        yield finding("stream_missing", what, one.modality, key, one.index)
    for key in sorted(rows.keys() & others.keys()):
        lengths = [_frames(stream, key) for stream in (rgb, flow)]
        if lengths[0] != lengths[1]:
            what = f"rgb has {lengths[0]} frames, flow {lengths[1]}"
            yield finding("length_mismatch", what, "flow", key, flow.part(key))
        made = [stream.seen[key].attributes for stream in (rgb, flow) if key in stream.seen]
        names, digests = ({part.get(name) for part in made} for name in ("source", "source_digest"))
        if len(made) == 2 and len(names) == 1 and len(digests) == 2:
            what = f"they were made of two versions of {names.pop()}"
            yield finding("streams_differ", what, "flow", key, flow.part(key))


def _frames(stream: Stream, key: Key) -> int:
    """Of the part where it was opened, else of the index."""
    part = stream.seen[key].attributes if key in stream.seen else {}
    return int(part.get("frame_count", stream.rows[key].frames))


def short_videos(stream: Stream, length: int, untrimmed: bool) -> Iterator[Finding]:
    """Videos with fewer frames than a clip, which are used all the same."""
    filled = "nothing follows" if untrimmed else "its last frame is repeated"
    for key, row in stream.rows.items():
        if row.frames < length:
            what = f"{row.frames} frames, a clip has {length}; {filled}"
            yield finding("short_video", what, stream.modality, key, stream.part(key))


def annotation_findings(stream: Stream, listing: Listing, data: DataSettings) -> Iterator[Finding]:
    """What is odd in the annotations, and in how they fit the stored videos."""
    whole = {
        stream.part(key): seen.attributes
        for key, seen in stream.seen.items()
        if seen.attributes and not seen.damage
    }
    known = {str(part): attributes for part, attributes in whole.items()}
    good = [source for source in listing.sources if _part(stream, (source.class_name, source.name)) in whole]
    folders = {source.name: source.class_name for source in listing.sources}
    for problem in [*listing.problems, *misfits(good, stream.index.with_suffix(""), data, known)]:
        kind = next((kind for words, kind in _PROBLEMS if words.search(problem.reason)), "annotation_problem")
        key = (folders.get(problem.video, ""), problem.video)
        place = f"{problem.file} {_place(problem)}".strip()
        found = finding(kind, problem.reason, path=place)
        yield found._replace(video="/".join(part for part in key if part))


def _part(stream: Stream, key: Key) -> Any:
    try:
        return stream.part(key)
    except ValueError:
        return None


def _place(problem: Problem) -> str:
    return f"line {problem.line}" if problem.line else ""


def count(
    streams: Sequence[Stream], listing: Listing | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """How much is listed and how much is stored: videos by split and subset, and the same by class.

    Of untrimmed videos actions are counted by class. `listed` are those that can be used; None where nothing
    is compared.
    """
    listed, listed_by_class = _listed(listing)
    stored = {stream.modality: _stored(stream) for stream in streams}
    tables: list[list[dict[str, Any]]] = []
    for place, wanted in enumerate((listed, listed_by_class)):
        keys = {*wanted, *(key for counts in stored.values() for key in counts[place])}
        rows = []
        for key in sorted(keys, key=lambda key: (*key[:-1], SUBSETS.index(key[-1]))):
            *names, number, subset = key
            row: dict[str, Any] = {"class": names[0]} if names else {}
            row |= {"split": number, "subset": subset}
            row["listed"] = wanted[key] if listing else None
            rows.append(row | {modality: counts[place][key] for modality, counts in stored.items()})
        tables.append(rows)
    return tables[0], tables[1]


_Counts = tuple[Counter[Any], Counter[Any]]  # by (split, subset), and by (class, split, subset)


def _listed(listing: Listing | None) -> _Counts:
    counts: _Counts = Counter(), Counter()
    for source in listing.sources if listing else ():
        for number, subset in source.splits.items():
            counts[0][number, subset] += 1
            untrimmed = listing is not None and listing.ground_truth is not None
            classes = [action.class_name for action in source.segments] if untrimmed else [source.class_name]
            counts[1].update((name, number, subset) for name in classes)
    return counts


def _stored(stream: Stream) -> _Counts:
    counts: _Counts = Counter(), Counter()
    store = stream.store
    if store is None:
        return counts
    for (number, subset), videos in store.splits.items():
        counts[0][number, subset] += len(videos)
        for video in videos:
            row = store.videos[video]
            labels = [row.label] if row.label >= 0 else [action.label for action in store.segments[video]]
            counts[1].update((store.classes[label], number, subset) for label in labels)
    return counts
