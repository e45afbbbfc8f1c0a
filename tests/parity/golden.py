"""The recorded figures of the published code: where they lie, weights and inputs rebuilt, comparison."""

from __future__ import annotations

import importlib.util
import json
import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gkdcli.models.foreign import official_name
from gkdcli.models.weights import fit

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


def recorded(name: str) -> dict[str, np.ndarray]:
    """All figures of one recorded file."""
    return dict(np.load(FOLDER / f"{name}.npz"))


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


class RecordedNoise:
    """Stands for `Noise`: the i-th draw is the recorded one, nothing is dropped."""

    def __init__(self, figures: dict[str, np.ndarray], dtype: torch.dtype = torch.float32) -> None:
        self.figures, self.dtype, self.draws = figures, dtype, 0

    def normal(self, shape: Sequence[int]) -> Tensor:
        wanted = self.figures.get(f"eps_shape/{self.draws}", shape)
        assert tuple(wanted) == tuple(shape), self.draws
        drawn = script("make_inputs").normal(int(self.figures["eps_seed_base"]) + self.draws, shape)
        self.draws += 1
        return torch.from_numpy(drawn).to(self.dtype)

    def keep(self, shape: Sequence[int], probability: float) -> None:
        return None


def gradients(module: nn.Module, official: Iterable[str]) -> dict[str, Tensor]:
    """Official key -> gradient, of the parameters that have one."""
    ours = dict(module.named_parameters())
    named = {key: ours[name] for key in official if (name := official_name(key)) in ours}
    return {key: value.grad for key, value in named.items() if value.grad is not None}


def norm(tensors: Iterable[Tensor]) -> float:
    """2-norm over all elements."""
    return math.sqrt(sum(float(value.double().square().sum()) for value in tensors))


def projection(key: str, value: Tensor) -> float:
    """The recorded one number that sees every element of a tensor."""
    draw = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(value.numel(), np.float32)
    return float(np.dot(value.double().numpy().reshape(-1), draw.astype(np.float64)))


def sample(value: Tensor) -> np.ndarray:
    """The sixteen recorded elements of a tensor."""
    places = np.random.default_rng(0).integers(0, value.numel(), 16)
    return value.double().numpy().reshape(-1)[places]


@dataclass
class Findings:
    """The largest error of each kind of figure, against the tolerance recorded for it."""

    fixture: str
    worst: dict[str, tuple[float, str, float]] = field(default_factory=dict)

    def add(self, kind: str, name: str, error: float, tolerance: float) -> None:
        """Notes one comparison; NaN counts as the worst of all."""
        if kind not in self.worst or not error <= self.worst[kind][0]:
            self.worst[kind] = (error, name, tolerance)

    def settle(self) -> None:
        """Says what was found, and fails where a tolerance is exceeded."""
        for kind, (error, name, tolerance) in self.worst.items():
            print(f"{self.fixture}: {kind}: largest error {error:.1e} (accepted {tolerance:.0e}), at {name}")
        wrong = {kind: found for kind, found in self.worst.items() if not found[0] <= found[2]}
        assert not wrong, wrong


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
