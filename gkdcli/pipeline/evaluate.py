"""`gkd evaluate`: a run and a store -> scores."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gkdcli.console import Console
from gkdcli.data.store import Store
from gkdcli.errors import ExitCode, GkdError
from gkdcli.evaluation.fusion import fuse
from gkdcli.evaluation.predict import Predictions, load_predictions, predict, save_predictions
from gkdcli.evaluation.scores import check_requirements, class_scores, parse_requirement, recognition_scores
from gkdcli.files import digest, write_json
from gkdcli.pipeline.lookup import find_run, newest, open_store, require_same_flow, split_videos
from gkdcli.report import draw_confusion
from gkdcli.result import Result, jsonable
from gkdcli.runs import Place, Run
from gkdcli.tasks.trained import ROLE, chosen_device, rebuild, test_dataset

Saved = Literal["never", "may", "must"]  # whether predictions in the run folder may be used


@dataclass
class _Stream:
    """One modality: its run's predictions on the test videos."""

    place: Place
    store: Store
    run: Run
    predictions: Predictions


def evaluate(
    places: Sequence[Place],
    console: Console,
    *,
    model: str,
    runs: Sequence[Path | None],
    compare: bool,
    rescore: bool,
    require: list[str],
    output: Path | None,
    dry_run: bool,
) -> Result:
    """Scores of a network, or of an rgb and a flow network and their fusion, on the test videos of a split.

    Args:
        places: one, or those of rgb and flow for fusion.
        console: who is told.
        model: `student` or `teacher`.
        runs: run folders by place; None for the newest that fits.
        compare: also score the newest teacher, plain and distilled student.
        rescore: take the predictions in the run folders.
        require: `top1>=0.6` and the like.
        output: where to write scores and per-video predictions as JSON.
        dry_run: only say what would be scored.
    """
    requirements = [parse_requirement(text) for text in require]
    stores = [open_store(place) for place in places]
    _require_like_stores(stores)
    flags = ["--rgb-run", "--flow-run"] if len(places) > 1 else ["--run"]
    found = [
        find_run(place, console, model, run, store, flag, dry_run)
        for place, run, store, flag in zip(places, runs, stores, flags, strict=True)
    ]
    _require_fusible(places, console, stores, found)
    if dry_run:
        return Result(_plan(places, stores, found), str(found[0].folder))
    saved: Saved = "must" if rescore else "never"
    streams = [
        _stream(place, console, store, run, saved)
        for place, store, run in zip(places, stores, found, strict=True)
    ]
    fused, payload = _scored(streams)
    if compare:
        payload["runs"] = _comparison(places, console, stores)
    name = "report" if len(streams) == 1 else "fusion"
    write_json(found[0].folder / f"{name}.json", jsonable(payload))
    picture = found[0].folder / ("confusion.png" if len(streams) == 1 else "fusion-confusion.png")
    draw_confusion(payload["confusion"], stores[0].classes, picture)
    if output is not None:
        each = _per_video(fused, stores[0], found[0].record["recipe"])
        write_json(output, jsonable(payload | {"predictions": each}))
    error = check_requirements(payload, requirements)
    code = error.code if error else ExitCode.DONE
    return Result(payload, str(found[0].folder), code, error, f"next: `{places[0].command('export')}`")


def _plan(places: Sequence[Place], stores: Sequence[Store], runs: Sequence[Run]) -> dict[str, Any]:
    """What would be scored."""
    videos = len(split_videos(stores[0], places[0], "test"))
    plan: dict[str, Any] = {"run": str(runs[0].folder), "videos": videos, "weights": str(runs[0].weights)}
    if len(runs) > 1:
        plan["runs"] = [
            {"stream": place.modality, "run": str(run.folder)}
            for place, run in zip(places, runs, strict=True)
        ]
    return plan


def _require_like_stores(stores: Sequence[Store]) -> None:
    if any(store.classes != stores[0].classes for store in stores):
        raise GkdError(
            "the rgb and the flow store have other classes",
            " and ".join(str(store.path) for store in stores),
            "prepare both from the same videos and lists: `gkd prepare ... --modality both`",
        )


def _require_fusible(
    places: Sequence[Place], console: Console, stores: Sequence[Store], runs: Sequence[Run]
) -> None:
    """Refuses before any network runs what `fuse` would refuse after both have, and unlike recipes."""
    for what, values in (
        ("recipes", [run.record["recipe"] for run in runs]),  # their scores are made of logits in two ways
        ("clip lengths", [run.settings.clips.length for run in runs]),
    ):
        if len(set(values)) > 1:
            raise GkdError(
                f"the two networks are of other {what}: {' and '.join(map(str, values))}",
                ", ".join(str(run.folder) for run in runs),
                "name runs that agree with --rgb-run and --flow-run",
            )
    rows = [
        {
            (row.class_name, row.name): row
            for row in (store.videos[video] for video in split_videos(store, place, "test"))
        }
        for store, place in zip(stores, places, strict=True)
    ]
    for other in rows[1:]:
        unlike = sorted(rows[0].keys() ^ other.keys()) or sorted(
            name for name, row in other.items() if row.frames != rows[0][name].frames
        )
        if unlike:
            raise GkdError(
                f"the two streams are of other videos: {len(rows[0])} and {len(other)},"
                f" {len(unlike)} are only in one or differ in length",
                f"first: {'/'.join(unlike[0])}; {' and '.join(str(store.path) for store in stores)}",
                "prepare both together: `gkd prepare ... --modality both`",
            )
        others = sum(row.digest != rows[0][name].digest for name, row in other.items())
        if others:  # images of flow that were extracted elsewhere, or a video that was replaced since
            console.warn(
                f"rgb and flow of {others} of {len(other)} videos come from different files",
                " and ".join(str(store.path) for store in stores),
                "if a video has changed, `gkd prepare ... --modality both` brings both up to date",
            )


def _stream(place: Place, console: Console, store: Store, run: Run, saved: Saved) -> _Stream:
    videos = split_videos(store, place, "test")
    return _Stream(place, store, run, _predictions(place, console, run, store, videos, saved))


def _predictions(
    place: Place, console: Console, run: Run, store: Store, videos: list[int], saved: Saved
) -> Predictions:
    path, weights = run.folder / "predictions.h5", digest(run.weights)
    if saved != "never":
        kept = None
        with contextlib.nullcontext() if saved == "must" else contextlib.suppress(GkdError):
            kept = load_predictions(path)
        if kept and kept.fingerprint == store.fingerprint and kept.weights == weights:
            return kept
        if saved == "must":
            raise GkdError(
                "the saved predictions are of another store or other weights",
                str(path),
                "drop --rescore once",
            )
    device, settings = chosen_device(place.settings), place.settings
    network = rebuild(run).to(device)
    with console.progress(f"evaluate {run.folder.name}", len(videos)) as tick:
        logits, labels = predict(
            test_dataset(store, run, videos),
            network.time_logits,
            batch_size=settings.eval.batch_size,
            workers=settings.train.workers,
            device=device,
            tick=tick,
        )
    names = [f"{store.videos[video].class_name}/{store.videos[video].name}" for video in videos]
    predictions = Predictions(logits, labels, names, store.fingerprint, weights)
    save_predictions(path, predictions)
    return predictions


def _scored(streams: Sequence[_Stream]) -> tuple[Predictions, dict[str, Any]]:
    """Fused predictions and the document of `evaluate`, of two streams with each one's scores."""
    if len(streams) == 1:
        return streams[0].predictions, _score(streams[0])
    weights = streams[0].place.settings.eval.fusion_weights
    fused = fuse([stream.predictions for stream in streams], weights)
    own = {stream.place.modality: _score(stream) for stream in streams}
    rgb, flow = own["rgb"], own["flow"]
    first = streams[0]
    recipe = first.run.record["recipe"]
    scores = recognition_scores(fused.logits, fused.labels, first.store.classes, recipe)
    payload = {
        "streams": [
            {"stream": name, **{key: part[key] for key in ("top1", "top5", "mean_class_top1")}}
            for name, part in (("rgb", rgb), ("flow", flow), ("fused", scores))
        ],
        **scores,
        "model": rgb["model"],
        "parameters": rgb["parameters"] + flow["parameters"],
        "gmac": rgb["gmac"] + flow["gmac"],
        "training_seconds": _sum(rgb["training_seconds"], flow["training_seconds"]),
        "rgb": rgb,
        "flow": flow,
        "fused": {key: scores[key] for key in ("top1", "top5", "mean_class_top1")},
        "protocol": {
            **{key: rgb["protocol"][key] for key in ("dataset", "split", "videos", "recipe", "views")},
            "modality": "rgb+flow",
            "fusion_weights": list(weights),
            "flow_method": flow["protocol"]["flow_method"],
            "rgb_run": str(first.run.folder),
            "flow_run": str(streams[1].run.folder),
            "rgb_weights_sha256": rgb["protocol"]["weights_sha256"],
            "flow_weights_sha256": flow["protocol"]["weights_sha256"],
        },
    }
    return fused, payload


def _sum(*values: float | None) -> float | None:
    """None where one is unknown: of imported weights nobody knows how they were trained."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _score(stream: _Stream) -> dict[str, Any]:
    """The document of one stream."""
    place, run, store, predictions = stream.place, stream.run, stream.store, stream.predictions
    record = run.record
    scores = recognition_scores(predictions.logits, predictions.labels, store.classes, record["recipe"])
    flow = {"flow_method": store.settings["flow"]} if place.modality == "flow" else {}
    return scores | {
        "model": ROLE[record["stage"]] + (" (plain)" if record["method"] == "none" else ""),
        "parameters": record["parameters"],
        "gmac": record["gmac"],
        "training_seconds": record.get("seconds"),
        "protocol": {
            "dataset": store.dataset,
            "modality": place.modality,
            "split": place.split,
            "videos": len(predictions.videos),
            "recipe": record["recipe"],
            "views": "middle window, centre crop",
            "clip_frames": run.settings.clips.length,
            "crop_px": run.settings.clips.crop,
            **flow,
            "store": store.fingerprint,
            "weights_sha256": predictions.weights,
            **record["protocol"],
        },
    }


_COMPARED = (
    ("teacher", "pretrain", None),
    ("plain student", "distill", "none"),
    ("distilled student", "distill", "gkd"),
)


def _comparison(places: Sequence[Place], console: Console, stores: Sequence[Store]) -> list[dict[str, Any]]:
    """The newest complete runs of each kind on the same videos; saved predictions serve where they fit."""
    rows: list[dict[str, Any]] = []
    for name, stage, method in _COMPARED:
        try:
            runs = [newest(place, console, stage, stores[0].classes, method) for place in places]
            for run, store in zip(runs, stores, strict=True):
                require_same_flow(run, store)
        except GkdError:
            console.note(f"no {name} to compare with")
            continue
        streams = [
            _stream(place, console, store, run, "may")
            for place, store, run in zip(places, stores, runs, strict=True)
        ]
        scores = _scored(streams)[1]
        seconds = _sum(*(run.record["seconds"] for run in runs))
        teacher_gmac = rows[0]["gmac"] if rows else scores["gmac"]
        each = {f"{part['stream']}_top1": part["top1"] for part in scores.get("streams", [])[:-1]}
        rows.append(
            {
                "model": name,
                "top1": scores["top1"],
                "top5": scores["top5"],
                **each,
                "parameters": scores["parameters"],
                "gmac": scores["gmac"],
                "compute": f"{scores['gmac'] / teacher_gmac:.0%}",
                "steps": _sum(*(run.record["progress"]["step"] for run in runs)),
                "training_seconds": None if seconds is None else round(seconds, 1),
                "run": ", ".join(str(run.folder) for run in runs),
            }
        )
    return rows


def _per_video(predictions: Predictions, store: Store, recipe: str) -> list[dict[str, Any]]:
    scores = class_scores(predictions.logits, recipe)
    return [
        {
            "video": name,
            "class": store.classes[label],
            "predicted": store.classes[int(row.argmax())],
            "score": float(row.max()),
        }
        for name, label, row in zip(predictions.videos, predictions.labels, scores, strict=True)
    ]
