"""rgb and flow in one pass: equal lengths, one store each, the same as one after the other."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from gkdcli.data.annotations import scan_folder
from gkdcli.data.clips import ClipDataset, View
from gkdcli.data.extract import Report, prepare_parts
from gkdcli.data.parts import read_attributes
from gkdcli.data.store import Store
from gkdcli.data.video import decode
from gkdcli.errors import GkdError
from gkdcli.settings import ClipSettings, DataSettings
from tests.data.test_images import write_images
from tests.videos import draw, write_video

DATA = DataSettings(short_side=0, flow="farneback")


def _prepare(
    root: Path, modalities: Sequence[str], data: DataSettings = DATA, frames: bool = False, name: str = "mine"
) -> Report:
    listing = scan_folder(root / "videos", 0.5, frames)
    return prepare_parts(listing, root / name, name, modalities, data, workers=1)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for place in range(3):
        write_video(tmp_path / "videos" / "jump" / f"{place}.mp4", draw(12, seed=place))
    return tmp_path


def _datasets(folder: Path, modality: str) -> dict[str, bytes]:
    content = {}
    for path in sorted((folder / modality).rglob("*.h5")):
        with h5py.File(path) as file:
            content |= {f"{path.name}/{name}": file[name][:].tobytes() for name in file}
    return content


@pytest.mark.parametrize("storage", ["jpeg", "raw"])
def test_one_pass_gives_what_two_give(root: Path, storage: str) -> None:
    data = DATA.model_copy(update={"storage": storage})
    both = _prepare(root, ("rgb", "flow"), data, name="both")
    assert (both.prepared, both.frames, set(both.indexes)) == (3, 36, {"rgb", "flow"})
    for modality in ("flow", "rgb"):
        _prepare(root, (modality,), data, name="single")
    for modality in ("rgb", "flow"):
        assert _datasets(root / "both", modality) == _datasets(root / "single", modality)
    rgb, flow = (Store.open(both.indexes[modality]) for modality in ("rgb", "flow"))
    assert [row.frames for row in rgb.videos] == [row.frames for row in flow.videos] == [12] * 3
    again = _prepare(root, ("rgb", "flow"), data, name="both")
    assert (again.prepared, again.skipped) == (0, 3)


def test_the_layout_of_a_flow_part(root: Path) -> None:
    _prepare(root, ("flow",))
    part = root / "mine" / "flow" / "jump" / "0.h5"
    with h5py.File(part) as file:
        assert sorted(file) == ["flow_x", "flow_x_offsets", "flow_y", "flow_y_offsets"]
        assert file["flow_x_offsets"].shape == (13,)
        ends = file["flow_x_offsets"][:]
        images = [file["flow_x"][a:b].tobytes() for a, b in itertools.pairwise(ends)]
    assert images[11] == images[10] != images[9]  # one pair fewer than frames: the last is repeated
    assert decode(images[0], grey=True).shape == (48, 64)
    about = read_attributes(part)
    assert (about["flow_method"], about["flow_bound"], about["frame_count"]) == ("farneback", 20.0, 12)
    assert json.loads(about["flow_parameters"])["winsize"] == 15


def test_flow_shows_the_motion_of_its_video(root: Path) -> None:
    """The drawn square moves by two px to the right and one downwards in each frame."""
    _prepare(root, ("flow",), DATA.model_copy(update={"storage": "raw"}))
    flow = Store.open(root / "mine" / "flow.h5").frames(0, 2, 1)[0].astype(float) * 40 / 255 - 20
    moving = np.hypot(flow[..., 0], flow[..., 1]) > 1
    assert moving.any()
    assert np.median(flow[moving][:, 0]) == pytest.approx(2, abs=0.7)
    assert np.median(flow[moving][:, 1]) == pytest.approx(1, abs=0.7)


def test_methods_are_not_mixed(root: Path) -> None:
    _prepare(root, ("rgb", "flow"))
    dis = DATA.model_copy(update={"flow": "dis"})
    with pytest.raises(GkdError, match=r"data\.flow farneback -> dis"):
        _prepare(root, ("flow",), dis)
    assert _prepare(root, ("rgb",), dis).skipped == 3  # frames do not depend on it


def test_a_video_that_cannot_give_flow_is_in_neither_store(root: Path) -> None:
    write_video(root / "videos" / "jump" / "still.mp4", draw(1))
    report = _prepare(root, ("rgb", "flow"))
    assert [Path(path).name for path, _ in report.rejected] == ["still.mp4"]
    assert "one frame only" in report.rejected[0][1]
    for modality in ("rgb", "flow"):
        assert [row.name for row in Store.open(report.indexes[modality]).videos] == ["0", "1", "2"]
        assert "still.mp4" in (root / "mine" / f"{modality}.rejected.tsv").read_text()
        assert not list((root / "mine").rglob(".*tmp"))
    assert _prepare(root, ("rgb",), name="rgb-alone").rejected == []


def test_flow_of_another_length_than_rgb_is_a_reject(tmp_path: Path) -> None:
    """Images of flow that were extracted from another version of the video."""
    videos = tmp_path / "videos" / "jump"
    for name, flow in (("a", 6), ("b", 5), ("c", 6)):
        write_images(videos / name, 6, "img")
        for kind in ("flow_x", "flow_y"):
            write_images(videos / name, flow, kind)
    _prepare(tmp_path, ("rgb",), frames=True)
    for path in [*(videos / "c").glob("img_*"), *(videos / "c").glob("flow_?_00006.jpg")]:
        path.unlink()  # five of flow now, the store has six frames
    report = _prepare(tmp_path, ("flow",), frames=True)
    assert [(Path(path).name, reason) for path, reason in report.rejected] == [
        ("c", "the two streams differ in length: flow has 5 frames, rgb has 6 frames")
    ]
    assert [row.frames for row in Store.open(report.indexes["flow"]).videos] == [6, 6]


def test_images_become_the_same_store_without_encoding_again(tmp_path: Path) -> None:
    videos = tmp_path / "videos" / "jump"
    for name in ("a", "b"):
        write_images(videos / name)
    report = _prepare(tmp_path, ("rgb", "flow"), frames=True)  # flow is computed: there are no images of it
    store = Store.open(report.indexes["rgb"])
    images = [np.asarray(image).tobytes() for image in store.frames(0, 0, 6)]
    assert images == [path.read_bytes() for path in sorted((videos / "a").glob("*.jpg"))]
    assert Store.open(report.indexes["flow"]).videos[0].frames == 6
    assert _prepare(tmp_path, ("rgb", "flow"), frames=True).skipped == 2
    (videos / "a" / "image_00006.jpg").unlink()
    assert _prepare(tmp_path, ("rgb", "flow"), frames=True).prepared == 1


@pytest.mark.parametrize("storage", ["jpeg", "raw"])
def test_a_flipped_flow_clip_moves_the_other_way(root: Path, storage: str) -> None:
    """METHOD.md 8 (18): `official` mirrors pixels only."""
    report = _prepare(root, ("flow",), DATA.model_copy(update={"storage": storage}))
    clips = ClipSettings(length=16, crop=32, mean=[0.5], std=[0.25])
    found = {}
    for recipe in ("official", "corrected"):
        dataset = ClipDataset(Store.open(report.indexes["flow"]), [0], clips, recipe, seed=0)
        frames = dataset.read(0, 0)
        assert frames.shape == (16, 2, 48, 64)
        for flip in (False, True):
            found[recipe, flip] = dataset.cut(frames, View(0, 4, 8, 32, 32, flip))
    plain = found["official", False]
    assert torch.equal(plain, found["corrected", False])
    mirrored = plain.flip(3)
    assert torch.equal(found["official", True], mirrored)
    assert torch.equal(found["corrected", True][0], 255 - mirrored[0])
    assert torch.equal(found["corrected", True][1], mirrored[1])


def test_a_flow_clip_has_x_first(root: Path) -> None:
    jpeg = Store.open(_prepare(root, ("flow",), name="j").indexes["flow"])
    raw = Store.open(
        _prepare(root, ("flow",), DATA.model_copy(update={"storage": "raw"}), name="r").indexes["flow"]
    )
    clips = ClipSettings(length=16, crop=32)
    one, two = (ClipDataset(store, [1], clips, "corrected", None).read(1, 0) for store in (jpeg, raw))
    assert (one.float() - two.float()).abs().mean() < 2
    assert (one.float() - two.float().flip(1)).abs().mean() > 2
