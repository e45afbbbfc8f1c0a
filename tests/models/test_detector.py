"""models.detector: shapes for every length and crop, shortcuts equal to the whole, what training holds."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from gkdcli.models.detector import LEVELS, STRIDES, Boundaries, Detections, Detector, attended, priors
from tests.training.jobs import settle

WIDTH, HIDDEN, CLASSES = 0.0625, 32, 5


def build(length: int = 128, crop: int = 32, **options) -> Detector:
    """A student that has seen data; its head tells clips apart."""
    torch.manual_seed(0)
    network = Detector("top-i3d", CLASSES, length=length, crop=crop, width=WIDTH, **options)
    settle(network, clips_of(2, length, crop, seed=9))
    return network


def clips_of(count: int, length: int = 128, crop: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, length, crop, crop, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def network() -> Detector:
    return build()


@pytest.fixture(scope="module")
def features(network: Detector) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return network.features(clips_of(2))


@pytest.mark.parametrize("crop", [32, 48, 96])
@pytest.mark.parametrize("length", [128, 256, 384])
def test_every_length_and_crop_has_its_shapes(length: int, crop: int) -> None:
    network = Detector("top-i3d", CLASSES, length=length, crop=crop, width=WIDTH).eval()
    with torch.no_grad():
        features = network.features(clips_of(2, length, crop))
        maps = network.attend(features)
        found, boundaries = network.head(features)
    side = {"Mixed_5c": -(-crop // 32), "Mixed_4f": -(-crop // 16)}
    steps = {"Mixed_5c": length // 8, "Mixed_4f": length // 4}
    widths = {"Mixed_5c": 64, "Mixed_4f": 52}
    for tap in ("Mixed_5c", "Mixed_4f"):
        assert features[tap].shape == (2, widths[tap], steps[tap], side[tap], side[tap])
        assert maps[tap].shape == (2, widths[tap], steps[tap])
    count = sum(length // stride for stride in STRIDES)
    wanted = {"loc": 2, "conf": CLASSES + 1, "prop_loc": 2, "prop_conf": CLASSES + 1, "center": 1}
    assert {name: tuple(value.shape) for name, value in found._asdict().items()} == {
        name: (2, count, last) for name, last in wanted.items()
    }
    assert boundaries.frame.shape == (2, HIDDEN, length)
    for level in (boundaries.location, boundaries.classification):
        assert level.shape == (2, 2 * HIDDEN, length // 4)
    assert (found.loc > 0).all()


def test_a_clip_that_is_no_multiple_of_the_coarsest_stride_is_refused() -> None:
    with pytest.raises(AssertionError, match="multiple of 128"):
        Detector("top-i3d", CLASSES, length=192, crop=32, width=WIDTH)


def test_the_figures_of_the_full_size() -> None:
    with torch.device("meta"):
        network = Detector("i3d", 20, length=256, crop=96)
    assert network.head.lengths == [64, 32, 16, 8, 4, 2]
    assert len(priors(256)) == 126
    assert network.head.loc_head.in_channels == 512


def test_priors_are_the_middles_of_equal_parts_level_after_level(network: Detector) -> None:
    expected = [(i + 0.5) / t for t in (32, 16, 8, 4, 2, 1) for i in range(t)]
    assert priors(128).tolist() == pytest.approx(expected)
    levels = network.head.levels()
    assert [len(level) for level in levels] == network.head.lengths == [32, 16, 8, 4, 2, 1]
    assert torch.equal(torch.cat(levels), priors(128))
    assert "head.priors" not in network.state_dict()  # published files have none


def test_class_logits_and_boundaries_are_those_of_the_whole_head(network, features) -> None:
    with torch.no_grad():
        found, boundaries = network.head(features)
        assert torch.equal(network.head.class_logits(features), found.conf)
        for ours, whole in zip(network.head.boundaries(features), boundaries, strict=True):
            assert torch.equal(ours, whole)
            assert whole.std() > 1e-3


def test_both_taps_reach_what_the_head_says(network, features) -> None:
    """Level 0 sees both; the levels above see Mixed_5c alone (METHOD.md 5)."""
    with torch.no_grad():
        (before, _), lengths = network.head(features), network.head.lengths
        for tap, reached in (("Mixed_4f", [True] + [False] * (LEVELS - 1)), ("Mixed_5c", [True] * LEVELS)):
            changed = features | {tap: features[tap].flip(2) * 1.5}
            after = network.head(changed)[0]
            moved = [
                not torch.equal(old, new)
                for old, new in zip(
                    torch.split(before.conf, lengths, 1), torch.split(after.conf, lengths, 1), strict=True
                )
            ]
            # the last level of this width has groups of one value, which come out as the bias
            assert moved[:-1] == reached[:-1]


def test_a_group_of_one_value_comes_out_as_the_bias_in_batches_of_any_size(network) -> None:
    """PyTorch refuses such groups in batches of one: the last level of the narrowest networks has them."""
    head, clips = copy.deepcopy(network.head), clips_of(2)
    nn.init.normal_(head.pyramid[-1].norm.bias)
    expected = torch.relu(head.pyramid[-1].norm.bias)
    assert expected.any()
    with torch.no_grad():
        for count in (1, 2):
            last = head._levels(network.features(clips[:count]))[-1]
            assert last.shape == (count, HIDDEN, 1)
            torch.testing.assert_close(last[:, :, 0], expected.expand(count, -1), rtol=0, atol=1e-4)
            assert all(value.isfinite().all() for value in network(clips[:count]))


# ---- attended features (METHOD.md 2, 8 (4)) ----


def test_the_official_attended_feature_is_divided_by_the_sum_of_its_attention(network, features) -> None:
    """FINDINGS 4: so it is some ten thousand times smaller than the feature; per clip in evaluation."""
    with torch.no_grad():
        maps = network.attend(features)
        found = attended(features, maps, "official")
    for tap, attention in maps.items():
        for clip in range(2):
            expected = features[tap][clip] * attention[clip][..., None, None] / attention[clip].sum()
            torch.testing.assert_close(found[tap][clip], expected)
        assert found[tap].mean() < 1e-2 * features[tap].mean()


def test_the_corrected_attended_feature_keeps_the_sum_of_every_clip(network, features) -> None:
    with torch.no_grad():
        maps = network.attend(features)
        for share in (maps, {tap: 1 - attention for tap, attention in maps.items()}):  # and the background's
            found = attended(features, share, "corrected")
            for tap in maps:
                assert found[tap].sum((1, 2, 3, 4)).tolist() == pytest.approx(
                    features[tap].sum((1, 2, 3, 4)).tolist(), rel=1e-4
                )
                ratio = found[tap] / (features[tap] * share[tap][..., None, None])
                for clip in ratio:  # one factor for a whole clip
                    known = clip[clip.isfinite()]
                    assert (known.max() - known.min()) < 1e-4 * known.mean()


@pytest.mark.parametrize("recipe", ["official", "corrected"])
def test_a_clips_outputs_do_not_depend_on_its_batch_mates(recipe: str) -> None:
    network = build(recipe=recipe).double()
    clips = clips_of(3).double() * torch.tensor([1.0, 4.0, 0.2]).double()[:, None, None, None, None]
    with torch.no_grad():
        together = network(clips)
        for clip in range(3):
            alone = network(clips[clip : clip + 1])
            for one, all_of_them in zip(alone, together, strict=True):
                torch.testing.assert_close(one[0], all_of_them[clip], rtol=1e-6, atol=1e-8)
    assert together.conf.std(0).max() > 1e-6  # they do differ


def test_evaluation_goes_by_the_attended_feature_unless_told_otherwise(features) -> None:
    network = build()
    with torch.no_grad():
        focused = network.head(attended(network.features(clips_of(2)), network.attend(features), "corrected"))
        assert all(torch.equal(*pair) for pair in zip(network(clips_of(2)), focused[0], strict=True))
        network.scores_attended = False
        plain = network(clips_of(2))
        assert all(torch.equal(*pair) for pair in zip(plain, network.head(features)[0], strict=True))
        assert not torch.equal(plain.conf, focused[0].conf)
        without = build(attention=None)
        assert not without.attention
        without.load_state_dict({n: v for n, v in network.state_dict().items() if "attention" not in n})
        assert torch.equal(without(clips_of(2)).conf, plain.conf)


# ---- batch norm (METHOD.md 4, 8 (7)) ----


@pytest.mark.parametrize(
    ("norms", "moves", "trained"), [("trained", True, True), ("held", False, True), ("frozen", False, False)]
)
def test_batch_norms_are_trained_held_or_frozen(norms: str, moves: bool, trained: bool) -> None:
    """Held keeps the statistics (FINDINGS 7: gains were meant to stay too), frozen all."""
    network = build()
    network.hold_norms(norms)
    kinds = {name: module for name, module in network.named_modules() if isinstance(module, nn.BatchNorm3d)}
    before = copy.deepcopy(network.state_dict())
    for _ in range(2):  # validation in between changes nothing
        network.eval()
        network.train()
        assert network.training
        assert network.head.training
        network(clips_of(2, seed=5))
    assert len(kinds) == 57
    assert {module.training for module in kinds.values()} == {moves}
    statistics = [name for name in before if name.endswith(("running_mean", "running_var"))]
    changed = {name for name in statistics if not torch.equal(network.state_dict()[name], before[name])}
    assert changed == (set(statistics) if moves else set())
    affine = {f"{name}.{part}" for name in kinds for part in ("weight", "bias")}
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad is (trained or name not in affine), name
    network(clips_of(2)).conf.sum().backward()
    first = network.backbone.Conv3d_1a_7x7
    assert first.conv3d.weight.grad is not None
    assert (first.bn.weight.grad is not None) is trained


def test_held_norms_normalise_by_what_they_hold() -> None:
    network = build()
    with torch.no_grad():
        evaluated = network.eval().features(clips_of(2))
        network.hold_norms("held")
        held = network.train().features(clips_of(2))
        network.hold_norms("trained")
        free = network.train().features(clips_of(2))
    assert torch.equal(held["Mixed_5c"], evaluated["Mixed_5c"])
    assert not torch.allclose(free["Mixed_5c"], evaluated["Mixed_5c"], rtol=1e-2)


# ---- first weights ----


def test_the_head_starts_as_published() -> None:
    """Pyramid and frame level Xavier-uniform, the rest normal(0, 0.01), zero biases, group norms 1 and 0."""
    torch.manual_seed(0)
    head = Detector("top-i3d", CLASSES, length=128, crop=96, width=0.25).head
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(7.0) if parameter.ndim > 1 else None
    head.initialise()
    uniform = normal = 0
    for name, module in head.named_modules():
        if isinstance(module, nn.GroupNorm):
            assert (module.weight == 1).all()
            assert not module.bias.any()
        elif isinstance(module, nn.Conv1d | nn.Conv3d):
            assert not module.bias.any(), name
            weight, fan = module.weight, module.weight[0, 0].numel()
            if name.startswith(("pyramid", "frame_level")):
                bound = math.sqrt(6 / (fan * (weight.shape[0] + weight.shape[1])))
                assert 0.95 * bound < weight.abs().max() <= bound, name
                uniform += 1
            else:
                assert weight.std().item() == pytest.approx(0.01, rel=0.2), name
                assert weight.abs().max() > 0.02
                normal += 1
    assert (uniform, normal) == (LEVELS + 3, 4 + 2 * 4 + 5)
    assert [scale.item() for scale in head.loc_scales] == [1.0] * LEVELS


# ---- whether rounding errors tip where the head pools ----


def test_distances_pool_alike_until_a_segments_end_is_rounded_otherwise(network: Detector) -> None:
    count = len(priors(128))
    loc = np.full((2, count, 2), 4.3, np.float32)  # no end near the middle between two frames
    assert network.pools_alike(loc)
    assert network.pools_alike(loc, loc + 1e-3, loc - 1e-3)
    assert not network.pools_alike(loc, loc + 3)
    tie = np.full((2, count, 2), 4.5, np.float32)  # -4.5 - 1 lies in the middle
    other = tie.copy()
    other[1, 5] -= 1e-3
    assert network.pools_alike(tie, tie.copy())
    assert not network.pools_alike(tie, other)
    assert not network.pools_alike(tie, tie, other)


def test_outputs_are_named_tuples_that_a_graph_can_return() -> None:
    assert Detections._fields == ("loc", "conf", "prop_loc", "prop_conf", "center")
    assert Boundaries._fields == ("frame", "location", "classification")
