"""Weights: files that are refused, loading by name and shape, a student that starts from its teacher."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from gkdcli.errors import GkdError
from gkdcli.models.foreign import load_backbone
from gkdcli.models.i3d import I3D
from gkdcli.models.recognizer import Recognizer
from gkdcli.models.weights import (
    fit,
    init_student,
    load_metadata,
    load_tensors,
    require_fit,
    save_tensors,
)


def recognizer(kind: str = "i3d", classes: int = 4, **options) -> Recognizer:
    return Recognizer(kind, classes, **{"length": 16, "crop": 32, "width": 0.0625, **options})


def public_file(path: Path, classes: int, prefix: str = "") -> dict[str, torch.Tensor]:
    """A file as they circulate: no counters, classifier called logits.conv3d."""
    torch.manual_seed(7)
    state = {k: v for k, v in I3D("i3d", width=0.0625).state_dict().items() if "num_batches" not in k}
    width = recognizer().classifier.weight.shape[1]
    state["logits.conv3d.weight"] = torch.randn(classes, width, 1, 1, 1)
    state["logits.conv3d.bias"] = torch.randn(classes)
    torch.save({prefix + k: v for k, v in state.items()}, path)
    return state


def test_safetensors_round_trip_with_metadata(tmp_path):
    path = tmp_path / "deep" / "w.safetensors"
    tensors = {k: v for k, v in recognizer().state_dict().items()}
    save_tensors(path, tensors, {"kind": "i3d"})
    back = load_tensors(path)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[k], tensors[k]) for k in tensors)
    assert load_metadata(path) == {"kind": "i3d"}
    assert [p.name for p in path.parent.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize("zipped", [True, False])
def test_plain_state_dicts_of_both_pytorch_formats_are_read(tmp_path, zipped):
    path = tmp_path / "w.pt"
    torch.save({"a": torch.arange(3)}, path, _use_new_zipfile_serialization=zipped)
    assert torch.equal(load_tensors(path)["a"], torch.arange(3))


class Trap:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("how", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_python_objects_are_refused_and_never_run(tmp_path, how):
    path, sprung = tmp_path / "w.pt", tmp_path / "sprung"
    how({"a": Trap(sprung)}, path)
    with pytest.raises(GkdError) as caught:
        load_tensors(path)
    assert "weights file" in caught.value.what
    assert caught.value.where == str(path)
    assert not sprung.exists()


def test_a_saved_model_object_is_named_as_such(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pt")
    with pytest.raises(GkdError, match="Python objects") as caught:
        load_tensors(tmp_path / "w.pt")
    assert "state_dict" in caught.value.hint


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello world\n", b"\x80\x02", b"PK\x03\x04 torn"])
def test_damaged_files_are_refused_with_a_hint(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(GkdError, match="weights file") as caught:
        load_tensors(tmp_path / name)
    assert "again" in caught.value.hint


@pytest.mark.parametrize("legacy", [True, False])
def test_truncated_downloads_are_refused(tmp_path, legacy):
    path = tmp_path / "w.pt"
    torch.save({"a": torch.zeros(1000)}, path, _use_new_zipfile_serialization=not legacy)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(GkdError, match="damaged"):
        load_tensors(path)


@pytest.mark.parametrize(
    ("content", "said"), [([torch.zeros(1)], "holds a list"), ({"state_dict": {}}, "`state_dict` is a dict")]
)
def test_other_contents_are_refused(tmp_path, content, said):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(GkdError, match=said):
        load_tensors(tmp_path / "w.pt")


def test_absent_files_are_named(tmp_path):
    with pytest.raises(GkdError, match="no weights file"):
        load_tensors(tmp_path / "none.pt")


def test_fit_goes_by_name_and_shape_and_reports_the_rest():
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 3), "b": torch.nn.Linear(2, 3)})
    before = module["b"].weight.clone()
    tensors = {
        "net.b.bias": torch.full((3,), 5.0),
        "net.a.weight": torch.ones(3, 2),
        "net.b.weight": torch.ones(3, 4),
        "net.c": torch.ones(1),
        "other.x": torch.ones(1),
    }
    result = fit(module, tensors, prefix="net.")
    assert sorted(result.loaded) == ["a.weight", "b.bias"]
    assert result.missing == ["a.bias"]
    assert result.unexpected == ["c"]
    assert result.wrong_shape == [("b.weight", (3, 4), (3, 2))]
    assert torch.equal(module["b"].weight, before)
    assert torch.equal(module["b"].bias, torch.full((3,), 5.0))


def test_fit_keeps_the_memory_layout_of_the_network():
    model = recognizer()
    strides = {k: v.stride() for k, v in model.state_dict().items()}
    fit(model, {k: v.contiguous() for k, v in recognizer().state_dict().items()})
    assert {k: v.stride() for k, v in model.state_dict().items()} == strides


def test_an_rgb_checkpoint_offered_to_a_flow_network_is_recognised():
    result = fit(recognizer("top-i3d", channels=2), recognizer("top-i3d").state_dict())
    with pytest.raises(GkdError) as caught:
        require_fit(result, "student.safetensors", "flow student")
    assert caught.value.what == (
        "these weights do not fit the flow student: 1 tensor has another shape, 0 missing, 0 unexpected"
    )
    assert caught.value.where == (
        "student.safetensors, backbone.Conv3d_1a_7x7.conv3d.weight is 4x3x1x7x7, the model wants 4x2x1x7x7"
    )
    assert caught.value.hint == "three input channels mean an rgb checkpoint; try `--modality rgb`"


def test_require_fit_names_a_missing_or_surplus_tensor():
    state = recognizer().state_dict()
    bias = state.pop("classifier.bias")
    with pytest.raises(GkdError) as caught:
        require_fit(fit(recognizer(), state), "f")
    assert caught.value.where == "f, classifier.bias is not in the file"
    with pytest.raises(GkdError) as caught:
        require_fit(fit(recognizer(), {**state, "classifier.bias": bias, "x": bias}), "f")
    assert caught.value.where == "f, x is not in the model"
    require_fit(fit(recognizer(), {**state, "classifier.bias": bias}), "f")


@pytest.mark.parametrize("prefix", ["", "module.", "backbone._model."])
def test_public_backbones_load_with_and_without_prefix(tmp_path, prefix):
    state = public_file(tmp_path / "rgb_imagenet.pt", classes=4, prefix=prefix)
    model = recognizer()
    result = load_backbone(model, tmp_path / "rgb_imagenet.pt")
    assert result.complete
    assert torch.equal(model.backbone.Mixed_5c.b2b.conv3d.weight, state["Mixed_5c.b2b.conv3d.weight"])
    assert torch.equal(model.backbone.Mixed_3b.b0.bn.running_var, state["Mixed_3b.b0.bn.running_var"])
    assert torch.equal(model.classifier.weight, state["logits.conv3d.weight"])


def test_other_class_counts_keep_the_fresh_classifier(tmp_path):
    public_file(tmp_path / "w.pt", classes=40)
    model = recognizer()
    fresh = model.classifier.weight.clone()
    result = load_backbone(model, tmp_path / "w.pt")
    assert torch.equal(model.classifier.weight, fresh)
    assert [name for name, _, _ in result.wrong_shape] == ["classifier.weight", "classifier.bias"]


def test_backbones_that_do_not_fit_are_refused(tmp_path):
    public_file(tmp_path / "w.pt", classes=4)
    with pytest.raises(GkdError, match="do not fit the backbone: 10 tensors have another shape"):
        load_backbone(recognizer("top-i3d"), tmp_path / "w.pt")
    torch.save({"layer1.weight": torch.zeros(1)}, tmp_path / "resnet.pt")
    with pytest.raises(GkdError, match="nothing in these weights is an I3D") as caught:
        load_backbone(recognizer(), tmp_path / "resnet.pt")
    assert "layer1.weight" in caught.value.where


def test_a_student_starts_from_its_teacher_with_ten_kernels_summed_over_time():
    teacher, student = recognizer("i3d"), recognizer("top-i3d")
    result = init_student(student, teacher)
    assert result.complete
    assert len(result.deflated) == 10
    assert set(result.deflated) < set(result.loaded)
    assert torch.equal(student.classifier.weight, teacher.classifier.weight)
    assert torch.equal(
        student.attention["Mixed_5c"].expand.weight, teacher.attention["Mixed_5c"].expand.weight
    )
    torch.testing.assert_close(
        student.backbone.Conv3d_1a_7x7.conv3d.weight,
        teacher.backbone.Conv3d_1a_7x7.conv3d.weight.sum(2, True),
    )


def test_a_deflated_student_equals_its_teacher_where_the_clip_stands_still():
    """Away from both ends in time, where the teacher's kernels see zeros that the student's do not."""
    torch.manual_seed(0)
    teacher = recognizer("i3d", length=64)
    teacher.train()(torch.rand(2, 3, 64, 32, 32))  # moves the running statistics too
    student = recognizer("top-i3d", length=64)
    init_student(student, teacher)
    still = torch.rand(1, 3, 1, 32, 32).expand(-1, -1, 64, -1, -1)
    with torch.no_grad():
        ours = dict(student.eval().backbone.endpoints(still))
        theirs = dict(teacher.eval().backbone.endpoints(still))
    # Up to Mixed_4c the teacher's outermost kernel elements lie 19 frames away: 5 steps of 4 frames.
    torch.testing.assert_close(
        ours["Mixed_4c"][:, :, 5:11], theirs["Mixed_4c"][:, :, 5:11], rtol=1e-4, atol=1e-6
    )
    assert not torch.allclose(ours["Mixed_4c"][:, :, 0], theirs["Mixed_4c"][:, :, 0], rtol=1e-4)
    assert ours["Mixed_4c"].abs().max() > 1e-3


def test_kernels_longer_than_the_teachers_stay_fresh_and_are_listed():
    teacher, student = recognizer("top-i3d", attention=None), recognizer("i3d")
    fresh = student.backbone.Conv3d_1a_7x7.conv3d.weight.clone()
    result = init_student(student, teacher)
    assert len(result.wrong_shape) == 10
    assert torch.equal(student.backbone.Conv3d_1a_7x7.conv3d.weight, fresh)
    assert all(name.startswith("attention.") for name in result.missing)
    assert result.unexpected == []
