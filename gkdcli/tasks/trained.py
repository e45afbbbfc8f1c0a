"""Trained networks: rebuilt from their run folder, or chosen as a student's first weights."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from gkdcli.console import counted
from gkdcli.data.batches import Clips
from gkdcli.data.store import Store
from gkdcli.errors import GkdError, usage_error
from gkdcli.models.attention import attention_kind
from gkdcli.models.foreign import open_weights
from gkdcli.models.network import Network, Norms, build_cvae
from gkdcli.models.video_backbones import related
from gkdcli.models.weights import Fit, fit, init_student, load_tensors, require_fit
from gkdcli.runs import Run
from gkdcli.settings import Role, Settings
from gkdcli.tasks import detection, recognition


class Task(Protocol):
    """What `recognition` and `detection` have in common."""

    SCORE: str
    SUMMARY: tuple[str, ...]
    build_network: Callable[..., Any]
    supervised_terms: Any
    training_set: Callable[[Store, Sequence[int], Settings], Clips]
    held_out_score: Callable[..., float]
    load: Callable[[Path], Any]
    predict_run: Callable[..., None]
    score: Callable[..., tuple[dict[str, Any], Any]]
    remarks: Callable[[Mapping[str, Any]], Sequence[tuple[str, str, str]]]
    protocol: Callable[[Run, Settings], dict[str, Any]]
    seen_by: Callable[[Settings], dict[str, str]]
    fuses_plain: Callable[[Run], bool]
    write_output: Callable[..., None]
    draw: Callable[..., None]


def task_of(settings: Settings) -> Task:
    """The sheet of a page."""
    return detection if settings.task == "detection" else recognition


ROLE: dict[str, Role] = {"pretrain": "teacher", "distill": "student"}


def rebuild(run: Run) -> Any:
    """The network of a run with its weights, in evaluation mode.

    Raises:
        GkdError: the weights are missing, damaged or of another network.
    """
    record = run.record
    network = task_of(run.settings).build_network(
        run.settings, ROLE[record["stage"]], len(record["classes"]), record["modality"], has_attention(run)
    )
    require_fit(
        fit(network, load_tensors(run.weights), "network."), str(run.weights), f"{record['modality']} network"
    )
    return network.eval()


def rebuild_generators(run: Run, network: Network) -> nn.ModuleDict:
    """The CVAEs of a run."""
    generators = build_cvae(network)
    require_fit(fit(generators, load_tensors(run.weights), "generator."), str(run.weights), "CVAE")
    return generators


def has_attention(run: Run) -> bool:
    """All but the plain student have one."""
    return bool(run.record["method"] != "none")


def has_generators(run: Run) -> bool:
    """All trained teachers have their CVAE; an imported one may have come without."""
    return bool(run.record.get("generators", True))


def require_same_clip(teacher: Run, settings: Settings) -> None:
    """Refuses a teacher that would be shown other clips than it knows, or whose taps have other shapes.

    Raises:
        GkdError: with both values.
    """
    theirs, ours = teacher.settings, settings
    for key, old, new in (
        ("clips.length", theirs.clips.length, ours.clips.length),
        ("clips.crop", theirs.clips.crop, ours.clips.crop),
        ("clips.mean", theirs.clips.mean, ours.clips.mean),
        ("clips.std", theirs.clips.std, ours.clips.std),
        ("model.width", theirs.model.width, ours.model.width),
    ):
        if old != new:
            raise GkdError(
                f"teacher and student differ in {key}: {old} and {new}",
                str(teacher.folder / "settings.toml"),
                f"`--set {key}={old}`, or train a teacher of that kind",
            )


def start_student(student: Network, init: str, teacher: Network | None, root: Path) -> str:
    """Gives a network its first weights; returns what was done, for the log.

    Args:
        student: freshly built.
        init: `scratch`, `teacher`, or the path of a run folder or weights file.
        teacher: rebuilt, where there is one.
        root: paths may be relative to it.

    Raises:
        GkdError: no such path, or nothing in it fits.
    """
    if init == "scratch":
        return "from scratch"
    if init == "teacher":
        if teacher is None:
            raise usage_error(
                "a teacher cannot start from a teacher", "train.init = teacher", "name a file or a run"
            )
        ours, theirs = student.backbone.kind, teacher.backbone.kind
        alike = related(ours, theirs)
        found, source = init_student(student, teacher, backbone=alike), "the teacher"
        given = attention_kind(teacher.state_dict())
        if not alike:
            source += f"'s head (a {ours} has no use for a {theirs} backbone)"
    else:
        path = next((path for path in (Path(init), root / init) if path.exists()), None)
        if path is None:
            raise usage_error(
                f"there is nothing to start from at `{init}`", "--init", "scratch, teacher, or a path"
            )
        weights = weights_at(path)
        network = open_weights(weights).require_network()
        found, source = network.fit(student), str(weights)
        given = attention_kind(network.tensors)
        _require_backbone(found, source)
    fresh = len(found.missing) + len(found.wrong_shape)
    rest = f", {fresh} left fresh: {_first_names(found)}" if fresh else ""
    wanted = attention_kind(student.state_dict())
    if wanted and given and wanted != given:
        rest += f"; the {wanted} attention starts anew, theirs is {given}"
    return f"{counted(len(found.loaded), 'tensor')} from {source}{rest}"


def weights_at(path: Path) -> Path:
    """A weights file: of a run folder, or of the newest complete run of a folder of runs; a file as it is.

    Raises:
        GkdError: no complete run in that folder (exit code 2).
    """
    if not path.is_dir():
        return path
    if (path / "run.json").is_file():
        return Run(path).weights
    runs = [run for run in (Run(entry.parent) for entry in sorted(path.glob("*/run.json"))) if not run.damage]
    complete = [run for run in runs if run.state == "complete"]
    if not complete:
        raise usage_error(
            f"there is no complete run in `{path}`",
            f"it holds {counted(len(runs), 'run')}",
            "name a run folder, a folder of runs such as runs/demo/pretrain-attention-rgb, or a weights file",
        )
    return complete[-1].weights


def _require_backbone(found: Fit, source: str) -> None:
    """A head may stay fresh (another number of classes); a backbone that does not fit is a mistake."""
    odd = [name for name in found.missing if name.startswith("backbone.")]
    shapes = [entry for entry in found.wrong_shape if entry[0].startswith("backbone.")]
    if odd or shapes:
        require_fit(Fit(found.loaded, odd, [], shapes), source, "network")


def _first_names(found: Fit) -> str:
    names = [*found.missing, *(entry[0] for entry in found.wrong_shape)]
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def norms_of(settings: Settings, began: str) -> Norms:
    """What training does to the backbone's batch norms (METHOD.md 4, 8 (7)).

    Args:
        settings: of the run.
        began: see `start_student`; a run that is continued is told what it was told at first.
    """
    if settings.task == "recognition":
        return "trained"
    if settings.recipe == "official":
        return "held"
    return "trained" if began == "from scratch" else "frozen"


def chosen_device(settings: Settings) -> torch.device:
    """`train.device`, where auto means CUDA if there is one; sets the threads and the memory of the CPU.

    Raises:
        GkdError: CUDA was asked for and there is none.
    """
    if settings.train.threads:
        torch.set_num_threads(settings.train.threads)
    name = settings.train.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name == "cuda" and not torch.cuda.is_available():
        raise GkdError(
            "there is no usable CUDA device",
            "train.device = cuda",
            "`gkd --doctor` says why; `--device cpu` works everywhere",
        )
    if name == "cpu":
        _keep_freed_memory()
    return torch.device(name)


def _keep_freed_memory() -> None:
    """Has glibc keep what tensors leave, for the next ones.

    By default it returns each large block to the kernel, which clears it page by page when it is asked for
    again: a third of a distillation step at full size. Elsewhere than on Linux nothing happens.
    """
    trim_threshold, mmap_max = -1, -4  # glibc's M_TRIM_THRESHOLD and M_MMAP_MAX
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)
