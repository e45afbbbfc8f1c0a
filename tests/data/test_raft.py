"""data.raft: weights from a file alone; any size of frames; a clear word where the file is no RAFT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.models.optical_flow import raft_large, raft_small

from gkdcli.data.flow import FlowEstimator
from gkdcli.data.torch_flow import load_raft
from gkdcli.errors import GkdError
from gkdcli.files import digest


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("raft") / "small.safetensors"
    save_file(raft_small(weights=None).state_dict(), path)
    return path


def _frames(count: int, height: int, width: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (height, width, 3)).astype(np.uint8) for _ in range(count)]


def test_it_is_torchvisions_network_between_the_same_colours(small: Path) -> None:
    frames = _frames(2, 128, 136)
    network = raft_small(weights=None).eval()
    network.load_state_dict(load_file(small))
    pictures = [torch.from_numpy(frame).movedim(-1, 0)[None] / 127.5 - 1 for frame in frames]
    with torch.inference_mode():
        wanted = network(*pictures)[-1][0].movedim(0, -1).numpy()
    estimator = FlowEstimator("raft", 20.0, weights=str(small))
    np.testing.assert_allclose(estimator.speeds(frames)[0], wanted, atol=1e-4)
    assert estimator.colour
    assert estimator.parameters == {"kind": "raft_small", "updates": 12, "weights_sha256": digest(small)}


@pytest.mark.parametrize("size", [(112, 112), (20, 150), (131, 129)])
def test_frames_of_any_size_are_padded_and_cropped(small: Path, size: tuple[int, int]) -> None:
    flow = FlowEstimator("raft", 20.0, weights=str(small), batch=2).block(_frames(3, *size))
    assert flow.shape == (2, *size, 2)
    assert flow.dtype == np.uint8


def test_the_names_of_the_weights_tell_which_it_is(tmp_path: Path) -> None:
    path = tmp_path / "large.pth"
    torch.save(raft_large(weights=None).state_dict(), path)
    assert load_raft(str(path), "cpu").parameters["kind"] == "raft_large"


def test_a_wrong_file_is_named(tmp_path: Path, small: Path) -> None:
    damaged, objects, other, cut = (
        tmp_path / name for name in ("a.safetensors", "b.pth", "c.safetensors", "d.pth")
    )
    damaged.write_bytes(small.read_bytes()[:1000])
    torch.save(torch.nn.ReLU(), objects)
    save_file({"conv.weight": torch.zeros(3)}, other)
    torch.save([torch.zeros(1)], cut)
    for path, what in (
        (tmp_path / "none.pth", "there is no file"),
        (damaged, "cannot be read"),
        (objects, "cannot be read"),
        (other, "no weights of RAFT"),
        (cut, "no state dict"),
    ):
        with pytest.raises(GkdError, match=what) as caught:
            FlowEstimator("raft", 20.0, weights=str(path))
        assert str(path) in caught.value.where
        assert "data.flow_weights" in caught.value.hint
    with pytest.raises(GkdError, match="no weights of its own") as caught:
        FlowEstimator("raft", 20.0)
    assert caught.value.code == 2
