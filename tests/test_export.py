"""export: the graph computes what the model does, and the card is enough to use it without gkd."""

from __future__ import annotations

import ast
import builtins
import copy
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gkdcli.card import describe, readable
from gkdcli.data.clips import ClipDataset, normalise
from gkdcli.data.store import Store
from gkdcli.errors import GkdError
from gkdcli.evaluation.predict import load_predictions
from gkdcli.export import write_export
from gkdcli.files import digest
from gkdcli.runs import Run
from gkdcli.settings import ExportSettings
from gkdcli.tasks.trained import rebuild
from tests.conftest import run_gkd
from tests.training.jobs import settle


@pytest.fixture(scope="module")
def evaluated(tiny_trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A student's run with the scores of its weights; its batch norm is settled, so that clips matter."""
    root = tmp_path_factory.mktemp("evaluated")
    for name in ("datasets", "stores"):
        (root / name).symlink_to(tiny_trained / name)
    shutil.copytree(tiny_trained / "runs", root / "runs")
    (path,) = root.glob("runs/demo-tiny/distill-rgb/*")
    run = Run(path)
    network, clips = rebuild(run), run.settings.clips
    dataset = ClipDataset(Store.open(root / "stores/demo-tiny/rgb.h5"), range(40), clips, "corrected", None)
    settle(network, normalise(torch.stack([dataset[place, 0, 0][0] for place in range(40)]), clips))
    kept = load_file(run.weights)
    kept |= {f"network.{name}": value.contiguous() for name, value in network.state_dict().items()}
    save_file(kept, run.weights)
    run_gkd("evaluate", "demo-tiny", "--root", root).must()
    return run


@pytest.fixture(scope="module")
def exported(evaluated: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "student"
    write_export(evaluated, rebuild(evaluated), ExportSettings(), ["safetensors", "onnx"], folder)
    return folder


@pytest.fixture(scope="module")
def session(exported: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(exported / "model.onnx"), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def card(exported: Path) -> dict[str, Any]:
    return json.loads((exported / "card.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8])
def test_the_graph_computes_what_the_model_does_for_every_batch_size(evaluated, session, batch):
    clip = np.random.default_rng(batch + 100).standard_normal((batch, 3, 16, 32, 32), dtype=np.float32)
    with torch.no_grad():
        exact = rebuild(evaluated).double()(torch.from_numpy(clip).double()).numpy()
    (found,) = session.run(None, {"clip": clip})
    assert found.shape == (batch, 12)
    assert (
        np.abs(found - exact).max() <= 2e-3 * np.abs(exact).max()
    )  # rounding, magnified in so narrow a network


def test_the_graph_carries_its_own_card(exported, card):
    model = onnx.load(exported / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == 20
    carried = {entry.key: json.loads(entry.value) for entry in model.metadata_props if entry.key in card}
    for key in ("classes", "preprocessing", "input", "outputs", "run", "run_weights_sha256"):
        assert carried[key] == card[key]
    (clip,) = model.graph.input
    assert clip.name == "clip"
    sizes = [d.dim_param or d.dim_value for d in clip.type.tensor_type.shape.dim]
    assert sizes == ["batch", 3, 16, 32, 32]
    assert [out.name for out in model.graph.output] == ["logits"]
    assert card["onnx"]["opset"] == 20
    assert card["onnx"]["largest_relative_difference"] <= 2e-3


def test_the_weights_file_holds_network_and_card(evaluated, exported, card):
    tensors = load_file(exported / "model.safetensors")
    network = rebuild(evaluated).state_dict()
    assert tensors.keys() == network.keys()
    assert all(torch.equal(tensors[name], value) for name, value in network.items())
    with safe_open(exported / "model.safetensors", framework="pt") as handle:
        inside = json.loads(handle.metadata()["card"])
    assert inside["classes"] == card["classes"]
    assert card["safetensors_sha256"] == digest(exported / "model.safetensors")


def test_the_card_says_where_the_weights_come_from(evaluated, card):
    record, report = evaluated.record, json.loads((evaluated.folder / "report.json").read_text())
    assert card["backbone"] == "top-i3d"
    assert card["classes"] == record["classes"]
    assert card["parameters"] == record["parameters"]
    assert card["run"] == evaluated.folder.name
    assert card["run_weights_sha256"] == digest(evaluated.weights)
    assert re.fullmatch(r"\d{8}-\d{6}", card["distilled_from"])
    assert (evaluated.folder.parents[1] / "pretrain-attention-rgb" / card["distilled_from"]).is_dir()
    assert card["scores"] == {"top1": report["top1"], "top5": report["top5"]}
    assert card["protocol"]["recipe"] == "corrected"


def test_scores_of_other_weights_are_not_claimed(evaluated, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(evaluated.folder, folder)
    report = json.loads((folder / "report.json").read_text())
    report["protocol"]["weights_sha256"] = "0" * 64
    (folder / "report.json").write_text(json.dumps(report))
    run = Run(folder)
    assert describe(run, rebuild(run))["scores"] is None
    (folder / "report.json").unlink()
    assert describe(run, rebuild(run))["scores"] is None


def test_a_score_that_there_is_none_of_is_not_told(card):
    """A test set without actions has no average precision: null in the report."""
    unknown = card | {"scores": {"average_map": None, "average_map_official": None}}
    assert "Test videos: not evaluated yet." in readable(unknown)
    assert "Test videos: top1 0.250." in readable(card | {"scores": {"top1": 0.25, "top5": None}})


def test_the_code_on_a_detectors_page_lacks_nothing_but_the_video(card):
    code = readable(card | {"detection": {}}).split("```")[1].removeprefix("python\n")
    names = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)]
    known = {name.id for name in names if isinstance(name.ctx, ast.Store)} | set(dir(builtins))
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            known |= {alias.name for alias in node.names}
    assert {name.id for name in names} - known == {"outputs", "offsets", "fps"}
    for given in ("outputs:", "offsets:", "fps:"):
        assert given in code


def test_the_readable_card_reads_well(exported, card):
    text = (exported / "README.md").read_text(encoding="utf-8")
    assert text.startswith(
        "# top-i3d for demo-tiny (rgb)\n\n51,639 parameters, 0.00208 GMAC per clip. Test videos: top1 0."
    )
    assert (
        "`clip`, float32, batch x 3 x 16 x 32 x 32 (batch, channel (R, G, B), time, height, width):" in text
    )
    for number, step in enumerate(card["preprocessing"]["steps"], 1):
        assert f"\n{number}. {step}" in text
    assert "- 3: left\n" in text
    assert "None" not in text
    assert "{" not in text


def follow(steps: list[str], frames: np.ndarray, card: dict[str, Any]) -> np.ndarray:
    """The five steps of the card, to the letter, with NumPy and OpenCV."""
    length, crop = card["input"]["shape"][2:4]
    n, height, width, _ = frames.shape
    assert f"take {length} consecutive ones from number max(0, (n - {length - 1}) // 2)" in steps[1]
    first = max(0, (n - (length - 1)) // 2)
    assert first == eval(card["preprocessing"]["first_frame"], {"n": n, "max": max})
    taken = list(frames[first : first + length])
    while len(taken) < length:
        taken.append(taken[-1])
    if min(height, width) < crop:
        scale = crop / min(height, width)
        height, width = max(crop, round(height * scale)), max(crop, round(width * scale))
        taken = [cv2.resize(frame, (width, height), interpolation=cv2.INTER_LINEAR) for frame in taken]
    top, left = round((height - crop) / 2), round((width - crop) / 2)
    cut = np.stack(taken)[:, top : top + crop, left : left + crop].astype(np.float32)
    scaled = (cut / 255 - np.float32(card["preprocessing"]["mean"])) / np.float32(
        card["preprocessing"]["std"]
    )
    return scaled.transpose(3, 0, 1, 2)[None].astype(np.float32)


def test_the_card_followed_to_the_letter_gives_the_logits_of_evaluate(evaluated, session, card):
    """From stored frames to logits without a line of gkd: the proof that the card is complete."""
    root = evaluated.folder.parents[3]
    store = Store.open(root / "stores/demo-tiny/rgb.h5")
    predictions = load_predictions(evaluated.folder / "predictions.h5")
    videos = store.split(1, "test")
    assert np.ptp(predictions.logits, axis=0).max() > 0.1 * np.abs(predictions.logits).max(), "clips matter"
    for place in (0, 7, 23):
        row = store.videos[videos[place]]
        assert predictions.videos[place] == f"{row.class_name}/{row.name}"
        stored = store.frames(videos[place], 0, row.frames)
        frames = np.stack([cv2.imdecode(image, cv2.IMREAD_COLOR)[:, :, ::-1] for image in stored])
        (logits,) = session.run(None, {"clip": follow(card["preprocessing"]["steps"], frames, card)})
        expected = predictions.logits[place].mean(axis=1)
        assert np.abs(logits[0] - expected).max() <= 2e-3 * np.abs(predictions.logits).max()
        scores = np.exp(logits[0]) / np.exp(logits[0]).sum()  # "softmax over classes gives scores"
        assert card["classes"][int(scores.argmax())] == card["classes"][int(expected.argmax())]


# ---- what can go wrong ----


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_extra_is_named_and_nothing_is_written(evaluated, tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(GkdError, match=f"needs the export extra: {missing} is not installed") as caught:
        write_export(
            evaluated, rebuild(evaluated), ExportSettings(), ["safetensors", "onnx"], tmp_path / "out"
        )
    assert caught.value.hint == "`pip install 'gkdcli[export]'`"
    assert not (tmp_path / "out").exists()


def test_safetensors_alone_need_no_extra(evaluated, tmp_path, monkeypatch):
    for name in ("onnx", "onnxruntime", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, None)
    write_export(evaluated, rebuild(evaluated), ExportSettings(), ["safetensors"], tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["README.md", "card.json", "model.safetensors"]


def test_a_graph_that_disagrees_is_refused_and_leaves_nothing(evaluated, tmp_path, monkeypatch):
    export = torch.onnx.export

    def other(network: torch.nn.Module, *arguments: Any, **options: Any) -> Any:
        changed = copy.deepcopy(network)
        with torch.no_grad():
            changed.classifier.bias[3] += 0.02
        return export(changed, *arguments, **options)

    monkeypatch.setattr(torch.onnx, "export", other)
    with pytest.raises(GkdError, match=r"differs from the live model by 0\.0") as caught:
        write_export(
            evaluated, rebuild(evaluated), ExportSettings(), ["safetensors", "onnx"], tmp_path / "out"
        )
    assert "export.tolerance = 0.0001" in caught.value.hint
    assert list((tmp_path / "out").iterdir()) == []


def test_class_names_of_any_kind_reach_card_and_graph(evaluated, tmp_path):
    """Folders give classes their names, and folders may be called anything."""
    folder = tmp_path / "run"
    shutil.copytree(evaluated.folder, folder)
    run = Run(folder)
    run.record["classes"][:3] = ["日本 ü", "$x_1$ #", "b\udc80d"]
    run.update()
    again = Run(folder)
    assert again.record["classes"][:3] == ["日本 ü", "$x_1$ #", "b\udc80d"]
    write_export(again, rebuild(again), ExportSettings(), ["safetensors"], tmp_path / "out")
    found = json.loads((tmp_path / "out/card.json").read_text(encoding="utf-8"))
    assert found["classes"][:3] == ["日本 ü", "$x_1$ #", "b\udc80d"]
    assert "- 0: 日本 ü\n" in (tmp_path / "out/README.md").read_text(encoding="utf-8")


def test_official_scores_are_not_promised_from_averaged_logits(evaluated, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(evaluated.folder, folder)
    run = Run(folder)
    run.update(recipe="official")
    assert "softmax per time step" in describe(run, rebuild(run))["outputs"][0]["meaning"]
