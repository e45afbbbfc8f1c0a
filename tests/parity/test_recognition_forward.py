"""Forward passes of the recognition networks and their CVAEs at full size (golden 02 and 04)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gkdcli.losses.distill import cvae_loss
from gkdcli.models.attention import attend
from gkdcli.models.cvae import CVAE
from gkdcli.models.recognizer import Recognizer
from tests.parity.golden import FOLDER, error, fill, needs_golden, script, shapes

pytestmark = [needs_golden, pytest.mark.heavy]


def network(kind: str, channels: int, classes: int) -> Recognizer:
    who, salt = ("teacher", "teacher:") if kind == "i3d" else ("student", "")
    model = Recognizer(kind, classes, length=64, crop=224, channels=channels)
    fill(model, shapes(f"rec_{who}_in{channels}_cls{classes}"), salt)
    return model.eval()


@pytest.mark.parametrize(
    ("entry", "kind", "channels", "classes", "batch"),
    [
        ("student", "top-i3d", 3, 101, 1),
        ("teacher", "i3d", 3, 101, 1),
        ("student_flow51", "top-i3d", 2, 51, 1),
        ("student_batch2", "top-i3d", 3, 101, 2),
        ("student_bnbatch", "top-i3d", 3, 101, 1),
        ("teacher_bnbatch", "i3d", 3, 101, 1),
    ],
)
def test_forward(entry, kind, channels, classes, batch, record_property):
    figures = dict(np.load(FOLDER / "02_recognition_forward.npz"))
    clip = script("make_inputs").recognition_clip(int(figures["input_seed"]) + channels, batch, channels)
    model = network(kind, channels, classes).train("bnbatch" in entry)
    found = {}
    with torch.no_grad():
        for name, feature in model.backbone.endpoints(torch.from_numpy(clip)):
            found[f"feat/{name}"] = error(figures, f"{entry}/feat/{name}", feature)
        attention = model.attend({"Mixed_5c": feature})["Mixed_5c"]
        attended = attend(feature, attention, over="batch")
        for name, value in {
            "att5c": attention,
            "att5c/full_first_64_channels": attention[:, :64],
            "attended_Mixed_5c": attended,
            "logits_attended": model.logits(attended),
            "logits_unattended": model.logits(feature),
        }.items():
            found[name] = error(figures, f"{entry}/{name}", value)
        if batch == 2:
            alone = model.logits(attend(feature, attention, over="sample"))
            found["each_alone"] = error(figures, f"{entry}/logits_attended_each_alone", alone)
    after = {name: value for name, value in figures.items() if name.startswith(f"{entry}/after/")}
    assert bool(after) == ("bnbatch" in entry)
    state = model.state_dict()
    for name, wanted in after.items():
        key = name.split("/after/")[1].removesuffix("/sample")
        if key.rsplit("/", 1)[-1] in ("shape", "mean", "std", "l2"):
            continue
        ours = state["backbone." + key.removeprefix("backbone._model.")].numpy().reshape(-1)[: wanted.size]
        scale = max(float(np.sqrt(np.mean(np.square(wanted, dtype=np.float64)))), 1e-12)
        found[name] = float(np.abs(ours - wanted.reshape(-1)).max() / scale)
    worst = max(found, key=found.__getitem__)
    record_property("largest_error", f"{worst} {found[worst]:.1e}")
    print(f"{entry}: largest error {found[worst]:.1e} of RMS, at {worst}")
    assert found[worst] < (1e-3 if "bnbatch" in entry else 5e-4), worst


@pytest.mark.parametrize(
    ("who", "channels"), [("student", 1024), ("teacher", 1024), ("student", 832), ("teacher", 832)]
)
def test_cvae(who, channels):
    figures = dict(np.load(FOLDER / "04_cvae_rec.npz"))
    inputs, entry, seed = script("make_inputs"), f"{who}/{channels}", int(figures["input_seed"]) + channels
    shape = tuple(int(size) for size in figures[f"{entry}/in_shape"])
    tap = "Mixed_5c" if channels == 1024 else "Mixed_4f"
    official = {
        key: size for key, size in shapes(f"rec_cvae_{who}").items() if ("_832." in key) == (channels == 832)
    }
    holder = torch.nn.ModuleDict({tap: CVAE((shape[1], shape[2], shape[3], shape[4]))})
    fill(holder, official, "teacher:" if who == "teacher" else "")
    model = holder[tap]
    feature = torch.from_numpy(np.maximum(inputs.normal(seed, shape), 0))
    uniform = np.random.default_rng(seed + 1).random((shape[0], channels, shape[2]), dtype=np.float32)
    attention = torch.from_numpy(uniform)
    noise = torch.from_numpy(inputs.normal(seed + 2, figures[f"{entry}/eps_shape"]))
    other = torch.from_numpy(inputs.normal(seed + 3, figures[f"{entry}/inference_eps_shape"]))
    latents = []
    model.decoder.register_forward_pre_hook(lambda _, given: latents.append(given[0]))
    with torch.no_grad():
        result = model(feature, attention, noise)
        terms = cvae_loss(result, feature, attention, kl_weight=0.1)
        found = {
            name: error(figures, f"{entry}/{name}", value)
            for name, value in {
                "means": result.mean,
                "log_var": result.log_var,
                "z": latents[0],
                "recon": result.feature,
                "inference_recon": model.generate(attention, other),
                "loss_cvae": terms.reconstruction + terms.kl,
                "loss_mse_part": terms.reconstruction,
            }.items()
        }
    worst = max(found, key=found.__getitem__)
    print(f"{entry}: largest error {found[worst]:.1e} of RMS, at {worst}")
    assert found[worst] < 1e-5, worst
