"""Where things lie under the root, and run folders: create, state, lock, find, resume rules."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from gkdcli.errors import GkdError, usage_error
from gkdcli.files import is_locked, locked, write_json, write_text
from gkdcli.resolve import load_settings, preset_names, to_toml, toml_value
from gkdcli.settings import STAGES, DataSettings, Settings

STAGE_FOLDER = {stage: STAGES[stage] for stage in ("pretrain", "distill")}
SCHEMA = 1
# what may differ between a run and its continuation (DESIGN: epochs, device, workers, progress)
RESUMABLE = {
    "optim.epochs",
    "train.device",
    "train.workers",
    "train.threads",
    "train.checkpoint_minutes",
    "train.tensorboard",
    "train.checkpoint_steps",
    "train.keep_checkpoints",
    "train.checkpoint_activations",
    "data.workers",
    "data.flow_batch",
    "data.flow_weights",
}
# given by hand, they must be given again to every command that works on the store
STORED = frozenset(f"data.{key}" for key in DataSettings().stored("flow"))
_RECORD = {"schema", "state", "stage", "modality", "split", "recipe", "method", "classes"}


@cache
def version() -> str:
    """The installed version of gkd; looked up once, for it takes longer than some videos' frames."""
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
        preset: what the user named it by; the preset's name where it is empty.
    """

    root: Path
    settings: Settings
    modality: str = "rgb"
    split: int = 1
    explicit: frozenset[str] = frozenset()
    page: Mapping[str, Any] = field(default_factory=dict)
    preset: str = ""

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

    def entry(self, role: str) -> Path:
        """Where imported weights of the `teacher` or the `student` lie, in a folder laid out like a run."""
        split = "" if self.split == 1 else f"-split{self.split}"
        return self.models / f"{role}-{self.modality}{split}"

    def command(self, verb: str, *extra: str) -> str:
        """`gkd <verb> <preset> ...` with the flags that lead back to this place."""
        return shlex.join(["gkd", verb, self.preset or self.settings.name, *self._flags(), *extra])

    def import_command(self, file: str, *extra: str) -> str:
        """`gkd import <file> --dataset <preset> ...`, likewise."""
        named = ["--dataset", self.preset or self.settings.name]
        return shlex.join(["gkd", "import", file, *named, *self._flags(), *extra])

    def _flags(self) -> list[str]:
        words = []
        if self.modality != "rgb":
            words += ["--modality", self.modality]
        if self.split != 1:
            words += ["--split", str(self.split)]
        if self.root != Path("."):
            words += ["--root", str(self.root)]
        if self.settings.dataset in preset_names():  # one's own set keeps its page, with these settings in it
            for key in sorted(self.explicit & STORED):
                value = getattr(self.settings.data, key.removeprefix("data."))
                words += ["--set", f"{key}={value if isinstance(value, str) else toml_value(value)}"]
        return words

    def runs(self, stage: str) -> Path:
        """The folder that holds all runs of a stage."""
        return self.root / "runs" / self.settings.name / f"{STAGE_FOLDER[stage]}-{self.modality}"


class Run:
    """One run folder; `record` is its run.json, empty where that is missing or cannot be used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record: dict[str, Any] = {}
        self.damage = "there is no run.json"
        try:
            record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            self.damage = f"run.json is damaged: {error}"
            return
        if not isinstance(record, dict) or not record.keys() >= _RECORD:
            self.damage = "run.json is damaged: it lacks entries that every run has"
        elif record["schema"] != SCHEMA:
            self.damage = f"run.json has schema {record['schema']}, this version of gkd reads {SCHEMA}"
        else:
            self.record, self.damage = record, ""

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
        """`complete`, `cut` (by --max-steps), `running`, `interrupted`, `failed` or `damaged`."""
        if self.damage:
            return "damaged"
        state = str(self.record["state"])
        return "interrupted" if state == "running" and not is_locked(self.folder / ".lock") else state

    @cached_property
    def settings(self) -> Settings:
        """The resolved settings it was started with."""
        return load_settings(self.folder / "settings.toml")

    def is_of(self, classes: Sequence[str]) -> bool:
        """Whether it tells these classes apart; imported weights may know only how many they are."""
        known = self.record["classes"]
        return bool(len(classes) == self.record["class_count"] if known is None else known == list(classes))

    def take_names(self, classes: Sequence[str]) -> None:
        """Gives imported weights the store's class names, where they came without."""
        self.record["classes"] = self.record["classes"] or list(classes)

    def is_of_other_store(self, fingerprint: str) -> bool:
        """Whether it was trained on something else; of imported weights nobody knows."""
        return self.record["store"]["fingerprint"] not in (None, fingerprint)

    def update(self, **fields: Any) -> None:
        """Changes fields of run.json, atomically."""
        self.record |= fields
        self.damage = ""
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
        schema=SCHEMA,
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


def newest_complete(
    place: Place, stage: str, classes: list[str] | None, method: str | None = None, flag: str = "--run"
) -> Run:
    """The newest complete run with the same split, classes and recipe (and method, where given).

    Args:
        place: where.
        stage: `pretrain` or `distill`.
        classes: of the store.
        method: `distill.method` of the run; None takes either.
        flag: the flag by which the user may name one instead.

    Raises:
        GkdError: there is none; the message says what there is and how to go on.
    """
    runs = all_runs(place, stage)
    for run in reversed(runs):
        if run.state == "complete" and not misfit(run, place, classes, method):
            return run
    noun = "attention run" if stage == "pretrain" else "student"
    why = "nothing to distill from: " if flag == "--teacher" else ""
    wanted = f"{place.settings.name}, {place.modality}, split {place.split}, recipe {place.settings.recipe}"
    raise GkdError(
        f"{why}no complete {noun} for {wanted}",
        f"{_under(place, stage)} {_holdings(runs, place, classes, method)}",
        f"{_next_command(place, stage, runs)}, or name a run with `{flag} PATH`",
    )


def misfit(run: Run, place: Place, classes: list[str] | None, method: str | None) -> str:
    """Why a run is none of those looked for; "" if it is."""
    record = run.record
    if record["split"] != place.split:
        return f"of split {record['split']}"
    if record["recipe"] != place.settings.recipe:
        return f"of recipe {record['recipe']}"
    if classes is not None and not run.is_of(classes):
        return "of other classes than the store's"
    if method not in (None, record["method"]):
        return f"of method {record['method']}"
    return ""


_SAID = {"cut": "was cut short", "interrupted": "was interrupted", "failed": "failed"}


def _holdings(
    runs: list[Run], place: Place, classes: list[str] | None = None, method: str | None = None
) -> str:
    """`holds 2 runs; the newest, 20260925-141207, was interrupted at epoch 7 of 16`."""
    if not runs:
        return "holds no run"
    newest = runs[-1]
    one = f"1 run, {newest.folder.name}, which"
    which = one if len(runs) == 1 else f"{len(runs)} runs; the newest, {newest.folder.name},"
    state, reached = newest.state, newest.record.get("progress", {})
    at = f" at epoch {reached['epoch']} of {reached['epochs']}" if reached and state != "complete" else ""
    odd = "" if newest.damage else misfit(newest, place, classes, method)
    return f"holds {which} {_SAID.get(state, f'is {state}')}{at}{f' and is {odd}' if odd else ''}"


def _next_command(place: Place, stage: str, runs: list[Run]) -> str:
    unfinished = any(_resumable(run, place) for run in runs)
    return f"`{place.command(STAGE_FOLDER[stage], *(['--resume'] if unfinished else []))}`"


def _resumable(run: Run, place: Place) -> bool:
    return run.state in ("interrupted", "failed", "cut", "running") and run.record["split"] == place.split


def newest_unfinished(place: Place, stage: str) -> Run:
    """The newest run that `--resume` continues.

    Raises:
        GkdError: every run is complete, or there is none.
    """
    runs = all_runs(place, stage)
    for run in reversed(runs):
        if _resumable(run, place):
            return run
    raise GkdError(
        "there is no unfinished run to resume",
        f"{_under(place, stage)} {_holdings(runs, place)}",
        f"`{place.command(STAGE_FOLDER[stage])}` starts a new one",
    )


def open_run(path: Path) -> Run:
    """A run named by the user.

    Raises:
        GkdError: no run folder there (exit code 2), or a damaged one.
    """
    if not os.path.isfile(path / "run.json"):
        raise usage_error(
            f"`{path}` is not a run folder",
            "no run.json in it",
            "run folders lie under runs/<preset>/; `gkd import` makes one of a weights file",
        )
    run = Run(path)
    if run.damage:
        raise GkdError(run.damage, str(path / "run.json"), "name another run")
    return run


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


def _under(place: Place, stage: str) -> str:
    """`runs/demo/distill-rgb/`, and the root where it is not the current folder."""
    folder = f"{place.runs(stage).relative_to(place.root)}/"
    return folder if place.root == Path(".") else f"{folder} under {place.root}"
