"""What the README shows and the tests check: its commands, its marked blocks, the recipe of `make demo`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
GKD = Path(sys.executable).parent / "gkd"


def demo_commands() -> list[str]:
    """The commands of `make demo`, from the Makefile: their one address."""
    recipe = (ROOT / "Makefile").read_text().partition("\ndemo: $(STAMP)")[2].partition("\n\n")[0]
    return [line.strip() for line in recipe.splitlines() if line.startswith("\tgkd ")]


def first_commands() -> list[str]:
    """The shell lines of the README's first screen, without their comments."""
    block = README.read_text().partition("```sh\n")[2].partition("```")[0]
    return [line.partition("#")[0].strip() for line in block.splitlines()]


def block(name: str) -> str:
    """The text between the markers of `name`."""
    return README.read_text().partition(f"<!-- {name} -->\n")[2].partition(f"<!-- /{name} -->")[0]


def replace_block(text: str, name: str, content: str) -> str:
    """The README with another text between the markers of `name`."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    assert pattern.search(text), f"the README has no block {name}"
    return pattern.sub(lambda found: f"{found[1]}{content}{found[2]}", text)


def tiny(text: str) -> str:
    """A command of the demos, or of one of them, on the tiny presets."""
    return re.sub(r"\bdemo(-detection)?\b(?!-)", r"demo\1-tiny", text)


def run(command: str, folder: Path) -> tuple[int, str]:
    """Exit code and what a user sees (stdout and stderr as they come) of a `gkd ...` line."""
    words = [str(GKD), *command.removeprefix("gkd ").split()]
    done = subprocess.run(
        words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.returncode, done.stdout


def shape(output: str) -> list[str]:
    """The labels of an output, in order: what stays when figures, names of runs and progress change."""
    labels = []
    for line in output.splitlines():
        if re.search(r"\d+/\d+", line) or not line.strip():
            continue
        label = re.split(r"\s{2,}|: |\. ", line.strip())[0]
        labels.append(re.sub(r"[\d.,]+", "0", label))
    return labels
