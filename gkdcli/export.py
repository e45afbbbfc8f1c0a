"""What leaves the house: weights, the card that explains them, and an ONNX graph checked against the model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gkdcli.errors import GkdError
from gkdcli.files import atomic_path, digest, write_json, write_text
from gkdcli.models.recognizer import Recognizer
from gkdcli.models.weights import save_tensors
from gkdcli.runs import Run, version
from gkdcli.settings import CHANNELS, ExportSettings


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
        save_tensors(path, dict(network.state_dict()), {"card": json.dumps(card)})
        payload["safetensors"] = {"file": str(path), "bytes": path.stat().st_size, "sha256": digest(path)}
        card["safetensors_sha256"] = payload["safetensors"]["sha256"]
    write_json(folder / "card.json", card)
    write_text(folder / "README.md", _readable(card))
    return payload | {"card": str(folder / "README.md")}


def describe(run: Run, network: Recognizer) -> dict[str, Any]:
    """The card: all that someone without gkd must know to use the weights."""
    record, page = run.record, run.settings
    clips, report = page.clips, run.folder / "report.json"
    scores = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
    channels = CHANNELS[record["modality"]]
    one = len(clips.mean) == 1
    kind = page.model.teacher if record["stage"] == "pretrain" else page.model.student
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
        "trained_from": record["began"],
        "distilled_from": record["parents"].get("teacher"),
        "run": run.folder.name,
        "parameters": record["parameters"],
        "gmac": record["gmac"],
        "classes": record["classes"],
        "input": {
            "name": "clip",
            "shape": ["batch", channels, clips.length, clips.crop, clips.crop],
            "dtype": "float32",
            "layout": "batch, channel (R, G, B), time, height, width",
        },
        "output": {
            "name": "logits",
            "shape": ["batch", len(record["classes"])],
            "meaning": "time-averaged logits; softmax over classes gives scores",
        },
        "preprocessing": {
            "frames": f"{clips.length} consecutive frames from the middle; a shorter video repeats its last",
            "stored": _stored_size(page.data),
            "rescale_short_side_px": clips.short_side or None,
            "crop": f"centre {clips.crop}x{clips.crop}; smaller frames are scaled up to it, bilinear",
            "scale": "pixel / 255, then (x - mean) / std per channel",
            "mean": list(clips.mean) * (channels if one else 1),
            "std": list(clips.std) * (channels if len(clips.std) == 1 else 1),
        },
        "scores": {key: scores.get(key) for key in ("top1", "top5")} if scores else None,
        "protocol": scores.get("protocol"),
    }


def _stored_size(data: Any) -> str:
    if data.size:
        return f"resized to {data.size[0]}x{data.size[1]}"
    return f"short side {data.short_side} px, aspect kept" if data.short_side else "native size"


def _readable(card: dict[str, Any]) -> str:
    scores = card["scores"] or {}
    told = (
        ", ".join(f"{key} {value:.3f}" for key, value in scores.items() if value is not None)
        or "not evaluated yet"
    )
    before = card["preprocessing"]
    lines = [
        f"# {card['backbone']} for {card['dataset']} ({card['modality']})",
        "",
        f"{card['parameters']:,} parameters, {card['gmac']:.3f} GMAC per clip. Scores on test videos: {told}.",
        f"Trained by gkd {card['gkd']}, recipe {card['recipe']}, {card['trained_from']}"
        + (f"; distilled from {card['distilled_from']}." if card["distilled_from"] else "."),
        "",
        "## Input",
        "",
        f"`clip`, float32, {card['input']['shape']} ({card['input']['layout']}):",
        "",
        f"1. frames: {before['frames']} ({before['stored']});",
        *(
            [f"2. rescaled to short side {before['rescale_short_side_px']} px;"]
            if before["rescale_short_side_px"]
            else []
        ),
        f"3. {before['crop']};",
        f"4. {before['scale']}; mean {before['mean']}, std {before['std']}.",
        "",
        "## Output",
        "",
        f"`logits`, {card['output']['shape']}: {card['output']['meaning']}.",
        "",
        "## Classes",
        "",
        *(f"{label}. {name}" for label, name in enumerate(card["classes"])),
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
    for key in ("classes", "preprocessing", "input", "output"):
        model.metadata_props.add(key=key, value=json.dumps(card[key], ensure_ascii=False))
    with atomic_path(path) as temporary:
        onnx.save(model, str(temporary))
        onnx.checker.check_model(str(temporary))
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        difference = max(_difference(network, session, shape, batch) for batch in (1, 3))
        if not difference <= settings.tolerance:
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
    }


def _difference(network: Recognizer, session: Any, shape: tuple[int, ...], batch: int) -> float:
    clip = np.random.default_rng(batch).standard_normal((batch, *shape), dtype=np.float32)
    with torch.inference_mode():
        live = network(torch.from_numpy(clip)).numpy()
    (exported,) = session.run(None, {"clip": clip})
    return float(np.abs(exported - live).max() / max(np.abs(live).max(), 1e-12))
