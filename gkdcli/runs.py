"""Where things lie under the root, and run folders: create, state, lock, find, resume rules."""

from __future__ import annotations

import importlib.metadata
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gkdcli.errors import GkdError, usage_error
from gkdcli.files import is_locked, locked, write_json, write_text
from gkdcli.resolve import load_settings, to_toml
from gkdcli.settings import Settings

STAGE_FOLDER = {"pretrain": "pretrain-attention", "distill": "distill"}
# what may differ between a run and its continuation (DESIGN: epochs, device, workers, progress)
RESUMABLE = {"optim.epochs", "train.device", "train.workers", "train.checkpoint_minutes", "data.workers"}


def version() -> str:
    """The installed version of gkd."""
    try:
        return importlib.metadata.version("gkdcli")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


@dataclass(frozen=True)
class Place:
    """The conventions of one command: every default path, in one address.

    Args:
        root: the folder under which everything lies.
        settings: the resolved page.
        modality: `rgb` or `flow`.
        split: number of the split, from 1.
        explicit: dotted names of the settings that were given by hand, not by preset or default.
        page: the preset as it was read, with its overlays.
    """

    root: Path
    settings: Settings
    modality: str = "rgb"
    split: int = 1
    explicit: frozenset[str] = frozenset()
    page: Mapping[str, Any] = field(default_factory=dict)

    @property
    def videos(self) -> Path:
        """Where a data set's videos are looked for."""
        return self.root / "datasets" / self.settings.dataset

    @property
    def store_folder(self) -> Path:
        """What `gkd prepare` writes under."""
        return self.root / "stores" / self.settings.dataset

    @property
    def store(self) -> Path:
        """The index of the modality's store."""
        return self.store_folder / f"{self.modality}.h5"

    @property
    def models(self) -> Path:
        """Imported or downloaded weights."""
        return self.root / "models" / self.settings.dataset

    def command(self, verb: str, *extra: str) -> str:
        """`gkd <verb> <preset> ...` with the flags that lead back to this place."""
        words = ["gkd", verb, self.settings.name]
        if self.modality != "rgb":
            words += ["--modality", self.modality]
        if self.split != 1:
            words += ["--split", str(self.split)]
        if self.root != Path("."):
            words += ["--root", str(self.root)]
        return " ".join([*words, *extra])

    def runs(self, stage: str) -> Path:
        """The folder that holds all runs of a stage."""
        return self.root / "runs" / self.settings.name / f"{STAGE_FOLDER[stage]}-{self.modality}"


class Run:
    """One run folder; `record` is its run.json."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record: dict[str, Any] = {}
        path = folder / "run.json"
        if path.is_file():
            try:
                self.record = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise GkdError(f"run.json is damaged: {error}", str(path), "name another run") from None

    @property
    def last(self) -> Path:
        """Weights, optimizer and position of the newest checkpoint."""
        return self.folder / "last.safetensors"

    @property
    def best(self) -> Path:
        """Weights of the epoch that did best on the held-out videos."""
        return self.folder / "best.safetensors"

    @property
    def weights(self) -> Path:
        """What evaluation and export use: `best` where the protocol chose one, else `last`."""
        return self.best if self.record.get("protocol", {}).get("weights") == "best" else self.last

    @property
    def metrics(self) -> Path:
        """One JSON object per step."""
        return self.folder / "metrics.jsonl"

    @property
    def state(self) -> str:
        """`complete`, `cut` (by --max-steps), `running`, `interrupted` or `failed`."""
        state = str(self.record.get("state", "interrupted"))
        return "interrupted" if state == "running" and not is_locked(self.folder / ".lock") else state

    @property
    def settings(self) -> Settings:
        """The resolved settings it was started with."""
        return load_settings(self.folder / "settings.toml")

    def update(self, **fields: Any) -> None:
        """Changes fields of run.json, atomically."""
        self.record |= fields
        write_json(self.folder / "run.json", self.record)

    def log(self, text: str) -> None:
        """Appends a time-stamped line to log.txt."""
        with open(self.folder / "log.txt", "a", encoding="utf-8") as handle:
            handle.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One process (group) works on a run at a time."""
        with locked(self.folder / ".lock", f"run {self.folder.name}"):
            yield


def create_run(place: Place, stage: str, record: Mapping[str, Any]) -> Run:
    """Makes `runs/<preset>/<stage>-<modality>/<YYYYmmdd-HHMMSS>/` with settings.toml and run.json."""
    parent = place.runs(stage)
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        folder = parent / time.strftime("%Y%m%d-%H%M%S")
        try:
            folder.mkdir()
            break
        except FileExistsError:
            time.sleep(0.2)  # two runs in one second: the later one waits for its own name
    write_text(folder / "settings.toml", to_toml(place.settings))
    run = Run(folder)
    run.update(
        schema=1,
        version=version(),
        state="running",
        stage=stage,
        preset=place.settings.name,
        dataset=place.settings.dataset,
        modality=place.modality,
        split=place.split,
        recipe=place.settings.recipe,
        method=place.settings.distill.method if stage == "distill" else None,
        started=time.time(),
        **record,
    )
    return run


def all_runs(place: Place, stage: str) -> list[Run]:
    """Runs of a stage, oldest first."""
    folder = place.runs(stage)
    return [Run(path.parent) for path in sorted(folder.glob("*/run.json"))]


def newest_complete(place: Place, stage: str, classes: list[str] | None, method: str | None = None) -> Run:
    """The newest complete run with the same split, classes and recipe (and method, where given).

    Raises:
        GkdError: there is none; the message says what there is and how to go on.
    """
    runs = all_runs(place, stage)
    for run in reversed(runs):
        record = run.record
        if (
            run.state == "complete"
            and record["split"] == place.split
            and record["recipe"] == place.settings.recipe
            and classes in (None, record["classes"])
            and method in (None, record["method"])
        ):
            return run
    command = STAGE_FOLDER[stage]
    noun = "attention run" if stage == "pretrain" else "student"
    raise GkdError(
        f"no complete {noun} for {place.settings.name}, {place.modality}, split {place.split},"
        f" recipe {place.settings.recipe}",
        f"{_relative(place.runs(stage), place.root)}/ holds {_describe(runs)}",
        _next_command(command, place, runs)
        + (
            ", or name a teacher with `--teacher PATH`"
            if stage == "pretrain"
            else ", or name a run with `--run PATH`"
        ),
    )


def _describe(runs: list[Run]) -> str:
    if not runs:
        return "no run"
    newest = runs[-1]
    reached = newest.record.get("progress", {})
    at = (
        f", {newest.state} at epoch {reached.get('epoch')} of {reached.get('epochs')}"
        if reached
        else f", {newest.state}"
    )
    return f"{len(runs)} run{'s' if len(runs) > 1 else ''}; the newest, {newest.folder.name}{at}"


def _next_command(command: str, place: Place, runs: list[Run]) -> str:
    unfinished = any(run.state in ("interrupted", "failed", "cut") for run in runs)
    return f"`{place.command(command, *(['--resume'] if unfinished else []))}`"


def newest_unfinished(place: Place, stage: str) -> Run:
    """The newest run that `--resume` continues.

    Raises:
        GkdError: every run is complete, or there is none.
    """
    runs = all_runs(place, stage)
    for run in reversed(runs):
        if (
            run.state in ("interrupted", "failed", "cut", "running")
            and run.record.get("split") == place.split
        ):
            return run
    raise GkdError(
        "there is no unfinished run to resume",
        f"{_relative(place.runs(stage), place.root)}/ holds {_describe(runs)}",
        "start a new run without --resume; more epochs: `--resume` needs a run that was stopped",
    )


def open_run(path: Path) -> Run:
    """A run named by the user.

    Raises:
        GkdError: no run folder there (exit code 2).
    """
    if not (path / "run.json").is_file():
        raise usage_error(
            f"`{path}` is not a run folder", "no run.json in it", "run folders lie under runs/<preset>/"
        )
    return Run(path)


def resumed_settings(run: Run, place: Place) -> Settings:
    """The run's own settings, with those changes that a continuation may have.

    Raises:
        GkdError: a diff of every setting given by hand that may not change (exit code 2).
    """
    old, new = run.settings, place.settings
    old_flat, new_flat = _flat(old), _flat(new)
    given = {key for key in place.explicit if old_flat.get(key) != new_flat[key]}
    changed = [f"{key} {old_flat.get(key)} -> {new_flat[key]}" for key in sorted(given - RESUMABLE)]
    if changed:
        raise usage_error(
            f"cannot resume with different settings: {', '.join(changed)}",
            str(run.folder / "settings.toml"),
            "drop those options, or start a new run without --resume;"
            " only epochs, device, workers and progress may change",
        )
    document = old.model_dump(mode="json")
    for key in given:
        section, _, name = key.rpartition(".")
        document[section][name] = new_flat[key]
    return Settings.model_validate(document)


def _flat(settings: Settings) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.model_dump(mode="json").items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": item for key, item in value.items()}
        else:
            flat[name] = value
    return flat


def relative_to_run(run_folder: Path, target: Path) -> str:
    """How run.json names another folder: relative, so that a moved tree still works."""
    return os.path.relpath(target, run_folder)


def _relative(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
