"""No dead settings: each one is changed in turn, and a plan, an output or an error changes with it.

What is observed is never an echo of the settings: weights after three steps, frames in a store, the size of a
network, processes, a graph's operator set.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing.process
import os
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import onnx
import pytest
import torch
from safetensors import safe_open

from gkdcli.data import jobs, torch_flow
from gkdcli.data.sources import Source
from gkdcli.models import layers
from gkdcli.resolve import setting_names
from gkdcli.settings import DataSettings
from tests.conftest import Outcome, borrow
from tests.videos import draw, write_video


class House:
    """What an observation works with: the command line, a trained preset, two videos, fresh folders."""

    def __init__(
        self, gkd: Callable[..., Outcome], preset: str, trained: Path, videos: Path, folder: Path
    ) -> None:
        self.gkd = gkd
        self.preset = preset
        self.trained = trained
        self.videos = videos
        self.folder = folder

    def fresh(self) -> Path:
        """A name that nothing has yet."""
        return self.folder / f"root{len(list(self.folder.iterdir()))}"

    def root(self) -> Path:
        """Store and runs are those of the trained root."""
        root = borrow(self.trained, self.fresh())
        runs = root / "runs" / self.preset
        runs.mkdir(parents=True)
        for path in (self.trained / "runs" / self.preset).iterdir():
            (runs / path.name).symlink_to(path)
        return root

    def run(self, stage: str) -> Path:
        """The trained run of a stage."""
        return next((self.trained / "runs" / self.preset / stage).iterdir())

    def train(self, sets: list[str], root: Path, command: str = "distill") -> Outcome:
        """Three steps of a run of its own."""
        (root / "runs" / self.preset / f"{command}-rgb").unlink()
        words = [command, self.preset, "--root", root, "--max-steps", 3, "--batch-size", 4]
        if command == "distill":
            words += ["--teacher", self.run("pretrain-attention-rgb")]
        return self.gkd(*words, *_flags(sets))

    def prepare(self, sets: list[str], *words: object) -> tuple[Outcome, Path]:
        """A store of the two videos."""
        root = self.fresh()
        call = ("prepare", "folder", self.videos, "--name", "own", "--root", root)
        return self.gkd(*call, *words, *_flags(sets)), root / "stores" / "own"


def _flags(sets: list[str]) -> list[str]:
    return [word for text in sets for word in ("--set", text)]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dead") / "videos"
    for name in ("up/a", "up/b", "up/c", "up/d", "up/e"):
        write_video(folder / f"{name}.mp4", draw(10, 96, 64))
    return folder


@pytest.fixture
def house(gkd: Callable[..., Outcome], tiny_streams: Path, videos: Path, tmp_path: Path) -> House:
    return House(gkd, "demo-tiny", tiny_streams, videos, tmp_path)


@pytest.fixture(scope="module")
def detecting(tiny_detection: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teacher and student of detection, to be evaluated."""
    root = borrow(tiny_detection, tmp_path_factory.mktemp("detecting") / "root")
    shutil.copytree(tiny_detection / "runs", root / "runs")
    return root


@pytest.fixture
def detection_house(gkd: Callable[..., Outcome], detecting: Path, videos: Path, tmp_path: Path) -> House:
    return House(gkd, "demo-detection-tiny", detecting, videos, tmp_path)


# ---- observations: (house, settings) -> what is seen ----


def weights(house: House, sets: list[str], command: str = "distill") -> str:
    """Of network and CVAE after three steps."""
    root = house.root()
    house.train(sets, root, command).must()
    (path,) = root.glob(f"runs/{house.preset}/{command}-rgb/*/last.safetensors")
    digest = hashlib.sha256()
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            if name.startswith(("network.", "generator.")):
                digest.update(file.get_tensor(name).numpy().tobytes())
    return digest.hexdigest()


def teacher_weights(house: House, sets: list[str]) -> str:
    """The same in phase 1, for what teacher and student must agree in."""
    return weights(house, sets, "pretrain-attention")


def plan_of(stage: str, key: str) -> Callable[[House, list[str]], Any]:
    """One computed entry of a training plan."""

    def observe(house: House, sets: list[str]) -> Any:
        words = (stage, house.preset, "--root", house.trained, "--dry-run", "--json", *_flags(sets))
        return house.gkd(*words).must().json["result"][key]

    return observe


def drawing_plan(house: House, sets: list[str]) -> Any:
    """How many videos would be drawn; None where none would."""
    words = ("prepare", "demo-tiny", "--root", house.folder, "--dry-run", "--json")
    return house.gkd(*words, *_flags(sets)).json.get("result", {}).get("videos_drawn")


def drawn_pixels(house: House, sets: list[str]) -> bytes:
    """The first of the drawn videos."""
    words = ("prepare", "demo-tiny", "--set", "data.draw_train=2", "--set", "data.draw_test=1")
    root = house.fresh()
    house.gkd(*words, "--root", root, *_flags(sets)).must()
    return sorted(root.glob("datasets/**/*.mp4"))[0].read_bytes()


def reason_of_a_hang(house: House, sets: list[str]) -> str:
    """Why a video is rejected one of whose images never ends."""
    folder = house.fresh() / "frames" / "up" / "a"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "img_00001.jpg")
    root = folder.parents[2]
    words = ("prepare", "folder", "--from-frames", folder.parents[1], "--name", "own", "--root", root)
    assert house.gkd(*words, *_flags(sets)).code == 1  # nothing else is there
    return (root / "stores" / "own" / "rgb.rejected.tsv").read_text()


def subsets(house: House, sets: list[str]) -> Any:
    """Test videos of a folder that names no split."""
    return house.prepare(sets, "--dry-run", "--json")[0].must().json["result"]["test"]


def part(house: House, sets: list[str]) -> Any:
    """Layout, number, size and bytes of the stored frames."""
    outcome, store = house.prepare(sets)
    outcome.must()
    with h5py.File(sorted(store.glob("rgb/up/*.h5"))[0]) as file:
        keys = ("frame_count", "width", "height")
        return [sorted(file), file["frames"].shape, *(int(file.attrs[key]) for key in keys)]


def flow_part(house: House, sets: list[str]) -> bytes:
    """The stored pictures of horizontal motion."""
    outcome, store = house.prepare(["data.flow=farneback", *sets], "--modality", "flow")
    outcome.must()
    with h5py.File(sorted(store.glob("flow/up/*.h5"))[0]) as file:
        return bytes(file["flow_x"][:].tobytes())


def warned(house: House, sets: list[str]) -> int:
    """How often one is warned that a setting has no use here."""
    return house.prepare(sets)[0].must().err.count("warning: ")


def pairs_at_once(house: House, sets: list[str]) -> set[int]:
    """How many are handed to TV-L1; a job is done in this process, so that it can be watched."""
    seen = set()
    outcome = house.gkd(
        "prepare", "folder", house.videos, "--show-config", "--root", house.fresh(), *_flags(sets)
    )
    data = DataSettings(**tomllib.loads(outcome.must().out)["data"])

    def watched(before: torch.Tensor, after: torch.Tensor, **_: Any) -> torch.Tensor:
        seen.add(len(before))
        return torch.zeros(len(before), 2, *before.shape[1:])

    source = Source(house.videos / "up" / "a.mp4", "up", "a", {})
    part = house.fresh() / "a.h5"
    part.parent.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_flow, "tvl1_flow", watched)
        assert not jobs.work(jobs.Job(source, {"flow": part}, data, 1)).reason
    return seen


def raft_refusal(house: House, sets: list[str]) -> str:
    """What RAFT has to say about its weights."""
    return house.prepare(["data.flow=raft", *sets], "--modality", "flow")[0].err


def fused_scores(house: House, sets: list[str]) -> list[float]:
    """Of each test video, by both streams together."""
    output = house.folder / "scores.json"
    words = ("evaluate", "demo-tiny", "--root", house.trained, "--fusion", "--output", output)
    house.gkd(*words, *_flags(sets)).must()
    return [entry["score"] for entry in json.loads(output.read_text())["predictions"]]


def processes(command: str) -> Callable[[House, list[str]], int]:
    """How many a command starts."""

    def observe(house: House, sets: list[str]) -> int:
        started = []
        start = multiprocessing.process.BaseProcess.start

        def watched(process: Any) -> None:
            started.append(process)
            start(process)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(multiprocessing.process.BaseProcess, "start", watched)
            if command == "prepare":
                house.prepare(sets)[0].must()
            else:
                house.train(sets, house.root()).must()
        return len(started)

    return observe


def checkpoints(house: House, sets: list[str]) -> int:
    """How often the checkpoint is renamed into place."""
    written = []
    replace = os.replace

    def watched(old: Path, new: Path) -> None:
        written.append(Path(new).name)
        replace(old, new)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", watched)
        house.train(sets, house.root()).must()
    return written.count("last.safetensors")


def kept_checkpoints(house: House, sets: list[str]) -> list[str]:
    """Names of the checkpoints in the run's folder."""
    root = house.root()
    house.train(sets, root).must()
    return sorted(path.name for path in root.glob(f"runs/{house.preset}/distill-rgb/*/*.safetensors"))


def recomputed_blocks(house: House, sets: list[str]) -> int:
    """How often a block is told to keep its input alone."""
    asked = []
    checkpoint = layers.checkpoint

    def watched(*words: Any, **options: Any) -> Any:
        asked.append(words[0])
        return checkpoint(*words, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "checkpoint", watched)
        house.train(sets, house.root()).must()
    return len(asked)


def where_it_runs(house: House, sets: list[str]) -> tuple[int, bool]:
    """Without CUDA it is refused, with CUDA said; bf16 is refused on the CPU."""
    outcome = house.train(sets, house.root())
    return outcome.code, "steps on cpu" in outcome.err


def threads(house: House, sets: list[str]) -> int:
    """How many PyTorch was told to use."""
    before = torch.get_num_threads()
    try:
        house.train(sets, house.root()).must()
        return torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def compiled(house: House, sets: list[str]) -> int:
    """How many functions PyTorch is asked to compile; compiling them takes minutes, so it is left out."""
    asked = []

    def watched(function: Any, **_: Any) -> Any:
        asked.append(function)
        return function

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", watched)
        house.train(sets, house.root()).must()
    return len(asked)


def batches_of_evaluation(house: House, sets: list[str]) -> set[int]:
    """The sizes that the first layer sees."""
    seen: list[int] = []

    def watch(module: Any, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, torch.nn.Conv3d):
            seen.append(len(inputs[0]))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(watch)
    try:
        words = ("evaluate", "demo-tiny", "--root", house.trained, "--run", house.run("distill-rgb"))
        house.gkd(*words, *_flags(sets)).must()
    finally:
        hook.remove()
    return set(seen)


def detections(house: House, sets: list[str]) -> Any:
    """All that is found in the test videos."""
    output = house.folder / "found.json"
    words = ("evaluate", house.preset, "--root", house.trained, "--output", output)
    house.gkd(*words, *_flags(sets)).must()
    return json.loads(output.read_text())["results"]


def average_map(house: House, sets: list[str]) -> float:
    """How right that is."""
    words = ("evaluate", house.preset, "--root", house.trained, "--json", *_flags(sets))
    return float(house.gkd(*words).must().json["result"]["average_map"])


def graph(house: House, sets: list[str]) -> Any:
    """The exported graph's operator set, and the difference up to which it is accepted."""
    words = (
        "export",
        "demo-tiny",
        "--root",
        house.trained,
        "--format",
        "onnx",
        "--out",
        house.folder / "out",
    )
    found = house.gkd(*words, "--json", *_flags(sets)).must().json["result"]["onnx"]
    return onnx.load(found["file"]).opset_import[0].version, found["accepted_difference"]


def refusal(command: str) -> Callable[[House, list[str]], str]:
    """The error of a command that cannot go on; "" where it can."""

    def observe(house: House, sets: list[str]) -> str:
        outcome = house.gkd(command, "demo-tiny", "--root", house.trained, "--dry-run", *_flags(sets))
        return outcome.err if outcome.code else ""

    return observe


def event_files(house: House, sets: list[str]) -> int:
    """How many a run has written for TensorBoard."""
    root = house.root()
    house.train(sets, root).must()
    return len(list(root.glob("runs/*/distill-rgb/*/tensorboard/events*")))


class Row(NamedTuple):
    """Under the settings `base`, giving `name` the value `other` changes what `observe` sees."""

    name: str
    other: str
    observe: Callable[[House, list[str]], Any]
    base: tuple[str, ...] = ()
    house: str = "house"


def detecting_row(name: str, other: str, observe: Callable[[House, list[str]], Any]) -> Row:
    """The same on the tiny detection demo."""
    return Row(name, other, observe, house="detection_house")


SGD = ("optim.algorithm=sgd", "optim.warmup_epochs=0")
NO_WARMUP = ("optim.warmup_epochs=0",)
ROWS = [
    Row("name", "other", plan_of("pretrain-attention", "runs")),
    Row("dataset", "other", refusal("distill")),
    Row("task", "detection", refusal("distill")),
    Row("recipe", "official", weights),
    Row("data.source", "videos", drawing_plan),
    Row("data.storage", "raw", part),
    Row("data.jpeg_quality", "60", part),
    Row("data.short_side", "32", part),
    Row("data.size", "[48, 32]", part),
    Row("data.fps", "5", part),
    Row("data.flow", "dis", flow_part),
    Row("data.flow_bound", "5", flow_part),
    Row("data.flow_batch", "1", pairs_at_once, ("data.flow=tvl1-torch",)),
    Row("data.flow_weights", "none.pth", raft_refusal),
    Row("data.workers", "2", processes("prepare"), ("data.workers=1",)),
    Row("data.gpu_share", "0.5", warned),  # what it does on a cluster: tests/data/test_cluster.py
    Row("data.timeout", "2", reason_of_a_hang, ("data.timeout=1",)),
    Row("data.test_fraction", "0.6", subsets),
    Row("data.holdout", "0", plan_of("distill", "held_out_videos")),
    Row("data.draw_train", "5", drawing_plan),
    Row("data.draw_test", "5", drawing_plan),
    Row("data.draw_seed", "1", drawn_pixels),
    Row("clips.length", "24", plan_of("pretrain-attention", "gmac")),
    Row("clips.crop", "64", plan_of("pretrain-attention", "gmac")),
    Row("clips.short_side", "48", weights),
    Row("clips.scales", "[1.0]", weights),
    Row("clips.flip", "true", weights),
    Row("clips.mean", "[0.3]", teacher_weights),
    Row("clips.std", "[0.5]", teacher_weights),
    detecting_row("clips.stride", "30", plan_of("pretrain-attention", "training_clips")),
    Row("model.teacher", "i2d", plan_of("pretrain-attention", "parameters")),
    Row("model.student", "i2d", plan_of("distill", "parameters")),
    Row("model.attention", "lite", plan_of("distill", "parameters")),
    Row("model.width", "0.125", plan_of("pretrain-attention", "parameters")),
    Row("model.dropout", "0", weights, ("model.dropout=0.5",)),
    Row("model.bn_momentum", "0.5", weights),
    Row("optim.algorithm", "sgd", weights),
    Row("optim.learning_rate", "1e-4", weights),
    Row("optim.momentum", "0", weights, SGD),
    Row("optim.weight_decay", "0.1", weights),
    Row("optim.schedule", "constant", weights, NO_WARMUP),
    Row("optim.warmup_epochs", "0", weights),
    Row("optim.batch_size", "5", plan_of("distill", "steps")),
    Row("optim.accumulation", "2", weights),
    Row("optim.clip_norm", "1e-3", weights, SGD),
    Row("optim.epochs", "3", plan_of("distill", "steps")),
    Row("optim.generator_lr", "1e-4", weights),
    Row("optim.generator_betas", "[0.1, 0.5]", weights, NO_WARMUP),
    Row("optim.step_epochs", "[0.05]", weights, (*NO_WARMUP, "optim.schedule=step", "optim.step_epochs=[1]")),
    Row("optim.step_factor", "0.5", weights, (*NO_WARMUP, "optim.schedule=step", "optim.step_epochs=[0.05]")),
    Row("optim.ema", "0.5", weights),
    Row("optim.label_smoothing", "0.2", weights),
    Row("distill.method", "none", plan_of("distill", "cvae_parameters")),
    Row("distill.beta", "10", weights),
    Row("distill.generative_weight", "10", weights),
    Row("distill.reconstruction_weight", "10", weights),
    Row("distill.kl_weight", "10", weights),
    detecting_row("distill.location_weight", "1", weights),
    detecting_row("distill.class_weight", "10", weights),
    detecting_row("distill.background_weight", "1", weights),
    detecting_row("distill.contrast_weight", "10", weights),
    detecting_row("distill.refine_iou", "0.01", weights),
    Row("distill.ramp_epochs", "1", weights),
    Row("train.schedule", "epoch", plan_of("distill", "steps")),
    Row("train.init", "scratch", weights),
    Row("train.seed", "1", weights),
    Row("train.device", "cuda", where_it_runs, ("train.device=cpu",)),
    Row("train.workers", "1", processes("distill")),
    Row("train.threads", "2", threads, ("train.threads=1",)),
    Row("train.precision", "bf16", where_it_runs, ("train.device=cpu",)),
    Row("train.compile", "true", compiled),
    Row("train.channels_last", "off", weights),
    Row("train.sync_batch_norm", "true", where_it_runs, ("train.device=cpu",)),
    Row("train.checkpoint_minutes", "1e-9", checkpoints),
    Row("train.tensorboard", "true", event_files),
    Row("train.teacher_cache", "2", plan_of("distill", "teacher_cache_bytes")),
    Row("train.checkpoint_steps", "1", checkpoints),
    Row("train.keep_checkpoints", "3", kept_checkpoints, ("train.checkpoint_steps=1",)),
    Row("train.checkpoint_activations", "true", recomputed_blocks),
    Row("eval.batch_size", "5", batches_of_evaluation),
    Row("eval.fusion_weights", "[1, 0]", fused_scores),
    detecting_row("eval.stride", "32", detections),
    detecting_row("eval.score_threshold", "0.06", detections),
    detecting_row("eval.nms_sigma", "0.5", detections),
    detecting_row("eval.nms_floor", "0.02", detections),
    detecting_row("eval.top_k", "5", detections),
    detecting_row("eval.tiou", "[0.05]", average_map),
    Row("export.opset", "21", graph),
    Row("export.tolerance", "1e-12", graph),
]
_seen: dict[Any, Any] = {}


def test_the_table_has_every_setting_once() -> None:
    assert [row.name for row in ROWS] == setting_names()


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_changing_it_changes_something(row: Row, request: pytest.FixtureRequest) -> None:
    house: House = request.getfixturevalue(row.house)
    key = (row.observe, row.base, row.house)
    if key not in _seen:
        _seen[key] = row.observe(house, list(row.base))
    assert row.observe(house, [*row.base, f"{row.name}={row.other}"]) != _seen[key]


@pytest.mark.parametrize("name", ["house", "detection_house"])
def test_training_is_the_same_where_nothing_is_changed(name: str, request: pytest.FixtureRequest) -> None:
    """Without this the rows that compare weights would prove nothing."""
    house: House = request.getfixturevalue(name)
    assert weights(house, []) == _seen.setdefault((weights, (), name), weights(house, []))


def test_evaluation_is_the_same_where_nothing_is_changed(detection_house: House) -> None:
    """Likewise of those that compare detections."""
    assert detections(detection_house, []) == detections(detection_house, [])
