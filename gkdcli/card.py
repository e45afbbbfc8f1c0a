"""The card of an export: all that someone without gkd must know to use the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gkdcli.files import digest
from gkdcli.models.detector import priors
from gkdcli.models.network import Network
from gkdcli.runs import Run, version
from gkdcli.settings import CHANNELS, Settings


def describe(run: Run, network: Network) -> dict[str, Any]:
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
        "attention": page.model.attention if network.attention else None,
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
        "outputs": _outputs(page, len(record["classes"]), record["recipe"]),
        "of": _ATTENDED if network.attention and network.scores_attended else "plain feature",
        "preprocessing": {
            "steps": _steps(page, record["modality"]),
            **_windows(page),
            "mean": list(clips.mean) * (channels if len(clips.mean) == 1 else 1),
            "std": list(clips.std) * (channels if len(clips.std) == 1 else 1),
        },
        **({"detection": _detection(page)} if page.task == "detection" else {}),
        "scores": {key: report[key] for key in _SCORES[page.task]} if report else None,
        "protocol": report.get("protocol"),
    }


_ATTENDED = "attended feature"
_SCORES = {"recognition": ("top1", "top5"), "detection": ("average_map", "average_map_official")}


def _outputs(page: Settings, classes: int, recipe: str) -> list[dict[str, Any]]:
    """What the graph returns, in order."""
    if page.task == "recognition":
        return [{"name": "logits", "shape": ["batch", classes], "meaning": _MEANING[recipe]}]
    count = len(priors(page.clips.length))
    return [
        {"name": name, "shape": ["batch", count, width or classes + 1], "meaning": meaning}
        for name, width, meaning in (
            ("loc", 2, "distances from a prior's centre to start and end, in frames"),
            ("conf", 0, "class logits; 0 is background, class k is at k + 1"),
            ("prop_loc", 2, "refinement of the distances, in halves of the coarse length"),
            ("prop_conf", 0, "class logits of the refined segment"),
            ("center", 1, "logit of the refined segment's quality"),
        )
    ]


def _windows(page: Settings) -> dict[str, Any]:
    """Which frames of a video are shown to the network."""
    length = page.clips.length
    if page.task == "recognition":
        return {"first_frame": f"max(0, (n - {length - 1}) // 2)"}
    return {"window_frames": length, "window_stride": page.eval.stride}


def _detection(page: Settings) -> dict[str, Any]:
    """The arguments of `decode` and `soft_nms`, which lie beside the graph as Python files."""
    chosen = page.eval
    return {
        "priors": priors(page.clips.length).tolist(),
        "clip_frames": page.clips.length,
        "threshold": chosen.score_threshold,
        "sigma": chosen.nms_sigma,
        "floor": chosen.nms_floor,
        "top_k": chosen.top_k,
        "recipe": page.recipe,
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
    if page.task == "detection":
        taken = (
            f"take windows of {length} consecutive ones that begin at 0, {page.eval.stride},"
            f" {2 * page.eval.stride}, ..., and the last full one; a shorter video is one window, followed by"
            " zeros after step 5"
        )
    else:
        taken = (
            f"of n frames take {length} consecutive ones from number max(0, (n - {length - 1}) // 2), counted"
            " from 0; a shorter video repeats its last frame"
        )
    return [
        f"decode the video to 8-bit RGB frames{kept}, {size}" + (flow if modality == "flow" else ""),
        taken,
        f"{rescale}frames whose short side is under {crop} px are scaled up to it (bilinear, half-pixel"
        " centres, rounded to 8 bit)",
        f"cut the middle {crop}x{crop} px: top = round((H - {crop}) / 2), left = round((W - {crop}) / 2),"
        " halves to the even number",
        "pixel / 255, then (x - mean) / std per channel",
    ]


_DETECT = (
    "",
    "`decode.py` and `nms.py` beside this page, NumPy alone, make segments in seconds of them:",
    "",
    "```python",
    "import json",
    "import numpy",
    "from decode import Heads, decode",
    "from nms import soft_nms",
    "",
    'card = json.load(open("card.json"))["detection"]',
    "# outputs: the five arrays for all windows of a video; offsets: their first frames, an array;",
    "# fps: frames per second of what the windows are cut from",
    "found = decode(Heads(*outputs), offsets, numpy.array(card['priors']), clip_frames=card['clip_frames'],",
    "               fps=fps, threshold=card['threshold'])",
    "kept, scores = soft_nms(found.segments, found.scores, sigma=card['sigma'], floor=card['floor'],",
    "                        top_k=card['top_k'], recipe=card['recipe'], groups=found.labels)",
    "# found.segments[kept], scores, found.labels[kept]",
    "```",
)


def readable(card: dict[str, Any]) -> str:
    """The card as a page of Markdown."""
    scores = card["scores"] or {}
    told = ", ".join(f"{key} {value:.3f}" for key, value in scores.items() if value is not None)
    told = told or "not evaluated yet"
    origin = f", distilled from run {card['distilled_from']}" if card["distilled_from"] else ""
    made = "Imported" if card["imported"] else "Trained"
    of = card["of"] + (f" ({card['attention']} attention)" if card["of"] == _ATTENDED else "")
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
        f"Of the {of}:",
        "",
        *(
            f"- `{one['name']}`, {' x '.join(map(str, one['shape']))}: {one['meaning']}"
            for one in card["outputs"]
        ),
        *(_DETECT if "detection" in card else ()),
        "",
        "## Classes",
        "",
        *(f"- {label}: {name}" for label, name in enumerate(card["classes"])),
        "",
    ]
    return "\n".join(lines)
