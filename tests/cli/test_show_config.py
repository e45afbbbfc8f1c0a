"""`--show-config` prints what a command would work with, and touches nothing."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gkdcli.resolve import preset_names, setting_names
from gkdcli.settings import MODALITIES, STAGES, Settings


def _origins(text: str) -> dict[str, str]:
    """Dotted key -> the comment behind its value."""
    table, found = "", {}
    for line in text.splitlines():
        if header := re.fullmatch(r"\[(.+)\]", line):
            table = f"{header[1]}."
        elif entry := re.fullmatch(r"(\w+) = .*?  +# (.+)", line):
            found[table + entry[1]] = entry[2]
    return found


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("preset", preset_names())
def test_every_page_is_toml_with_an_origin_behind_each_value_and_nothing_is_opened(
    preset: str,
    stage: str,
    modality: str,
    gkd: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    named = ("--dataset", preset) if stage == "import" else (preset,)  # its argument is the file
    rest = ("--modality", modality, "--show-config")
    words = (STAGES[stage], *named, *rest)
    outcome = gkd(*words).must()
    assert outcome.err == ""
    settings = Settings.model_validate(tomllib.loads(outcome.out))
    origins = _origins(outcome.out)
    assert list(origins) == setting_names()
    assert all(re.fullmatch(rf"default|preset {preset}( \[[\w.]+\])?", origin) for origin in origins.values())
    document = gkd(*words, "--json").must().json
    assert Settings.model_validate(document["result"]["settings"]) == settings
    assert document["result"]["origin"] == origins
    assert gkd("--json", *words).must().json == document
    assert gkd(STAGES[stage], "--preset", preset, *rest).must().out == outcome.out
    assert list(tmp_path.iterdir()) == []


def test_each_source_is_named_as_the_user_wrote_it(
    gkd: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GKD_OPTIM__WEIGHT_DECAY", "0.25")
    Path("over.toml").write_text("[optim]\nmomentum = 0.5\n[distill.flow.clips]\ncrop = 96\n")
    outcome = gkd(
        *("distill", "ucf101", "--modality", "flow", "--config", "over.toml", "--set", "distill.beta=0.5"),
        *("--epochs", 3, "--batch-size", 2, "--lr", 0.125, "--init", "teacher", "--seed", 7),
        *("--device", "cpu", "--workers", 1, "--show-config"),
    ).must()
    page, origins = tomllib.loads(outcome.out), _origins(outcome.out)
    wanted = {
        "optim.weight_decay": (0.25, "GKD_OPTIM__WEIGHT_DECAY"),
        "optim.momentum": (0.5, "--config over.toml"),
        "clips.crop": (96, "--config over.toml [distill.flow.clips]"),
        "clips.std": ([0.226], "preset ucf101 [flow.clips]"),
        "clips.length": (64, "preset ucf101"),
        "model.width": (1.0, "default"),
        "distill.beta": (0.5, "--set"),
        "optim.epochs": (3, "--epochs"),
        "optim.batch_size": (2, "--batch-size"),
        "optim.learning_rate": (0.125, "--lr"),
        "train.init": ("teacher", "--init"),
        "train.seed": (7, "--seed"),
        "train.device": ("cpu", "--device"),
        "train.workers": (1, "--workers"),
    }
    for name, (value, origin) in wanted.items():
        section, _, key = name.partition(".")
        assert (page[section][key], origins[name]) == (value, origin), name


def test_workers_of_prepare_are_those_that_decode(gkd: Callable[..., Any]) -> None:
    page = tomllib.loads(gkd("prepare", "demo", "--workers", 3, "--show-config").must().out)
    assert (page["data"]["workers"], page["train"]["workers"]) == (3, 0)


def test_name_names_runs_and_store(gkd: Callable[..., Any]) -> None:
    out = gkd("prepare", "folder", "VIDEOS", "--name", "mine", "--show-config").must().out
    page, origins = tomllib.loads(out), _origins(out)
    assert (page["name"], page["dataset"]) == ("mine", "mine")
    assert (origins["name"], origins["dataset"]) == ("--name", "--name")
    assert gkd("prepare", "--preset", "folder", "VIDEOS", "--name", "mine", "--show-config").must().out == out


def test_a_printed_page_is_a_preset(gkd: Callable[..., Any], tmp_path: Path) -> None:
    """The way to a page of one's own: print, change, name it."""
    page = tmp_path / "mine.toml"
    page.write_text(gkd("distill", "demo", "--show-config").must().out)
    again = gkd("distill", page, "--show-config").must().out
    assert tomllib.loads(again) == tomllib.loads(page.read_text())
    assert gkd("distill", "demo", "--config", page, "--show-config").must().code == 0


def test_show_config_wins_over_dry_run(gkd: Callable[..., Any], tmp_path: Path) -> None:
    outcome = gkd("distill", "demo", "--root", tmp_path, "--show-config", "--dry-run").must()
    assert tomllib.loads(outcome.out)["name"] == "demo"
