"""The recorded figures of the published code: where they lie, weights and inputs rebuilt, comparison."""

from __future__ import annotations

import importlib.util
import json
import math
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gkdcli.models.weights import fit, official_name

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"the golden files are not in {FOLDER}")


def script(name: str) -> ModuleType:
    """One of the two Python files beside the golden data."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Official key -> shape of a recorded model."""
    document = json.loads((FOLDER / "01_state_dicts.json").read_text())
    return {key: tuple(shape) for key, (shape, _) in document[model].items()}


def fill(module: nn.Module, official: dict[str, tuple[int, ...]], salt: str) -> None:
    """Gives a module the recorded model's weights; every tensor must find its place."""
    maker = script("fill_weights")
    tensors = {}
    for key, shape in official.items():
        name = official_name(key)
        assert name, key
        tensors[name] = torch.from_numpy(maker.fill_tensor(key, shape, salt))
    assert fit(module, tensors).complete


def error(figures: dict[str, np.ndarray], name: str, value: Tensor) -> float:
    """Largest difference from the record, relative to the record's root mean square."""
    array = value.detach().numpy()
    if name in figures:
        wanted, got = figures[name], array
    else:
        wanted = figures[f"{name}/sample"]
        assert tuple(figures[f"{name}/shape"]) == array.shape
        got = script("make_inputs").summarise(array, wanted.size)["sample"]
    return float(np.abs(got - wanted).max() / np.sqrt(np.mean(np.square(wanted, dtype=np.float64))))


def filled(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight filler's rules, restated, for the quoted figures that need no golden files."""
    draw = np.random.default_rng(zlib.crc32(key.encode()))
    last = key.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if last == "running_var" or (last == "weight" and len(shape) == 1):
        return np.float32(0.5 + draw.random(shape))
    if last in ("running_mean", "bias"):
        return np.float32(0.1 * draw.standard_normal(shape))
    return np.float32(draw.standard_normal(shape) * math.sqrt(2.0 / math.prod(shape[1:])))
