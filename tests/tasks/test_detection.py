"""tasks.detection: which terms, on which feature, with which weights, in both recipes (METHOD.md 4, 5, 8).

Of the deviations in METHOD.md 8, (1), (19), (21) and (22) are shown here, (7) in part; (4) and (7) in
models/test_detector, (2) in models/test_boundary, (13) in data/test_windows, (16) in data/test_window_clips
and training/test_detection_trainer.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gkdcli.data.segments import Segment
from gkdcli.errors import GkdError
from gkdcli.losses.boundary import boundary_contrast, boundary_loss
from gkdcli.losses.segments import HeadOutputs, Targets, background_loss, focal_loss, segment_losses
from gkdcli.models.boundary import boundary_max_pool, proposal_segments
from gkdcli.models.detector import attended
from gkdcli.tasks import detection
from gkdcli.tasks.trained import norms_of
from gkdcli.training.forward import Forward
from gkdcli.training.noise import Noise
from gkdcli.training.steps import network_terms, see
from tests.stores import Video, make_store, picture
from tests.training.detection_jobs import OFFICIAL, batch, networks, page

RECIPES = {"official": OFFICIAL, "corrected": ()}
WEIGHTS = {
    "location": 10.0,
    "classification": 1.0,
    "refined_location": 10.0,
    "refined_classification": 1.0,
    "quality": 1.0,
    "start": 1.0,
    "end": 1.0,
    "background": 35.0,
    "boundary_contrast": 0.1,
}
CLASSES = 3


def supervise(settings, network, clips, spliced, targets):
    """What the task adds to a step, and what it was given."""
    seen = see(Forward(), network, clips)
    more = None if spliced is None else see(Forward(), network, spliced)
    noise = Noise(0, 1, 1, range(len(clips)))
    return detection.supervised_terms(network, seen, more, targets, noise, settings), seen, more


@pytest.fixture(scope="module", params=RECIPES)
def case(request):
    settings = page(*RECIPES[request.param], "distill.refine_iou=0.01")  # of a fresh head, few reach more
    network = networks(settings, CLASSES).student
    network.hold_norms("held")  # so that a clip looks the same however often it is seen
    clips, spliced, targets = batch(settings.optim.batch_size if request.param == "official" else 2)
    found, seen, more = supervise(settings, network, clips, spliced, targets)
    return SimpleNamespace(
        recipe=request.param,
        settings=settings,
        network=network,
        clips=clips,
        spliced=spliced,
        targets=targets,
        found=found,
        seen=seen,
        more=more,
    )


def value(found, name):
    return found.terms[name].value


def truth(targets):
    return Targets(targets["segments"], targets["labels"], targets["valid"])


def test_all_terms_have_the_weights_of_the_page(case) -> None:
    assert {name: term.weight for name, term in case.found.terms.items()} == WEIGHTS
    for name, term in case.found.terms.items():
        assert term.value.ndim == 0, name
        assert term.value.isfinite(), name
        assert term.value > 0, name


def test_weights_follow_the_settings() -> None:
    sets = [f"distill.{name}_weight={n + 2}" for n, name in enumerate(("location", "class", "background"))]
    settings = page(*sets, "distill.contrast_weight=5")
    found, *_ = supervise(settings, networks(settings, CLASSES).student, *batch())
    weights = {name: term.weight for name, term in found.terms.items()}
    assert weights == {
        "location": 2.0,
        "classification": 3.0,
        "refined_location": 2.0,
        "refined_classification": 3.0,
        "quality": 3.0,
        "start": 1.0,
        "end": 1.0,
        "background": 4.0,
        "boundary_contrast": 5.0,
    }


def test_the_heads_terms_are_those_of_the_attended_feature(case) -> None:
    feature = attended(case.seen.features, case.seen.maps, case.recipe)
    outputs, boundaries = case.network.head(feature)
    priors = case.network.head.priors
    losses = segment_losses(HeadOutputs(*outputs), truth(case.targets), priors, 128, 0.01, case.recipe)
    for name, expected in losses._asdict().items():
        torch.testing.assert_close(value(case.found, name), expected)
    expected = {"start": 0.0, "end": 0.0}
    for weight, part in (
        (1.0, boundaries.frame),
        (0.1, boundaries.location),
        (0.1, boundaries.classification),
    ):
        for name, loss in boundary_loss(*part.chunk(2, 1), case.targets["maps"])._asdict().items():
            expected[name] += weight * loss
    for name in expected:
        torch.testing.assert_close(value(case.found, name), expected[name])


def test_background_is_scored_on_what_attention_leaves(case) -> None:
    """FINDINGS 22: `official` adds up 126 priors, here 63, `corrected` takes their mean; so they differ."""
    rest = {tap: 1 - attention for tap, attention in case.seen.maps.items()}
    conf = case.network.head.class_logits(attended(case.seen.features, rest, case.recipe))
    torch.testing.assert_close(value(case.found, "background"), background_loss(conf, case.recipe))
    each = focal_loss(conf, torch.zeros(conf.shape[:2], dtype=torch.long))
    expected = each.sum() if case.recipe == "official" else each.sum() / (len(case.clips) * 63)
    torch.testing.assert_close(value(case.found, "background"), expected)


def test_the_contrast_is_of_the_spliced_clips_attended_foreground(case) -> None:
    feature = attended(case.more.features, case.more.maps, case.recipe)
    boundaries = case.network.head(feature)[1]
    frames = proposal_segments(case.targets["proposals"][case.targets["spliced"]])
    expected = 0.0
    for weight, part, segments in (
        (1.0, boundaries.frame, frames),
        (0.1, boundaries.location, frames / 4),
        (0.1, boundaries.classification, frames / 4),
    ):
        expected += weight * boundary_contrast(boundary_max_pool(part, segments), torch.tensor([True]))
    torch.testing.assert_close(value(case.found, "boundary_contrast"), expected)


def test_a_batch_without_splices_has_no_contrast(case) -> None:
    found, *_ = supervise(case.settings, case.network, case.clips, None, case.targets)
    assert sorted(found.terms) == sorted(set(WEIGHTS) - {"boundary_contrast"})
    for name, term in found.terms.items():
        torch.testing.assert_close(term.value, value(case.found, name))


def test_without_its_weight_the_background_is_not_computed() -> None:
    settings = page("distill.background_weight=0")
    network = networks(settings, CLASSES).student
    calls = []
    network.head.class_logits = lambda *_: calls.append(1)
    found, *_ = supervise(settings, network, *batch())
    assert "background" not in found.terms
    assert not calls


def test_what_generated_features_are_compared_with(case) -> None:
    """FINDINGS 1: `official` has overwritten the features by the attended one written last."""
    without, *_ = supervise(case.settings, case.network, case.clips, None, case.targets)
    if case.recipe == "corrected":
        assert case.found.generated_like is without.generated_like is None
        return
    rest = {tap: 1 - attention for tap, attention in case.seen.maps.items()}
    for found, expected in (
        (case.found, attended(case.more.features, case.more.maps, "official")),
        (without, attended(case.seen.features, rest, "official")),
    ):
        assert found.generated_like.keys() == expected.keys() == {"Mixed_5c", "Mixed_4f"}
        for tap, feature in expected.items():
            torch.testing.assert_close(found.generated_like[tap], feature)


def step(settings, clips, spliced, targets, played=None, ramp=1.0):
    played = played or networks(settings, CLASSES)
    shown = clips if spliced is None else torch.cat([clips, spliced])
    seen = see(played.forward, played.student, shown)
    supervised = lambda ours, more, noise: detection.supervised_terms(  # noqa: E731
        played.student, ours, more, targets, noise, settings
    )
    noise = Noise(0, 1, 1, range(len(clips)))
    terms = network_terms(
        played, shown, seen, noise, ramp, settings.distill, supervised, len(shown) - len(clips)
    )
    return terms, played, seen.divided(len(clips))[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_reconstruction_meets_the_last_attended_feature_or_the_taps_own(recipe) -> None:
    """FINDINGS 1, in the step: against features of 1e-4 a silent generator would win."""
    settings = page(*RECIPES[recipe])
    clips, spliced, targets = batch(1 if recipe == "official" else 2)
    played = networks(settings, CLASSES)
    played.student.hold_norms("held")
    with torch.no_grad():
        terms, _, seen = step(settings, clips, spliced, targets, played, ramp=0.5)
        noise = Noise(0, 1, 1, range(len(clips)))
        if recipe == "official":
            more = see(Forward(), played.student, spliced)
            wanted = attended(more.features, more.maps, "official")
        else:
            wanted = seen.features
        for tap in ("Mixed_4f", "Mixed_5c"):  # in the order in which noise is drawn
            attention = seen.maps[tap]
            shape = (len(clips), attention.shape[2], attention.shape[1])
            generated = played.generators[tap].generate(attention, noise.normal(shape))
            term = terms[f"reconstruction.{tap}"]
            assert term.weight == 0.25
            torch.testing.assert_close(term.value, (generated - wanted[tap]).square().mean())


def test_attention_is_distilled_on_clips_and_on_spliced_ones_by_the_same_weight() -> None:
    settings = page("distill.beta=7")
    clips, spliced, targets = batch()
    played = networks(settings, CLASSES)
    played.student.hold_norms("held")
    with torch.no_grad():
        terms, *_ = step(settings, clips, spliced, targets, played)
        for shown, name in ((clips, ""), (spliced, ".spliced")):
            ours, theirs = (
                see(Forward(), network, shown).maps for network in (played.student, played.teacher)
            )
            for tap in ("Mixed_5c", "Mixed_4f"):
                term = terms[f"attention_distillation.{tap}{name}"]
                assert term.weight == 7.0
                torch.testing.assert_close(term.value, (ours[tap] - theirs[tap]).square().mean())
        terms, *_ = step(settings, clips, None, targets, played)
    assert not [name for name in terms if name.endswith(".spliced")]


def test_every_spliced_clip_counts() -> None:
    """FINDINGS 19: the published triplet branch takes the first clip of a batch alone."""
    settings = page()
    network = networks(settings, CLASSES).student
    network.hold_norms("held")
    clips, spliced, targets = batch()
    other = spliced.roll(9, 2)
    targets = targets | {
        "spliced": torch.tensor([True, True]),
        "proposals": torch.tensor([[(10, 30), (50, 80), (31, 49)], [(20, 45), (60, 105), (46, 59)]]).float(),
    }
    with torch.no_grad():
        both, *_ = supervise(settings, network, clips, torch.cat([other, spliced]), targets)
        single = []
        for clip, shown in enumerate((other, spliced)):
            one = targets | {"spliced": torch.tensor([clip == 0, clip == 1])}
            single.append(value(supervise(settings, network, clips, shown, one)[0], "boundary_contrast"))
    assert abs(single[0] - single[1]) > 1e-3
    # rounding, magnified by the group norms of so narrow a network
    torch.testing.assert_close(value(both, "boundary_contrast"), sum(single) / 2, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("recipe", "pulls"), [("official", True), ("corrected", False)])
def test_quality_pulls_at_the_distances_in_official_alone(recipe, pulls) -> None:
    """FINDINGS 21: the IoU that quality should tell is differentiated through, or is not."""
    settings = page(*RECIPES[recipe])
    network = networks(settings, CLASSES).student
    found, *_ = supervise(settings, network, *batch(1))
    value(found, "quality").backward()
    assert network.head.center_head.weight.grad.abs().sum() > 0
    for part in (network.head.loc_head, network.head.prop_loc_head):
        assert (part.weight.grad is not None and bool(part.weight.grad.any())) is pulls


def test_the_plain_student_has_the_heads_terms_on_the_plain_feature() -> None:
    """No attention, no CVAE, no background term (METHOD.md 8); the contrast stays."""
    settings = page("distill.method=none")
    played = networks(settings, CLASSES, distilling=False)
    played.student.hold_norms("held")
    clips, spliced, targets = batch()
    assert not played.student.attention
    terms, _, seen = step(settings, clips, spliced, targets, played)
    assert sorted(terms) == sorted(set(WEIGHTS) - {"background"})
    assert seen.maps == {}
    outputs, _ = played.student.head(seen.features)
    losses = segment_losses(
        HeadOutputs(*outputs), truth(targets), played.student.head.priors, 128, 0.5, "corrected"
    )
    for name, expected in losses._asdict().items():
        torch.testing.assert_close(terms[name].value, expected)
    official = page("distill.method=none", *OFFICIAL)
    found, seen, more = supervise(official, played.student, *batch(1))
    assert "background" not in found.terms
    assert all(found.generated_like[tap] is more.features[tap] for tap in more.features)


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_term_moves_what_it_is_meant_to_move(name) -> None:
    """A term that nothing learns by would go unnoticed: its value is logged all the same."""
    settings = page("distill.refine_iou=0.01")
    network = networks(settings, CLASSES).student
    found, *_ = supervise(settings, network, *batch())
    value(found, name).backward()
    touched = {key for key, parameter in network.named_parameters() if parameter.grad is not None}
    moved = {key for key in touched if dict(network.named_parameters())[key].grad.any()}
    own = {
        "location": "head.loc_head.weight",
        "classification": "head.conf_head.weight",
        "refined_location": "head.prop_loc_head.weight",
        "refined_classification": "head.prop_conf_head.weight",
        "quality": "head.center_head.weight",
        "start": "head.frame_level.2.conv.weight",
        "end": "head.frame_level.2.conv.weight",
        "background": "head.conf_head.weight",
        "boundary_contrast": "head.loc_branch.boundary.conv.weight",
    }
    assert own[name] in moved
    for part in ("backbone.Conv3d_1a_7x7", "attention.Mixed_4f.time", "head.pyramid.0"):
        assert any(key.startswith(part) for key in moved), part


# ---- networks and clips ----


@pytest.mark.parametrize(("role", "kind"), [("teacher", "i3d"), ("student", "top-i3d")])
def test_networks_are_built_from_the_page(role, kind) -> None:
    network = detection.build_network(page(), role, 5, "rgb")
    assert network.backbone.kind == kind
    assert network.recipe == "corrected"
    assert network.head.conf_head.out_channels == 6
    assert sorted(network.attention) == ["Mixed_4f", "Mixed_5c"]
    assert not network.head.loc_head.bias.any()  # its first weights are the stated ones
    assert detection.build_network(page(), role, 5, "flow").backbone.Conv3d_1a_7x7.conv3d.in_channels == 2
    assert not detection.build_network(page(), role, 5, "rgb", attention=False).attention


@pytest.mark.parametrize(
    ("sets", "began", "expected"),
    [
        (OFFICIAL, "from scratch", "held"),
        (OFFICIAL, "462 tensors from the teacher", "held"),
        ((), "from scratch", "trained"),
        ((), "462 tensors from the teacher", "frozen"),
        ((), "backbone from rgb_imagenet.pt (57 units)", "frozen"),
        (("task=recognition",), "462 tensors from the teacher", "trained"),
        (("task=recognition", "recipe=official"), "from scratch", "trained"),
    ],
)
def test_what_happens_to_batch_norm(sets, began, expected) -> None:
    """FINDINGS 7: frozen wholly where weights were trained before; `official` trains gains and biases."""
    assert norms_of(page(*sets), began) == expected


def test_fewer_clips_than_a_batch_are_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path, [Video("train", f"v{n}", picture(n, 140)) for n in range(2)], "raw")
    store.segments = [(Segment(2.0, 4.0, 0, 20.0, 40.0),), ()]
    assert len(detection.training_set(store, [0, 1], page("optim.batch_size=2"))) == 2  # offsets 0 and 12
    with pytest.raises(GkdError, match="2 training clips, fewer than a batch of 3") as caught:
        detection.training_set(store, [0, 1], page("optim.batch_size=3"))
    assert "--batch-size" in caught.value.hint
    assert "2 training videos" in caught.value.where
    with pytest.raises(GkdError, match="0 training clips"):
        detection.training_set(store, [1], page("optim.batch_size=1"))
