"""The backbones: shapes, widths, which kernels see time."""

from __future__ import annotations

import copy

import pytest
import torch

from gkdcli.models.i3d import ENDPOINTS, I3D, KINDS, tap_shape
from gkdcli.models.layers import LAYOUT


def time_extents(kind: str) -> dict[str, int]:
    with torch.device("meta"):
        model = I3D(kind)
    return {
        name.removesuffix(".conv3d.weight"): value.shape[2]
        for name, value in model.state_dict().items()
        if name.endswith("conv3d.weight")
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("length", "crop", "width"), [(16, 64, 0.125), (24, 50, 0.1), (17, 65, 0.07)])
def test_tap_shape_foretells_the_taps(kind, length, crop, width):
    model = I3D(kind, 2, width).eval()
    with torch.no_grad():
        taps = model(torch.rand(2, 2, length, crop, crop))
    assert {name: tuple(x.shape[1:]) for name, x in taps.items()} == {
        name: tap_shape(name, length, crop, width) for name in ("Mixed_4f", "Mixed_5c")
    }


def test_tap_shapes_of_the_paper():
    assert tap_shape("Mixed_5c", 64, 224) == (1024, 8, 7, 7)
    assert tap_shape("Mixed_4f", 256, 96) == (832, 64, 6, 6)


@pytest.mark.parametrize(("kind", "millions"), [("i3d", 12.70), ("top-i3d", 10.84)])
def test_parameter_counts_with_400_classes(kind, millions):
    with torch.device("meta"):
        count = sum(p.numel() for p in I3D(kind).parameters()) + 400 * 1025
    assert round(count / 1e6, 2) == millions


def test_kinds_differ_in_time_extent_only_and_split_at_mixed_4c():
    full, top, bottom, flat = (time_extents(kind) for kind in KINDS)
    timed = {name for name, extent in full.items() if extent > 1}
    assert len(timed) == 20  # the stem, 2c, and two per inception block
    split = ENDPOINTS.index("Mixed_4c")
    below = {name for name in timed if ENDPOINTS.index(name.split(".")[0]) <= split}
    assert {name for name, extent in top.items() if extent > 1} == timed - below
    assert {name for name, extent in bottom.items() if extent > 1} == below
    assert len(below) == 10
    assert set(flat.values()) == {1}
    assert full["Conv3d_1a_7x7"] == 7


def test_endpoints_are_the_sixteen_of_the_paper():
    model = I3D("top-i3d", width=0.0625).eval()
    with torch.no_grad():
        found = dict(model.endpoints(torch.rand(1, 3, 16, 32, 32)))
    assert tuple(found) == ENDPOINTS
    assert len(ENDPOINTS) == 16


@pytest.fixture
def two_threads():
    """On one thread PyTorch computes small convolutions by another kernel, which ignores the layout."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("width", "layout"), [(0.125, LAYOUT), (0.5, torch.contiguous_format)])
def test_no_layer_changes_the_memory_layout_on_the_way(width, layout):
    """Mixed layouts make pools and sums several times slower without any other sign."""
    model = I3D("i3d", width=width)
    for clip in (torch.rand(2, 3, 16, 64, 64), torch.rand(2, 3, 16, 64, 64).contiguous(memory_format=LAYOUT)):
        for name, x in model.endpoints(clip):
            assert x.is_contiguous(memory_format=layout), name


def test_both_layouts_and_both_ways_to_pool_compute_the_same():
    torch.manual_seed(0)
    narrow, clip = I3D("i3d", width=0.125).eval(), torch.rand(2, 3, 16, 64, 64)
    other = copy.deepcopy(narrow).to(memory_format=torch.contiguous_format)
    other.layout = torch.contiguous_format
    with torch.no_grad():
        frozen, contiguous = narrow(clip)["Mixed_5c"], other(clip)["Mixed_5c"]
    torch.testing.assert_close(frozen, contiguous)
    torch.testing.assert_close(frozen, narrow(clip)["Mixed_5c"])
