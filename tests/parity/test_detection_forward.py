"""The forward pass of the detector against the recorded one (golden 03)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gkdcli.models.detector import Boundaries, Detections, Detector, attended
from tests.parity import golden

NETWORKS = {
    "student": ("top-i3d", "det_student_in3", 3, ""),
    "teacher": ("i3d", "det_teacher_in3", 3, "teacher:"),
    "student_flow": ("top-i3d", "det_student_in2", 2, ""),
}
# a rounded boundary may flip and change single rows of what the proposal branches say
PROPOSALS = ("prop_loc", "prop_conf", "center")


def rows_off(figures: dict, name: str, value: Tensor) -> int:
    """Priors whose figures differ by more than 1e-3 of the record's root mean square."""
    wanted = torch.from_numpy(figures[name])
    far = (value - wanted).abs() > 1e-3 * wanted.square().mean().sqrt()
    return int(far.any(dim=2).sum())


@golden.needs_golden
@pytest.mark.heavy
@pytest.mark.parametrize("name", NETWORKS)
def test_detector(name: str) -> None:
    """Taps, attention, and all outputs, of attended and of plain features."""
    kind, model, channels, salt = NETWORKS[name]
    figures = golden.recorded("03_detection_forward")
    network = Detector(kind, 20, length=256, crop=96, channels=channels, recipe="official").eval()
    golden.fill(network, golden.shapes(model), salt)
    clip = golden.script("make_inputs").detection_clip(int(figures["input_seed"]) + channels, 1, channels)
    found = golden.Findings(f"03 {name}")
    with torch.inference_mode():
        features = network.features(torch.from_numpy(clip))
        maps = network.attend(features)
        focused = attended(features, maps, "official")
        outputs = {"raw": network.head(features), "attended": network.head(focused)}
        as_evaluated = network(torch.from_numpy(clip))
    for tap, short in (("Mixed_5c", "5c"), ("Mixed_4f", "4f")):
        for what, value in (
            (f"feat/{tap}", features[tap]),
            (f"att{short}", maps[tap]),
            (f"attended_{tap}", focused[tap]),
        ):
            found.add("features", what, golden.error(figures, f"{name}/{what}", value), 1e-3)
    for kind_of, (detections, boundaries) in outputs.items():
        compare(found, figures, f"{name}/{kind_of}", detections, boundaries)
    assert all(torch.equal(a, b) for a, b in zip(as_evaluated, outputs["attended"][0], strict=True))
    found.settle()


def compare(
    found: golden.Findings, figures: dict, prefix: str, detections: Detections, boundaries: Boundaries
) -> None:
    for key, value in detections._asdict().items():
        if key in PROPOSALS:
            found.add("rows of proposals that differ", key, rows_off(figures, f"{prefix}/{key}", value), 3)
        else:
            found.add("coarse", f"{prefix}/{key}", golden.error(figures, f"{prefix}/{key}", value), 1e-3)
    for part, names in (
        (boundaries.frame, ("start", "end")),
        (boundaries.location, ("start_loc_prop", "end_loc_prop")),
        (boundaries.classification, ("start_conf_prop", "end_conf_prop")),
    ):
        for key, half in zip(names, part.chunk(2, dim=1), strict=True):
            value = half.transpose(1, 2)  # recorded as (B, T, C)
            found.add("boundaries", key, golden.error(figures, f"{prefix}/{key}", value), 1e-3)
