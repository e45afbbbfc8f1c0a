"""Detection on the command line, from training to an export that runs without gkd, at its smallest."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gkdcli.data.clips import hold_out
from gkdcli.data.store import Store
from gkdcli.models.weights import load_tensors
from gkdcli.pipeline import train
from gkdcli.runs import Run
from gkdcli.tasks import detection
from gkdcli.tasks.trained import rebuild, rebuild_generators
from tests.conftest import Outcome, borrow
from tests.published import published_names
from tests.training.detection_jobs import networks, page

Gkd = Callable[..., Outcome]
PRESET = "demo-detection-tiny"
TIOU = ("--tiou", "0.05,0.1")  # where so small a network scores more than 0


def copy_of(source: Path, root: Path, *kinds: str) -> Path:
    """A root to write in: some kinds of run of another are copied, without what evaluation left."""
    borrow(source, root)
    for kind in kinds:
        shutil.copytree(source / "runs" / PRESET / kind, root / "runs" / PRESET / kind)
    for name in ("predictions*.h5", "report.json", "fusion.json", "*.png"):
        for path in root.glob(f"runs/**/{name}"):
            path.unlink()
    return root


STREAMS = ("distill-rgb", "distill-flow")
ALL = (*STREAMS, "pretrain-attention-rgb", "pretrain-attention-flow")


@pytest.fixture(scope="module")
def scored(tiny_detection: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained runs, for evaluation; a report is written into them, nothing else changes."""
    return copy_of(tiny_detection, tmp_path_factory.mktemp("scored") / "root", *ALL)


@pytest.fixture
def root(tiny_detection: Path, tmp_path: Path) -> Path:
    """The store and the teachers: what distillation needs."""
    return copy_of(tiny_detection, tmp_path / "root", "pretrain-attention-rgb")


def run_of(root: Path, kind: str) -> Path:
    return max((root / "runs" / PRESET / kind).iterdir())


def result_of(gkd: Gkd, *words: object) -> Any:
    return gkd(*words, "--json").must().json["result"]


def evaluated(gkd: Gkd, root: Path, *words: object) -> Any:
    return result_of(gkd, "evaluate", PRESET, "--root", root, *words)


# ---- evaluate ----


def test_the_document_of_evaluate(gkd: Gkd, scored: Path) -> None:
    outcome = gkd("evaluate", PRESET, "--root", scored, "--json").must()
    result = outcome.json["result"]
    assert outcome.json["run"] == str(run_of(scored, "distill-rgb"))
    assert list(result["map"]) == [f"0.{digit}" for digit in range(1, 8)]
    mean = {"average_map": range(3, 8), "average_map_official": range(1, 6)}
    for key, digits in mean.items():
        value = sum(result["map"][f"0.{digit}"] for digit in digits) / 5
        assert result[key] == pytest.approx(value)
    assert result["map"]["0.1"] > 0
    classes = Store.open(scored / "stores" / PRESET / "rgb.h5").classes
    assert [row["class"] for row in result["per_class"]] == classes
    for tiou, value in result["map"].items():
        assert value == pytest.approx(np.mean([row["ap"][tiou] for row in result["per_class"]]))
    truth = json.loads((scored / "datasets" / PRESET / "annotations.json").read_text())["database"]
    tested = [video for video in truth.values() if video["subset"].lower().startswith("test")]
    assert result["ground_truth"]["videos"] == len(tested) == 2
    assert result["ground_truth"]["segments"] == sum(len(video["annotations"]) for video in tested)
    assert sum(row["segments"] for row in result["per_class"]) == result["ground_truth"]["segments"]
    assert result["ground_truth"]["source"] == "annotations.json"
    protocol = result["protocol"]
    expected = {"modality": "rgb", "recipe": "corrected", "videos": 2, "stride_frames": 64, "nms_sigma": 0.1,
                "score_threshold": 0.01, "top_k": 5000, "clip_frames": 128, "crop_px": 32, "weights": "last",
                "chosen_on": "nothing: the last epoch"}  # fmt: skip
    assert {key: protocol[key] for key in expected} == expected
    assert "gkd export" in outcome.err
    table = gkd("evaluate", PRESET, "--root", scored).must().out
    assert [row.split()[0] for row in table.splitlines() if row.split()[:1] == classes[:1]]


def test_given_overlaps_are_scored_and_averaged(gkd: Gkd, scored: Path) -> None:
    result = evaluated(gkd, scored, *TIOU)
    assert list(result["map"]) == ["0.05", "0.1"]
    assert result["average_map"] == pytest.approx(sum(result["map"].values()) / 2)
    assert result["average_map"] > result["average_map_official"] > 0


def test_saved_predictions_are_scored_again_with_other_settings(gkd: Gkd, scored: Path, monkeypatch) -> None:
    first = evaluated(gkd, scored, *TIOU)
    monkeypatch.setattr("gkdcli.pipeline.evaluate.rebuild", lambda run: pytest.fail("a network was built"))
    again = evaluated(gkd, scored, *TIOU, "--rescore")
    assert again == first
    fewer = evaluated(gkd, scored, *TIOU, "--rescore", "--set", "eval.top_k=3")
    assert fewer["ground_truth"]["detections"] == 2 * 6 * 3  # videos x classes
    refused = gkd("evaluate", PRESET, "--root", scored, "--rescore", "--set", "eval.stride=32")
    assert refused.code == 1
    assert "the saved predictions are of another stride\n" in refused.err


def test_the_written_file_scores_the_same_without_store_or_network(
    gkd: Gkd, scored: Path, tmp_path: Path
) -> None:
    file = tmp_path / "found.json"
    first = evaluated(gkd, scored, *TIOU, "--output", file)
    document = json.loads(file.read_text())
    assert sum(len(rows) for rows in document["results"].values()) == first["ground_truth"]["detections"]
    assert set(document["results"]) == {f"untrimmed_test_000{n}" for n in (0, 1)}
    truth = scored / "datasets" / PRESET / "annotations.json"
    words = ("--predictions", file, "--ground-truth", truth)
    again = result_of(gkd, "evaluate", PRESET, "--root", tmp_path, *TIOU, *words)
    assert again["map"] == pytest.approx(first["map"])
    assert again["average_map"] == pytest.approx(first["average_map"])
    assert again["average_map_official"] == pytest.approx(first["average_map_official"])
    assert [row["ap"] for row in again["per_class"]] == [
        pytest.approx(row["ap"]) for row in first["per_class"]
    ]


def test_both_streams_and_their_fusion(gkd: Gkd, scored: Path, tmp_path: Path) -> None:
    result = evaluated(gkd, scored, *TIOU, "--fusion")
    assert [row["stream"] for row in result["streams"]] == ["rgb", "flow", "fused"]
    assert {"average_map", "average_map_official"} <= result["fused"].keys()
    assert all(result["fused"][key] == result[key] for key in ("average_map", "average_map_official"))
    for modality in ("rgb", "flow"):
        alone = evaluated(gkd, scored, *TIOU, "--modality", modality)
        assert result[modality]["map"] == alone["map"]
        weights = "1,0" if modality == "rgb" else "0,1"
        one = evaluated(gkd, scored, *TIOU, "--fusion", "--rescore", "--fusion-weights", weights)
        assert one["map"] == alone["map"]
        assert one["map"] != result["map"]
    protocol = result["protocol"]
    assert (protocol["modality"], protocol["fusion_weights"]) == ("rgb+flow", [1.0, 1.0])
    assert protocol["flow_method"] == "farneback"
    folder = run_of(scored, "distill-rgb")
    assert json.loads((folder / "fusion.json").read_text())["map"]


def test_requirements(gkd: Gkd, scored: Path) -> None:
    words = ("evaluate", PRESET, "--root", scored, "--rescore")
    evaluated(gkd, scored)
    assert gkd(*words, "--require", "average_map>=0", "--require", "map.0.1>0.0001").code == 0
    missed = gkd(*words, "--json", "--require", "average_map>=0.9")
    assert missed.code == 4
    assert missed.json["ok"] is False
    assert "average_map is" in missed.json["error"]["what"]
    assert missed.json["result"]["map"]


def test_the_teacher_and_all_networks_side_by_side(gkd: Gkd, scored: Path, tmp_path: Path) -> None:
    teacher = evaluated(gkd, scored, "--model", "teacher", *TIOU)
    assert teacher["model"] == "teacher"
    student = evaluated(gkd, scored, *TIOU)
    assert teacher["map"] != student["map"]
    assert teacher["parameters"] > student["parameters"]
    rows = evaluated(gkd, scored, "--model", "all", *TIOU)["runs"]
    assert [row["model"] for row in rows] == ["teacher", "distilled student"]
    assert [row["average_map"] for row in rows] == [teacher["average_map"], student["average_map"]]
    assert rows[1]["steps"] == 10


# ---- training ----


def test_the_plain_student_is_trained_and_compared(gkd: Gkd, root: Path, scored: Path) -> None:
    plain = ("--set", "distill.method=none", "--set", "train.init=scratch")
    plan = result_of(gkd, "distill", PRESET, "--root", root, *plain, "--dry-run")
    assert plan["cvae_parameters"] == 0
    gkd("distill", PRESET, "--root", root, *plain, "--epochs", 1).must()
    run = Run(run_of(root, "distill-rgb"))
    names = set(load_file(run.last))
    assert not [name for name in names if "attention" in name or name.startswith("generator.")]
    logged = json.loads(run.metrics.read_text().splitlines()[0])
    assert "location" in logged
    assert not [
        name for name in logged if name.startswith(("background", "cvae", "reconstruction", "attention"))
    ]
    result = evaluated(gkd, root, "--model", "all", *TIOU)
    assert result["model"] == "student (plain)"
    assert [row["model"] for row in result["runs"]] == ["teacher", "plain student"]


def test_a_run_cut_short_goes_on_to_the_same_weights(gkd: Gkd, tiny_detection: Path, root: Path) -> None:
    """Against the run that was never cut; norms stay frozen, as the student began from its teacher."""
    cut = gkd("distill", PRESET, "--root", root, "--max-steps", 3, "--json").must().json["result"]
    assert (cut["state"], cut["steps"], cut["curves"]) == ("cut", 3, None)  # within its first epoch
    assert gkd("evaluate", PRESET, "--root", root).code == 1  # never chosen silently
    done = gkd("distill", PRESET, "--root", root, "--resume", "--json").must().json["result"]
    assert (done["state"], done["steps"], done["run"]) == ("complete", 10, cut["run"])
    whole = load_file(run_of(tiny_detection, "distill-rgb") / "last.safetensors")
    found = load_file(Path(done["run"]) / "last.safetensors")
    assert found.keys() == whole.keys()
    assert [name for name in found if not torch.equal(found[name], whole[name])] == []
    teacher = load_file(run_of(root, "pretrain-attention-rgb") / "last.safetensors")
    name = "network.backbone.Mixed_5c.b0.bn.running_mean"
    assert torch.equal(found[name], teacher[name])


def test_held_out_videos_choose_the_weights(gkd: Gkd, root: Path) -> None:
    words = ("pretrain-attention", PRESET, "--root", root, "--set", "data.holdout=0.2", "--epochs", 1)
    result = result_of(gkd, *words)
    run = Run(Path(result["run"]))
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    (held,) = [line["held_out_average_map"] for line in lines if "mean" in line]
    assert result["held_out_average_map"] == held
    assert result["best_epoch"] == 1
    assert run.weights == run.best
    assert run.record["protocol"]["held_out_videos"] == 1
    again = evaluated(gkd, root, "--model", "teacher")
    assert again["protocol"]["chosen_on"] == "held-out training videos"


@pytest.mark.parametrize(("share", "told"), [(0.5, True), (0.0, False)])
def test_a_set_too_small_to_hold_out_of_is_told(
    gkd: Gkd, root: Path, monkeypatch: pytest.MonkeyPatch, share: float, told: bool
) -> None:
    monkeypatch.setattr(
        train, "hold_out", lambda rows, videos, fraction: hold_out(rows, videos[:4], fraction)
    )
    outcome = gkd(
        "pretrain-attention", PRESET, "--root", root, "--set", f"data.holdout={share}", "--dry-run"
    ).must()
    assert ("no training video is held out" in outcome.err) == told
    assert (f"data.holdout = {share}, training videos 4" in outcome.err) == told


def test_the_plan_counts_clips_that_show_an_action(gkd: Gkd, root: Path) -> None:
    plan = result_of(gkd, "pretrain-attention", PRESET, "--root", root, "--dry-run")
    store = Store.open(root / "stores" / PRESET / "rgb.h5")
    dataset = detection.training_set(store, store.split(1, "train"), page())
    assert plan["training_clips"] == len(dataset) > plan["training_videos"] == 6
    assert plan["steps"] == 2 * (len(dataset) // 4)
    assert plan["clip"] == "3x128x32x32"
    few = gkd("pretrain-attention", PRESET, "--root", root, "--batch-size", 100)
    assert few.code == 1
    assert f"there are {len(dataset)} training clips, fewer than a batch of 100" in few.err


def test_official_takes_one_clip_at_a_time(gkd: Gkd, root: Path) -> None:
    words = ("pretrain-attention", PRESET, "--root", root, "--set", "recipe=official")
    refused = gkd(*words)
    assert refused.code == 2
    assert "needs 1" in refused.err
    done = gkd(*words, "--batch-size", 1, "--set", "train.schedule=epoch", "--max-steps", 2, "--json").must()
    assert done.json["result"]["steps"] == 2


# ---- weights of others ----


def test_a_published_file_evaluates_as_the_run_it_was_made_of(gkd: Gkd, scored: Path, tmp_path: Path) -> None:
    first = evaluated(gkd, scored, *TIOU)
    run = Run(run_of(scored, "distill-rgb"))
    network = rebuild(run)
    torch.save({"state_dict": published_names(network)}, tmp_path / "student.ckpt")
    torch.save(published_names(rebuild_generators(run, network)), tmp_path / "cvae.ckpt")
    root = borrow(scored, tmp_path / "root")
    words = ("import", "--dataset", PRESET, "--root", root)
    told = result_of(gkd, *words, tmp_path / "student.ckpt")
    assert (told["role"], told["complete"], told["did_not_fit"]) == ("student", True, [])
    joined = gkd(*words, tmp_path / "cvae.ckpt", "--model", "student", "--json").must()
    assert (joined.json["result"]["cvae"], joined.json["result"]["did_not_fit"]) == (True, [])
    assert "never uses the 4f branch" not in joined.err
    theirs, ours = load_tensors(run.last), load_tensors(Path(told["entry"]) / "last.safetensors")
    kept = {name for name in theirs if name.startswith(("network.", "generator."))}
    assert kept == ours.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in kept)
    outcome = gkd("evaluate", PRESET, "--root", root, *TIOU, "--json").must()
    assert outcome.json["run"] == told["entry"]
    result = outcome.json["result"]
    for key in ("map", "average_map", "average_map_official", "per_class", "ground_truth", "parameters"):
        assert result[key] == first[key], key


def test_official_flow_is_fused_without_attention_and_scored_alone_with_it(
    gkd: Gkd, tiny_detection: Path, tmp_path: Path
) -> None:
    """FINDINGS 17: the released fused test gives the flow stream none (METHOD.md 5)."""
    root = borrow(tiny_detection, tmp_path / "root")
    official = ("--set", "recipe=official", "--set", "optim.batch_size=1")
    entries = {}
    for modality in ("rgb", "flow"):
        network = rebuild(Run(run_of(tiny_detection, f"distill-{modality}")))
        file = tmp_path / f"{modality}.ckpt"
        torch.save(published_names(network), file)
        words = ("import", file, "--dataset", PRESET, "--root", root, "--modality", modality)
        entries[modality] = Path(result_of(gkd, *words, *official)["entry"])
    evaluated(gkd, root, "--modality", "flow", *official, *TIOU)
    assert [path.name for path in entries["flow"].glob("*.h5")] == ["predictions.h5"]
    fused = evaluated(gkd, root, "--fusion", *official, *TIOU)
    assert sorted(path.name for path in entries["flow"].glob("*.h5")) == [
        "predictions-plain.h5",
        "predictions.h5",
    ]
    assert [path.name for path in entries["rgb"].glob("*.h5")] == ["predictions.h5"]
    conf = [detection.load(path)[0].heads.conf for path in sorted(entries["flow"].glob("*.h5"))]
    assert not np.array_equal(*conf)
    assert fused["protocol"]["recipe"] == "official"
    assert fused["flow"]["protocol"]["of"] == "plain feature"  # so its score here is not the one alone
    assert "of" not in fused["rgb"]["protocol"]
    corrected = borrow(tiny_detection, tmp_path / "corrected")
    shutil.copytree(tiny_detection / "runs", corrected / "runs")
    for path in corrected.glob("runs/**/predictions*.h5"):
        path.unlink()
    evaluated(gkd, corrected, "--fusion")
    assert not list(corrected.glob("runs/**/predictions-plain.h5"))


# ---- export ----

WITHOUT_GKD = """
import json, sys
import numpy, onnxruntime
from decode import Heads, decode
from nms import soft_nms

everything = json.load(open("card.json"))
card = everything["detection"]
given = numpy.load(sys.argv[1])
session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
outputs = session.run(None, {"clip": given["clips"]})
assert [one.name for one in session.get_outputs()] == [one["name"] for one in everything["outputs"]]
found = decode(Heads(*outputs), given["offsets"], numpy.array(card["priors"]),
               clip_frames=card["clip_frames"], fps=float(given["fps"]), threshold=card["threshold"])
kept, scores = soft_nms(found.segments, found.scores, sigma=card["sigma"], floor=card["floor"],
                        top_k=card["top_k"], recipe=card["recipe"], groups=found.labels)
assert not [name for name in sys.modules if name.startswith(("gkd", "torch"))]
rows = [{"label": everything["classes"][label], "score": float(score), "segment": segment.tolist()}
        for segment, score, label in zip(found.segments[kept], scores, found.labels[kept])]
json.dump(rows, sys.stdout)
"""


CARD_NEEDS = [
    "import json",
    "import numpy",
    "from decode import Heads, decode",
    "from nms import soft_nms",
    'card = json.load(open("card.json"))["detection"]',
]


def windows_of(frames: np.ndarray, card: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The card's steps 2 to 5, to the letter: normalised windows (W, C, T, H, W) and their first frames."""
    told, crop = card["preprocessing"], card["input"]["shape"][-1]
    length, stride = told["window_frames"], told["window_stride"]
    n, height, width, _ = frames.shape
    offsets = list(range(0, max(n - length, 0) + 1, stride))
    if offsets[-1] + length < n:
        offsets.append(n - length)
    assert min(height, width) >= crop
    top, left = round((height - crop) / 2), round((width - crop) / 2)
    cut = frames[:, top : top + crop, left : left + crop].astype(np.float32)
    scaled = (cut / 255 - np.float32(told["mean"])) / np.float32(told["std"])
    windows = np.zeros((len(offsets), length, crop, crop, frames.shape[-1]), np.float32)
    for window, offset in zip(windows, offsets, strict=True):
        taken = scaled[offset : offset + length]
        window[: len(taken)] = taken
    return windows.transpose(0, 4, 1, 2, 3), np.array(offsets)


@pytest.fixture(scope="module")
def traced() -> Iterator[None]:
    """The graph of one and the same network is traced once: that takes a minute and more."""
    export, graphs = torch.onnx.export, []

    def once(*given: Any, **how: Any) -> Any:
        if not graphs:
            graphs.append(export(*given, **how))
        return graphs[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", once)
        yield


@pytest.mark.usefixtures("traced")
def test_an_export_finds_the_same_actions_without_gkd(
    gkd: Gkd, scored: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A whole video through graph, decode.py and nms.py, as the card says, in a process of its own."""
    evaluated(gkd, scored, "--output", tmp_path / "found.json")
    out = tmp_path / "export"
    words = ("export", PRESET, "--root", scored, "--format", "onnx", "--format", "safetensors", "--out", out)
    exported = gkd(*words, "--json").must()
    assert "constant folding" not in caplog.text  # the exporter's own notes
    told = exported.json["result"]
    assert told["onnx"]["largest_relative_difference"] <= told["onnx"]["accepted_difference"]
    checked = told["whole_videos"]
    assert (checked["videos"], checked["windows"] > 2, checked["detections"] > 10) == (2, True, True)
    assert checked["found_again"] >= 0.98
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "card.json", "decode.py", "model.onnx", "model.safetensors", "nms.py",
    ]  # fmt: skip
    card = json.loads((out / "card.json").read_text())
    weights, run = load_file(out / "model.safetensors"), Run(run_of(scored, "distill-rgb"))
    ours = rebuild(run).state_dict()
    assert weights.keys() == ours.keys()
    assert all(torch.equal(weights[name], ours[name]) for name in ours)

    expected = json.loads((tmp_path / "found.json").read_text())["results"]
    store = Store.open(scored / "stores" / PRESET / "rgb.h5")
    row = store.split(1, "test")[0]
    video = store.videos[row]
    stored = store.frames(row, 0, video.frames)
    frames = np.stack([cv2.imdecode(image, cv2.IMREAD_COLOR)[:, :, ::-1] for image in stored])
    clips, offsets = windows_of(frames, card)
    assert len(offsets) > 1
    np.savez(tmp_path / "given.npz", clips=clips, offsets=offsets, fps=video.fps)
    (out / "run.py").write_text(WITHOUT_GKD)
    surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "run.py", tmp_path / "given.npz"],
        cwd=out, env=surroundings, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) > 100
    quoted = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert [line for line in quoted.splitlines() if line[:1].isalpha()][:5] == CARD_NEEDS
    assert_same_detections(found, expected[video.name])


@pytest.mark.usefixtures("traced")
def test_a_graph_that_finds_other_actions_in_whole_videos_is_not_written(
    gkd: Gkd, scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it: an older export stays whole, its card and weights with its graph."""
    from gkdcli.pipeline import export

    agreement, out = export.agreement, tmp_path / "out"
    monkeypatch.setattr(export, "agreement", lambda *given: agreement(*given) | {"found_again": 0.5})
    older = {name: name.encode() for name in ("model.onnx", "model.safetensors", "card.json")}
    out.mkdir()
    for name, content in older.items():
        (out / name).write_bytes(content)
    refused = gkd("export", PRESET, "--root", scored, "--format", "onnx", "--out", out)
    assert refused.code == 1
    assert "the graph finds 50.0% of what the live network finds in whole videos" in refused.err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == older


def assert_same_detections(found: list[Any], expected: list[Any]) -> None:
    """Of each class as many, each near one of the other; both were rounded differently on the way."""
    assert len(found) == len(expected)
    for label in {row["label"] for row in expected}:
        ours, theirs = (
            np.array([[*row["segment"], row["score"]] for row in rows if row["label"] == label])
            for rows in (found, expected)
        )
        assert ours.shape == theirs.shape
        apart = np.abs(ours[:, None] - theirs[None]).max(axis=2)
        assert max(apart.min(axis=0).max(), apart.min(axis=1).max()) < 1e-3, label


def test_networks_of_these_tests_differ() -> None:
    """Otherwise equal scores would say nothing."""
    played = networks(page(), 6)
    ours, theirs = published_names(played.student), published_names(played.teacher)
    assert ours.keys() == theirs.keys()
    assert len(set(ours)) == len(played.student.state_dict())
