"""`make readme`: runs the demo and puts its real output into the README."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from readme import GKD, README, demo_commands, replace_block, run

MISTAKES = (
    "gkd distill thumos-14",
    "gkd distill demo --set optim.learning_rat=1e-5",
    "gkd distill thumos14 --set clips.length=192",
    "gkd evaluate hmdb51",
)


def main() -> None:
    """Writes the README's marked blocks."""
    text = README.read_text()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.monotonic()
        shown = [_show(command, folder) for command in demo_commands()]
        seconds = time.monotonic() - started
        compared, fused = (
            json.loads(run(f"gkd evaluate demo --rescore {flag} --json -q", folder)[1])["result"]
            for flag in ("--model all", "--fusion")
        )
        detected = [
            json.loads(run(f"gkd evaluate demo-detection --model {model} --json -q", folder)[1])["result"]
            for model in ("teacher", "student")
        ]
    text = replace_block(text, "figures", _figures(compared["runs"], fused, seconds) + _detection(detected))
    text = replace_block(text, "demo", f"```\n{''.join(shown)}```\n")
    with tempfile.TemporaryDirectory() as name:
        config = run("gkd distill --preset hmdb51 --show-config", Path(name))[1].splitlines()
        start = config.index("[optim]")
        text = replace_block(
            text, "show-config", "```\n" + "\n".join(config[start : start + 8]) + "\n...\n```\n"
        )
        errors = [_show(command, Path(name), failing=True) for command in MISTAKES]
    text = replace_block(text, "errors", f"```\n{chr(10).join(errors)}```\n")
    README.write_text(text)


def _show(command: str, folder: Path, failing: bool = False) -> str:
    code, output = run(command, folder)
    sys.stderr.write(f"$ {command}\n{output}\n")
    if bool(code) != failing:
        sys.exit(f"`{command}` ended with {code}")
    output = "\n".join(line for line in output.rstrip().splitlines() if " s left" not in line)
    return f"$ {command}\n{output}\n" + ("" if failing else "\n")


def _detection(scores: list[dict[str, Any]]) -> str:
    """Teacher and distilled student, rgb, and what chance gives."""
    lines = [
        "",
        "| drawn detection demo | average mAP (0.3-0.7) | mAP 0.5 | parameters | GMAC per clip | training"
        " | measured by |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in zip(("teacher, rgb", "distilled student, rgb"), scores, strict=True):
        flag = " --model teacher" if name.startswith("teacher") else ""
        lines.append(
            f"| {name} | {row['average_map']:.3f} | {row['map']['0.5']:.3f} | {row['parameters']:,}"
            f" | {row['gmac']:.3f} | {row['training_seconds']:.0f} s | `gkd evaluate demo-detection{flag}` |"
        )
    shuffled, priors = (scores[1][f"average_map_of_{what}"] for what in ("shuffled_scores", "class_priors"))
    truth = scores[1]["ground_truth"]
    lines += [
        "",
        f"On {truth['videos']} untrimmed videos, {truth['segments']} actions of {truth['classes']} classes;"
        f" the student's detections with shuffled scores give {shuffled:.3f}, class frequencies and usual"
        f" lengths alone {priors:.3f}.",
        "",
    ]
    return "\n".join(lines)


def _figures(rows: list[dict[str, Any]], fused: dict[str, Any], seconds: float) -> str:
    """Teacher and students of rgb, then the distilled students of flow and of both together."""
    lines = [
        "| drawn demo | top-1 | top-5 | parameters | GMAC per clip | training | measured by |",
        "|---|---|---|---|---|---|---|",
    ]
    named = [(f"{row['model']}, rgb", row, "--model all") for row in rows]
    named += [("distilled student, flow", fused["flow"], "--fusion"), ("both streams", fused, "--fusion")]
    for name, row, flag in named:
        lines.append(
            f"| {name} | {row['top1']:.3f} | {row['top5']:.3f} | {row['parameters']:,}"
            f" | {row['gmac']:.3f} | {row['training_seconds']:.0f} s | `gkd evaluate demo {flag}` |"
        )
    cores = os.cpu_count()
    lines += [
        "",
        f"Measured by `make readme` on {cores} cores ({platform.machine()}), all commands {seconds:.0f} s.",
        "",
    ]
    return "\n".join(lines)


assert GKD.exists(), f"install gkd first: {shlex.quote(str(GKD))} is missing"
if __name__ == "__main__":
    main()
