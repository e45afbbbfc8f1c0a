"""`model.attention = "lite"` from the command line: both tasks, of the student alone or of both networks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from gkdcli.runs import Run
from gkdcli.tasks.trained import rebuild
from tests.conftest import Outcome, borrow
from tests.published import published_names, tiny_network

Gkd = Callable[..., Outcome]
LITE = ("--set", "model.attention=lite")
TENSORS = 12  # of one lite attention: six layers with weight and bias


def with_runs(source: Path, root: Path, preset: str, *kinds: str) -> Path:
    """A root of one's own that sees the videos, stores and some runs of another."""
    borrow(source, root)
    (root / "runs" / preset).mkdir(parents=True)
    for kind in kinds:
        shutil.copytree(source / "runs" / preset / kind, root / "runs" / preset / kind)
    return root


@pytest.fixture
def root(tiny_trained: Path, tmp_path: Path) -> Path:
    """The store and the official teacher of `demo-tiny`."""
    return with_runs(tiny_trained, tmp_path / "root", "demo-tiny", "pretrain-attention-rgb")


def run_of(root: Path, preset: str, kind: str) -> Run:
    return Run(max((root / "runs" / preset / kind).iterdir()))


@pytest.mark.parametrize("task", ["recognition", pytest.param("detection", marks=pytest.mark.slow)])
def test_a_lite_student_of_an_official_teacher_goes_the_whole_line(
    task: str, gkd: Gkd, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    preset = "demo-tiny" if task == "recognition" else "demo-detection-tiny"
    source = request.getfixturevalue("tiny_trained" if task == "recognition" else "tiny_detection")
    root = with_runs(source, tmp_path / "root", preset, "pretrain-attention-rgb")
    here, taps = (preset, "--root", root), 1 if task == "recognition" else 2
    began = gkd("distill", *here, *LITE, "--epochs", 1)
    assert began.must().err.count("; its attention is official, the student's lite\n") == 1
    fresh = f", {TENSORS * taps} left fresh: attention.Mixed_5c.narrow.weight, "
    assert fresh in began.err
    assert "; the lite attention starts anew, theirs is official, " in began.err

    run = run_of(root, preset, "distill-rgb")
    assert run.settings.model.attention == "lite"
    network = rebuild(run)  # its page is enough
    parts = sum(value.numel() for value in network.attention.parameters())
    assert run.record["parameters"] == sum(value.numel() for value in network.parameters())
    assert parts < 0.1 * run.record["parameters"]
    logged = json.loads(run.metrics.read_text().splitlines()[0])
    assert "attention_distillation.Mixed_5c" in logged
    result = gkd("evaluate", *here, "--json").must().json["result"]
    assert result["parameters"] == run.record["parameters"]

    words = ("export", *here, "--format", "onnx", "--format", "safetensors", "--json")
    exported = gkd(*words).must().json["result"]
    assert exported["onnx"]["largest_relative_difference"] <= exported["onnx"]["accepted_difference"]
    folder = Path(exported["folder"])
    assert json.loads((folder / "card.json").read_text())["attention"] == "lite"
    assert "Of the attended feature (lite attention):" in (folder / "README.md").read_text()
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[2] == run.settings.clips.length

    # what was exported comes back under a page that says otherwise
    told = gkd("import", folder / "model.safetensors", "--dataset", preset, "--root", root, "--json")
    assert told.must().json["result"]["attention"] == "lite"
    entry = Run(root / "models" / preset / "student-rgb")
    assert entry.settings.model.attention == "lite"
    assert rebuild(entry).state_dict().keys() == network.state_dict().keys()


def test_teacher_and_student_may_both_be_lite_and_then_all_is_taken(
    gkd: Gkd, tiny: Path, tmp_path: Path
) -> None:
    here = ("demo-tiny", "--root", borrow(tiny, tmp_path / "root"), *LITE, "--epochs", 1)
    plan = gkd("pretrain-attention", *here, "--dry-run", "--json").must().json["result"]
    assert plan["attention"] == "lite"
    done = gkd("pretrain-attention", *here, "--json").must().json["result"]
    assert done["parameters"] == plan["parameters"]
    began = gkd("distill", *here, "--max-steps", 1).must()
    assert "tensors from the teacher, " in began.err
    assert "attention is" not in began.err
    assert "fresh" not in began.err


def test_a_run_goes_on_with_its_own_kind_alone(gkd: Gkd, root: Path) -> None:
    here = ("distill", "demo-tiny", "--root", root)
    gkd(*here, *LITE, "--max-steps", 1).must()
    refused = gkd(*here, "--resume", "--set", "model.attention=official")
    assert refused.code == 2
    assert "cannot resume with different settings: model.attention lite -> official" in refused.err
    gkd(*here, "--resume", "--max-steps", 2).must()  # the page says official, the run lite
    assert run_of(root, "demo-tiny", "distill-rgb").settings.model.attention == "lite"


def test_weights_of_the_other_kind_are_refused_and_the_setting_is_named(gkd: Gkd, root: Path) -> None:
    """A run whose page was changed by hand."""
    run = run_of(root, "demo-tiny", "pretrain-attention-rgb")
    page = run.folder / "settings.toml"
    page.write_text(page.read_text().replace('attention = "official"', 'attention = "lite"'))
    refused = gkd("evaluate", "demo-tiny", "--root", root, "--model", "teacher")
    assert refused.code == 1
    assert f"these weights do not fit the rgb network: 0 tensors have another shape, {TENSORS} missing" in (
        refused.err
    )
    assert "hint: these weights have the official attention, the network the lite one: model.attention" in (
        refused.err
    )


def test_a_run_of_before_the_setting_is_official(gkd: Gkd, root: Path) -> None:
    run = run_of(root, "demo-tiny", "pretrain-attention-rgb")
    page = run.folder / "settings.toml"
    assert 'attention = "official"\n' in page.read_text()
    page.write_text(page.read_text().replace('attention = "official"\n', ""))
    assert gkd("evaluate", "demo-tiny", "--root", root, "--model", "teacher").code == 0


def test_published_weights_are_official_whatever_the_page_says(gkd: Gkd, root: Path, tmp_path: Path) -> None:
    file = tmp_path / "w.ckpt"
    torch.save(published_names(tiny_network("teacher")), file)
    page = tmp_path / "mine.toml"
    page.write_text(
        Path("presets/demo-tiny.toml").read_text().replace("[model]", '[model]\nattention = "lite"')
    )
    found = gkd("import", file, "--dataset", page, "--root", root, "--json").must().json["result"]
    assert (found["complete"], found["attention"]) == (True, "official")
    assert Run(root / "models/demo-tiny/teacher-rgb").settings.model.attention == "official"
    refused = gkd("import", file, "--dataset", "demo-tiny", "--root", root, *LITE)
    assert refused.code == 1
    assert "these weights have the official attention, but model.attention is lite" in refused.err
    assert "--set model.attention=official" in refused.err


def test_first_weights_of_the_other_kind_leave_the_attention_fresh_and_say_so(
    gkd: Gkd, root: Path, tmp_path: Path
) -> None:
    run = run_of(root, "demo-tiny", "pretrain-attention-rgb")
    file = tmp_path / "teacher.safetensors"
    save_file({n: v for n, v in load_file(run.weights).items() if n.startswith("network.")}, file)
    words = ("pretrain-attention", "demo-tiny", "--root", root, *LITE, "--init", file, "--max-steps", 1)
    began: Any = gkd(*words).must()
    assert f"{TENSORS} left fresh" in began.err
    assert "; the lite attention starts anew, theirs is official" in began.err
