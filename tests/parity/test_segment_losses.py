"""The five losses of the detector's head and all their gradients against the recorded ones (golden 05)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gkdcli.losses.segments import HeadOutputs, SegmentLosses, Targets, background_loss, segment_losses
from tests.parity.golden import needs_golden, recorded

pytestmark = needs_golden
CASES = ("c0_b1_pos", "c1_b3_pos", "c2_b1_background", "c3_b3_mixed", "c4_b1_outside")
TERMS = dict(zip(SegmentLosses._fields, ("loc", "conf", "prop_loc", "prop_conf", "center"), strict=True))


def load(case: str) -> tuple[dict[str, np.ndarray], HeadOutputs, Targets, torch.Tensor, int]:
    """Figures of a case, outputs that require gradients, padded targets, priors and length."""
    everything = recorded("05_multisegment_loss")
    figures = {name.removeprefix(f"{case}/"): value for name, value in everything.items() if case in name}
    outputs = HeadOutputs(*(torch.from_numpy(figures[name]).requires_grad_() for name in HeadOutputs._fields))
    batch, frames = len(outputs.loc), int(everything["clip_length"])
    clips = [torch.from_numpy(figures[f"target{place}"]) for place in range(batch)]
    padded = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=-1.0)
    targets = Targets(padded[:, :, :2] * frames, padded[:, :, 2].long().clamp(min=0), padded[:, :, 2] >= 0)
    return figures, outputs, targets, torch.from_numpy(everything["priors"])[:, 0], frames


def official(case: str) -> tuple[dict[str, np.ndarray], HeadOutputs, SegmentLosses]:
    figures, outputs, targets, priors, frames = load(case)
    threshold = float(recorded("05_multisegment_loss")["overlap_thresh"])
    return figures, outputs, segment_losses(outputs, targets, priors, frames, threshold, "official")


@pytest.mark.parametrize("case", CASES)
def test_losses_and_the_gradient_of_their_sum(case):
    figures, outputs, losses = official(case)
    for term, name in TERMS.items():
        assert getattr(losses, term).item() == pytest.approx(float(figures[f"loss_{name}"]), rel=1e-5), term
    torch.stack(losses).sum().backward()
    for name, value in outputs._asdict().items():
        wanted = torch.from_numpy(figures[f"grad_sum_wrt_{name}"])
        scale = float(wanted.abs().max())
        torch.testing.assert_close(value.grad, wanted, rtol=1e-5, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_of_each_loss_by_itself(case):
    """Every pair of loss and output: the recorded norm, or zero where none is recorded."""
    figures, outputs, losses = official(case)
    compared = 0
    for term, name in TERMS.items():
        gradients = torch.autograd.grad(
            getattr(losses, term), outputs, retain_graph=True, materialize_grads=True
        )
        for output, gradient in zip(outputs._fields, gradients, strict=True):
            wanted = float(figures.get(f"grad_loss_{name}_wrt_{output}_l2", 0.0))
            assert float(gradient.norm()) == pytest.approx(wanted, rel=1e-5, abs=1e-12), (term, output)
            compared += wanted > 0
    assert compared == (7 if "background" not in case and "outside" not in case else 2)


def test_corrected_differs_by_the_detached_target_only():
    """FINDINGS 21: the quality loss sends nothing into the distances; everything else stays."""
    _, outputs, targets, priors, frames = load("c1_b3_pos")
    corrected, published = (
        segment_losses(outputs, targets, priors, frames, 0.5, recipe) for recipe in ("corrected", "official")
    )
    assert torch.equal(torch.stack(corrected), torch.stack(published))
    for losses, reached in ((corrected, {"center"}), (published, {"center", "loc", "prop_loc"})):
        gradients = torch.autograd.grad(losses.quality, outputs, retain_graph=True, materialize_grads=True)
        moved = {name for name, value in zip(outputs._fields, gradients, strict=True) if value.any()}
        assert moved == reached


@pytest.mark.parametrize("case", ["c2_b1_background", "c4_b1_outside"])
def test_the_background_loss_is_the_class_loss_without_positives(case):
    """FINDINGS 22: wherever the gaps lie; `corrected` divides by clips x priors."""
    figures, outputs, *_ = load(case)
    wanted = float(figures["loss_conf"])
    assert background_loss(outputs.conf, "official").item() == pytest.approx(wanted, rel=1e-5)
    assert background_loss(outputs.conf, "corrected").item() == pytest.approx(wanted / 126, rel=1e-5)


def test_no_recorded_case_is_left_out():
    assert {name.split("/")[0] for name in recorded("05_multisegment_loss") if "/" in name} == set(CASES)
