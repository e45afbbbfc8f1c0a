"""What a training would do, before it does it; and what its run says of itself from the start."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from gkdcli.data.batches import Clips
from gkdcli.data.store import Store
from gkdcli.errors import GkdError
from gkdcli.files import free_bytes
from gkdcli.launch import Launch
from gkdcli.models.cost import cost
from gkdcli.models.network import build_cvae
from gkdcli.runs import STAGE_FOLDER, Place, Run, relative_to_run
from gkdcli.settings import CHANNELS
from gkdcli.tasks.trained import ROLE, task_of
from gkdcli.training.memory import WORKSPACE, expected_bytes, resident_bytes, state_bytes
from gkdcli.training.schedule import schedule_of
from gkdcli.training.teacher_cache import bytes_per_view, views_of


def plan_of(
    place: Place,
    stage: str,
    store: Store,
    videos: list[int],
    held: list[int],
    dataset: Clips,
    max_steps: int | None,
    teacher_run: Run | None,
    launch: Launch,
) -> dict[str, Any]:
    """What would be done; networks are counted on the meta device, without memory."""
    settings, classes = place.settings, len(store.classes)
    plain = stage == "distill" and settings.distill.method == "none"
    clip = (CHANNELS[place.modality], settings.clips.length, settings.clips.crop, settings.clips.crop)
    build_network = task_of(settings).build_network
    build = partial(build_network, settings, ROLE[stage], classes, place.modality, not plain)
    found = cost(build, clip)
    with torch.device("meta"):
        network = build()
        generators = 0 if plain else sum(part.numel() for part in build_cvae(network).parameters())
    views = 0 if plain or stage != "distill" else views_of(settings)
    cache_bytes = views * len(dataset) * bytes_per_view(network.shapes, settings)
    order = schedule_of(settings, len(dataset), not plain, launch.size)
    if not order.batches:
        raise GkdError(
            f"there are {len(dataset)} training clips, fewer than a batch of all processes,"
            f" {settings.optim.batch_size} x {launch.size}",
            str(store.path),
            "`--batch-size` makes it smaller, or fewer processes",
        )
    # of a GPU its tensors alone; of the CPU all that the process holds
    on_cpu = settings.train.device == "cpu" or not torch.cuda.is_available()
    memory = resident_bytes() if on_cpu else WORKSPACE
    distilled = teacher_run is not None and not plain
    theirs = teacher_run.record["parameters"] + generators if teacher_run and distilled else 0
    memory += expected_bytes(settings, found, generators, theirs, math.prod(clip))
    return {
        "stage": STAGE_FOLDER[stage],
        "preset": settings.name,
        "modality": place.modality,
        "split": place.split,
        "recipe": settings.recipe,
        "schedule": settings.train.schedule,
        "init": settings.train.init,
        "teacher": str(teacher_run.folder) if teacher_run else None,
        "attention": None if plain else settings.model.attention,
        "classes": classes,
        "training_videos": len(videos),
        "training_clips": len(dataset),
        "held_out_videos": len(held),
        "epochs": settings.optim.epochs,
        "steps": order.last_step(max_steps),
        "batch_size": settings.optim.batch_size,
        "processes": launch.size,
        "global_batch_size": order.batch_size,
        "clip": "x".join(map(str, clip)),
        "parameters": found.parameters,
        "gmac": found.gmac,
        "cvae_parameters": generators,
        "memory_bytes": memory,
        "teacher_cache_bytes": cache_bytes,
        "checkpoint_bytes": state_bytes(settings, found.parameters, generators),
        "free_bytes": free_bytes(place.root),
        "runs": str(place.runs(stage)),
    }


def record_of(
    place: Place, store: Store, held: list[int], teacher_run: Run | None, began: str, plan: dict[str, Any]
) -> dict[str, Any]:
    """The beginning of `run.json`; `plan` is that of `plan_of`, `began` a line about the first weights."""
    folder = place.runs("distill") / "x"  # all runs lie equally deep
    parents = {"teacher": relative_to_run(folder, teacher_run.folder)} if teacher_run else {}
    chosen = "best" if held else "last"
    return {
        "classes": store.classes,
        "parents": parents,
        "began": began,
        "parameters": plan["parameters"],
        "gmac": plan["gmac"],
        "store": {"path": relative_to_run(folder, place.store), "fingerprint": store.fingerprint},
        "versions": {"torch": torch.__version__},
        "protocol": {
            "weights": chosen,
            "held_out_videos": len(held),
            "chosen_on": "held-out training videos" if held else "nothing: the last epoch",
        },
    }
