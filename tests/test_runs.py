"""Run folders: where they lie, their states, which one is chosen, what a continuation may change."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gkdcli.errors import ExitCode, GkdError
from gkdcli.resolve import resolve
from gkdcli.runs import (
    RESUMABLE,
    Place,
    Run,
    all_runs,
    create_run,
    newest_complete,
    newest_unfinished,
    open_run,
    relative_to_run,
    resumed_settings,
    version,
)

CLASSES = ["down", "up"]


def _place(root: Path, *sets: str, stage: str = "distill", **fields: Any) -> Place:
    resolved = resolve("demo", stage=stage, modality="rgb", root=root, sets=sets)
    explicit = frozenset(key for key, origin in resolved.origin.items() if origin == "--set")
    return Place(root, resolved.settings, explicit=explicit, page=resolved.page, **fields)


def _run(place: Place, name: str, stage: str = "distill", **record: Any) -> Run:
    """A run under a name of the test's choosing, since runs are ordered by it."""
    run = create_run(place, stage, {"classes": CLASSES})
    folder = run.folder.rename(run.folder.with_name(name))
    run = Run(folder)
    run.update(**({"state": "complete"} | record))
    return run


def _refused(call: Any, *given: Any, **named: Any) -> GkdError:
    with pytest.raises(GkdError) as caught:
        call(*given, **named)
    return caught.value


# ---- places ----


def test_everything_lies_where_the_manual_says(tmp_path: Path) -> None:
    place = _place(tmp_path)
    assert place.videos == tmp_path / "datasets/demo"
    assert place.store_folder == tmp_path / "stores/demo"
    assert place.store == tmp_path / "stores/demo/rgb.h5"
    assert place.models == tmp_path / "models/demo"
    assert place.runs("pretrain") == tmp_path / "runs/demo/pretrain-attention-rgb"
    assert place.runs("distill") == tmp_path / "runs/demo/distill-rgb"


def test_the_next_command_leads_back_here() -> None:
    settings = resolve("demo", stage="distill", modality="rgb", root=Path()).settings
    assert Place(Path(), settings).command("evaluate") == "gkd evaluate demo"
    place = Place(Path("/a b"), settings, "flow", 2, preset="./my page.toml")
    assert place.command("distill", "--resume") == (
        "gkd distill './my page.toml' --modality flow --split 2 --root '/a b' --resume"
    )


# ---- life of a run ----


def test_a_new_run_holds_settings_and_record_and_only_relative_paths(tmp_path: Path) -> None:
    place = _place(tmp_path)
    run = create_run(place, "distill", {"classes": CLASSES})
    assert run.folder.parent == place.runs("distill")
    assert time.strptime(run.folder.name, "%Y%m%d-%H%M%S")
    assert run.settings == place.settings
    record = json.loads((run.folder / "run.json").read_text())
    assert record == run.record
    wanted = {"schema": 1, "state": "running", "stage": "distill", "preset": "demo", "dataset": "demo"}
    wanted |= {"modality": "rgb", "split": 1, "recipe": "corrected", "method": "gkd", "classes": CLASSES}
    assert {key: record[key] for key in wanted} == wanted
    assert record["version"] == version() == "0.1.0"
    assert str(tmp_path) not in (run.folder / "run.json").read_text()
    assert create_run(place, "pretrain", {"classes": CLASSES}).record["method"] is None


def test_two_runs_in_one_second_get_a_folder_each(tmp_path: Path) -> None:
    place = _place(tmp_path)
    names = {create_run(place, "distill", {"classes": CLASSES}).folder.name for _ in range(2)}
    assert len(names) == 2
    assert len(all_runs(place, "distill")) == 2


def test_running_without_a_lock_means_interrupted(tmp_path: Path) -> None:
    """After kill -9 nobody is left to say so."""
    run = create_run(_place(tmp_path), "distill", {"classes": CLASSES})
    assert run.state == "interrupted"
    with run.lock():
        assert Run(run.folder).state == "running"
    assert Run(run.folder).state == "interrupted"
    for state in ("complete", "cut", "failed", "interrupted"):
        run.update(state=state)
        assert Run(run.folder).state == state


def test_a_killed_process_leaves_an_interrupted_run_that_can_be_locked_again(tmp_path: Path) -> None:
    run = create_run(_place(tmp_path), "distill", {"classes": CLASSES})
    hold = (
        "import sys, time\nfrom pathlib import Path\nfrom gkdcli.runs import Run\n"
        "with Run(Path(sys.argv[1])).lock():\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(run.folder)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert run.state == "running"
        error = _refused(run.lock().__enter__)
        assert error.what == f"another command is using run {run.folder.name}"
        assert f"process {process.pid} " in error.where
        process.kill()
    assert run.state == "interrupted"
    with run.lock():
        assert run.state == "running"


def test_weights_follow_the_protocol(tmp_path: Path) -> None:
    run = create_run(_place(tmp_path), "distill", {"classes": CLASSES})
    assert run.weights == run.last
    run.update(protocol={"weights": "best"})
    assert Run(run.folder).weights == run.best


def test_the_log_grows_by_stamped_lines(tmp_path: Path) -> None:
    run = create_run(_place(tmp_path), "distill", {"classes": CLASSES})
    run.log("one")
    run.log("two")
    lines = (run.folder / "log.txt").read_text().splitlines()
    assert [line[20:] for line in lines] == ["one", "two"]
    assert time.strptime(lines[0][:19], "%Y-%m-%d %H:%M:%S")


def test_a_moved_run_still_opens(tmp_path: Path) -> None:
    """A whole tree may move, and a run may be copied out of it."""
    teacher = _run(_place(tmp_path / "a", stage="pretrain"), "20260101-000000", "pretrain")
    student = _run(_place(tmp_path / "a"), "20260101-000001")
    student.update(parents={"teacher": relative_to_run(student.folder, teacher.folder)})
    shutil.move(tmp_path / "a", tmp_path / "b")
    place = _place(tmp_path / "b")
    found = newest_complete(place, "distill", CLASSES)
    assert found.settings == place.settings
    parent = open_run(found.folder / found.record["parents"]["teacher"])
    assert parent.record["stage"] == "pretrain"
    shutil.copytree(found.folder, tmp_path / "alone")
    assert open_run(tmp_path / "alone").settings == found.settings


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "run.json is damaged: Expecting value"),
        (b'{"schema": 1, "sta', "run.json is damaged: "),
        (b"\xff\xfe", "run.json is damaged: "),
        (b"[]", "run.json is damaged: it lacks entries that every run has"),
        (b'{"schema": 1, "state": "complete"}', "run.json is damaged: it lacks entries that every run has"),
        (None, "run.json has schema 2, this version of gkd reads 1"),
    ],
)
def test_a_damaged_run_is_named_and_never_chosen_and_no_obstacle_to_others(
    tmp_path: Path, content: bytes | None, says: str
) -> None:
    place = _place(tmp_path)
    good = _run(place, "20260101-000000")
    bad = _run(place, "20260102-000000")
    path = bad.folder / "run.json"
    path.write_bytes(content if content is not None else json.dumps(bad.record | {"schema": 2}).encode())
    assert Run(bad.folder).state == "damaged"
    error = _refused(open_run, bad.folder)
    assert error.what.startswith(says)
    assert (error.where, error.code) == (str(path), ExitCode.FAILED)
    assert newest_complete(place, "distill", CLASSES).folder == good.folder
    good.update(state="failed")
    assert newest_unfinished(place, "distill").folder == good.folder
    assert ", is damaged" in _refused(newest_complete, place, "distill", CLASSES).where


@pytest.mark.parametrize("name", ["none", "file", "empty"])
def test_what_is_no_run_folder_is_a_usage_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    error = _refused(open_run, tmp_path / name)
    assert error.what == f"`{tmp_path / name}` is not a run folder"
    assert error.code == ExitCode.USAGE


# ---- which run is chosen ----


def test_the_newest_that_is_complete_and_fits_is_chosen(tmp_path: Path) -> None:
    place = _place(tmp_path)
    _run(place, "20260101-000000")
    wanted = _run(place, "20260102-000000")
    _run(place, "20260103-000000", state="cut")
    _run(place, "20260103-000001", state="interrupted")
    _run(place, "20260103-000002", state="failed")
    _run(place, "20260103-000003", state="running")
    _run(place, "20260104-000000", split=2)
    _run(place, "20260104-000001", recipe="official")
    _run(place, "20260104-000002", classes=["up", "down"])
    plain = _run(place, "20260105-000000", method="none")
    assert newest_complete(place, "distill", CLASSES, "gkd").folder == wanted.folder
    assert newest_complete(place, "distill", CLASSES).folder == plain.folder
    assert newest_complete(place, "distill", CLASSES, "none").folder == plain.folder
    assert newest_complete(place, "distill", None).folder == plain.folder


def test_runs_of_other_presets_stages_and_modalities_are_not_looked_at(tmp_path: Path) -> None:
    _run(_place(tmp_path, "name=other"), "20260101-000000")
    _run(_place(tmp_path, modality="flow"), "20260101-000000")
    _run(_place(tmp_path), "20260101-000000", "pretrain")
    assert "holds no run" in _refused(newest_complete, _place(tmp_path), "distill", CLASSES).where


@pytest.mark.parametrize(
    ("record", "holds", "resume"),
    [
        ({"state": "interrupted"}, "was interrupted at epoch 7 of 16", " --resume"),
        ({"state": "cut"}, "was cut short at epoch 7 of 16", " --resume"),
        ({"state": "failed"}, "failed at epoch 7 of 16", " --resume"),
        ({"split": 2}, "is complete and is of split 2", ""),
        ({"recipe": "official"}, "is complete and is of recipe official", ""),
        ({"classes": ["a"]}, "is complete and is of other classes than the store's", ""),
    ],
)
def test_where_none_fits_the_message_says_what_there_is_and_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: dict[str, Any], holds: str, resume: str
) -> None:
    monkeypatch.chdir(tmp_path)
    place = _place(Path(), stage="pretrain")
    _run(place, "20260101-000000", "pretrain", progress={"epoch": 7, "epochs": 16}, **record)
    error = _refused(newest_complete, place, "pretrain", CLASSES, flag="--teacher")
    assert error.what == (
        "nothing to distill from: no complete attention run for demo, rgb, split 1, recipe corrected"
    )
    assert error.where == (f"runs/demo/pretrain-attention-rgb/ holds 1 run, 20260101-000000, which {holds}")
    assert error.hint == f"`gkd pretrain-attention demo{resume}`, or name a run with `--teacher PATH`"
    assert error.code == ExitCode.FAILED


def test_where_there_is_no_run_the_message_says_so(tmp_path: Path) -> None:
    error = _refused(newest_complete, _place(tmp_path), "distill", CLASSES)
    assert error.what == "no complete student for demo, rgb, split 1, recipe corrected"
    assert error.where == f"runs/demo/distill-rgb/ under {tmp_path} holds no run"
    assert error.hint == f"`gkd distill demo --root {tmp_path}`, or name a run with `--run PATH`"


def test_the_newest_unfinished_run_of_the_split_is_continued(tmp_path: Path) -> None:
    place = _place(tmp_path)
    error = _refused(newest_unfinished, place, "distill")
    assert error.what == "there is no unfinished run to resume"
    assert error.hint == f"`gkd distill demo --root {tmp_path}` starts a new one"
    _run(place, "20260101-000000", state="cut")
    wanted = _run(place, "20260102-000000", state="interrupted")
    _run(place, "20260103-000000", state="failed", split=2)
    _run(place, "20260104-000000")
    assert newest_unfinished(place, "distill").folder == wanted.folder


# ---- what a continuation may change ----


def test_a_run_goes_on_with_its_own_settings_whatever_the_preset_says_now(tmp_path: Path) -> None:
    run = create_run(
        _place(tmp_path, "optim.batch_size=3", "distill.beta=0.5"), "distill", {"classes": CLASSES}
    )
    assert resumed_settings(run, _place(tmp_path)) == run.settings


def test_settings_that_may_change_do_and_the_others_are_refused_with_a_diff(tmp_path: Path) -> None:
    place = _place(tmp_path, "clips.length=16", "optim.batch_size=16")
    run = create_run(place, "distill", {"classes": CLASSES})
    allowed = {
        "optim.epochs": 99,
        "train.device": "cpu",
        "train.workers": 3,
        "train.threads": 2,
        "train.checkpoint_minutes": 1.5,
        "train.checkpoint_steps": 7,
        "train.keep_checkpoints": 2,
        "train.checkpoint_activations": True,
        "train.tensorboard": True,
    }
    sets = [f"{key}={str(value).lower()}" for key, value in allowed.items()]
    found = resumed_settings(run, _place(tmp_path, *sets, "clips.length=16", "data.workers=2"))
    for key, value in allowed.items():
        section, _, name = key.partition(".")
        assert getattr(getattr(found, section), name) == value
    assert {*allowed, "data.workers", "data.flow_batch", "data.flow_weights"} == RESUMABLE
    error = _refused(
        resumed_settings,
        run,
        _place(tmp_path, *sets, "optim.batch_size=8", "clips.length=32", "recipe=official"),
    )
    assert error.what == (
        "cannot resume with different settings:"
        " clips.length 16 -> 32, optim.batch_size 16 -> 8, recipe corrected -> official"
    )
    assert error.where == str(run.folder / "settings.toml")
    assert error.hint == (
        "drop those options, or start a new run without --resume;"
        " only epochs, device, workers and progress may change"
    )
    assert error.code == ExitCode.USAGE
