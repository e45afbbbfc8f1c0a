"""What a command works on: the store and the run, found by convention or named by hand."""

from __future__ import annotations

from pathlib import Path

from gkdcli.console import Console
from gkdcli.data.store import Store, setting_differences
from gkdcli.errors import GkdError
from gkdcli.pipeline.imports import plan_import, write_entry
from gkdcli.resolve import toml_value
from gkdcli.runs import STAGE_FOLDER, Place, Run, misfit, newest_complete, open_run
from gkdcli.tasks.trained import ROLE


def open_store(place: Place) -> Store:
    """The store a command works on.

    Raises:
        GkdError: there is none, or it was prepared with other settings.
    """
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
    place: Place,
    console: Console,
    model: str,
    run_path: Path | None,
    store: Store,
    flag: str = "--run",
    dry_run: bool = False,
) -> Run:
    """The named run, or the one that `newest` finds; what was chosen is said, with the flag to differ.

    Raises:
        GkdError: none fits, or the named one is of other classes, another split or modality.
    """
    stage = "pretrain" if model == "teacher" else "distill"
    if run_path is None:
        run = newest(place, console, stage, store.classes, flag=flag, dry_run=dry_run)
        console.note(f"{model}: {run.folder} {chosen(run, flag)}")
    else:
        run = open_run(run_path)
        _require_like(run, place, store)
    run.take_names(store.classes)
    require_same_flow(run, store)
    if run.is_of_other_store(store.fingerprint):
        console.warn("the store has changed since this run was trained on it", str(run.folder))
    return run


def split_videos(store: Store, place: Place, subset: str) -> list[int]:
    """The videos of a subset of the split asked for.

    Raises:
        GkdError: there is no such split, or none of its videos is in the store.
    """
    videos = store.split(place.split, subset)
    if not videos:
        kind = "training" if subset == "train" else subset
        rejects = place.store.with_suffix(".rejected.tsv")
        raise GkdError(
            f"split {place.split} of {store.dataset} has no {kind} videos",
            str(store.path),
            f"rejected videos: {rejects}" if rejects.is_file() else "prepare more videos per class",
        )
    return videos


def newest(
    place: Place,
    console: Console,
    stage: str,
    classes: list[str],
    method: str | None = None,
    flag: str = "--run",
    dry_run: bool = False,
) -> Run:
    """The newest complete run that fits, else imported weights that do.

    Args:
        place: where.
        console: who is told of an import on the way.
        stage: `pretrain` or `distill`.
        classes: of the store.
        method: `distill.method` of the run; None takes either.
        flag: the flag by which the user may name one instead.
        dry_run: a published checkpoint that lies in models/ under its own name is not imported for good.

    Raises:
        GkdError: there is nothing; the message says what there is and how to go on.
    """
    try:
        return newest_complete(place, stage, classes, method, flag)
    except GkdError as error:
        run = _imported(place, console, stage, error, dry_run)
        if odd := misfit(run, place, classes, method):
            raise GkdError(error.what, f"{error.where}; {run.folder} is {odd}", error.hint) from None
    run.take_names(classes)
    return run


def chosen(run: Run, flag: str) -> str:
    """Why `newest` took a run, in brackets, with the flag that names another."""
    how = "imported" if "imported" in run.record else "newest that fits"
    return f"({how}; `{flag} PATH` names another)"


def _imported(place: Place, console: Console, stage: str, otherwise: GkdError, dry_run: bool) -> Run:
    """The entry of models/, made on the way from a published checkpoint that lies there."""
    role = ROLE[stage]
    run = Run(place.entry(role))
    if not run.damage:
        return run
    # nothing in such a file tells its split; the first is the one whose figures are published
    file = place.models / f"{place.settings.dataset}-{place.modality}.ckpt"
    if place.split != 1 or not file.is_file():
        raise otherwise
    try:
        entry = plan_import(place, file, role)
    except GkdError as error:
        where = f"{otherwise.where}; {file.name} there: {error.what} ({error.where})"
        raise GkdError(otherwise.what, where, error.hint) from None
    if not entry.whole:
        where = f"{otherwise.where}; {file} is no whole {role}"
        raise GkdError(otherwise.what, where, f"`{place.import_command(str(file))}` lists what is missing")
    if dry_run:
        console.note(f"{file} would be imported as {entry.path}")
        return entry.as_run()
    write_entry(place, entry)
    console.note(f"{file} was imported as {entry.path}")
    return Run(entry.path)


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
    odd = "" if run.is_of(store.classes) else "other classes than the store"
    for key, wanted in (("split", place.split), ("modality", place.modality)):
        if not odd and run.record[key] != wanted:
            odd = f"{key} {run.record[key]}, not {wanted}"
    if odd:
        raise GkdError(
            f"this run is of {odd}", str(run.folder), "scores of unlike runs and stores mean nothing"
        )
    if not run.weights.is_file():
        raise GkdError(
            "this run has no finished epoch",
            str(run.folder),
            f"`{place.command(STAGE_FOLDER[run.record['stage']], '--resume')}`",
        )
