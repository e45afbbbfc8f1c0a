"""tasks.trained: networks come back from their runs; first weights; teachers that do not fit."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gkdcli.errors import ExitCode, GkdError
from gkdcli.runs import Run
from gkdcli.tasks import recognition
from gkdcli.tasks.trained import (
    chosen_device,
    has_attention,
    rebuild,
    rebuild_generators,
    require_same_clip,
    start_student,
)
from tests.training.jobs import copied, page


@pytest.fixture(scope="module")
def teacher(tiny_trained: Path) -> Run:
    (path,) = tiny_trained.glob("runs/demo-tiny/pretrain-attention-rgb/*")
    return Run(path)


@pytest.fixture(scope="module")
def student(tiny_trained: Path) -> Run:
    (path,) = tiny_trained.glob("runs/demo-tiny/distill-rgb/*")
    return Run(path)


def test_a_run_comes_back_with_its_weights_in_evaluation_mode(teacher, student):
    for run, kind in ((teacher, "i3d"), (student, "top-i3d")):
        network = rebuild(run)
        stored = load_file(run.weights)
        assert network.backbone.kind == kind
        assert not network.training
        assert all(torch.equal(stored[f"network.{name}"], v) for name, v in network.state_dict().items())
        generators = rebuild_generators(run, network)
        assert all(torch.equal(stored[f"generator.{n}"], v) for n, v in generators.state_dict().items())
        assert has_attention(run)
        assert sum(value.numel() for value in network.parameters()) == run.record["parameters"]


def test_best_weights_are_used_where_something_was_held_out(student):
    assert student.weights == student.best
    assert student.record["protocol"]["weights"] == "best"
    assert student.record["protocol"]["held_out_videos"] == 12


def test_weights_of_another_network_are_refused(student, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("run.json", "settings.toml"):
        (folder / name).write_bytes((student.folder / name).read_bytes())
    tensors = load_file(student.weights)
    tensors["network.classifier.weight"] = torch.zeros(13, 64, 1, 1, 1)
    save_file(tensors, folder / "best.safetensors")
    with pytest.raises(GkdError, match="do not fit the rgb network: 1 tensor has another shape"):
        rebuild(Run(folder))
    (folder / "best.safetensors").unlink()
    with pytest.raises(GkdError, match="no weights file"):
        rebuild(Run(folder))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"clips__length": 32}, "clips.length"),
        ({"clips__crop": 64}, "clips.crop"),
        ({"clips__mean": [0.5]}, "clips.mean"),
        ({"clips__std": [0.2]}, "clips.std"),
        ({"model__width": 0.125}, "model.width"),
    ],
)
def test_a_teacher_of_other_clips_is_refused_with_both_values(teacher, change, key):
    require_same_clip(teacher, page())
    with pytest.raises(GkdError, match=f"teacher and student differ in {key}") as caught:
        require_same_clip(teacher, page(**change))
    assert key in caught.value.hint


# ---- first weights ----


@pytest.fixture
def fresh():
    torch.manual_seed(5)
    return recognition.build_network(page(), "student", 12, "rgb")


def test_scratch_changes_nothing(fresh, tmp_path):
    before = copied(fresh)
    assert start_student(fresh, "scratch", None, tmp_path) == "from scratch"
    assert all(torch.equal(before[name], value) for name, value in fresh.state_dict().items())


def test_a_student_starts_from_its_teacher(fresh, teacher, tmp_path):
    network = rebuild(teacher)
    assert start_student(fresh, "teacher", network, tmp_path) == "354 tensors from the teacher"
    theirs = network.state_dict()
    for name, value in fresh.state_dict().items():
        expected = theirs[name]
        if expected.shape != value.shape:  # deflated
            expected = expected.sum(2, keepdim=True)
        assert torch.equal(value, expected), name


def test_a_teacher_cannot_start_from_a_teacher(fresh, tmp_path):
    with pytest.raises(GkdError, match="a teacher cannot") as caught:
        start_student(fresh, "teacher", None, tmp_path)
    assert caught.value.code is ExitCode.USAGE


@pytest.mark.parametrize("relative", [True, False])
def test_a_run_or_a_file_gives_its_weights_also_under_the_root(fresh, student, tiny_trained, relative):
    for path in (student.folder, student.weights):
        name = str(path.relative_to(tiny_trained)) if relative else str(path)
        assert start_student(fresh, name, None, tiny_trained) == f"354 tensors from {student.weights}"
    stored = load_file(student.weights)
    assert all(torch.equal(stored[f"network.{name}"], value) for name, value in fresh.state_dict().items())


def test_a_head_of_other_classes_stays_fresh_and_is_named(student, tmp_path):
    torch.manual_seed(0)
    other = recognition.build_network(page(), "student", 5, "rgb")
    before = other.classifier.weight.clone()
    began = start_student(other, str(student.weights), None, tmp_path)
    assert "2 left fresh: classifier.weight, classifier.bias" in began
    assert torch.equal(other.classifier.weight, before)


def test_a_backbone_that_does_not_fit_is_a_mistake(student, tmp_path):
    wide = recognition.build_network(page(model__width=0.125), "student", 12, "rgb")
    with pytest.raises(GkdError, match="do not fit the network"):
        start_student(wide, str(student.weights), None, tmp_path)
    flow = recognition.build_network(page(), "student", 12, "flow")
    with pytest.raises(GkdError, match="1 tensor has another shape"):
        start_student(flow, str(student.weights), None, tmp_path)


def test_nothing_to_start_from_is_said(fresh, tmp_path):
    with pytest.raises(GkdError, match="nothing to start from at `nowhere`") as caught:
        start_student(fresh, "nowhere", None, tmp_path)
    assert caught.value.code is ExitCode.USAGE


def test_the_device_is_cpu_without_cuda_and_cuda_must_be_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen_device(page()) == torch.device("cpu")
    with pytest.raises(GkdError, match="no usable CUDA device"):
        chosen_device(page(train__device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen_device(page()).type == "cuda"
    assert chosen_device(page(train__device="cpu")).type == "cpu"


AGAIN = """
import resource, torch
from gkdcli.settings import Settings
from gkdcli.tasks.trained import chosen_device
chosen_device(Settings(train={"device": "cpu", "threads": 1}))
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

before = faults()
for _ in range(20):
    torch.ones(2**24)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_memory_of_freed_tensors_is_used_again_without_the_kernel():
    """64 MB are 16384 pages; the first blocks need theirs, not all twenty."""
    done = subprocess.run([sys.executable, "-c", AGAIN], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 5 * 16384
