"""models.layers.recomputed: a backbone whose blocks backward computes again is the same network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gkdcli.models.recognizer import Recognizer
from tests.training.jobs import page, store_of, trainer_of


def passed(kind: str, again: bool, dtype: torch.dtype, norms: str) -> dict[str, Tensor]:
    """Gradients and batch statistics after two passes with gradients and one without."""
    torch.manual_seed(0)
    network = Recognizer(kind, 3, length=16, crop=32, width=0.0625).to(dtype).train()
    network.hold_norms(norms)
    if again:
        network.recompute()
    for number in range(2):
        generator = torch.Generator().manual_seed(number)
        clips = torch.randn(2, 3, 16, 32, 32, generator=generator, dtype=dtype)
        network.features(clips)["Mixed_5c"].square().mean().backward()
    with torch.no_grad():
        network.features(clips)
    found = {f"gradient of {name}": value.grad for name, value in network.named_parameters()}
    return {name: value for name, value in found.items() if value is not None} | network.state_dict()


@pytest.mark.parametrize(
    ("kind", "dtype", "norms"),
    [
        ("top-i3d", torch.float32, "trained"),
        ("top-i3d", torch.float64, "trained"),
        ("i3d", torch.float32, "held"),
        pytest.param("mc3_18", torch.float32, "trained", marks=pytest.mark.slow),  # of full width
        ("s3d", torch.float32, "trained"),
    ],
)
def test_gradients_and_statistics_are_the_same_bits(kind: str, dtype: torch.dtype, norms: str) -> None:
    """Batch norm moves its statistics once for each batch, though it sees each twice."""
    plain, again = (passed(kind, how, dtype, norms) for how in (False, True))
    assert plain.keys() == again.keys()
    assert [name for name in plain if not torch.equal(plain[name], again[name])] == []
    counts = {int(value) for name, value in again.items() if name.endswith("num_batches_tracked")}
    assert counts == {3 if norms == "trained" else 0}


def test_backward_holds_less(tmp_path: Path) -> None:
    """Bytes that autograd keeps of the backbone between forward and backward."""
    kept = []
    for again in (False, True):
        network = Recognizer("top-i3d", 3, length=16, crop=32, width=0.0625).train()
        if again:
            network.recompute()
        sizes: dict[int, int] = {}

        def note(value: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
            found = network.features(torch.randn(2, 3, 16, 32, 32))
        weights = {value.untyped_storage().data_ptr() for value in network.parameters()}
        kept.append(sum(size for pointer, size in sizes.items() if pointer not in weights))
        del found
    assert kept[1] < 0.6 * kept[0]  # pools and the blocks' inputs stay


def test_a_run_is_the_same(tmp_path: Path) -> None:
    """The setting reaches the student in `pipeline.train`; see the table of settings for that."""
    store = store_of(tmp_path / "store", 4)
    ends = []
    for again in (False, True):
        trainer = trainer_of(tmp_path / str(again), store, page(optim__epochs=1))
        if again:
            trainer.job.networks.student.recompute()
        trainer.fit(None)
        ends.append(trainer.job.networks.student.state_dict())
    assert [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])] == []
