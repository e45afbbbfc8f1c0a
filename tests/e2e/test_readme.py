"""A stranger types the README's commands: they run, in their order, and print what the README shows."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.readme import GKD, block, demo_commands, first_commands, run, shape, tiny


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[int, str]]]:
    """All commands of `make demo`, on the tiny presets, through real processes."""
    folder = tmp_path_factory.mktemp("stranger")
    return folder, {command: run(tiny(command), folder) for command in demo_commands()}


def test_every_demo_command_ends_well(walked: tuple[Path, dict[str, tuple[int, str]]]) -> None:
    _, outputs = walked
    assert len(outputs) >= 6
    assert {command: code for command, (code, _) in outputs.items()} == dict.fromkeys(outputs, 0)


def test_the_readme_shows_what_the_commands_print(walked: tuple[Path, dict[str, tuple[int, str]]]) -> None:
    shown = block("demo")
    assert shown, "run `make readme`"
    for command, (_, output) in walked[1].items():
        in_readme = shown.partition(f"$ {command}\n")[2].partition("\n$ ")[0].removesuffix("```\n")
        assert shape(in_readme) == shape(output.replace("-tiny", "")), command


def test_the_first_screen_is_part_of_the_demo(walked: tuple[Path, dict[str, tuple[int, str]]]) -> None:
    folder, outputs = walked
    for command in first_commands():
        if command not in outputs:
            code, output = run(tiny(command), folder)
            assert code == 0, output


def test_results_are_one_document_in_a_pipeline(walked: tuple[Path, dict[str, tuple[int, str]]]) -> None:
    folder, _ = walked
    code, output = run("gkd evaluate demo-tiny --json -q", folder)
    document = json.loads(output)
    assert code == 0
    assert document["ok"]
    assert document["command"] == "evaluate"
    assert set(document) == {"schema", "ok", "command", "version", "run", "result"}
    assert {"top1", "top5", "per_class", "protocol"} <= set(document["result"])


def test_a_moved_run_folder_is_still_evaluated(walked: tuple[Path, dict[str, tuple[int, str]]]) -> None:
    folder, _ = walked
    run_folder = sorted((folder / "runs/demo-tiny/distill-rgb").iterdir())[-1]
    moved = folder / "elsewhere" / "my run"
    shutil.copytree(run_folder, moved)
    code, output = _evaluate(folder, moved)
    assert code == 0, output
    same = json.loads(_evaluate(folder, run_folder)[1])["result"]["top1"]
    assert json.loads(output)["result"]["top1"] == same


def _evaluate(folder: Path, run_folder: Path) -> tuple[int, str]:
    done = subprocess.run(
        [str(GKD), "evaluate", "demo-tiny", "--run", str(run_folder), "--json", "-q"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout
