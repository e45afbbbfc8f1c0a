"""What leaves the house: weights, the card that explains them, an ONNX graph checked against the model."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from gkdcli.errors import GkdError
from gkdcli.files import atomic_path, digest, write_json, write_text
from gkdcli.models.recognizer import Recognizer
from gkdcli.models.weights import save_tensors
from gkdcli.runs import Run, version
from gkdcli.settings import CHANNELS, ExportSettings, Settings


def write_export(
    run: Run, network: Recognizer, settings: ExportSettings, formats: list[str], folder: Path
) -> dict[str, Any]:
    """Writes `model.safetensors`, `card.json` and `README.md`, and `model.onnx` where asked for.

    Args:
        run: where the network comes from.
        network: rebuilt, in evaluation mode.
        settings: operator set and tolerance.
        formats: of `safetensors`, `onnx`.
        folder: is made.

    Returns:
        The files, and for ONNX the largest difference found.

    Raises:
        GkdError: the export extra is absent, or the graph does not agree with the live model.
    """
    card = describe(run, network)
    payload: dict[str, Any] = {
        "folder": str(folder),
        "classes": len(card["classes"]),
        "parameters": card["parameters"],
    }
    if "onnx" in formats:
        payload["onnx"] = _write_onnx(network, card, settings, folder / "model.onnx")
        card["onnx"] = payload["onnx"]
    if "safetensors" in formats:
        path = folder / "model.safetensors"
        try:
            save_tensors(path, dict(network.state_dict()), {"card": json.dumps(card)})
        except SafetensorError as error:
            raise GkdError(f"cannot write the weights: {error}", str(path), "make room there") from None
        payload["safetensors"] = {"file": str(path), "bytes": path.stat().st_size, "sha256": digest(path)}
        card["safetensors_sha256"] = payload["safetensors"]["sha256"]
    write_json(folder / "card.json", card)
    write_text(folder / "README.md", _readable(card))
    return payload | {"card": str(folder / "README.md")}


def describe(run: Run, network: Recognizer) -> dict[str, Any]:
    """The card: all that someone without gkd must know to use the weights."""
    record, page = run.record, run.settings
    clips, weights = page.clips, digest(run.weights)
    channels = CHANNELS[record["modality"]]
    kind = page.model.teacher if record["stage"] == "pretrain" else page.model.student
    teacher = record["parents"].get("teacher")
    report = _report(run, weights)
    return {
        "gkd": version(),
        "backbone": kind,
        "width": page.model.width,
        "attention": bool(network.attention),
        "modality": record["modality"],
        "dataset": record["dataset"],
        "split": record["split"],
        "recipe": record["recipe"],
        "method": record["method"],
        "first_weights": record["began"],
        "imported": "imported" in record,
        "distilled_from": Path(teacher).name if teacher else None,
        "run": run.folder.name,
        "run_weights_sha256": weights,
        "parameters": record["parameters"],
        "gmac": record["gmac"],
        "classes": record["classes"],
        "input": {
            "name": "clip",
            "shape": ["batch", channels, clips.length, clips.crop, clips.crop],
            "dtype": "float32",
            "layout": f"batch, channel ({_CHANNELS[record['modality']]}), time, height, width",
        },
        "output": {
            "name": "logits",
            "shape": ["batch", len(record["classes"])],
            "meaning": _MEANING[record["recipe"]],
            "of": "attended feature" if network.attention and network.scores_attended else "plain feature",
        },
        "preprocessing": {
            "steps": _steps(page, record["modality"]),
            "first_frame": f"max(0, (n - {clips.length - 1}) // 2)",
            "mean": list(clips.mean) * (channels if len(clips.mean) == 1 else 1),
            "std": list(clips.std) * (channels if len(clips.std) == 1 else 1),
        },
        "scores": {key: report[key] for key in ("top1", "top5")} if report else None,
        "protocol": report.get("protocol"),
    }


_MEANING = {
    "corrected": "time-averaged logits; softmax over classes gives scores",
    "official": "time-averaged logits; gkd scores with the softmax per time step, summed over time, so its"
    " ranks may differ a little from those of these logits",
}


def _report(run: Run, weights: str) -> dict[str, Any]:
    """What `gkd evaluate` found for these very weights; empty where it did not run since."""
    path = run.folder / "report.json"
    report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return dict(report) if report.get("protocol", {}).get("weights_sha256") == weights else {}


_FLOW = {
    "tvl1": "DualTVL1OpticalFlow, its defaults",
    "dis": "DISOpticalFlow, medium",
    "farneback": "calcOpticalFlowFarneback 0.5, 3, 15, 3, 5, 1.2",
}
_CHANNELS = {"rgb": "R, G, B", "flow": "x to the right, y downwards"}


def _steps(page: Settings, modality: str) -> list[str]:
    """From a video to the input, to be followed to the letter."""
    data, clips = page.data, page.clips
    length, crop = clips.length, clips.crop
    if data.size:
        size = f"resized to {data.size[0]}x{data.size[1]} px"
    else:
        size = f"scaled to short side {data.short_side} px" if data.short_side else "at native size"
    kept = f", {data.fps:g} per second" if data.fps else ""
    bound = data.flow_bound
    flow = (
        f"; take the {data.flow} flow (OpenCV {_FLOW[data.flow]}) from each grey frame to the next, the last"
        f" one twice, and keep round(255 * (v + {bound:g}) / {2 * bound:g}) of both components, cut to 0..255"
    )
    rescale = f"scale them to short side {clips.short_side} px; " if clips.short_side else ""
    return [
        f"decode the video to 8-bit RGB frames{kept}, {size}" + (flow if modality == "flow" else ""),
        f"of n frames take {length} consecutive ones from number max(0, (n - {length - 1}) // 2), counted"
        " from 0; a shorter video repeats its last frame",
        f"{rescale}frames whose short side is under {crop} px are scaled up to it (bilinear, half-pixel"
        " centres, rounded to 8 bit)",
        f"cut the middle {crop}x{crop} px: top = round((H - {crop}) / 2), left = round((W - {crop}) / 2),"
        " halves to the even number",
        "pixel / 255, then (x - mean) / std per channel",
    ]


def _readable(card: dict[str, Any]) -> str:
    scores = card["scores"] or {}
    told = ", ".join(f"{key} {value:.3f}" for key, value in scores.items()) or "not evaluated yet"
    origin = f", distilled from run {card['distilled_from']}" if card["distilled_from"] else ""
    made = "Imported" if card["imported"] else "Trained"
    before, shape = card["preprocessing"], card["input"]["shape"]
    lines = [
        f"# {card['backbone']} for {card['dataset']} ({card['modality']})",
        "",
        f"{card['parameters']:,} parameters, {card['gmac']:.3g} GMAC per clip. Test videos: {told}.",
        f"{made} by gkd {card['gkd']}, recipe {card['recipe']}{origin}."
        f" First weights: {card['first_weights']}.",
        "",
        "## Input",
        "",
        f"`clip`, float32, {' x '.join(map(str, shape))} ({card['input']['layout']}):",
        "",
        *(f"{number}. {step}{';' if number < 5 else ':'}" for number, step in enumerate(before["steps"], 1)),
        f"   mean {before['mean']}, std {before['std']}.",
        "",
        "## Output",
        "",
        f"`logits`, {' x '.join(map(str, card['output']['shape']))}, of the {card['output']['of']}:"
        f" {card['output']['meaning']}.",
        "",
        "## Classes",
        "",
        *(f"- {label}: {name}" for label, name in enumerate(card["classes"])),
        "",
    ]
    return "\n".join(lines)


def _write_onnx(
    network: Recognizer, card: dict[str, Any], settings: ExportSettings, path: Path
) -> dict[str, Any]:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - the exporter needs it
    except ImportError as error:
        raise GkdError(
            f"--format onnx needs the export extra: {error.name} is not installed",
            "--format onnx",
            "`pip install 'gkdcli[export]'`",
        ) from None
    shape = tuple(card["input"]["shape"][1:])
    clip = torch.from_numpy(np.random.default_rng(0).standard_normal((2, *shape), dtype=np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations are none of the user's business
        program = torch.onnx.export(
            network,
            (clip,),
            dynamo=True,
            opset_version=settings.opset,
            input_names=["clip"],
            output_names=["logits"],
            dynamic_shapes={"clip": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    for key in ("classes", "preprocessing", "input", "output", "run", "run_weights_sha256"):
        model.metadata_props.add(key=key, value=json.dumps(card[key], ensure_ascii=False))
    with atomic_path(path) as temporary:
        onnx.save(model, str(temporary))
        onnx.checker.check_model(str(temporary))
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        difference, rounding = _differences(network, session, shape)
        accepted = max(settings.tolerance, 10 * rounding)
        if not difference <= accepted:
            raise GkdError(
                f"the ONNX graph differs from the live model by {difference:.2g} of the logits' size",
                str(path),
                f"accepted is export.tolerance = {settings.tolerance:g}; nothing was written",
            )
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "opset": settings.opset,
        "largest_relative_difference": difference,
        "accepted_difference": accepted,
    }


def _differences(network: Recognizer, session: Any, shape: tuple[int, ...]) -> tuple[float, float]:
    """How far the graph, and the live model by float32 rounding, are from the model in float64.

    Relative to the largest logit, over batches of 1 and 3. Normalising few values magnifies rounding, in
    narrow networks beyond any fixed tolerance, and the graph need not be better than the model itself.
    """
    exact = copy.deepcopy(network).double()
    difference = rounding = 0.0
    for batch in (1, 3):
        clip = np.random.default_rng(batch).standard_normal((batch, *shape), dtype=np.float32)
        with torch.inference_mode():
            wanted = exact(torch.from_numpy(clip).double()).numpy()
            live = network(torch.from_numpy(clip)).numpy()
        (exported,) = session.run(None, {"clip": clip})
        size = max(np.abs(wanted).max(), 1e-12)
        difference = max(difference, float(np.abs(exported - wanted).max() / size))
        rounding = max(rounding, float(np.abs(live - wanted).max() / size))
    return difference, rounding
