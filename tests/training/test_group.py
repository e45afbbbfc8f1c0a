"""Several processes: how they divide a batch, and that two of them do what one does (training.processes)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from gkdcli.errors import GkdError
from gkdcli.launch import Launch, launched
from gkdcli.models.recognizer import Recognizer
from gkdcli.runs import Run
from gkdcli.settings import OptimSettings
from gkdcli.training import processes
from gkdcli.training.processes import Group
from gkdcli.training.schedule import Schedule
from gkdcli.training.steps import held_statistics
from gkdcli.training.stopping import Report, mean_values
from tests.training import pair
from tests.training.jobs import metrics_of, store_of, untimed

# ---- arithmetic ----


@given(
    clips=st.integers(1, 40),
    size=st.integers(1, 5),
    count=st.integers(1, 6),
    accumulation=st.integers(1, 4),
    drop_last=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_processes_divide_each_batch_and_their_shares_of_a_group_are_one(
    clips, size, count, accumulation, drop_last
):
    """Together they take the clips that one process with their batch takes, in its order."""
    optim = OptimSettings(batch_size=size, accumulation=accumulation, epochs=2)
    whole = Schedule(clips, (0, 1), 7, optim.model_copy(update={"batch_size": size * count}), drop_last)
    each = [Schedule(clips, (0, 1), 7, optim, drop_last, count, rank) for rank in range(count)]
    if not whole.batches:
        assert all(schedule.batches == 0 for schedule in each)
        return
    assert {(s.batches, s.steps, s.batch_size) for s in each} == {(whole.batches, whole.steps, size * count)}
    assert {schedule.rate(step) for schedule in each for step in (1,)} == {whole.rate(1)}
    taken = zip(whole.keys(0, whole.steps), *(s.keys(0, s.steps) for s in each), strict=True)
    shares = 0.0
    for step, (wanted, *parts) in enumerate(taken):
        batch = whole.spot(step).batch
        own = [schedule.own(batch) for schedule in each]
        assert max(own) - min(own) <= 1
        assert own == sorted(own, reverse=True)  # the first, whose running statistics are kept, has clips
        assert sum(own) == len(wanted) == each[0].size(batch)
        assert [len(part) for part in parts] == [max(n, 1) for n in own]  # nobody is without
        assert [key for n, part in zip(own, parts, strict=True) for key in part[:n]] == wanted
        assert all(part[0] in wanted for part in parts)
        shares += sum(schedule.share(batch) for schedule in each)
        assert sum(schedule.share(batch) for schedule in each) == pytest.approx(whole.share(batch))
        if whole.closes(batch):
            assert shares == pytest.approx(1)
            shares = 0.0


def test_means_count_clips_and_a_term_that_one_process_lacks_is_0_there():
    reports = [
        Report({"a": 1.0, "loss": 1.0}, 3, [], []),
        Report({"a": 2.0, "b": 8.0, "loss": 4.0}, 1, [], []),
        Report({"a": 7.0, "loss": 7.0}, 0, [], []),  # a stand-in: its clip is another's
    ]
    assert mean_values(reports) == {"a": 1.25, "b": 2.0, "loss": 1.75}


@pytest.mark.parametrize("size", [1, 40, 10**9])
def test_buckets_keep_order_and_types_apart(monkeypatch, size):
    monkeypatch.setattr(processes, "BUCKET", size)
    tensors = [torch.zeros(n, dtype=dtype) for n in (1, 4, 2) for dtype in (torch.float32, torch.int64)]
    buckets = list(processes._buckets(tensors))
    assert [id(value) for bucket in buckets for value in bucket] == [
        id(value) for dtype in (torch.float32, torch.int64) for value in tensors if value.dtype == dtype
    ]
    assert all(len({value.dtype for value in bucket}) == 1 for bucket in buckets)
    assert len(buckets) == {1: 6, 40: 3, 10**9: 2}[size]  # 24 bytes of floats; 8, 32 and 16 of integers


def test_alone_nothing_is_exchanged():
    group = Group()
    assert (group.gather(3), group.agree(True, False), group.share(lambda: 5)) == ([3], (True, False), 5)
    assert group.part(0, torch.device("cpu")) == 1.0
    assert group.divisors(torch.tensor([0, 3])).tolist() == [1, 3]
    with group.in_turn():
        pass


# ---- what torchrun says ----

COMPLETE = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "job",
    "TORCHELASTIC_RESTART_COUNT": "2",
}  # fmt: skip


def test_only_a_whole_environment_counts(monkeypatch):
    """RANK and WORLD_SIZE are left behind by many programs: nobody else would come."""
    assert launched() == Launch()
    for name, value in COMPLETE.items():
        monkeypatch.setenv(name, value)
    assert launched() == Launch(3, 4, 2, "job", 2)
    for name in COMPLETE:
        if name != "GROUP_RANK":
            with monkeypatch.context() as without:
                without.delenv(name)
                assert launched() == Launch(), name
    for name, value in (("RANK", "4"), ("RANK", "-1"), ("WORLD_SIZE", "many"), ("LOCAL_WORLD_SIZE", "0")):
        with monkeypatch.context() as odd:
            odd.setenv(name, value)
            assert launched() == Launch(), (name, value)


def test_a_torchrun_that_is_gone_is_no_reason_to_wait(monkeypatch):
    """All of its variables, left over."""
    for name, value in COMPLETE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "ANSWER", 0.5)
    with pytest.raises(GkdError, match=r"nobody answers at 127\.0\.0\.1:1, where torchrun should be"):
        Group.join(launched())


def test_a_command_is_typed_for_as_many_processes():
    assert Launch().typed("gkd distill demo") == "gkd distill demo"
    assert Launch(0, 2, 2).typed("gkd distill a") == "torchrun --nproc-per-node 2 -m gkdcli distill a"
    typed = Launch(0, 8, 4).typed("gkd distill a")
    assert typed == "torchrun --nnodes 2 ... --nproc-per-node 4 -m gkdcli distill a"


# ---- two processes and one ----


@pytest.fixture(scope="module")
def folder(tiny_detection_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What two processes and one have made of the same runs."""
    found = tmp_path_factory.mktemp("pair")
    store = store_of(found / "drawn", 7)
    other = tiny_detection_store / "stores" / "demo-detection-tiny" / "rgb.h5"
    pair.write(found / "stores.json", {"recognition": str(store.path), "detection": str(other)})
    pair.start(found)
    torch.set_default_dtype(torch.float64)
    try:
        for name in pair.CASES:
            pair.train(found, name, Group())
    finally:
        torch.set_default_dtype(torch.float32)
    yield found
    shutil.rmtree(found)


def run_of(folder: Path, size: int, name: str) -> Run:
    return Run(Path((folder / f"{size}" / f"{name}.run").read_text()))


def flat(path: Path, prefix: str) -> torch.Tensor:
    """Weights, or what the optimisers keep of the gradients themselves: squares hide their size."""
    tensors = load_file(path)
    names = [name for name in tensors if name.startswith(prefix) and tensors[name].is_floating_point()]
    kept = [name for name in names if not prefix.startswith("optim") or name.endswith(".exp_avg")]
    return torch.cat([tensors[name].flatten() for name in kept])


@pytest.mark.parametrize("name", pair.CASES)
def test_two_processes_end_where_one_with_their_batch_does(folder: Path, name: str):
    """Weights, gradients and the means that are logged; what is left comes from ReLUs at 0."""
    ours, theirs = run_of(folder, 2, name), run_of(folder, 1, name)
    assert load_file(ours.last).keys() == load_file(theirs.last).keys()
    for prefix in ("network.", "generator.", "optim.network.", "optim.generator."):
        two, one = flat(ours.last, prefix), flat(theirs.last, prefix)
        assert (two - one).norm() < 1e-5 * one.norm(), prefix
    moved = [line for line in metrics_of(theirs) if "loss" in line]
    assert len(moved) == len({line["loss"] for line in moved}) >= pair.CASES[name].steps
    for line, wanted in zip(untimed(metrics_of(ours)), untimed(metrics_of(theirs)), strict=True):
        for found, expected in ((line, wanted), (line.get("mean", {}), wanted.get("mean", {}))):
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                if isinstance(value, float):
                    assert found[key] == pytest.approx(value, rel=1e-5), key
                elif key != "mean":
                    assert found[key] == value, key


def test_a_process_without_spliced_clips_takes_its_part(folder: Path):
    """Which is to ask the others how many they have."""
    had = {
        pattern
        for name, case in pair.CASES.items()
        if case.task == "detection"
        for pattern in zip(*(json.loads((run_of(folder, 2, name).folder / f"spliced{rank}.json").read_text())
                             for rank in pair.RANKS), strict=True)
    }  # fmt: skip
    assert had & {(True, False), (False, True)}


def seen(folder: Path, what: str) -> list[list[Any]]:
    return [json.loads((folder / f"{what}{rank}.json").read_text()) for rank in pair.RANKS]


def test_a_loss_that_is_no_number_in_one_process_stops_both_and_names_its_clips(folder: Path):
    first, second = seen(folder, "not finite")
    assert first[:5] == second[:5]
    kind, what, where, _, step, names, state, _ = first
    assert (kind, step, state) == ("GkdError", 1, "failed")
    assert what == "the loss stopped being finite at epoch 1, step 2; first bad term: classification = nan"
    assert set(names) != set(second[5])
    assert where.startswith(f"clips {', '.join(second[5])};")


def test_a_signal_to_one_process_stops_both_after_the_same_step(folder: Path):
    first, second = seen(folder, "signal")
    assert first[:5] == second[:5]
    assert first[0] == "Interrupted"
    assert first[4] == 2
    assert first[6] == "interrupted"


def test_a_failure_of_one_process_is_told_once_by_the_first(folder: Path):
    first, second = seen(folder, "failure")
    assert second[1:4] == ["a video is damaged", "a/v3", "prepare it again"]
    assert first[1] == second[1]
    assert first[2] == "a/v3; process 1 of 2, counted from 0"
    assert (first[7], second[7]) == (True, False)
    assert first[6] == "failed"


# ---- batch norm of all ----


def test_synchronised_batch_norms_keep_names_and_obey_as_the_others_do():
    """They run on GPUs only; alone they compute what plain ones do, on the CPU too."""
    torch.manual_seed(0)
    network = Recognizer("top-i3d", 5, length=16, crop=32, width=0.0625)
    before, clips = {k: v.clone() for k, v in network.state_dict().items()}, torch.randn(2, 3, 16, 32, 32)
    plain = network.features(clips)["Mixed_5c"]
    moved = {k: v.clone() for k, v in network.state_dict().items()}
    network.load_state_dict(before)
    network.sync_norms()
    assert not any(isinstance(module, nn.BatchNorm3d) for module in network.modules())
    assert list(network.state_dict()) == list(before)
    assert torch.equal(network.features(clips)["Mixed_5c"], plain)
    assert all(torch.equal(value, moved[name]) for name, value in network.state_dict().items())
    network.load_state_dict(before)
    with held_statistics(network):
        assert torch.equal(network.features(clips)["Mixed_5c"], plain)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    network.hold_norms("frozen")
    assert not any(module.training for module in network.modules() if isinstance(module, nn.SyncBatchNorm))
