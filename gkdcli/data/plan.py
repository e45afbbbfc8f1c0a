"""What `gkd prepare` has to do: which videos have their parts already, judged by sizes and times of files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gkdcli.data.jobs import Job
from gkdcli.data.parts import part_path, read_attributes
from gkdcli.data.rejects import Reject, cell
from gkdcli.data.sources import Listing
from gkdcli.data.store import setting_differences
from gkdcli.data.video import scaler
from gkdcli.errors import GkdError
from gkdcli.files import digest, stamp
from gkdcli.settings import MODALITIES, DataSettings


@dataclass
class Plan:
    """The jobs, and what needs none."""

    jobs: list[Job] = field(default_factory=list)
    skipped: int = 0
    rejected: dict[str, Reject] = field(default_factory=dict)
    unlisted: int = 0
    attributes: dict[Path, dict[str, Any]] = field(default_factory=dict)  # of the parts that stay


def plan_parts(
    listing: Listing,
    store_folder: Path,
    modalities: Sequence[str],
    data: DataSettings,
    known: Mapping[str, Reject],
    device: str = "cpu",
) -> Plan:
    """What is to be done, judged by the sizes and times of files."""
    plan = Plan()
    listed: set[Path] = set()
    weights = digest(Path(data.flow_weights)) if "flow" in modalities and data.flow == "raft" else ""
    for source in listing.sources:
        path = str(source.path)
        try:
            parts = {
                modality: part_path(store_folder / modality, source.class_name, source.name)
                for modality in MODALITIES
            }
            stamps = {modality: stamp(source.file(modality)) for modality in modalities}
        except ValueError as error:
            plan.rejected[path] = Reject(str(error))
            continue
        except OSError as error:
            plan.rejected[path] = Reject(f"cannot be read: {error.strerror}")
            continue
        listed.update(parts.values())
        missing, digests = {}, {}
        for modality in modalities:
            found = _attributes(parts[modality])
            size, mtime_ns = stamps[modality]
            if found.get("source_size") == size:
                check_settings(parts[modality], json.loads(found["settings"]), data.stored(modality))
                _check_scaler(parts[modality], found["scaling"], scaler(data))
                if modality == "flow" and weights:
                    _check_weights(parts[modality], found["flow_parameters"], weights)
                if found["source_mtime_ns"] == mtime_ns:
                    plan.attributes[parts[modality]] = found
                    continue
                digests[modality] = found["source_digest"]
            missing[modality] = parts[modality]
        old = known.get(cell(path), Reject(""))
        if not missing:
            plan.skipped += 1
        elif old.size >= 0 and old == Reject.of(source.path, old.reason) and not digests:
            plan.rejected[path] = old
        else:
            beside = next((part for modality, part in parts.items() if modality not in missing), None)
            files = {source.file(modality): stamps[modality][0] for modality in missing}
            plan.jobs.append(Job(source, missing, data, sum(files.values()), digests, beside, device=device))
    for modality in modalities:
        plan.unlisted += sum(part not in listed for part in (store_folder / modality).glob("*/*.h5"))
    return plan


def _attributes(part: Path) -> dict[str, Any]:
    """Of a whole part; empty where there is none."""
    try:
        return read_attributes(part) if part.exists() else {}
    except OSError:
        return {}  # damaged after it was written: prepared anew


def check_settings(where: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """One store, one way of sampling and scaling."""
    differing = setting_differences(old, new) if old else []
    if differing:
        raise GkdError(
            f"the store was written under other settings: {', '.join(differing)}",
            str(where),
            "name another `dataset` in the preset (`--name` for a folder), or take the old settings",
        )


def _check_scaler(part: Path, old: str, new: str) -> None:
    """The same setting has meant other pixels before: those of swscale's bicubic filter."""
    if old not in ("not", new):
        raise GkdError(
            f"the store's frames were scaled otherwise: {old}, now {new}",
            str(part),
            "name another `dataset` in the preset (`--name` for a folder), or delete this store",
        )


def _check_weights(where: Path, parameters: str, weights: str) -> None:
    """One store, one network."""
    if weights not in parameters and "weights_sha256" in parameters:
        raise GkdError(
            "the flow of this store was computed with other weights of RAFT",
            f"{where}, now data.flow_weights has SHA-256 {weights[:12]}...",
            "name another `dataset` in the preset (`--name` for a folder), or take the old weights",
        )
