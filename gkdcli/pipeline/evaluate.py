"""`gkd evaluate`: a run and a store -> scores."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from gkdcli.console import Console
from gkdcli.data.store import Store
from gkdcli.errors import ExitCode, GkdError
from gkdcli.evaluation.scores import check_requirements, parse_requirement
from gkdcli.files import digest
from gkdcli.pipeline.lookup import find_run, newest, open_store, require_same_flow, split_videos
from gkdcli.pipeline.summary import write_report
from gkdcli.result import Result
from gkdcli.runs import Place, Run
from gkdcli.tasks.trained import ROLE, chosen_device, rebuild, task_of

Saved = Literal["never", "may", "must"]  # whether predictions in the run folder may be used


@dataclass
class _Stream:
    """One modality: its run's predictions on the test videos."""

    place: Place
    store: Store
    run: Run
    videos: list[int]
    predictions: Any
    plain: bool  # of the plain features although the network has an attention


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
    streams = _streams(places, console, stores, found, saved)
    fused, payload = _scored(streams)
    if compare:
        payload["runs"] = _comparison(places, console, stores)
    for remark in task_of(found[0].settings).remarks(payload):
        console.warn(*remark)
    name = "report" if len(streams) == 1 else "fusion"
    write_report(found[0].folder / f"{name}.json", payload)
    task, first = task_of(found[0].settings), streams[0]
    fusing = "" if len(streams) == 1 else "fusion-"
    task.draw(payload, fused, first.store, first.videos, found[0].folder, fusing)
    if output is not None:
        task.write_output(output, payload, fused, first.store, first.videos, first.run)
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


def _streams(
    places: Sequence[Place], console: Console, stores: Sequence[Store], runs: Sequence[Run], saved: Saved
) -> list[_Stream]:
    found = []
    for place, store, run in zip(places, stores, runs, strict=True):
        videos = split_videos(store, place, "test")
        plain = len(places) > 1 and task_of(run.settings).fuses_plain(run)
        predictions = _predictions(place, console, run, store, videos, saved, plain)
        found.append(_Stream(place, store, run, videos, predictions, plain))
    return found


def _predictions(
    place: Place, console: Console, run: Run, store: Store, videos: list[int], saved: Saved, plain: bool
) -> Any:
    """What a run's network says of some videos; of the `plain` features even where it has an attention."""
    task, settings = task_of(run.settings), place.settings
    path = run.folder / f"predictions{'-plain' if plain else ''}.h5"
    made_with = {"fingerprint": store.fingerprint, "weights": digest(run.weights), **task.seen_by(settings)}
    if saved != "never":
        kept = None
        with contextlib.nullcontext() if saved == "must" else contextlib.suppress(GkdError):
            kept = task.load(path)
        if kept is not None and {key: kept.made_with.get(key) for key in made_with} == made_with:
            return kept
        if saved == "must":
            raise GkdError(
                f"the saved predictions are of another {_unlike(made_with, kept.made_with)}",
                str(path),
                "drop --rescore once",
            )
    device = chosen_device(settings)
    network = rebuild(run).to(device)
    if plain:
        network.scores_attended = False
    progress = partial(console.progress, f"evaluate {run.folder.name}")
    task.predict_run(path, run, network, store, videos, settings, made_with, device, progress)
    return task.load(path)


def _unlike(wanted: Mapping[str, str], found: Mapping[str, str]) -> str:
    names = {"fingerprint": "store", "weights": "network"}
    return " and another ".join(names.get(key, key) for key in wanted if found.get(key) != wanted[key])


def _scored(streams: Sequence[_Stream]) -> tuple[Any, dict[str, Any]]:
    """What was found, fused, and the document of `evaluate`; of two streams with each one's scores."""
    if len(streams) == 1:
        return _score(streams[0])
    first, summary = streams[0], task_of(streams[0].run.settings).SUMMARY
    shared = {"dataset", "split", "videos", "recipe", *_task_protocol(first)}
    own = {stream.place.modality: _score(stream)[1] for stream in streams}
    rgb, flow = own["rgb"], own["flow"]
    scores, fused = _task_scores(first, [stream.predictions for stream in streams])
    payload = {
        "streams": [
            {"stream": name, **{key: part[key] for key in summary}}
            for name, part in (("rgb", rgb), ("flow", flow), ("fused", scores))
        ],
        **scores,
        "model": rgb["model"],
        "parameters": rgb["parameters"] + flow["parameters"],
        "gmac": rgb["gmac"] + flow["gmac"],
        "training_seconds": _sum(rgb["training_seconds"], flow["training_seconds"]),
        "rgb": rgb,
        "flow": flow,
        "fused": {key: scores[key] for key in summary},
        "protocol": {
            **{key: value for key, value in rgb["protocol"].items() if key in shared},
            "modality": "rgb+flow",
            "fusion_weights": list(first.place.settings.eval.fusion_weights),
            "flow_method": flow["protocol"]["flow_method"],
            "rgb_run": str(first.run.folder),
            "flow_run": str(streams[1].run.folder),
            "rgb_weights_sha256": rgb["protocol"]["weights_sha256"],
            "flow_weights_sha256": flow["protocol"]["weights_sha256"],
        },
    }
    return fused, payload


def _task_scores(first: _Stream, predictions: list[Any]) -> tuple[dict[str, Any], Any]:
    task = task_of(first.run.settings)
    return task.score(predictions, first.store, first.videos, first.place.settings, first.run)


def _task_protocol(stream: _Stream) -> dict[str, Any]:
    return task_of(stream.run.settings).protocol(stream.run, stream.place.settings)


def _sum(*values: float | None) -> float | None:
    """None where one is unknown: of imported weights nobody knows how they were trained."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _score(stream: _Stream) -> tuple[Any, dict[str, Any]]:
    """What was found, and the document of one stream."""
    place, run, store = stream.place, stream.run, stream.store
    record = run.record
    scores, found = _task_scores(stream, [stream.predictions])
    flow = {"flow_method": store.settings["flow"]} if place.modality == "flow" else {}
    return found, scores | {
        "model": ROLE[record["stage"]] + (" (plain)" if record["method"] == "none" else ""),
        "parameters": record["parameters"],
        "gmac": record["gmac"],
        "training_seconds": record.get("seconds"),
        "protocol": {
            "dataset": store.dataset,
            "modality": place.modality,
            "split": place.split,
            "videos": len(stream.videos),
            "recipe": record["recipe"],
            **_task_protocol(stream),
            "clip_frames": run.settings.clips.length,
            "crop_px": run.settings.clips.crop,
            **({"of": "plain feature"} if stream.plain else {}),
            **flow,
            "store": store.fingerprint,
            "weights_sha256": stream.predictions.made_with["weights"],
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
        streams = _streams(places, console, stores, runs, "may")
        scores = _scored(streams)[1]
        seconds = _sum(*(run.record["seconds"] for run in runs))
        teacher_gmac = rows[0]["gmac"] if rows else scores["gmac"]
        summary = task_of(runs[0].settings).SUMMARY
        each = {f"{part['stream']}_{summary[0]}": part[summary[0]] for part in scores.get("streams", [])[:-1]}
        rows.append(
            {
                "model": name,
                **{key: scores[key] for key in summary[:2]},
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
