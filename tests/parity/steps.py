"""What the recorded steps of both tasks are compared by (golden 06)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from gkdcli.training.steps import Networks
from tests.parity.golden import Findings, norm, official_name, projection, sample, script


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def assert_no_gradients(module: torch.nn.Module) -> None:
    """The published code leaves gradients in 201 tensors of the teachers (FINDINGS 8)."""
    assert all(parameter.grad is None for parameter in module.parameters())


PRECISE = 1e-9  # in float64 nothing but another order of additions is left


def compare_gradients(
    found: Findings,
    figures: dict[str, np.ndarray],
    exact: dict[str, np.ndarray],
    stage: str,
    ours: dict[str, Tensor],
    loose: bool = False,
) -> None:
    """Norms against the run of the same precision; samples and projections against float64.

    Where the record has no run in float64, `exact` is the one in float32 and the comparison `loose`.
    """
    same = figures is exact and not loose
    assert len(ours) == int(figures[f"{stage}/n_params_with_grad"])
    wanted = {"l2_all": float(figures[f"{stage}/grad_l2_all"])}
    got = {"l2_all": norm(ours.values())}
    for name in figures:
        if name.startswith(f"{stage}/grad_l2/"):
            key = name.split("/", 2)[2]
            wanted[key], got[key] = float(figures[name]), norm([ours[key]])
            size = float(exact[name])
            kept = exact[f"{stage}/grad/{key}/sample"]
            away = np.linalg.norm(sample(ours[key]) - kept) / np.linalg.norm(kept)
            found.add("gradient samples", f"{stage} {key}", float(away), PRECISE if same else 5e-2)
            off = abs(projection(key, ours[key]) - float(exact[f"{stage}/grad/{key}/projection"])) / size
            found.add("gradient projections", f"{stage} {key}", off, PRECISE if same else 5e-2)
    for key, value in wanted.items():
        found.add(
            "gradient norms", f"{stage} {key}", abs(got[key] - value) / value, PRECISE if same else 1e-2
        )


def compare_parameters(
    found: Findings,
    figures: dict[str, np.ndarray],
    networks: Networks,
    before: dict[str, dict[str, Tensor]],
) -> None:
    summarise = script("make_inputs").summarise
    modules = {"student": networks.student, "cvae": networks.generators}
    for name in figures:
        if not name.endswith("/sample"):
            continue
        _, who, key = name.removesuffix("/sample").split("/")
        if key == "bn_running_var":  # the record does not say of which layer; its values do
            key = "backbone._model.Mixed_5c.b2b.bn.running_var"
        ours, began = modules[who].state_dict()[official_name(key)], before[who][official_name(key)]
        wanted = figures[name].astype(np.float64)
        got = summarise(ours.numpy(), 64)["sample"].astype(np.float64)
        start = summarise(began.numpy(), 64)["sample"].astype(np.float64)
        assert tuple(figures[f"{name.removesuffix('/sample')}/shape"]) == ours.shape
        found.add(
            "parameters", f"{who} {key}", float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted)), 1e-3
        )
        # the way they went is a thousandth of their size, so it is looked at by itself: the optimisers
        moved = np.linalg.norm(wanted - start)
        if moved == 0:  # frozen statistics
            assert np.array_equal(got, start), key
            continue
        away = float(np.linalg.norm(got - wanted) / moved)
        # rounding grows from step to step below, where batch norm magnifies it; float64 steps agree to 1e-13
        found.add(f"their way, {who}", key, away, 0.25 if who == "student" else 0.05)
