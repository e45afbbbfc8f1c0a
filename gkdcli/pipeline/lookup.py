"""What a command works on: the store and the run, found by convention or named by hand."""

from __future__ import annotations

from pathlib import Path

from gkdcli.console import Console
from gkdcli.data.store import Store, setting_differences
from gkdcli.errors import GkdError
from gkdcli.resolve import toml_value
from gkdcli.runs import STAGE_FOLDER, Place, Run, newest_complete, open_run


def open_store(place: Place) -> Store:
    """The store a command works on.

    Raises:
        GkdError: there is none, or it was prepared with other settings.
    """
    if place.settings.task == "detection":
        raise GkdError(
            f"there is no {place.modality} store for {place.settings.dataset};"
            " temporal detection is not built yet",
            str(place.store),
            "this version trains recognition: demo, folder, hmdb51, ucf101",
        )
    store = Store.open(place.store)
    differences = setting_differences(store.settings, place.settings.data.stored(place.modality))
    if differences:
        key = differences[0].split()[0]
        theirs = toml_value(store.settings.get(key.removeprefix("data.")))
        raise GkdError(
            f"the store was prepared with other settings: {', '.join(differences)}",
            str(place.store),
            f"`--set {key}={theirs}` takes the store's; or prepare under another name (`dataset`)",
        )
    return store


def find_run(
    place: Place, console: Console, model: str, run_path: Path | None, store: Store, flag: str = "--run"
) -> Run:
    """The named run, or the newest complete one that fits; what was chosen is said, with the flag to differ.

    Raises:
        GkdError: none fits, or the named one is of other classes, another split or modality.
    """
    stage = "pretrain" if model == "teacher" else "distill"
    if run_path is None:
        run = newest_complete(place, stage, store.classes, flag=flag)
        console.note(f"{model}: {run.folder} (newest that fits; `{flag} PATH` names another)")
    else:
        run = open_run(run_path)
        _require_like(run, place, store)
    require_same_flow(run, store)
    if run.record["store"]["fingerprint"] != store.fingerprint:
        console.warn("the store has changed since this run was trained on it", str(run.folder))
    return run


def split_videos(store: Store, place: Place, subset: str) -> list[int]:
    """The videos of a subset of the split asked for.

    Raises:
        GkdError: there is no such split, or none of its videos is in the store.
    """
    videos = store.split(place.split, subset)
    if not videos:
        rejects = place.store.with_suffix(".rejected.tsv")
        raise GkdError(
            f"split {place.split} of {store.dataset} has no {'training' if subset == 'train' else 'test'} videos",
            str(store.path),
            f"rejected videos are in {rejects}"
            if rejects.is_file()
            else "prepare it with more videos per class",
        )
    return videos


def require_same_flow(run: Run, store: Store) -> None:
    """Flow of another method or bound looks different: a network that never saw it is no use on it.

    Raises:
        GkdError: with both.
    """
    if store.modality != "flow":
        return
    learnt = run.settings.data.stored("flow")
    odd = [key for key in ("flow", "flow_bound") if learnt[key] != store.settings[key]]
    if odd:
        told = ", ".join(f"data.{key} {learnt[key]}, the store has {store.settings[key]}" for key in odd)
        raise GkdError(
            f"this run was trained on flow of another kind: {told}",
            str(run.folder),
            "name a run that was trained on such flow, or prepare the flow it knows under another name",
        )


def _require_like(run: Run, place: Place, store: Store) -> None:
    """A run named by hand must be of the store's classes, and of the split and modality asked for."""
    for key, wanted in (("classes", store.classes), ("split", place.split), ("modality", place.modality)):
        if run.record[key] != wanted:
            known = (
                "other classes than the store"
                if key == "classes"
                else f"{key} {run.record[key]}, not {wanted}"
            )
            raise GkdError(
                f"this run is of {known}", str(run.folder), "scores of unlike runs and stores mean nothing"
            )
    if not run.weights.is_file():
        raise GkdError(
            "this run has no finished epoch",
            str(run.folder),
            f"`{place.command(STAGE_FOLDER[run.record['stage']], '--resume')}`",
        )
