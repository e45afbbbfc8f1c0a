"""Flow on its way into a store: blocks of frames, what is kept beside it, what may not be mixed."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision.models.optical_flow import raft_small

from gkdcli.data.annotations import scan_folder
from gkdcli.data.extract import Report, prepare_parts
from gkdcli.data.flow import FlowEstimator
from gkdcli.data.jobs import Job, work
from gkdcli.data.parts import read_attributes
from gkdcli.data.sources import Source
from gkdcli.data.video import VideoReader
from gkdcli.errors import GkdError
from gkdcli.files import digest
from gkdcli.settings import DataSettings
from tests.videos import draw, write_video

FRAMES = 6
DATA = DataSettings(short_side=0, storage="raw", flow="tvl1-torch")


@pytest.fixture
def video(tmp_path: Path) -> Path:
    return write_video(tmp_path / "videos" / "up" / "a.mp4", draw(FRAMES, 32, 24))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_file(raft_small(weights=None).state_dict(), tmp_path / "raft.safetensors")
    return tmp_path / "raft.safetensors"


def _stored(video: Path, data: DataSettings, name: str = "part.h5") -> tuple[np.ndarray, dict[str, object]]:
    """Frames (T, H, W, 2) and attributes of the part."""
    part = video.parent / name
    result = work(Job(Source(video, "up", "a", {}), {"flow": part}, data, 1))
    assert result.frames == FRAMES, result
    with h5py.File(part) as file:
        frames = file["frames"][:]
    return frames, read_attributes(part)


@pytest.mark.parametrize("batch", [1, 2, 4, 5, 9])
def test_blocks_meet_without_a_gap(video: Path, batch: int) -> None:
    """However many pairs a block has: one flow per frame, each that of its own pair, the last one twice."""
    data = DATA.model_copy(update={"flow_batch": batch})
    flow, attributes = _stored(video, data)
    with VideoReader(video) as reader:
        frames = [picture.grey() for picture in reader.pictures(data)]
    wanted = FlowEstimator("tvl1-torch", data.flow_bound, batch=1).block(frames)
    assert flow.shape == (FRAMES, 24, 32, 2)
    assert np.abs(flow[:-1].astype(int) - wanted).max() <= 1
    np.testing.assert_array_equal(flow[-1], flow[-2])
    assert attributes["flow_method"] == "tvl1-torch"
    assert json.loads(attributes["flow_parameters"])["tau"] == 0.25


def test_raft_sees_colours_and_its_weights_are_told(video: Path, weights: Path) -> None:
    data = DATA.model_copy(update={"flow": "raft", "flow_weights": str(weights), "flow_batch": 3})
    flow, attributes = _stored(video, data)
    assert flow.shape == (FRAMES, 24, 32, 2)
    assert json.loads(attributes["flow_parameters"])["weights_sha256"] == digest(weights)


def _prepare(root: Path, **changed: object) -> Report:
    listing = scan_folder(root / "videos", 0.5, False)
    return prepare_parts(
        listing, root / "mine", "mine", ("flow",), DATA.model_copy(update=changed), workers=1
    )


def test_a_store_has_one_method_and_any_batch(video: Path, tmp_path: Path) -> None:
    write_video(tmp_path / "videos" / "up" / "b.mp4", draw(FRAMES, 32, 24, seed=1))
    assert _prepare(tmp_path).prepared == 2
    write_video(tmp_path / "videos" / "up" / "c.mp4", draw(FRAMES, 32, 24, seed=2))
    with pytest.raises(GkdError, match="tvl1-torch -> tvl1"):
        _prepare(tmp_path, flow="tvl1")
    report = _prepare(tmp_path, flow_batch=2, flow_weights="unused.pth")
    assert (report.prepared, report.skipped, report.notes) == (1, 2, [])


def test_other_weights_of_raft_are_another_store(video: Path, weights: Path, tmp_path: Path) -> None:
    write_video(tmp_path / "videos" / "up" / "b.mp4", draw(FRAMES, 32, 24, seed=1))
    raft = {"flow": "raft", "flow_weights": str(weights)}
    assert _prepare(tmp_path, **raft).prepared == 2
    moved = weights.rename(tmp_path / "moved.safetensors")
    assert _prepare(tmp_path, flow="raft", flow_weights=str(moved)).skipped == 2
    save_file(raft_small(weights=None).state_dict(), weights)
    with pytest.raises(GkdError, match="other weights of RAFT"):
        _prepare(tmp_path, **raft)


def test_what_every_video_would_fail_on_ends_the_run(video: Path, tmp_path: Path) -> None:
    """It comes from a worker process with all of its words."""
    write_video(tmp_path / "videos" / "up" / "b.mp4", draw(FRAMES, 32, 24, seed=1))
    (tmp_path / "odd.safetensors").write_bytes(b"odd")
    with pytest.raises(GkdError, match="cannot be read") as caught:
        _prepare(tmp_path, flow="raft", flow_weights=str(tmp_path / "odd.safetensors"))
    assert "data.flow_weights" in caught.value.hint


def test_too_small_frames_are_a_reject(tmp_path: Path) -> None:
    part = tmp_path / "part.h5"
    video = tmp_path / "a.npy"
    np.save(video, np.zeros((4, 2, 9, 3), np.uint8))
    data = DATA.model_copy(update={"fps": 10.0})
    result = work(Job(Source(video, "up", "a", {}), {"flow": part}, data, 1))
    assert (result.reason, result.again) == ("no flow can be computed on 9x2 px: 3 px are needed", True)
    assert not part.exists()
