"""`gkd import`: files of others become entries that every command finds; bad ones are named and never run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from gkdcli.errors import GkdError
from gkdcli.models.weights import load_tensors, save_tensors
from gkdcli.pipeline.imports import plan_import
from gkdcli.resolve import resolve
from gkdcli.runs import Place
from gkdcli.tasks.recognition import build_network
from tests.conftest import borrow, run_gkd
from tests.published import nested, published_names, tiny_generators, tiny_network


@pytest.fixture
def shop(workspace: Path, gkd: Callable[..., Any]) -> Callable[..., Any]:
    """`shop("import", FILE)` with the flags that every call here needs."""

    def call(*words: object) -> Any:
        named = ("--dataset", "demo-tiny") if words[0] == "import" else ("--preset", "demo-tiny")
        return gkd(*words, *named, "--root", workspace)

    return call


def saved(path: Path, content: object, **how: Any) -> Path:
    torch.save(content, path, **how)
    return path


def network_of(entry: Path) -> dict[str, torch.Tensor]:
    tensors = load_tensors(entry / "last.safetensors")
    return {n.removeprefix("network."): v for n, v in tensors.items() if n.startswith("network.")}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def prefixed(state: dict[str, torch.Tensor], prefix: str = "module.") -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


WAYS = {
    "plain": lambda state, network: state,
    "DataParallel": lambda state, network: prefixed(state),
    "nested": nested,
    "nested, DataParallel": lambda state, network: nested(prefixed(state), network),
    "without counters": lambda state, network: {n: v for n, v in state.items() if "num_batches" not in n},
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_published_checkpoints_become_entries(way, role, old, shop, workspace, tmp_path):
    network = tiny_network(role)
    content = WAYS[way](published_names(network), network)
    wanted = {name: value.clone() for name, value in network.state_dict().items()}
    file = saved(tmp_path / "w.ckpt", content, _use_new_zipfile_serialization=not old)
    result = shop("import", file, "--json").must().json["result"]
    entry = workspace / f"models/demo-tiny/{role}-rgb"
    assert (result["entry"], result["role"], result["complete"]) == (str(entry), role, True)
    assert result["did_not_fit"] == []
    assert result["names"] == "published" + (", in `state_dict`" if "nested" in way else "")
    got = network_of(entry)
    if way == "without counters":
        assert result["loaded"] == 354 - 57
        wanted |= {name: value for name, value in got.items() if "num_batches" in name}
    assert same(got, wanted)
    record = json.loads((entry / "run.json").read_text())
    assert (record["split"], record["recipe"], len(record["classes"])) == (1, "corrected", 12)
    assert [path.name for path in (workspace / "models/demo-tiny").iterdir() if path.name != ".lock"] == [
        entry.name
    ]


def test_the_whole_line_on_imported_weights(shop, workspace, tmp_path):
    """Teacher and its CVAE from two files; then distill, evaluate and export without a run of one's own."""
    teacher = saved(tmp_path / "teacher.ckpt", published_names(tiny_network("teacher")))
    generators = saved(tmp_path / "cvae.ckpt", prefixed(published_names(tiny_generators("teacher"))))
    student = saved(tmp_path / "student.ckpt", published_names(tiny_network("student", seed=3)))
    entry = workspace / "models/demo-tiny/teacher-rgb"

    early = shop("import", generators)
    assert early.code == 1
    assert early.err.splitlines()[0] == (
        "error: this is the CVAE of a teacher, and no teacher is imported yet"
    )
    told = shop("import", teacher).must()
    again = f"`gkd import CVAE_FILE --dataset demo-tiny --root {workspace} --model teacher`"
    assert again in told.err
    refused = shop("distill")
    assert refused.code == 1
    assert "without its CVAE" in refused.err
    assert again in refused.err
    assert "--set distill.generative_weight=0" in refused.err
    plan = shop("distill", "--set", "distill.generative_weight=0", "--dry-run", "--json").must().json
    assert plan["result"]["teacher"] == str(entry)

    before = network_of(entry)
    joined = shop("import", generators, "--json").must()
    assert "never uses the 4f branch" in joined.err
    result = joined.json["result"]
    assert (result["role"], result["loaded"], result["cvae"]) == ("teacher", 20, True)
    assert {row["why"] for row in result["did_not_fit"]} == {"unexpected"}
    assert len(result["did_not_fit"]) == 20
    assert all(row["tensor"].startswith("Mixed_4f.") for row in result["did_not_fit"])
    assert same(network_of(entry), before)

    done = shop("distill", "--max-steps", 2, "--json").must()
    assert f"teacher: {entry} (imported; `--teacher PATH` names another)" in done.err
    assert "354 tensors from the teacher" in done.err
    run = json.loads((Path(done.json["run"]) / "run.json").read_text())
    assert (Path(done.json["run"]) / run["parents"]["teacher"]).resolve() == entry.resolve()
    metrics = (Path(done.json["run"]) / "metrics.jsonl").read_text().splitlines()
    assert "generative_distillation.Mixed_5c" in json.loads(metrics[0])
    assert shop("distill", "--resume", "--max-steps", 3).must()
    assert "belonged to its old weights" in shop("import", teacher, "--dry-run").must().err

    shop("import", student).must()
    scored = shop("evaluate", "--json").must()
    assert "student-rgb (imported; `--run PATH` names another)" in scored.err
    assert scored.json["result"]["protocol"]["chosen_on"] == "imported: unknown"
    assert shop("evaluate", "--model", "all", "--json").must().json["result"]["runs"][0]["gmac"]
    exported = shop("export", "--json").must().json["result"]
    weights = load_tensors(Path(exported["safetensors"]["file"]))
    wanted = tiny_network("student", seed=3).state_dict()
    assert same(weights, dict(wanted))

    assert "Imported by gkd" in (Path(exported["folder"]) / "README.md").read_text()

    # what was exported comes back as what it was
    shop("import", exported["safetensors"]["file"]).must()
    assert same(network_of(workspace / "models/demo-tiny/student-rgb"), dict(wanted))
    second = shop("evaluate", "--json").must().json["result"]
    assert second["per_class"] == scored.json["result"]["per_class"]


def test_generative_distillation_can_be_done_without(shop, tmp_path):
    shop("import", saved(tmp_path / "t.ckpt", published_names(tiny_network("teacher")))).must()
    done = shop("distill", "--set", "distill.generative_weight=0", "--max-steps", 1, "--json").must()
    first = json.loads((Path(done.json["run"]) / "metrics.jsonl").read_text().splitlines()[0])
    assert "cvae_kl.Mixed_5c" in first
    assert "generative_distillation.Mixed_5c" not in first


def test_runs_of_ones_own_come_first_and_safetensors_of_runs_are_taken_whole(tiny_trained, gkd, tmp_path):
    root = borrow(tiny_trained, tmp_path / "root")
    (root / "runs").symlink_to(tiny_trained / "runs")
    file = saved(tmp_path / "s.ckpt", published_names(tiny_network("student")))
    gkd("import", file, "--dataset", "demo-tiny", "--root", root).must()
    found = gkd("evaluate", "demo-tiny", "--root", root, "--dry-run", "--json").must()
    assert "/runs/demo-tiny/distill-rgb/" in found.json["run"]
    teacher = next((tiny_trained / "runs/demo-tiny/pretrain-attention-rgb").iterdir()) / "last.safetensors"
    result = gkd("import", teacher, "--dataset", "demo-tiny", "--root", root, "--json").must().json["result"]
    assert (result["names"], result["role"], result["cvae"], result["did_not_fit"]) == (
        "gkd",
        "teacher",
        True,
        [],
    )
    kept = load_tensors(root / "models/demo-tiny/teacher-rgb/last.safetensors")
    wanted = {n: v for n, v in load_tensors(teacher).items() if not n.startswith("optim.")}
    assert same(kept, wanted)
    assert {name.split(".")[0] for name in kept} == {"network", "generator"}


def test_our_own_export_says_its_width(tmp_path: Path) -> None:
    """It is in the card that the file carries; another one named by hand is taken, and does not fit."""
    page = resolve("demo-tiny", stage="distill", modality="rgb", root=tmp_path).settings
    model = page.model.model_copy(update={"width": 0.125})
    assert model != page.model
    network = build_network(page.model_copy(update={"model": model}), "student", 5, "rgb")
    file = tmp_path / "model.safetensors"
    save_tensors(file, dict(network.state_dict()), {"card": json.dumps({"width": 0.125})})
    entry = plan_import(Place(tmp_path, page), file)
    assert entry.whole
    assert (entry.settings.model, entry.record["class_count"]) == (model, 5)
    with pytest.raises(GkdError, match="do not fit"):
        plan_import(Place(tmp_path, page, explicit=frozenset({"model.width"})), file)
    for foreign in ("no JSON", "[]", '{"width": "wide"}', '{"width": -1}'):
        save_tensors(file, dict(network.state_dict()), {"card": foreign})
        with pytest.raises(GkdError, match="do not fit"):
            plan_import(Place(tmp_path, page), file)


# ---- files of which not everything fits ----


def test_another_number_of_classes_is_listed_and_the_rest_kept(shop, workspace, tmp_path):
    file = saved(tmp_path / "w.ckpt", published_names(tiny_network("student", classes=51)))
    outcome = shop("import", file, "--json").must()
    result = outcome.json["result"]
    path = workspace / "models/demo-tiny/student-rgb-backbone.safetensors"
    assert (result["entry"], result["complete"], result["loaded"]) == (str(path), False, 352)
    assert result["did_not_fit"] == [
        {
            "why": "wrong shape",
            "tensor": "classifier.weight",
            "in_the_file": "51x64x1x1x1",
            "expected": "12x64x1x1x1",
        },
        {"why": "wrong shape", "tensor": "classifier.bias", "in_the_file": "51", "expected": "12"},
    ]
    assert "warning: this is no whole student; what fits was kept to start from" in outcome.err
    assert "--init" in outcome.err.splitlines()[-1]
    assert shop("evaluate").code == 1
    begun = shop("distill", "--set", "distill.method=none", "--init", path, "--max-steps", 1).must()
    assert f"tensors from {path}, 2 left fresh: classifier.weight, classifier.bias" in begun.err


@pytest.mark.parametrize("origin", ["published", "public I3D"])
def test_a_file_of_which_only_the_backbone_fits_is_listed_as_such(origin, shop, workspace, tmp_path):
    """What the published HMDB51 test copies by position, leaving the attention at random (FINDINGS 14)."""
    state = {n: v for n, v in published_names(tiny_network("teacher")).items() if n.startswith("backbone.")}
    assert len(state) == 344
    if origin == "public I3D":
        state = {name.removeprefix("backbone._model."): value for name, value in state.items()}
    outcome = shop("import", saved(tmp_path / "w.pt", state), "--json").must()
    result = outcome.json["result"]
    path = workspace / "models/demo-tiny/teacher-rgb-backbone.safetensors"
    assert (result["names"], result["entry"], result["complete"]) == (origin, str(path), False)
    assert {row["why"] for row in result["did_not_fit"]} == {"missing"}
    assert all(row["tensor"].startswith("attention.Mixed_5c.") for row in result["did_not_fit"])
    assert len(result["did_not_fit"]) == 10
    assert f"--backbone {path}" in outcome.err.splitlines()[-1]
    begun = shop("pretrain-attention", "--backbone", path, "--max-steps", 1).must()
    assert f"backbone from {path} (344 tensors)" in begun.err


def test_names_that_mean_nothing_here_are_listed(shop, tmp_path):
    state = published_names(tiny_network("student")) | {"Att_Head_9z.0.weight": torch.zeros(2, 3)}
    rows = shop("import", saved(tmp_path / "w.pt", state), "--json").must().json["result"]
    assert rows["did_not_fit"] == [
        {"why": "unexpected", "tensor": "Att_Head_9z.0.weight", "in_the_file": None, "expected": None}
    ]
    assert rows["complete"]


# ---- files that are refused ----


class Evil:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def bare_pickle(content: dict[str, Any], path: Path, protocol: int) -> None:
    """Not even written by torch.save."""
    path.write_bytes(pickle.dumps(OrderedDict(evil=content["evil"]), protocol))


@pytest.mark.parametrize(
    "how",
    [
        torch.save,
        lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
        lambda content, path: bare_pickle(content, path, 2),
        lambda content, path: bare_pickle(content, path, 5),
    ],
    ids=["torch.save", "old torch.save", "pickle 2", "pickle 5"],
)
def test_a_file_that_would_run_code_is_refused_by_name_and_not_run(how, shop, workspace, tmp_path):
    file, sprung = tmp_path / "evil.ckpt", tmp_path / "sprung"
    how(published_names(tiny_network("student")) | {"evil": Evil(sprung)}, file)
    outcome = shop("import", file, "--json")
    assert outcome.code == 1
    assert "`posix.mkdir`" in outcome.json["error"]["what"]
    assert outcome.json["error"]["where"] == str(file)
    assert not sprung.exists()
    assert not (workspace / "models").exists()


def test_a_class_of_someones_own_is_named(shop, tmp_path):
    file = saved(tmp_path / "w.pt", {"model": torch.nn.Linear(2, 2), "x": torch.zeros(1)})
    assert "(`torch.nn.modules.linear.Linear`)" in shop("import", file).err


REFUSED = {
    "nothing known": (
        {"layer1.weight": torch.zeros(1)},
        (),
        "nothing in these weights is an I3D backbone",
    ),
    "no tensors": ({"epoch": 3}, (), "nothing in these weights is an I3D backbone"),
    "a list": ([torch.zeros(1)], (), "holds a list, not a state dict"),
    "flow": (
        lambda: published_names(tiny_network("student", modality="flow")),
        (),
        "these weights take 2 input channels, an rgb network takes 3",
    ),
    "other clips": (
        lambda: published_names(tiny_network("student")),
        ("--set", "model.width=0.125"),
        "these weights do not fit the rgb student",
    ),
    "other model": (
        lambda: published_names(tiny_network("student")),
        ("--model", "teacher"),
        "the backbone in these weights is top-i3d, not i3d (teacher)",
    ),
    "no role": (
        lambda: published_names(tiny_network("student")),
        ("--set", "model.student=i2d"),
        "the backbone in these weights is top-i3d, not i3d (teacher) or i2d (student)",
    ),
    "detection": (
        lambda: (
            published_names(tiny_network("student"))
            | {"coarse_pyramid_detection.loc_heads.0.scale": torch.ones(1)}
        ),
        (),
        "this is a checkpoint of detection; demo-tiny is recognition",
    ),
    "half a backbone": (
        lambda: {n: v for n, v in published_names(tiny_network("student")).items() if "Mixed_4f" not in n},
        (),
        "these weights do not fit the rgb student: 0 tensors have another shape, 30 missing",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_at_all_is_refused_with_reason_place_and_hint(case, shop, workspace, tmp_path):
    content, words, what = REFUSED[case]
    file = saved(tmp_path / "w.pt", content() if callable(content) else content)
    outcome = shop("import", file, *words, "--json")
    assert outcome.code == 1, outcome.err
    error = outcome.json["error"]
    assert what in error["what"]
    assert str(file) in error["where"]
    assert error["hint"]
    assert not (workspace / "models").exists()


def test_a_cvae_says_whose_it_is_or_the_user_must(shop, workspace, tmp_path):
    for role in ("teacher", "student"):
        shop("import", saved(tmp_path / f"{role}.pt", published_names(tiny_network(role)))).must()
    students = saved(tmp_path / "student-cvae.pt", published_names(tiny_generators("student")))
    wrong = shop("import", students, "--model", "teacher")
    assert wrong.code == 1
    assert "error: this is the CVAE of a student, not of a teacher" in wrong.err
    assert shop("import", students, "--json").must().json["result"]["role"] == "student"
    silent = {n: v for n, v in published_names(tiny_generators("teacher")).items() if "_832" not in n}
    file = saved(tmp_path / "silent.pt", silent)
    asked = shop("import", file)
    assert asked.code == 2
    assert "say `--model teacher` or `--model student`" in asked.err
    assert shop("import", file, "--model", "teacher", "--json").must().json["result"]["role"] == "teacher"
    torn = {n: v for n, v in silent.items() if "fc2" not in n}
    assert shop("import", saved(tmp_path / "torn.pt", torn), "--model", "teacher").code == 1


# ---- manners ----


def test_a_dry_run_tells_the_same_and_writes_nothing(shop, workspace, tmp_path):
    file = saved(tmp_path / "w.ckpt", published_names(tiny_network("student")))
    before = sorted(str(path) for path in workspace.rglob("*"))
    plan = shop("import", file, "--dry-run", "--json").must().json
    assert sorted(str(path) for path in workspace.rglob("*")) == before
    assert shop("import", file, "--json").must().json == plan


def test_importing_again_replaces_the_entry(shop, workspace, tmp_path):
    for seed in (0, 5):
        shop("import", saved(tmp_path / "w.ckpt", published_names(tiny_network("student", seed=seed)))).must()
    entry = workspace / "models/demo-tiny/student-rgb"
    assert same(network_of(entry), dict(tiny_network("student", seed=5).state_dict()))
    assert sorted(path.name for path in entry.parent.iterdir()) == [".lock", "student-rgb"]


@pytest.mark.parametrize(("words", "what"), [((), "no file is named"), (("w.pt",), "no data set is named")])
def test_what_must_be_named(words, what, gkd):
    named = () if words else ("--dataset", "demo-tiny")
    outcome = gkd("import", *words, *named, "--json")
    assert outcome.code == 2
    assert outcome.json["error"]["what"] == what
    assert outcome.json["command"] == "import"


def test_other_splits_and_recipes_are_never_chosen(shop, workspace, tmp_path):
    file = saved(tmp_path / "w.ckpt", published_names(tiny_network("student")))
    shop("import", file, "--set", "recipe=official").must()
    refused = shop("evaluate")
    assert refused.code == 1
    assert "models/demo-tiny/student-rgb is of recipe official" in refused.err
    assert shop("evaluate", "--set", "recipe=official", "--dry-run").must()
    shop("import", file, "--split", 2).must()
    assert (workspace / "models/demo-tiny/student-rgb-split2/run.json").is_file()
    assert shop("evaluate").code == 1


# ---- without store, and without import ----


def test_class_names_may_come_later(tiny, gkd, tmp_path):
    """Imported before `gkd prepare`: the entry knows how many classes there are, the store their names."""
    root = tmp_path / "root"
    file = saved(tmp_path / "w.ckpt", published_names(tiny_network("student")))
    words = ("--root", root)
    gkd("import", file, "--dataset", "demo-tiny", *words).must()
    record = json.loads((root / "models/demo-tiny/student-rgb/run.json").read_text())
    assert (record["classes"], record["class_count"]) == (None, 12)
    borrow(tiny, root)
    scored = gkd("evaluate", "demo-tiny", *words, "--json").must().json["result"]
    assert len(scored["per_class"]) == 12
    exported = gkd("export", "demo-tiny", *words, "--json").must().json["result"]
    card = json.loads((Path(exported["folder"]) / "card.json").read_text())
    assert len(card["classes"]) == 12
    more = saved(tmp_path / "more.ckpt", published_names(tiny_network("student", classes=13)))
    other = tmp_path / "other"
    gkd("import", more, "--dataset", "demo-tiny", "--root", other).must()
    borrow(tiny, other)
    refused = gkd("evaluate", "demo-tiny", "--root", other)
    assert "student-rgb is of other classes than the store's" in refused.err


def test_a_published_file_lying_in_models_is_found_without_import(shop, workspace, tmp_path):
    folder = workspace / "models/demo-tiny"
    folder.mkdir(parents=True)
    file = saved(folder / "demo-tiny-rgb.ckpt", published_names(tiny_network("student")))
    plan = shop("evaluate", "--dry-run", "--json").must()
    assert plan.json["run"] == str(folder / "student-rgb")
    assert [path.name for path in folder.iterdir()] == [file.name]
    wrong = shop("evaluate", "--model", "teacher")
    assert wrong.code == 1
    assert "the backbone in these weights is top-i3d, not i3d (teacher)" in wrong.err
    found = shop("evaluate").must()
    assert f"{file} was imported as {folder / 'student-rgb'}" in found.err
    assert "imported as" not in shop("evaluate").must().err
    assert shop("evaluate", "--split", 2).code == 1


def test_the_command_as_a_process(workspace, tmp_path):
    """Nothing but safe loading, in a process of its own; the table lists what did not fit."""
    file = saved(tmp_path / "w.ckpt", published_names(tiny_network("student", classes=3)))
    outcome = run_gkd("import", file, "--dataset", "demo-tiny", "--root", workspace).must()
    assert "did not fit" in outcome.out
    assert "wrong shape" in outcome.out
    assert "12x64x1x1x1" in outcome.out


def test_a_file_of_torchvision_is_imported_as_first_weights(
    workspace: Path, gkd: Callable[..., Any], tmp_path: Path
) -> None:
    """Its trunk fits; the unit to the tap, attention and classifier are ours and stay fresh."""
    torch.manual_seed(0)
    torch.save(torchvision.models.video.r3d_18(weights=None).state_dict(), tmp_path / "r3d_18.pth")
    kind = ("--set", "model.teacher=r3d_18")
    words = ("import", tmp_path / "r3d_18.pth", "--dataset", "demo-tiny", "--root", workspace, "--json")
    result = gkd(*words, *kind).must().json["result"]
    assert (result["complete"], result["backbone"], result["names"]) == (False, "r3d_18", "torchvision")
    assert {
        row["tensor"].partition(".")[0] for row in result["did_not_fit"] if row["why"] == "unexpected"
    } == {"fc"}
    other = gkd(*words)
    assert other.code == 1
    assert "the backbone in these weights is r3d_18, not i3d (teacher)" in other.err
    train = (
        "pretrain-attention",
        "demo-tiny",
        "--root",
        workspace,
        *kind,
        "--max-steps",
        1,
        "--batch-size",
        2,
    )
    outcome = gkd(*train, "--backbone", result["entry"])
    assert outcome.must().code == 0
    assert "backbone from" in outcome.err


def test_our_own_export_of_a_torchvision_student_is_whole(
    workspace: Path, gkd: Callable[..., Any], tmp_path: Path
) -> None:
    kinds = ("--set", "model.teacher=mc3_18", "--set", "model.student=mc3_18", "--set", "train.threads=2")
    common = ("demo-tiny", "--root", workspace, *kinds)
    plain = ("--set", "distill.method=none", "--init", "scratch", "--batch-size", 16, "--epochs", 1)
    gkd("distill", *common, *plain).must()
    gkd("export", *common, "--out", tmp_path / "out").must()
    shutil.rmtree(workspace / "runs")
    words = ("import", tmp_path / "out" / "model.safetensors", "--dataset", "demo-tiny", "--root", workspace)
    result = gkd(*words, *kinds, "--model", "student", "--json").must().json["result"]
    assert (result["complete"], result["backbone"], result["names"]) == (True, "mc3_18", "gkd")
    assert gkd("evaluate", *common, "--json").must().json["run"].endswith("models/demo-tiny/student-rgb")
