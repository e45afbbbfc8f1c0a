"""Weights of others: which dictionary of a file is taken, under which names, and what they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gkdcli.errors import GkdError
from gkdcli.models.foreign import backbone_kind, open_weights
from gkdcli.models.i3d import KINDS
from gkdcli.models.recognizer import Recognizer
from gkdcli.models.weights import load_tensors, read_file
from tests.published import nested, published_names, tiny_generators, tiny_network


def saved(path, content):
    torch.save(content, path)
    return path


def test_the_dictionary_with_most_known_names_is_taken(tmp_path):
    state = published_names(tiny_network("student"))
    part = {name: value for name, value in state.items() if name.startswith("backbone.")}
    content = {"first": part, "deep": {"er": {"whole": state}}, "again": dict(state), "loss": torch.zeros(1)}
    found = open_weights(saved(tmp_path / "w.pt", content)).require_network()
    assert (found.within, len(found.tensors), found.unknown) == ("deep.er.whole", 354, [])


def test_network_and_cvae_may_share_a_file_or_a_dictionary(tmp_path):
    network, cvae = published_names(tiny_network("teacher")), published_names(tiny_generators("teacher"))
    apart = {"model": network, "cvae": {f"module.{name}": value for name, value in cvae.items()}}
    together = {f"net.{n}": v for n, v in network.items()} | {f"cvae.{n}": v for n, v in cvae.items()}
    for content in (apart, together):
        contents = open_weights(saved(tmp_path / "w.pt", content))
        assert len(contents.network.tensors) == 354
        assert len(contents.generators.tensors) == 40
        assert contents.network.unknown == contents.generators.unknown == []


def test_a_dictionary_within_itself_ends(tmp_path):
    content = {"state": published_names(tiny_network("student"))}
    content["self"] = content
    assert open_weights(saved(tmp_path / "w.pt", content)).require_network().within == "state"


@pytest.mark.parametrize("names", ["old", "new"])
def test_states_of_random_generators_are_passed_over_and_numpy_is_not_called(names, tmp_path):
    """Under NumPy's names of before 2.0, and of since."""
    network, path = tiny_network("student"), tmp_path / "w.pt"
    # the older format holds its names as lines of text, so that one can stand for another
    torch.save(nested(published_names(network), network), path, _use_new_zipfile_serialization=False)
    written = path.read_bytes()
    one, other = b"numpy._core.multiarray\n", b"numpy.core.multiarray\n"
    assert (one in written) != (other in written)
    path.write_bytes(written.replace(other, one) if names == "new" else written.replace(one, other))
    content = read_file(path)
    assert not isinstance(content["rng"][1][1], np.ndarray)
    assert not isinstance(content["best"], np.floating)
    assert content["rng"][0].dtype == torch.uint8
    assert len(content["state_dict"]) == 354


def test_other_things_of_numpy_are_refused_by_name(tmp_path):
    path = saved(tmp_path / "w.pt", {"generator": np.random.default_rng(0), "x": torch.zeros(1)})
    with pytest.raises(GkdError, match=r"`numpy\.random"):
        read_file(path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_four_backbones_are_told_apart(kind, tmp_path):
    network = Recognizer(kind, 3, length=16, crop=32, width=0.0625)
    found = open_weights(saved(tmp_path / "w.pt", published_names(network))).require_network()
    assert backbone_kind(found) == kind


def test_odd_shapes_are_no_bug(tmp_path):
    state = published_names(tiny_network("student"))
    state["backbone._model.Conv3d_1a_7x7.conv3d.weight"] = torch.zeros(())
    found = open_weights(saved(tmp_path / "w.pt", state)).require_network()
    assert backbone_kind(found) is None
    assert found.fit(tiny_network("student")).wrong_shape[0][1] == ()


def test_a_nested_file_is_no_plain_state_dict(tmp_path):
    with pytest.raises(GkdError, match="no plain state dict: `epoch` is a int"):
        load_tensors(saved(tmp_path / "w.pt", {"epoch": 1, "w": torch.zeros(1)}))
