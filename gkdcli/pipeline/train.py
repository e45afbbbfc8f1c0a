"""`gkd pretrain-attention` and `gkd distill`: Settings -> a run."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gkdcli.console import Console
from gkdcli.data.clips import hold_out, require_channels
from gkdcli.data.store import Store
from gkdcli.errors import GkdError
from gkdcli.files import human_bytes
from gkdcli.launch import launched
from gkdcli.models.kinetics import PUBLIC, start_backbone, told
from gkdcli.models.layers import initialise
from gkdcli.models.network import build_cvae
from gkdcli.pipeline.download import fetch, weights_source
from gkdcli.pipeline.lookup import chosen, newest, open_store, require_same_flow, split_videos
from gkdcli.pipeline.summary import profiled, report
from gkdcli.pipeline.training_plan import plan_of, record_of
from gkdcli.report import draw_curves
from gkdcli.result import Result
from gkdcli.runs import (
    STAGE_FOLDER,
    Place,
    Run,
    create_run,
    newest_unfinished,
    open_run,
    resumed_settings,
)
from gkdcli.settings import CHANNELS, Settings
from gkdcli.tasks.trained import (
    ROLE,
    chosen_device,
    has_generators,
    norms_of,
    rebuild,
    rebuild_generators,
    require_same_clip,
    start_student,
    task_of,
    weights_at,
)
from gkdcli.training import metrics
from gkdcli.training.forward import Forward
from gkdcli.training.journal import require_tensorboard
from gkdcli.training.processes import Group, begun_run, require_processes
from gkdcli.training.steps import Networks
from gkdcli.training.teacher_views import let_it_teach
from gkdcli.training.trainer import Job, Trainer


def train(
    place: Place,
    console: Console,
    stage: str,
    *,
    backbone: str | None,
    resume: bool,
    max_steps: int | None,
    dry_run: bool,
    teacher: Path | None = None,
    profile: int | None = None,
) -> Result:
    """Phase 1 (`pretrain`) or phase 2 (`distill`).

    Args:
        place: where, and with which settings.
        console: who is told.
        stage: `pretrain` or `distill`.
        backbone: Kinetics weights to start the backbone from: a file, or an https address to download.
        resume: continue the newest unfinished run.
        max_steps: stop after so many steps.
        dry_run: only plan.
        teacher: run folder of the teacher; default: the newest that fits.
        profile: take so many steps, say where their time goes, and leave no run.
    """
    launch = launched()
    group = Group() if dry_run else Group.join(launch)
    command = launch.typed(place.command(STAGE_FOLDER[stage], "--resume"))
    store = open_store(place)
    run = None  # a profile has none
    if not profile:
        run = newest_unfinished(place, stage) if resume else begun_run(place, stage, launch, group.agents)
    if run is not None:
        require_processes(run, launch, place.command(STAGE_FOLDER[stage], "--resume"))
        place = replace(place, settings=resumed_settings(run, place))
        if run.is_of_other_store(store.fingerprint):
            raise GkdError("the store has changed since this run began", str(run.folder), "start a new run")
        teacher = teacher or _recorded_teacher(run)
    settings = place.settings
    url, first_weights = weights_source(backbone, place) if backbone else (None, None)
    if first_weights and not url:
        first_weights = weights_at(first_weights)
    require_channels(settings.clips, CHANNELS[place.modality])
    videos, held = hold_out(store.videos, split_videos(store, place, "train"), settings.data.holdout)
    if settings.data.holdout and not held:
        console.warn(
            "no training video is held out: `last` will be used, the best epoch is not known",
            f"data.holdout = {settings.data.holdout:g}, training videos {len(videos)}",
            "it takes five videos (or groups) of one class; untrimmed videos count together",
        )
    if settings.train.tensorboard:
        require_tensorboard()
    device = _device(settings) if not dry_run else torch.device("cpu")
    fabric = group.start(device)
    with group.in_turn():  # it may import weights
        teacher_run = _find_teacher(place, console, stage, store, teacher, dry_run)
    task = task_of(settings)
    dataset = task.training_set(store, videos, settings)
    plan = plan_of(place, stage, store, videos, held, dataset, max_steps, teacher_run, launch)
    if dry_run:
        return Result(plan)
    if url and first_weights:
        with group.in_turn():
            fetch(url, first_weights, console)
    networks, began = _build_networks(place, stage, store, teacher_run, first_weights)
    if settings.train.sync_batch_norm:
        networks.student.sync_norms()
    networks.student.hold_norms(norms_of(settings, run.record["began"] if run else began))
    networks.forward = forward_of(settings, device)
    if settings.train.checkpoint_activations:
        networks.student.recompute()
    known = None
    if settings.train.teacher_cache and networks.teacher is not None and teacher_run is not None:
        dataset, known = let_it_teach(networks, dataset, place, teacher_run, run, device, group, console)
    elif settings.train.teacher_cache and stage == "distill":
        console.note("train.teacher_cache is not used: the plain student has no teacher")
    resumed = run is not None
    if run is None and not profile:
        record = record_of(place, store, held, teacher_run, began, plan) | {"teacher_cache": known}
        run = group.share(partial(create_run, place, stage, record))
        together = f", {launch.size} processes" if launch.size > 1 else ""
        size = f", about {human_bytes(plan['memory_bytes'])} of memory"
        console.note(f"run {run.folder}: {began}, {plan['steps']} steps on {device.type}{together}{size}")
        if stage == "pretrain" and settings.recipe == "official" and began == "from scratch":
            file = PUBLIC.get(settings.model.teacher, f"{place.modality}_imagenet.pt")
            console.warn(
                "this teacher starts from scratch; the paper's starts from Kinetics weights",
                "no --backbone was given",
                f"`{place.command('pretrain-attention', '--backbone', file)}` with the public file",
            )
    score = partial(task.held_out_score, networks.student, store, settings=settings, device=device)
    job = Job(
        networks,
        settings,
        dataset,
        task.supervised_terms,
        score=task.SCORE,
        validate=partial(score, held) if held else None,
        # in minute zero: store, decoder, network and scorer fit together
        warm_up=partial(score, held or videos, limit=2 * settings.eval.batch_size),
        resume_command=command,
    )
    if profile:
        trainer = Trainer(job, Run(place.runs(stage)), console, fabric, group)
        return profiled(place, stage, console, trainer, profile, plan)
    assert run is not None
    group.resume = f"`{command}` continues from the last checkpoint"
    with run.lock() if group.first else contextlib.nullcontext():
        trainer = Trainer(job, run, console, fabric, group)
        if resumed:
            trainer.restore()
            console.note(f"continuing {run.folder} at epoch {trainer.epoch}, step {trainer.position.step}")
        if group.first:
            torchrun = {"launch": {"id": launch.id, "agents": group.agents}} if launch.id else {}
            run.update(state="running", processes=launch.size, **torchrun)
        trainer.fit(max_steps)
        group.leave()
        if not group.first:
            return Result({})
        draw_curves(metrics.read(run.metrics), run.folder / "curves.png")
        done = report(run, trainer, settings, plan["memory_bytes"])
    return _trained(place, stage, run, command, done)


def _find_teacher(
    place: Place, console: Console, stage: str, store: Store, given: Path | None, dry_run: bool
) -> Run | None:
    settings = place.settings
    distilled = stage == "distill" and settings.distill.method == "gkd"
    if not distilled and not (stage == "distill" and settings.train.init == "teacher"):
        return None
    found = (
        open_run(given)
        if given
        else newest(place, console, "pretrain", store.classes, flag="--teacher", dry_run=dry_run)
    )
    if found.record["stage"] != "pretrain" or not found.is_of(store.classes):
        raise GkdError(
            "this run is no teacher of these classes", str(found.folder), "name a pretrain-attention run"
        )
    found.take_names(store.classes)
    if found.record["modality"] != place.modality:
        raise GkdError(
            f"the teacher is a {found.record['modality']} network",
            str(found.folder),
            f"`--modality {found.record['modality']}`",
        )
    require_same_clip(found, settings)
    require_same_flow(found, store)
    if distilled and settings.distill.generative_weight and not has_generators(found):
        raise GkdError(
            "this teacher was imported without its CVAE, which generative distillation asks",
            str(found.folder),
            f"`{place.import_command('CVAE_FILE', '--model', 'teacher')}`,"
            " or do without: `--set distill.generative_weight=0`",
        )
    if found.is_of_other_store(store.fingerprint):
        console.warn("the store has changed since the teacher was trained on it", str(found.folder))
    ours, theirs = settings.model.attention, found.settings.model.attention
    unlike = f"; its attention is {theirs}, the student's {ours}" if distilled and ours != theirs else ""
    why = "" if given else f" {chosen(found, '--teacher')}"
    console.note(f"teacher: {found.folder}{why}{unlike}")
    return found


def _recorded_teacher(run: Run) -> Path | None:
    parent = run.record.get("parents", {}).get("teacher")
    return run.folder / parent if parent else None


def _build_networks(
    place: Place, stage: str, store: Store, teacher_run: Run | None, backbone: Path | None
) -> tuple[Networks, str]:
    """Everything in play, and a line about the first weights."""
    settings = place.settings
    plain = stage == "distill" and settings.distill.method == "none"
    torch.manual_seed(settings.train.seed)
    task = task_of(settings)
    student = task.build_network(settings, ROLE[stage], len(store.classes), place.modality, not plain)
    generators = None if plain else build_cvae(student)
    if settings.recipe == "corrected":
        for module in [student.attention, generators]:
            if module is not None:
                initialise(module)
    teacher = rebuild(teacher_run) if teacher_run else None
    began = start_student(student, settings.train.init, teacher, place.root)
    if backbone is not None:
        began = f"backbone from {backbone} ({told(start_backbone(student, backbone))})"
    if plain or teacher_run is None or teacher is None:
        return Networks(student, generators), began
    theirs = rebuild_generators(teacher_run, teacher) if has_generators(teacher_run) else None
    return Networks(student, generators, teacher, theirs), began


def _device(settings: Settings) -> torch.device:
    """Where to train.

    Raises:
        GkdError: there is no such device, or `train.sync_batch_norm` without GPUs.
    """
    device = chosen_device(settings)
    if settings.train.sync_batch_norm and device.type == "cpu":
        raise GkdError(
            "PyTorch's synchronised batch norm runs on GPUs only",
            "train.sync_batch_norm = true",
            "`--set train.sync_batch_norm=false`: each process normalises by its own clips",
        )
    return device


def forward_of(settings: Settings, device: torch.device) -> Forward:
    """How networks are run.

    Raises:
        GkdError: bf16 or fp16 on the CPU, or nothing can be compiled.
    """
    if settings.train.precision == "fp16" and device.type == "cpu":
        # PyTorch 2.14 has autocast and scaler there, and on AVX2 gradients are right, but convolutions take
        # up to 27 times as long as in float32; where the CPU knows 16-bit numbers, see below
        raise GkdError(
            "fp16 trains on GPUs only: on the CPU it is slower than float32, and bf16 is no way out there",
            "train.precision = fp16, device cpu",
            "`--set train.precision=32`, or train on a GPU, where bf16 needs no scaled gradients",
        )
    if settings.train.precision == "bf16" and device.type == "cpu":
        # seen with PyTorch 2.14 on a CPU with AVX512-BF16: weight gradients of small 3D convolutions hold
        # whatever was in memory, and some kernels write past their buffers
        raise GkdError(
            "PyTorch's bf16 gradients of 3D convolutions are wrong on the CPU",
            "train.precision = bf16",
            "`--set train.precision=32`, or train on a GPU",
        )
    return Forward(settings.train.precision, settings.train.compile, device)


def _trained(place: Place, stage: str, run: Run, resume_command: str, done: dict[str, Any]) -> Result:
    record, score = run.record, task_of(place.settings).SCORE
    curves = run.folder / "curves.png"
    payload = {
        "state": record["state"],
        "run": str(run.folder),
        "steps": record["progress"]["step"],
        "seconds": round(record["seconds"], 1),
        "parameters": record["parameters"],
        "gmac": record["gmac"],
        "best_epoch": record["progress"]["best_epoch"],
        f"held_out_{score}": record["progress"][f"best_held_out_{score}"],
        "curves": str(curves) if curves.exists() else None,  # there are none within the first epoch
    }
    shown = payload  # what the report says too is for pipelines
    payload = payload | {
        "report": str(run.folder / "report.json"),
        "clips_per_sec": done["times"]["clips_per_sec"],
        "data_wait": done["times"]["data_wait"],
        "expected_memory_bytes": done["memory"]["expected_bytes"],
        "peak_memory_bytes": done["memory"]["peak_bytes"],
    }
    then = place.command("distill") if stage == "pretrain" else place.command("evaluate")
    if record["state"] == "cut":
        cut = "this run was cut short and is never chosen silently"
        return Result(payload, str(run.folder), next=f"next: `{resume_command}` ({cut})", shown=shown)
    return Result(payload, str(run.folder), next=f"next: `{then}`", shown=shown)
