"""What is told of a training when it is over: the report in its run folder, or a profile."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gkdcli.console import Console
from gkdcli.files import write_json
from gkdcli.resolve import to_toml
from gkdcli.result import Result, jsonable
from gkdcli.runs import Place, Run, version
from gkdcli.settings import Settings
from gkdcli.training import metrics
from gkdcli.training.memory import peak_bytes
from gkdcli.training.profiling import profile
from gkdcli.training.trainer import Trainer


def profiled(
    place: Place, stage: str, console: Console, trainer: Trainer, steps: int, plan: dict[str, Any]
) -> Result:
    """Where the time of some steps goes; written beside the runs, for there is none."""
    device = trainer.fabric.device
    console.note(f"profile: {steps} steps of each pass on {device.type}; nothing of them is kept")
    found = profile(trainer, steps)
    trainer.group.leave()
    if not trainer.group.first:
        return Result({})
    path = place.runs(stage) / "profile.json"
    payload = {
        "profile": str(path),
        "preset": place.settings.name,
        "device": device.type,
        "processes": trainer.group.size,
        "workers": place.settings.train.workers,
        "batch_size": place.settings.optim.batch_size,
        **found,
        "expected_memory_bytes": plan["memory_bytes"],
        "peak_memory_bytes": peak_bytes(device),
    }
    write_json(path, payload)
    return Result(payload)


def report(run: Run, trainer: Trainer, settings: Settings, expected_bytes: int) -> dict[str, Any]:
    """Writes what became of a training into `report.json`, under `training`.

    Args:
        run: at its end.
        trainer: of it.
        settings: it was trained with.
        expected_bytes: of memory, stated before it began.

    Returns:
        What was written: the settings' fingerprint (SHA-256 of the page, which is that of `settings.toml` as
        long as no continuation changed it), `epochs`, `scores`, `times`, `memory`, `versions`.
    """
    schedule, position, device = trainer.schedule, trainer.position, trainer.fabric.device
    score = f"held_out_{trainer.job.score}"
    epochs: list[dict[str, Any]] = []
    busy = waited = 0.0
    for entry in metrics.read(run.metrics):
        if "mean" in entry:
            epochs.append({"epoch": entry["epoch"], "terms": entry["mean"], score: entry.get(score)})
        else:
            busy += entry.get("step_seconds", 0.0)  # a run that an older version began has none
            waited += entry.get("wait_seconds", 0.0)
    clips = sum(schedule.size(schedule.spot(step).batch) for step in range(position.step))
    done = {
        "settings_sha256": hashlib.sha256(to_toml(settings).encode()).hexdigest(),
        "state": run.record["state"],
        "steps": position.step,
        "clips": clips,
        "epochs": epochs,
        "scores": {
            score: epochs[-1][score] if epochs else None,
            f"best_{score}": position.best,
            "best_epoch": position.best_epoch or None,
        },
        "times": {
            "seconds": position.seconds,  # with validation, checkpoints and the start of processes
            "step_seconds": busy,
            "wait_seconds": waited,
            "clips_per_sec": clips / busy if busy else None,
            "data_wait": waited / busy if busy else None,
        },
        # of the first process, since it was last started
        "memory": {"expected_bytes": expected_bytes, "peak_bytes": peak_bytes(device)},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "processes": trainer.group.size,
        "workers": settings.train.workers,
        "versions": {"gkd": version(), "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "numpy")},
    }
    path = run.folder / "report.json"
    write_json(path, jsonable({**_before(path), "training": done}))
    return done


def write_report(path: Path, document: Mapping[str, Any]) -> None:
    """Writes a report of an evaluation; what the one before it said of the training stays."""
    training = {key: value for key, value in _before(path).items() if key == "training"}
    write_json(path, jsonable({**training, **document}))


def _before(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
