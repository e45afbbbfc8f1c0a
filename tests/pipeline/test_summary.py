"""What is told of a training when it is over."""

from __future__ import annotations

import hashlib
import json
import mmap
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gkdcli.models.cost import Cost
from gkdcli.pipeline.summary import write_report
from gkdcli.training.memory import expected_bytes, peak_resident_bytes, resident_bytes
from tests.conftest import borrow
from tests.training.jobs import assert_the_table_is_the_lines, metrics_of, page


def report_of(folder: Path) -> Any:
    return json.loads((folder / "report.json").read_text())


def test_the_report_of_a_run(tiny_trained: Path):
    from gkdcli.runs import Run

    (folder,) = (tiny_trained / "runs/demo-tiny/distill-rgb").iterdir()
    run = Run(folder)
    found, lines = report_of(folder)["training"], metrics_of(run)
    steps = [line for line in lines if "mean" not in line]
    assert found["settings_sha256"] == hashlib.sha256((folder / "settings.toml").read_bytes()).hexdigest()
    assert [epoch["terms"] for epoch in found["epochs"]] == [line["mean"] for line in lines if "mean" in line]
    assert found["scores"]["best_held_out_top1"] == run.record["progress"]["best_held_out_top1"]
    assert (found["steps"], found["state"], found["processes"]) == (len(steps), "complete", 1)
    times = found["times"]
    assert times["step_seconds"] == pytest.approx(sum(line["step_seconds"] for line in steps))
    assert 0 < times["data_wait"] < 1
    assert times["step_seconds"] < times["seconds"]
    assert times["clips_per_sec"] == pytest.approx(found["clips"] / times["step_seconds"])
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert 0.75 < found["memory"]["peak_bytes"] / found["memory"]["expected_bytes"] < 1.25
    assert_the_table_is_the_lines(run)


def test_evaluation_keeps_what_is_known_of_the_training(gkd: Any, tiny_trained: Path, tmp_path: Path):
    root = borrow(tiny_trained, tmp_path / "root")
    shutil.copytree(tiny_trained / "runs", root / "runs")
    (folder,) = (root / "runs/demo-tiny/distill-rgb").iterdir()
    write_report(folder / "report.json", {"top1": 2.0})  # of an evaluation before
    before = report_of(folder)
    assert before["top1"] == 2.0
    top1 = gkd("evaluate", "demo-tiny", "--root", root, "--json").must().json["result"]["top1"]
    after = report_of(folder)
    assert after["top1"] == top1
    assert after["training"] == before["training"]


def test_a_report_that_is_damaged_is_written_anew(tmp_path: Path):
    (tmp_path / "report.json").write_text("{")
    write_report(tmp_path / "report.json", {"top1": float("nan")})
    assert report_of(tmp_path) == {"top1": None}


def test_expected_memory_follows_batch_optimiser_and_schedule():
    network = Cost(parameters=1000, gmac=0.0, kept_bytes=50_000, largest_bytes=1000)

    def expected(**changes: Any) -> float:
        return expected_bytes(page(**changes), network, 500, 2000, 100) / 1.1

    # weights, two moments of both; three clips as bytes and two as floats; kept, and a moment's three
    small = 4 * (1000 + 500 + 2000 + 2000 + 1000) + 12 * 100 + 2 * 50_000 + 3 * 2 * 1000
    assert expected() == pytest.approx(small, abs=1)
    assert expected(optim__algorithm="sgd") == pytest.approx(small - 4000, abs=1)
    assert expected(optim__batch_size=4) == pytest.approx(small + 12 * 100 + 2 * 53_000, abs=1)
    kept = 2 * 50_000 + 3 * 2 * 1000
    assert expected(train__schedule="step", train__precision="bf16") == pytest.approx(
        small - 0.3 * kept, abs=2
    )
    detection = {"task": "detection", "clips": {"length": 128, "crop": 32}}
    assert expected(**detection) - expected(**detection, distill__contrast_weight=0) == pytest.approx(
        2 * 53_000 + 2 * 500, abs=1
    )


def test_memory_of_this_process_is_seen():
    before = resident_bytes()
    with mmap.mmap(-1, 64_000_000) as held:  # a tensor might get memory that this process has kept
        held.write(bytes(len(held)))
        assert resident_bytes() - before > 50e6
        assert peak_resident_bytes() >= before + len(held) * 0.8
