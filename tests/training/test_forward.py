"""training.forward: how far bf16, torch.compile and channels innermost are from float32.

Features are compared in trained networks. A fresh, narrow one normalises all but equal values, which
magnifies any rounding: its features move by tenths in bf16, its losses do not. On the CPU only forward passes
are tried in bf16: gradients are wrong there, and training refuses it.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gkdcli.data.clips import ClipDataset, normalise
from gkdcli.data.store import Store
from gkdcli.errors import GkdError
from gkdcli.models.layers import LAYOUT
from gkdcli.models.recognizer import Recognizer
from gkdcli.runs import Run
from gkdcli.tasks import recognition
from gkdcli.tasks.trained import rebuild
from gkdcli.training.forward import Forward
from gkdcli.training.noise import Noise
from gkdcli.training.steps import (
    Networks,
    generator_terms,
    held_statistics,
    network_terms,
    see,
)
from tests.training.jobs import metrics_of, networks, page, settle, store_of, trainer_of

LABELS = {"labels": torch.tensor([0, 1, 2, 1])}
PAIRS = [("i3d", "top-i3d"), ("s3d", "mc3_18")]


@pytest.fixture
def clips() -> Tensor:
    return torch.randn(4, 3, 16, 32, 32, generator=torch.Generator().manual_seed(0))


def distance(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference, relative."""
    return float(((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()).detach())


def in_play(pair: tuple[str, str], **changes) -> tuple:
    settings = page(model__teacher=pair[0], model__student=pair[1], model__dropout=0.0, **changes)
    return networks(settings, 3), settings


def outputs(played: Networks, clips: Tensor) -> dict[str, Tensor]:
    """Of the student: features, maps, logits."""
    with torch.no_grad(), held_statistics(played.student):
        features, maps = see(played.forward, played.student, clips)
        logits = played.student.logits(features["Mixed_5c"])
    return {"feature": features["Mixed_5c"], "map": maps["Mixed_5c"], "logits": logits}


def terms(played: Networks, clips: Tensor, settings) -> dict[str, float]:
    """The loss terms of both stages of a step, in training mode."""
    student = played.student.train()
    with torch.no_grad(), held_statistics(student):
        seen = see(played.forward, student, clips)
        noise = [Noise(0, 1, part, range(4), torch.device("cpu")) for part in (0, 1)]
        found = generator_terms(played, seen, noise[0], settings.distill)
        found |= network_terms(
            played,
            clips,
            seen,
            noise[1],
            0.5,
            settings.distill,
            lambda ours, _, n: recognition.supervised_terms(student, ours, None, LABELS, n, settings),
        )
    assert {term.value.dtype for term in found.values()} == {torch.float32}
    return {name: float(term.value.detach()) for name, term in found.items()}


@pytest.mark.parametrize("stage", ["pretrain-attention", "distill"])
def test_features_maps_and_logits_of_a_trained_network_in_bf16(stage, tiny_trained):
    (folder,) = tiny_trained.glob(f"runs/demo-tiny/{stage}-rgb/*")
    run, store = Run(folder), Store.open(tiny_trained / "stores/demo-tiny/rgb.h5")
    views = ClipDataset(store, store.split(1, "test"), run.settings.clips, run.settings.recipe, seed=None)
    seen = normalise(torch.stack([views[n, 0, 0][0] for n in range(12)]), run.settings.clips)
    played = Networks(rebuild(run))
    wanted = outputs(played, seen)
    played.forward = Forward("bf16")
    found = outputs(played, seen)
    assert {value.dtype for value in found.values()} == {torch.float32}
    distances = {name: distance(found[name], wanted[name]) for name in wanted}
    assert max(distances.values()) < 0.05, distances
    assert distances["feature"] > 1e-4  # it was bf16


@pytest.mark.parametrize(
    ("pair", "precision"),
    [
        (PAIRS[0], "bf16"),
        (PAIRS[0], "fp16"),
        pytest.param(PAIRS[1], "bf16", marks=pytest.mark.slow),  # a minute: CPUs have no fast bf16
    ],
    ids=str,
)
def test_every_term_of_a_step_in_16_bits_is_within_five_percent(pair, precision, clips):
    played, settings = in_play(pair)
    wanted = terms(played, clips, settings)
    played.forward = Forward(precision)
    found = terms(played, clips, settings)
    assert len(wanted) == 6
    assert {name: abs(found[name] / wanted[name] - 1) < 0.05 for name in wanted} == dict.fromkeys(
        wanted, True
    )
    assert found != wanted


@pytest.mark.gpu
@pytest.mark.parametrize("lower", ["bf16", "fp16"])
def test_a_run_in_16_bits_keeps_float32_weights_and_learns_alike(tmp_path, lower):
    store = store_of(tmp_path / "store", 8)
    ends = {}
    for precision in ("32", lower):
        settings = page(train__precision=precision, optim__epochs=4, optim__batch_size=4)
        played = replace(networks(settings, 3), forward=Forward(precision, device=torch.device("cuda")))
        trainer = trainer_of(tmp_path / precision, store, settings, played=played, accelerator="cuda")
        trainer.fit(None)
        dtypes = {value.dtype for value in played.student.state_dict().values() if value.is_floating_point()}
        assert dtypes == {torch.float32}
        ends[precision] = [line for line in metrics_of(trainer.run) if "mean" in line][-1]["mean"]
    assert ends[lower] != ends["32"]
    for name, value in ends["32"].items():
        assert ends[lower][name] == pytest.approx(value, rel=0.15), name


@pytest.mark.parametrize(
    ("precision", "why"),
    [
        ("bf16", "bf16 gradients of 3D convolutions are wrong on the CPU"),
        ("fp16", "fp16 trains on GPUs only"),
    ],
)
def test_16_bits_are_refused_on_the_cpu(gkd, workspace, precision, why):
    outcome = gkd(
        "pretrain-attention",
        "demo-tiny",
        "--root",
        workspace,
        "--device",
        "cpu",
        "--set",
        f"train.precision={precision}",
    )
    assert outcome.code == 1
    assert why in outcome.err
    assert "bf16" in outcome.err
    assert "cpu" in outcome.err.lower()
    assert not (workspace / "runs").exists()


@pytest.mark.parametrize(("kind", "bound"), [("i3d", 1e-4), ("top-i3d", 1e-4), ("s3d", 1e-3)])
@pytest.mark.parametrize("training", [True, False])
def test_channels_innermost_are_within_rounding(kind, bound, training, clips):
    built = {}
    for choice in ("off", "on"):
        torch.manual_seed(0)
        built[choice] = Recognizer(kind, 3, length=16, crop=32, width=0.25, channels_last=choice)
    settle(built["off"], clips)
    built["on"].load_state_dict(built["off"].state_dict())
    assert built["on"].backbone.layout == LAYOUT
    assert built["off"].backbone.layout == torch.contiguous_format
    taps = {}
    for choice, network in built.items():
        with torch.no_grad(), held_statistics(network.train(training)):
            taps[choice] = network.features(clips)["Mixed_5c"]
    # in training mode a batch norm over eight all but equal values multiplies the rounding
    assert distance(taps["on"], taps["off"]) < (1e-2 if training else bound)


@pytest.mark.parametrize(("width", "innermost"), [(0.25, True), (0.5, False)])
def test_auto_is_the_layout_that_is_fastest_on_cpus(width, innermost):
    with torch.device("meta"):
        network = Recognizer("top-i3d", 3, length=16, crop=32, width=width)
    assert (network.backbone.layout == LAYOUT) is innermost


def test_where_nothing_can_be_compiled_it_is_said_at_once(monkeypatch):
    def broken(function, **_):
        def call(*_):
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nmore\nlines")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(GkdError) as caught:
        Forward(compiled=True)
    assert caught.value.what.endswith("machine: InvalidCxxCompiler: No working C++ compiler found")
    assert caught.value.where == "train.compile = true"
    assert "train.compile=false" in caught.value.hint


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["top-i3d", "mc3_18"])
def test_compiled_features_statistics_and_gradients_are_those_of_the_network(kind, clips):
    """Minutes: the compiler writes, and a C++ compiler translates, some hundred kernels."""
    torch.manual_seed(0)
    plain = Recognizer(kind, 3, length=16, crop=32, width=0.0625)
    settle(plain, clips)
    other = Recognizer(kind, 3, length=16, crop=32, width=0.0625)
    other.load_state_dict(plain.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        forwards = {plain: Forward(), other: Forward(compiled=True)}
        results = []
        for network, forward in forwards.items():
            with torch.no_grad():
                settled = forward.features(network.eval(), clips)["Mixed_5c"]
            with torch.no_grad(), held_statistics(network.train()):
                before = network.state_dict()["backbone." + _norm(network)].clone()
                forward.features(network, clips)
                assert torch.equal(network.state_dict()["backbone." + _norm(network)], before)
            trained = forward.features(network, clips)["Mixed_5c"]
            trained.square().mean().backward()
            statistics = network.state_dict()["backbone." + _norm(network)]
            assert not torch.equal(statistics, before)
            first = next(network.backbone.parameters()).grad
            results.append((settled, statistics, trained, first))
    bounds = (1e-5, 1e-5, 1e-2, 1e-1)  # see the head of this file for the last two
    for found, wanted, bound in zip(results[1], results[0], bounds, strict=True):
        assert distance(found, wanted) < bound
    assert other.state_dict().keys() == plain.state_dict().keys()


def _norm(network: Recognizer) -> str:
    return next(name for name in network.backbone.state_dict() if name.endswith("running_mean"))
