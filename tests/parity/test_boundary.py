"""Boundary max pooling and its segments against the recorded cases (golden 07)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gkdcli.models.boundary import boundary_max_pool
from tests.parity.golden import needs_golden, recorded

pytestmark = needs_golden


@pytest.mark.parametrize("case", range(7))
def test_forward_is_exact_and_the_gradient_correct(case):
    """Against the correct gradient, not that of the kernel as shipped (FINDINGS 2)."""
    figures = {name: value for name, value in recorded("07_boundary_pool").items() if f"c{case}/" in name}
    tensors = {name.split("/")[1]: torch.from_numpy(np.asarray(value)) for name, value in figures.items()}
    feature = tensors["input"].requires_grad_()
    pooled = boundary_max_pool(feature, tensors["segments"])
    assert torch.equal(pooled, tensors["output"])
    with torch.no_grad():
        assert torch.equal(boundary_max_pool(feature, tensors["segments"]), tensors["output"])
    pooled.backward(tensors["grad_output"])
    torch.testing.assert_close(feature.grad, tensors["grad_input"], rtol=0, atol=1e-5)


def test_no_recorded_case_is_left_out():
    assert {name.split("/")[0] for name in recorded("07_boundary_pool") if "/" in name} == {
        f"c{case}" for case in range(7)
    }
