"""`gkd import`: a weights file of any origin -> an entry of models/, laid out like a run."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from gkdcli.console import Console
from gkdcli.data.store import Store
from gkdcli.errors import GkdError, usage_error
from gkdcli.files import atomic_folder, digest, locked, write_text
from gkdcli.models.attention import attention_kind
from gkdcli.models.cost import cost
from gkdcli.models.foreign import Contents, Found, backbone_kind, first_kernel, kernel, open_weights
from gkdcli.models.i3d import TAP_STRIDES
from gkdcli.models.network import build_cvae
from gkdcli.models.weights import Fit, load_metadata, load_tensors, require_fit, save_tensors, times
from gkdcli.resolve import to_toml
from gkdcli.result import Result
from gkdcli.runs import SCHEMA, Place, Run, version
from gkdcli.settings import CHANNELS, ModelSettings, Role, Settings
from gkdcli.tasks.trained import ROLE, task_of

STAGE = {role: stage for stage, role in ROLE.items()}


@dataclass
class Entry:
    """What an import would write.

    Args:
        path: a folder laid out like a run, or a file of first weights.
        role: whose weights these are.
        settings: the page that the network is built from.
        record: run.json.
        tensors: `network.*` and `generator.*`, or those of a file of first weights.
        report: what the user is told.
    """

    path: Path
    role: Role
    settings: Settings
    record: dict[str, Any]
    tensors: dict[str, Tensor]
    report: dict[str, Any]

    @property
    def whole(self) -> bool:
        """Whether it is a network, and not only the first weights of one."""
        return bool(self.record)

    def as_run(self) -> Run:
        """The run that it will be, before anything is written."""
        run = Run(self.path)
        run.record, run.damage, run.settings = dict(self.record), "", self.settings
        return run


def import_weights(place: Place, console: Console, *, file: Path, model: str | None, dry_run: bool) -> Result:
    """Turns a weights file into an entry of models/.

    Args:
        place: where; its settings say how the networks are built.
        console: who is told.
        file: of `torch.save` or safetensors.
        model: `teacher` or `student`; None: the file tells.
        dry_run: write nothing.

    Raises:
        GkdError: not even a backbone in it fits.
    """
    entry = plan_import(place, file, model)
    if any(row["tensor"].startswith("Mixed_4f.") for row in entry.report["did_not_fit"]):
        console.note("recognition never uses the 4f branch of a published CVAE; it is left out")
    if entry.whole and not entry.record["generators"] and Run(entry.path).record.get("generators"):
        console.warn("the entry's CVAE belonged to its old weights and goes with them", str(entry.path))
    if not dry_run:
        write_entry(place, entry)
    if not entry.whole:
        console.warn(
            f"this is no whole {entry.role}; what fits {'would be' if dry_run else 'was'} kept to start from",
            str(file),
            "the rest is listed under `did not fit`",
        )
    return Result(entry.report, str(entry.path) if entry.whole else None, next=_next(place, entry))


def plan_import(place: Place, file: Path, model: str | None = None) -> Entry:
    """Reads a file and fits it; nothing is written. Arguments and errors as of `import_weights`."""
    contents, place = open_weights(file), _as_its_card_says(place, file)
    if contents.task not in (None, place.settings.task):
        raise GkdError(
            f"this is a checkpoint of {contents.task}; {place.settings.name} is {place.settings.task}",
            str(file),
            "name another preset with `--dataset`; its backbone alone can start a network: `--backbone FILE`",
        )
    if contents.network is None and contents.generators is not None:
        return _plan_generators(place, contents, contents.generators, model)
    return _plan_network(place, contents, contents.require_network(), model)


def _as_its_card_says(place: Place, file: Path) -> Place:
    """With the network's width that the card in our own export states, unless one was given by hand."""
    if file.suffix != ".safetensors" or "model.width" in place.explicit:
        return place
    try:
        width = json.loads(load_metadata(file)["card"])["width"]
        model = ModelSettings.model_validate(place.settings.model.model_dump() | {"width": width})
    except (KeyError, TypeError, ValueError):  # someone else's
        return place
    return replace(place, settings=place.settings.model_copy(update={"model": model}))


def _plan_network(place: Place, contents: Contents, found: Found, model: str | None) -> Entry:
    role = _role_by_kind(place, contents, found, model)
    _require_modality(place, contents, found)
    place = replace(place, settings=_with_its_attention(place, contents, found))
    settings, file = place.settings, contents.path
    names, classes = _classes(place, found)
    # our own plain student has no attention; a published or public file without one is a backbone
    plain = role == "student" and found.origin == "gkd" and not _holds(found, "attention.")
    network = task_of(settings).build_network(settings, role, classes, place.modality, not plain)
    fitted = found.fit(network)
    # the unit between torchvision's trunk and the tap is ours, so their files lack it
    odd = [name for name in fitted.missing if name.startswith("backbone.") and ".to_tap." not in name]
    shapes = [given for given in fitted.wrong_shape if given[0].startswith("backbone.")]
    require_fit(Fit(fitted.loaded, odd, [], shapes), str(file), f"{place.modality} {role}")
    report = _report(contents, found, fitted, network) | {"role": role, "backbone": network.backbone.kind}
    state = network.state_dict()
    if fitted.missing or fitted.wrong_shape:
        path = place.entry(role)
        path = path.with_name(f"{path.name}-backbone.safetensors")
        return Entry(
            path,
            role,
            settings,
            {},
            {name: state[name] for name in fitted.loaded},
            {"entry": str(path), "complete": False, **report},
        )
    tensors = {f"network.{name}": value for name, value in state.items()}
    if contents.generators is not None:
        generators = build_cvae(network)
        require_fit(_used(contents.generators.fit(generators)), str(file), "CVAE")
        tensors |= {f"generator.{name}": value for name, value in generators.state_dict().items()}
    record = _record(place, role, plain, names, classes, report, contents.generators is not None)
    path = place.entry(role)
    head = {"entry": str(path), "complete": True, "cvae": record["generators"]}
    head["attention"] = None if plain else settings.model.attention
    counted = {"classes": classes, "parameters": record["parameters"], "gmac": record["gmac"]}
    return Entry(path, role, settings, record, tensors, head | counted | report)


def _plan_generators(place: Place, contents: Contents, found: Found, model: str | None) -> Entry:
    """A published CVAE is a file of its own; it joins the entry of its network."""
    role = _role_of_generators(place, contents, found, model)
    run = Run(place.entry(role))
    if run.damage:
        raise GkdError(
            f"this is the CVAE of a {role}, and no {role} is imported yet",
            f"{contents.path}; looked for {run.folder}/run.json",
            f"first the {role} itself: `{place.import_command('FILE')}`",
        )
    record = run.record
    with torch.device("meta"):
        network = task_of(run.settings).build_network(run.settings, role, 1, record["modality"])
    generators = build_cvae(network)
    fitted = found.fit(generators)
    require_fit(_used(fitted), str(contents.path), f"CVAE of the {role}")
    tensors = {name: value for name, value in load_tensors(run.last).items() if name.startswith("network.")}
    tensors |= {f"generator.{name}": value for name, value in generators.state_dict().items()}
    report = _report(contents, found, fitted, generators) | {"role": role}
    record |= {"generators": True, "imported": [*record["imported"], report]}
    head = {"entry": str(run.folder), "complete": True, "cvae": True}
    return Entry(run.folder, role, run.settings, record, tensors, head | report)


def _holds(found: Found, beginning: str) -> bool:
    return any(name.startswith(beginning) for name in found.tensors)


def _used(fitted: Fit) -> Fit:
    """Without what is unexpected: a published CVAE has an idle 4f branch (README, difference 15)."""
    return Fit(fitted.loaded, fitted.missing, [], fitted.wrong_shape)


def _role_by_kind(place: Place, contents: Contents, found: Found, model: str | None) -> Role:
    """Teacher and student are told apart by the time extents of their kernels."""
    kind, page = backbone_kind(found), place.settings.model
    kinds: dict[Role, str] = {"teacher": page.teacher, "student": page.student}
    fitting = [role for role in kinds if kinds[role] == kind and model in (None, role)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise usage_error(
            f"teacher and student of {place.settings.name} are both {kind}; whose weights are these?",
            str(contents.path),
            "say `--model teacher` or `--model student`",
        )
    wanted = " or ".join(f"{kinds[role]} ({role})" for role in kinds if model in (None, role))
    raise GkdError(
        f"the backbone in these weights is {kind or 'of no known kind'}, not {wanted}",
        f"{contents.path}, by the names and time extents of its kernels",
        "`--set model.student=KIND` or `--set model.teacher=KIND` changes what is expected"
        if model is None
        else "drop `--model`, or name another file",
    )


def _with_its_attention(place: Place, contents: Contents, found: Found) -> Settings:
    """The page with the kind of attention that the file has; published files have the official one.

    Raises:
        GkdError: another one was asked for by hand.
    """
    page, kind = place.settings, attention_kind(found.tensors)
    if kind in (None, page.model.attention):
        return page
    if "model.attention" in place.explicit:
        raise GkdError(
            f"these weights have the {kind} attention, but model.attention is {page.model.attention}",
            str(contents.path),
            f"leave model.attention out, or `--set model.attention={kind}`",
        )
    return page.model_copy(update={"model": page.model.model_copy(update={"attention": kind})})


def _role_of_generators(place: Place, contents: Contents, found: Found, model: str | None) -> Role:
    """Told by recognition's idle 4f branch: of the feature's size in the teacher's, 6x6 in the student's.

    In detection that branch is in use, and those of teacher and student are alike.
    """
    side, given = -(-place.settings.clips.crop // TAP_STRIDES["Mixed_4f"][1]), kernel(found, "4f")
    told: Role | None = None
    if given is not None and side != 6 and place.settings.task == "recognition":
        told = "teacher" if given == side else "student" if given == 6 else None
    if model is None and told is None:
        raise usage_error(
            "a CVAE of the teacher or of the student? Nothing in the file tells",
            str(contents.path),
            "say `--model teacher` or `--model student`",
        )
    if model is not None and told not in (None, model):
        raise GkdError(
            f"this is the CVAE of a {told}, not of a {model}",
            f"{contents.path}, by the {given}x{given} kernels of its 4f branch",
            f"`--model {told}`",
        )
    return told or ("teacher" if model == "teacher" else "student")


def _require_modality(place: Place, contents: Contents, found: Found) -> None:
    channels = first_kernel(found).shape[1]
    modality = next((name for name, count in CHANNELS.items() if count == channels), None)
    if modality != place.modality:
        raise GkdError(
            f"these weights take {channels} input channels, an {place.modality} network takes"
            f" {CHANNELS[place.modality]}".replace("an flow", "a flow"),
            str(contents.path),
            f"`--modality {modality}`" if modality else "rgb has three channels, flow two",
        )


def _classes(place: Place, found: Found) -> tuple[list[str] | None, int]:
    """Names and number of classes: the store's, where there is one; else as many as the file has."""
    if place.store.is_file():
        names = Store.open(place.store).classes
        return names, len(names)
    name, others = (
        ("head.conf_head.bias", 1) if place.settings.task == "detection" else ("classifier.bias", 0)
    )
    bias = found.tensors.get(name)
    return None, max(len(bias) - others, 1) if bias is not None and bias.ndim == 1 else 1


def _report(contents: Contents, found: Found, fitted: Fit, module: nn.Module) -> dict[str, Any]:
    """Where the weights come from, and each tensor that did not find its place."""
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    rows: list[tuple[str, str, tuple[int, ...] | None, tuple[int, ...] | None]]
    rows = [("missing", name, None, shapes[name]) for name in fitted.missing]
    rows += [("wrong shape", name, got, wanted) for name, got, wanted in fitted.wrong_shape]
    theirs = {name: tuple(value.shape) for name, value in found.tensors.items()}
    rows += [("unexpected", name, theirs.get(name), None) for name in fitted.unexpected]
    return {
        "file": contents.path.name,
        "sha256": digest(contents.path),
        "names": found.origin + (f", in `{found.within}`" if found.within else ""),
        "loaded": len(fitted.loaded),
        "missing": len(fitted.missing),
        "unexpected": len(fitted.unexpected),
        "wrong_shape": len(fitted.wrong_shape),
        "did_not_fit": [
            {
                "why": why,
                "tensor": name,
                "in_the_file": None if got is None else times(got),
                "expected": None if wanted is None else times(wanted),
            }
            for why, name, got, wanted in rows
        ],
    }


def _record(
    place: Place,
    role: Role,
    plain: bool,
    names: list[str] | None,
    classes: int,
    report: dict[str, Any],
    generators: bool,
) -> dict[str, Any]:
    """run.json of an entry; what nobody knows of foreign weights is null."""
    settings = place.settings
    clip = (CHANNELS[place.modality], settings.clips.length, settings.clips.crop, settings.clips.crop)

    build = task_of(settings).build_network
    found = cost(lambda: build(settings, role, classes, place.modality, not plain), clip)
    return {
        "schema": SCHEMA,
        "version": version(),
        "state": "complete",
        "stage": STAGE[role],
        "preset": settings.name,
        "dataset": settings.dataset,
        "modality": place.modality,
        "split": place.split,
        "recipe": settings.recipe,
        "method": None if role == "teacher" else "none" if plain else "gkd",
        "started": time.time(),
        "classes": names,
        "class_count": classes,
        "generators": generators,
        "parents": {},
        "began": f"imported from {report['file']}",
        "parameters": found.parameters,
        "gmac": found.gmac,
        "seconds": None,
        "store": {"path": None, "fingerprint": None},
        "versions": {"torch": torch.__version__},
        "progress": {key: None for key in ("epoch", "epochs", "step", "best_epoch")},
        "protocol": {"weights": "last", "held_out_videos": None, "chosen_on": "imported: unknown"},
        "imported": [report],
    }


def write_entry(place: Place, entry: Entry) -> None:
    """Writes it whole, in place of an older one.

    Raises:
        GkdError: another import is at work, or there is no room.
    """
    with locked(place.models / ".lock", f"the imported weights of {place.settings.dataset}"):
        try:
            if not entry.whole:
                save_tensors(entry.path, entry.tensors, {"imported": json.dumps(entry.report)})
                return
            with atomic_folder(entry.path) as folder:
                write_text(folder / "settings.toml", to_toml(entry.settings))
                save_tensors(folder / "last.safetensors", entry.tensors, {})
                Run(folder).update(**entry.record)
        except SafetensorError as error:
            raise GkdError(f"cannot write the weights: {error}", str(entry.path), "make room there") from None


def _next(place: Place, entry: Entry) -> str:
    stage = "pretrain-attention" if entry.role == "teacher" else "distill"
    if not entry.whole:
        whole = any(name.startswith("attention.") for name in entry.tensors)
        flag = "--init" if whole else "--backbone"
        return f"next: `{place.command(stage, flag, str(entry.path))}`"
    if entry.role == "student":
        return f"next: `{place.command('evaluate')}`"
    if entry.record["generators"]:
        return f"next: `{place.command('distill')}`"
    cvae = place.import_command("CVAE_FILE", "--model", "teacher")
    return f"next: `{cvae}`, then `{place.command('distill')}`"
