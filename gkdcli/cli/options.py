"""The flags that every command shares, declared once, and the decorator that adds them to a command."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from gkdcli.console import Console
from gkdcli.resolve import Resolved, describe, preset_names, resolve
from gkdcli.runs import Place

DATA_PANEL, RUN_PANEL, OUTPUT_PANEL = "Data", "Running", "Output"


class Modality(StrEnum):
    """What a network sees."""

    rgb = "rgb"
    flow = "flow"


class PreparedModality(StrEnum):
    """What `gkd prepare` writes."""

    rgb = "rgb"
    flow = "flow"
    both = "both"


class Executor(StrEnum):
    """Who prepares."""

    local = "local"
    ray = "ray"


class FlowMethod(StrEnum):
    """How optical flow is computed."""

    tvl1 = "tvl1"
    tvl1_torch = "tvl1-torch"
    dis = "dis"
    farneback = "farneback"
    raft = "raft"


class Device(StrEnum):
    """Where networks run."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class ProgressStyle(StrEnum):
    """How progress is shown on stderr."""

    auto = "auto"
    bar = "bar"
    plain = "plain"
    off = "off"


def complete_preset(incomplete: str) -> list[str]:
    """For the shell: the presets that begin so."""
    return [name for name in preset_names() if name.startswith(incomplete)]


PresetArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="PRESET",
        autocompletion=complete_preset,
        help="A preset, a path to a .toml, or the name of an existing store.",
    ),
]
PresetOption = Annotated[
    str | None,
    typer.Option(
        "--preset", metavar="PRESET", help="The same as the argument.", autocompletion=complete_preset
    ),
]


class Which(StrEnum):
    """Which of the two networks."""

    student = "student"
    teacher = "teacher"


class Scored(StrEnum):
    """Which networks `gkd evaluate` scores."""

    student = "student"
    teacher = "teacher"
    all = "all"


class Format(StrEnum):
    """What `gkd export` writes."""

    safetensors = "safetensors"
    onnx = "onnx"


Backbone = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|URL",
        help="Kinetics weights of the backbone; an https address is downloaded into models/ first.",
        rich_help_panel=RUN_PANEL,
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the newest unfinished run.", rich_help_panel=RUN_PANEL)
]
MaxSteps = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Stop after so many steps; such a run is never chosen silently.",
        rich_help_panel=RUN_PANEL,
    ),
]

Profile = Annotated[
    int | None,
    typer.Option(
        "--profile",
        metavar="N",
        min=1,
        help="Say where the time of N steps goes, and stop; there is no run.",
        rich_help_panel=RUN_PANEL,
    ),
]


def _setting(name: str, flag: str, panel: str = RUN_PANEL, **given: Any) -> Any:
    """A flag that stands for a setting: its words and its range are the setting's own."""
    return typer.Option(flag, help=describe(name), show_default=False, rich_help_panel=panel, **given)


Flow = Annotated[FlowMethod | None, _setting("data.flow", "--flow", DATA_PANEL)]
FusionWeights = Annotated[str | None, _setting("eval.fusion_weights", "--fusion-weights", metavar="RGB,FLOW")]

Tiou = Annotated[str | None, _setting("eval.tiou", "--tiou", metavar="0.1,0.5|0.1:0.9:0.1")]


def run_option(flag: str, which: str) -> Any:
    """A run folder named by hand."""
    what = f"Run folder of {which}; default: the newest complete one that fits."
    return typer.Option(flag, metavar="PATH", help=what, rich_help_panel=RUN_PANEL)


Init = Annotated[str | None, _setting("train.init", "--init", metavar="scratch|teacher|PATH")]
Epochs = Annotated[int | None, _setting("optim.epochs", "--epochs")]
BatchSize = Annotated[int | None, _setting("optim.batch_size", "--batch-size")]
LearningRate = Annotated[float | None, _setting("optim.learning_rate", "--lr")]
TeacherCache = Annotated[int | None, _setting("train.teacher_cache", "--teacher-cache", metavar="K")]
RunFolder = Annotated[Path | None, run_option("--run", "the network")]
Model = Annotated[Which, typer.Option(help="Which of the two networks.", rich_help_panel=RUN_PANEL)]


@dataclass(frozen=True)
class Shared:
    """Flags of every command, and what follows from them."""

    modality: Annotated[Modality, typer.Option(help="What the network sees.", rich_help_panel=DATA_PANEL)] = (
        Modality.rgb
    )
    split: Annotated[
        int, typer.Option(min=1, max=99, help="Number of the official split.", rich_help_panel=DATA_PANEL)
    ] = 1
    root: Annotated[
        Path,
        typer.Option(
            file_okay=False,
            help="Folder that holds datasets/, stores/, runs/ and models/.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = Path(".")
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A TOML page over the preset.", rich_help_panel=RUN_PANEL),
    ] = None
    sets: Annotated[
        list[str],
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Any setting; repeat for more.", rich_help_panel=RUN_PANEL
        ),
    ] = field(default_factory=list)
    seed: Annotated[int | None, _setting("train.seed", "--seed")] = None
    device: Annotated[Device | None, _setting("train.device", "--device")] = None
    workers: Annotated[
        int | None,
        typer.Option(
            help="train.workers: processes that load clips; `prepare`: data.workers, that decode videos.",
            show_default=False,
            rich_help_panel=RUN_PANEL,
        ),
    ] = None
    json: Annotated[
        bool, typer.Option("--json", help="One JSON document on stdout.", rich_help_panel=OUTPUT_PANEL)
    ] = False
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet", "-q", help="Only warnings and errors on stderr.", rich_help_panel=OUTPUT_PANEL
        ),
    ] = False
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Details on stderr.", rich_help_panel=OUTPUT_PANEL)
    ] = False
    progress: Annotated[
        ProgressStyle, typer.Option(help="Progress on stderr.", rich_help_panel=OUTPUT_PANEL)
    ] = ProgressStyle.auto
    show_config: Annotated[
        bool,
        typer.Option(
            "--show-config",
            help="Print all settings with their origins, and stop.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = False
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check inputs and print the plan; write nothing.", rich_help_panel=OUTPUT_PANEL
        ),
    ] = False

    def console(self) -> Console:
        """The console these flags ask for."""
        return Console(quiet=self.quiet, verbose=self.verbose, progress_style=self.progress.value)

    def resolve(self, preset: str, stage: str, flags: dict[str, tuple[str, Any]], modality: str) -> Resolved:
        """Merges all settings for a stage and modality; flags whose value is None were not given."""
        flags = flags | {
            "train.seed": ("--seed", self.seed),
            "train.device": ("--device", self.device.value if self.device else None),
            ("data.workers" if stage == "prepare" else "train.workers"): ("--workers", self.workers),
        }
        return resolve(
            preset,
            stage=stage,
            modality=modality,
            root=self.root,
            config=self.config,
            sets=self.sets,
            flags={key: given for key, given in flags.items() if given[1] is not None},
            environment=os.environ,
        )

    def place(self, resolved: Resolved, preset: str, modality: str) -> Place:
        """The paths that follow; `preset` is what the user named the page by."""
        by_hand = {
            key
            for key, origin in resolved.origin.items()
            if origin != "default" and not origin.startswith("preset")
        }
        renamed = resolved.origin["name"] == "--name"  # one's own data set: named by that from now on
        return Place(
            self.root,
            resolved.settings,
            modality,
            self.split,
            frozenset(by_hand),
            resolved.page,
            "" if renamed else preset,
        )


def shared_flags(function: Callable[..., None]) -> Callable[..., None]:
    """Replaces the parameter `shared` by one flag per field of `Shared`.

    A command that declares a parameter of the same name itself, with other choices, keeps its own.
    """
    own = inspect.signature(function)
    hints = get_type_hints(function, include_extras=True)
    shared_hints = get_type_hints(Shared, include_extras=True)
    parameters = [
        parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in own.parameters.items()
        if name != "shared"
    ]
    for item in fields(Shared):
        if item.name in own.parameters:
            continue
        default = item.default if item.default_factory is MISSING else item.default_factory()
        parameters.append(
            inspect.Parameter(
                item.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=shared_hints[item.name]
            )
        )

    @functools.wraps(function)
    def command(**given: Any) -> None:
        shared = Shared(**{item.name: given[item.name] for item in fields(Shared)})
        function(shared=shared, **{name: given[name] for name in own.parameters if name != "shared"})

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del command.__wrapped__
    return command
