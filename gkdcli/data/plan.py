"""What `gkd prepare` has to do: which videos have their parts already, judged by sizes and times of files."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from gkdcli.data.jobs import Job
from gkdcli.data.parts import part_file, read_about
from gkdcli.data.rejects import Reject, cell
from gkdcli.data.sources import Listing, Source
from gkdcli.data.store import setting_differences
from gkdcli.data.video import scaler
from gkdcli.errors import GkdError
from gkdcli.files import digest, stamp
from gkdcli.settings import MODALITIES, DataSettings

_THREADS = 16  # that wait for a file system on a network; where nothing waits they take four times as long
_TOGETHER = 256  # videos looked at at a time
_KEPT = ("frame_count", "fps", "width", "height", "source_digest", "source_fps", "source_frames", "codec")


@dataclass
class Plan:
    """The jobs, and what needs none."""

    jobs: list[Job] = field(default_factory=list)
    skipped: int = 0
    rejected: dict[str, Reject] = field(default_factory=dict)
    unlisted: int = 0
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)  # of the parts that stay, by path


class _Seen(NamedTuple):
    """What lies on the disk of one video, by modality."""

    parts: Mapping[str, str]
    stamps: Mapping[str, tuple[int, int]]
    found: Mapping[str, dict[str, Any]]
    bad: str = ""


def plan_parts(
    listing: Listing,
    store_folder: Path,
    modalities: Sequence[str],
    data: DataSettings,
    known: Mapping[str, Reject],
    device: str = "cpu",
) -> Plan:
    """What is to be done, judged by the sizes and times of files.

    Args:
        listing: the videos.
        store_folder: `stores/<dataset>`.
        modalities: asked for.
        data: how they are to be prepared.
        known: rejects of earlier runs, by the `cell` of their path.
        device: where flow is to be computed.

    Raises:
        GkdError: a part was written under other settings.
    """
    plan = Plan()
    listed: set[str] = set()
    settings = {modality: data.stored(modality) for modality in modalities}
    same = {modality: json.dumps(stored, sort_keys=True) for modality, stored in settings.items()}
    weights = digest(Path(data.flow_weights)) if "flow" in modalities and data.flow == "raft" else ""
    for source, seen in zip(listing.sources, _look(listing.sources, store_folder, modalities), strict=True):
        path = str(source.path)
        if seen.bad:
            plan.rejected[path] = Reject(seen.bad)
            continue
        listed.update(seen.parts[modality] for modality in modalities)
        missing, digests = {}, {}
        for modality in modalities:
            part, found = seen.parts[modality], seen.found[modality]
            size, mtime_ns = seen.stamps[modality]
            if found.get("source_size") == size:
                if found["settings"] != same[modality]:
                    check_settings(Path(part), json.loads(found["settings"]), settings[modality])
                _check_scaler(part, found["scaling"], scaler(data))
                if modality == "flow" and weights:
                    _check_weights(part, found["flow_parameters"], weights)
                if found["source_mtime_ns"] == mtime_ns:
                    plan.attributes[part] = {key: found[key] for key in _KEPT if key in found}
                    continue
                digests[modality] = found["source_digest"]
            missing[modality] = Path(part)
        old = known.get(cell(path), Reject(""))
        if not missing:
            plan.skipped += 1
        elif old.size >= 0 and old == Reject.of(source.path, old.reason) and not digests:
            plan.rejected[path] = old
        else:
            beside = next(
                (Path(part) for modality, part in seen.parts.items() if modality not in missing), None
            )
            files = {source.file(modality): seen.stamps[modality][0] for modality in missing}
            plan.jobs.append(Job(source, missing, data, sum(files.values()), digests, beside, device=device))
    for modality in modalities:
        plan.unlisted += sum(part not in listed for part in _lying(store_folder / modality))
    return plan


def _look(sources: Sequence[Source], store_folder: Path, modalities: Sequence[str]) -> Iterator[_Seen]:
    """In the order of the sources; by threads as soon as most videos make this one wait."""
    folders = {modality: str(store_folder / modality) for modality in MODALITIES}
    look = partial(_look_at, folders, modalities)
    blocks = [sources[start : start + _TOGETHER] for start in range(0, len(sources), _TOGETHER)]
    for place, block in enumerate(blocks, start=1):
        before = _waits()
        yield from map(look, block)
        if 2 * (_waits() - before) > len(block):
            with ThreadPoolExecutor(_THREADS) as pool:
                for seen in pool.map(lambda block: [*map(look, block)], blocks[place:]):
                    yield from seen
            return


def _waits() -> int:
    """How often this process has had to wait so far, for a disk or a network."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw


def _look_at(folders: Mapping[str, str], modalities: Sequence[str], source: Source) -> _Seen:
    try:
        parts = {
            modality: part_file(folder, source.class_name, source.name)
            for modality, folder in folders.items()
        }
        stamps = {modality: stamp(source.file(modality)) for modality in modalities}
    except ValueError as error:
        return _Seen({}, {}, {}, str(error))
    except OSError as error:
        return _Seen({}, {}, {}, f"cannot be read: {error.strerror}")
    return _Seen(parts, stamps, {modality: _attributes(parts[modality]) for modality in modalities})


def _attributes(part: str) -> dict[str, Any]:
    """Of a whole part; empty where there is none."""
    try:
        return read_about(part)
    except OSError:
        return {}  # absent, or damaged after it was written: prepared anew


def _lying(folder: Path) -> list[str]:
    """Paths of the parts of a modality, whether listed or not."""
    found: list[str] = []
    if folder.is_dir():
        for inside in [entry.path for entry in os.scandir(folder) if entry.is_dir()]:
            found += (entry.path for entry in os.scandir(inside) if entry.name.endswith(".h5"))
    return found


def check_settings(where: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """One store, one way of sampling and scaling.

    Raises:
        GkdError: the two differ.
    """
    differing = setting_differences(old, new) if old else []
    if differing:
        raise GkdError(
            f"the store was written under other settings: {', '.join(differing)}",
            str(where),
            "name another `dataset` in the preset (`--name` for a folder), or take the old settings",
        )


def _check_scaler(part: str, old: str, new: str) -> None:
    """The same setting has meant other pixels before: those of swscale's bicubic filter."""
    if old not in ("not", new):
        raise GkdError(
            f"the store's frames were scaled otherwise: {old}, now {new}",
            part,
            "name another `dataset` in the preset (`--name` for a folder), or delete this store",
        )


def _check_weights(where: str, parameters: str, weights: str) -> None:
    """One store, one network."""
    if weights not in parameters and "weights_sha256" in parameters:
        raise GkdError(
            "the flow of this store was computed with other weights of RAFT",
            f"{where}, now data.flow_weights has SHA-256 {weights[:12]}...",
            "name another `dataset` in the preset (`--name` for a folder), or take the old weights",
        )
