"""Optimisers: gradient clipping."""

from __future__ import annotations

import pytest
import torch

from gkdcli.training.optim import clip


@pytest.mark.parametrize(("norm", "wanted"), [(0.0, 13.0), (26.0, 13.0), (6.5, 6.5)])
def test_gradients_of_all_parameters_together_are_scaled_down_to_the_norm(norm: float, wanted: float) -> None:
    first, second = (torch.zeros(1, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": [second]}], lr=1.0)
    first.grad, second.grad = torch.tensor([5.0]), torch.tensor([12.0])
    clip(optimizer, norm)
    found = torch.cat([first.grad, second.grad])
    assert float(found.norm()) == pytest.approx(wanted, rel=1e-5)
    assert float(found[0] / found[1]) == pytest.approx(5 / 12)
