"""What is told of a training when it is over: the report in its run folder, or a profile."""

from __future__ import annotations

from typing import Any

from gkdcli.console import Console
from gkdcli.files import write_json
from gkdcli.result import Result
from gkdcli.runs import Place
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
