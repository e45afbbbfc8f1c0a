"""training.schedule and training.optim: orders, groups, learning rates; against plain counting."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gkdcli.settings import OptimSettings
from gkdcli.training import optim
from gkdcli.training.schedule import Schedule


def plan(clips: int, passes: int, **settings: int) -> Schedule:
    return Schedule(clips, (0, 1)[:passes], 5, OptimSettings(**settings))


plans = st.builds(
    plan,
    st.integers(1, 40),
    st.integers(1, 2),
    batch_size=st.integers(1, 9),
    accumulation=st.integers(1, 5),
    epochs=st.integers(1, 3),
)


@given(plans)
def test_steps_epochs_and_groups_are_what_plain_loops_count(schedule):
    size, group = schedule.optim.batch_size, schedule.optim.accumulation
    step = 0
    for epoch in range(1, schedule.optim.epochs + 1):
        for part in schedule.parts:
            sizes = [size] * (schedule.clips // size) + [schedule.clips % size] * (schedule.clips % size > 0)
            for batch in range(len(sizes)):
                assert schedule.spot(step) == (epoch, part, batch)
                mates = sizes[batch // group * group :][:group]
                assert schedule.share(batch) == pytest.approx(sizes[batch] / sum(mates))
                assert schedule.closes(batch) == (batch % group == group - 1 or batch == len(sizes) - 1)
                step += 1
        assert step == epoch * schedule.steps_per_epoch
    assert step == schedule.steps
    assert schedule.last_step(None) == step


@given(plans, st.integers(1, 200))
def test_a_stop_falls_behind_a_closed_group_at_most_one_group_late(schedule, wanted):
    last = schedule.last_step(wanted)
    assert min(wanted, schedule.steps) <= last < wanted + schedule.optim.accumulation
    assert last <= schedule.steps
    assert schedule.closes(schedule.spot(last - 1).batch)


@given(plans, st.data())
def test_a_continuation_reads_what_is_left(schedule, data):
    whole = list(schedule.keys(0, schedule.steps))
    assert len(whole) == schedule.steps
    start = data.draw(st.integers(0, schedule.steps))
    last = data.draw(st.integers(start, schedule.steps))
    assert list(schedule.keys(start, last)) == whole[start:last]
    for step, keys in enumerate(whole):
        spot = schedule.spot(step)
        assert {key[1:] for key in keys} == {(spot.epoch, spot.part)}


def test_both_passes_of_an_epoch_take_every_clip_once_the_last_batch_kept():
    schedule = plan(7, 2, batch_size=3, epochs=1)
    keys = list(schedule.keys(0, schedule.steps))
    assert [len(batch) for batch in keys] == [3, 3, 1, 3, 3, 1]
    for part in (0, 1):
        taken = [key[0] for batch in keys for key in batch if key[2] == part]
        assert sorted(taken) == list(range(7))


@given(plans)
def test_detection_leaves_a_batch_out_that_is_not_full(kept):
    """Orders stay; a group's gradient is shared among the batches that are taken."""
    size, group = kept.optim.batch_size, kept.optim.accumulation
    if kept.clips < size:
        return
    schedule = Schedule(kept.clips, kept.parts, 5, kept.optim, drop_last=True)
    assert schedule.batches == kept.clips // size
    whole = list(schedule.keys(0, schedule.steps))
    assert len(whole) == schedule.steps
    assert {len(keys) for keys in whole} == {size}
    full = [keys for keys in kept.keys(0, kept.steps) if len(keys) == size]
    assert whole == full
    for batch in range(schedule.batches):
        mates = range(batch // group * group, schedule.batches)[:group]
        assert schedule.share(batch) == pytest.approx(1 / len(mates))
        assert schedule.closes(batch) == (batch == mates[-1])


def test_rates_warm_up_then_stay_or_fall_to_nothing():
    constant = OptimSettings(epochs=10, schedule="constant", warmup_epochs=2)
    cosine = OptimSettings(epochs=10, schedule="cosine", warmup_epochs=2)
    for settings in (constant, cosine):
        assert 0 < optim.rate_factor(settings, 0) < 1e-3
        assert optim.rate_factor(settings, 1) == pytest.approx(0.5, abs=1e-3)
        assert optim.rate_factor(settings, 1.99999) <= 1
        assert optim.rate_factor(settings, 2) == 1
    assert optim.rate_factor(constant, 9.99) == 1
    assert optim.rate_factor(cosine, 6) == pytest.approx(0.5)
    assert optim.rate_factor(cosine, 4) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert optim.rate_factor(cosine, 10) == pytest.approx(0)
    assert optim.rate_factor(OptimSettings(epochs=10), 0) == 1  # as published: no schedule


def test_a_group_has_the_rate_of_the_large_batch_it_stands_for():
    large = plan(12, 1, batch_size=6, epochs=2)
    small = plan(12, 1, batch_size=2, accumulation=3, epochs=2)
    assert [small.rate(step) for step in range(12)] == [large.rate(step // 3) for step in range(12)]


def test_optimisers_are_the_published_ones():
    parameter = torch.nn.Parameter(torch.ones(3))
    frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    settings = OptimSettings(learning_rate=0.1, momentum=0.9, weight_decay=5e-4)
    sgd = optim.network_optimizer([parameter, frozen], settings)
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["momentum"], sgd.defaults["weight_decay"]) == (0.9, 5e-4)
    assert sgd.param_groups[0]["params"] == [parameter]
    adam = optim.network_optimizer([parameter], OptimSettings(algorithm="adam", weight_decay=1e-3))
    assert type(adam) is torch.optim.Adam  # coupled weight decay
    assert (adam.defaults["betas"], adam.defaults["weight_decay"]) == ((0.9, 0.999), 1e-3)
    cvae = optim.generator_optimizer([parameter], OptimSettings(generator_lr=1e-4))
    assert type(cvae) is torch.optim.Adam
    assert (cvae.defaults["lr"], cvae.defaults["betas"], cvae.defaults["weight_decay"]) == (
        1e-4,
        (0.8, 0.999),
        0,
    )


@pytest.mark.parametrize("algorithm", ["sgd", "adam"])
def test_optimiser_state_comes_back_to_the_bit_and_in_the_layout_of_its_parameter(algorithm):
    def fresh() -> tuple[torch.nn.Conv3d, torch.optim.Optimizer]:
        torch.manual_seed(0)
        conv = torch.nn.Conv3d(3, 4, 3).to(memory_format=torch.channels_last_3d)
        return conv, optim.network_optimizer(conv.parameters(), OptimSettings(algorithm=algorithm))

    def step(conv: torch.nn.Conv3d, optimizer: torch.optim.Optimizer) -> None:
        conv(torch.ones(1, 3, 4, 4, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    conv, optimizer = fresh()
    step(conv, optimizer)
    saved = {name: value.clone() for name, value in optim.optimizer_tensors(optimizer, "o.").items()}
    again, restored = fresh()
    again.load_state_dict(conv.state_dict())
    optim.restore_optimizer(restored, {name: value.contiguous() for name, value in saved.items()}, "o.")
    assert {name: value.tolist() for name, value in optim.optimizer_tensors(restored, "o.").items()} == {
        name: value.tolist() for name, value in saved.items()
    }
    kind = "momentum_buffer" if algorithm == "sgd" else "exp_avg"
    assert restored.state[again.weight][kind].stride() == again.weight.stride()
    for _ in range(3):
        step(conv, optimizer)
        step(again, restored)
    assert torch.equal(conv.weight, again.weight)
