"""Every published checkpoint is recognised by its names and shapes, at full size (golden 01)."""

from __future__ import annotations

import json

import pytest
import torch

from gkdcli.models.detector import Detector
from gkdcli.models.foreign import backbone_kind, open_weights
from gkdcli.models.network import build_cvae
from gkdcli.models.recognizer import Recognizer
from tests.parity.golden import FOLDER, needs_golden, shapes

pytestmark = needs_golden
MODELS = sorted(json.loads((FOLDER / "01_state_dicts.json").read_text())) if FOLDER.is_dir() else []


def write(path, model):
    """The recorded names and shapes; every tensor is one stored zero, so the file is small."""
    torch.save({key: torch.zeros(()).expand(shape) for key, shape in shapes(model).items()}, path)
    return path


def expected(model: str) -> tuple[bool, bool, str | None]:
    """Whether there is a network, a CVAE, and of which task."""
    cvae = "_cvae_" in model
    return not cvae, cvae, "detection" if model.startswith("det_") else "recognition"


@pytest.mark.parametrize("model", MODELS)
def test_what_a_file_holds(model, tmp_path):
    contents = open_weights(write(tmp_path / "w.ckpt", model))
    assert (contents.network is not None, contents.generators is not None, contents.task) == expected(model)
    if contents.network is not None:
        assert backbone_kind(contents.network) == (
            "top-i3d" if "student" in model or "topi3d" in model else "i3d"
        )
        origin = "public I3D" if model.startswith("backbone_") else "published"
        assert contents.network.origin == origin


@pytest.mark.parametrize("model", [name for name in MODELS if name.startswith("rec_")])
def test_each_tensor_of_recognition_finds_its_place(model, tmp_path):
    contents = open_weights(write(tmp_path / "w.ckpt", model))
    who = "teacher" if "teacher" in model else "student"
    channels, classes = (2 if "_in2" in model else 3), (int(model.split("cls")[1]) if "cls" in model else 101)
    with torch.device("meta"):
        network = Recognizer(
            "i3d" if who == "teacher" else "top-i3d", classes, length=64, crop=224, channels=channels
        )
        generators = build_cvae(network)
    if contents.network is not None:
        assert contents.network.fit(network).complete
    else:
        fitted = contents.generators.fit(generators)
        assert len(fitted.loaded) == 20
        assert fitted.missing == fitted.wrong_shape == []
        assert len(fitted.unexpected) == 20  # the branch that recognition never uses (FINDINGS 15)
        assert all(name.startswith("Mixed_4f.") for name in fitted.unexpected)


@pytest.mark.parametrize("model", [name for name in MODELS if name.startswith("det_")])
def test_each_tensor_of_detection_finds_its_place(model, tmp_path):
    contents = open_weights(write(tmp_path / "w.ckpt", model))
    kind = "i3d" if "teacher" in model else "top-i3d"
    with torch.device("meta"):
        network = Detector(kind, 20, length=256, crop=96, channels=2 if "_in2" in model else 3)
        generators = build_cvae(network)
    found, module = (contents.network, network) if contents.network else (contents.generators, generators)
    assert found.fit(module).complete
