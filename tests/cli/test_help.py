"""Help answers at once and knows all flags."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import typer

from gkdcli.cli import whole_app
from gkdcli.settings import STAGES

HEAVY = {
    "torch",
    "torchvision",
    "av",
    "cv2",
    "h5py",
    "numpy",
    "matplotlib",
    "safetensors",
    "lightning_fabric",
    "ray",
}
SHARED = {
    "--modality", "--split", "--root", "--config", "--set", "--seed", "--device", "--workers", "--json",
    "--quiet", "-q", "--verbose", "-v", "--progress", "--show-config", "--dry-run",
}  # fmt: skip
# every command takes it, as another way of writing its argument
PRESET = {"--preset"}
OWN = {
    "prepare": {
        "--name", "--annotations", "--from-frames", "--from-npy", "--flow", "--retry", "--audit",
        "--flow-sample", "--shard", "--executor",
    },
    "pretrain-attention": {
        "--backbone", "--init", "--resume", "--max-steps", "--profile", "--epochs", "--batch-size",
        "--lr",
    },
    "distill": {
        "--backbone", "--teacher", "--teacher-cache", "--init", "--resume", "--max-steps", "--profile",
        "--epochs", "--batch-size", "--lr",
    },
    "evaluate": {
        "--model", "--run", "--fusion", "--rgb-run", "--flow-run", "--fusion-weights", "--rescore",
        "--predictions", "--ground-truth", "--tiou", "--require", "--output",
    },
    "export": {"--format", "--model", "--run", "--out"},
    "import": {"--dataset", "--model"},
}  # fmt: skip


def _flags(command: str) -> dict[str, Any]:
    group: Any = typer.main.get_command(whole_app())
    found = {}
    for parameter in group.commands[command].params:
        if parameter.param_type_name == "option":
            found |= dict.fromkeys([*parameter.opts, *parameter.secondary_opts], parameter)
    return found


def test_there_are_the_six_commands() -> None:
    group: Any = typer.main.get_command(whole_app())
    assert set(group.commands) == set(STAGES.values()) == set(OWN)


@pytest.mark.parametrize("command", OWN)
def test_every_command_has_the_shared_flags_and_few_of_its_own(command: str) -> None:
    flags = set(_flags(command)) - {"--help", "-h"}
    assert flags >= SHARED | PRESET
    assert flags - SHARED - PRESET == OWN[command]
    assert len(OWN[command]) <= 12


@pytest.mark.parametrize("command", OWN)
def test_shared_flags_mean_the_same_everywhere(command: str) -> None:
    ours, theirs = _flags(command), _flags("distill")
    for flag in SHARED - ({"--modality"} if command == "prepare" else set()):  # that one also takes `both`
        assert (ours[flag].help, ours[flag].default) == (theirs[flag].help, theirs[flag].default)


@pytest.mark.parametrize("command", OWN)
def test_help_names_every_flag_with_a_text(command: str, gkd: Callable[..., Any]) -> None:
    outcome = gkd(command, "--help").must()
    assert outcome.err == ""
    for flag, parameter in _flags(command).items():
        assert flag in outcome.out
        assert parameter.help or flag in ("--help", "-h"), flag
    for panel in ("Data", "Running", "Output"):
        assert f" {panel} " in outcome.out
    assert gkd(command, "-h").out == outcome.out


def test_the_first_page_names_every_command_and_needs_no_argument(gkd: Callable[..., Any]) -> None:
    outcome = gkd("--help").must()
    for command in OWN:
        assert f" {command} " in outcome.out
    for flag in ("--version", "--doctor", "--json"):
        assert flag in outcome.out
    assert gkd().must().out.split() == outcome.out.split()


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["distill", "--help"],
        ["--version"],
        ["distill", "demo", "--show-config"],
        ["distill", "dem"],
    ],
)
def test_what_opens_nothing_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys; from gkdcli.cli import run; run(sys.argv[1:]);"
        f" print('heavy:', *sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "heavy:"


def test_version(gkd: Callable[..., Any]) -> None:
    assert gkd("--version").must().out == "gkd 0.1.0\n"
    assert gkd("--version", "--json").must().json["result"] == {"version": "0.1.0"}


def test_the_shell_is_told_what_may_come_next(gkd_process: Callable[..., Any]) -> None:
    outcome = gkd_process(
        env={"_GKD_COMPLETE": "complete_bash", "COMP_WORDS": "gkd distill demo", "COMP_CWORD": "2"}
    )
    assert outcome.out.split() == ["demo", "demo-detection", "demo-detection-tiny", "demo-tiny"]
