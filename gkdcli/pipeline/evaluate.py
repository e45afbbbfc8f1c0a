"""`gkd evaluate`: a run and a store -> scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from gkdcli.console import Console
from gkdcli.data.store import Store
from gkdcli.errors import ExitCode, GkdError
from gkdcli.evaluation.predict import Predictions, load_predictions, predict, save_predictions
from gkdcli.evaluation.scores import check_requirements, class_scores, parse_requirement, recognition_scores
from gkdcli.files import digest, write_json
from gkdcli.pipeline.lookup import find_run, newest, open_store
from gkdcli.report import draw_confusion
from gkdcli.result import Result, jsonable
from gkdcli.runs import Place, Run
from gkdcli.tasks import recognition
from gkdcli.tasks.trained import ROLE, chosen_device, rebuild, test_dataset

Saved = Literal["never", "may", "must"]  # whether predictions in the run folder may be used


def evaluate(
    place: Place,
    console: Console,
    *,
    model: str,
    run_path: Path | None,
    compare: bool,
    rescore: bool,
    require: list[str],
    output: Path | None,
    dry_run: bool,
) -> Result:
    """Scores of a run's network on the test videos of the split."""
    requirements = [parse_requirement(text) for text in require]
    store = open_store(place)
    run = find_run(place, console, model, run_path, store, dry_run)
    videos = store.split(place.split, "test")
    if not videos:
        raise GkdError(
            f"{store.dataset} has no test videos",
            str(store.path),
            "prepare it with a larger data.test_fraction",
        )
    if dry_run:
        return Result(
            {"run": str(run.folder), "videos": len(videos), "weights": str(run.weights)}, str(run.folder)
        )
    predictions = _predictions(place, console, run, store, videos, "must" if rescore else "never")
    payload = score(place, run, store, predictions)
    if compare:
        payload["runs"] = _comparison(place, console, store, videos)
    write_json(run.folder / "report.json", jsonable(payload))
    draw_confusion(payload["confusion"], store.classes, run.folder / "confusion.png")
    if output is not None:
        write_json(
            output, jsonable(payload | {"predictions": _per_video(predictions, store, run.record["recipe"])})
        )
    error = check_requirements(payload, requirements)
    code = error.code if error else ExitCode.DONE
    return Result(payload, str(run.folder), code, error, f"next: `{place.command('export')}`")


def _predictions(
    place: Place, console: Console, run: Run, store: Store, videos: list[int], saved: Saved
) -> Predictions:
    path, weights = run.folder / "predictions.h5", digest(run.weights)
    if saved == "must" or (saved == "may" and path.is_file()):
        kept = load_predictions(path)
        if kept.fingerprint == store.fingerprint and kept.weights == weights:
            return kept
        if saved == "must":
            raise GkdError(
                "the saved predictions are of another store or other weights",
                str(path),
                "drop --rescore once",
            )
    device, settings = chosen_device(place.settings), place.settings
    forward = recognition.predictor(rebuild(run).to(device), place.modality, run.record["recipe"])
    with console.progress(f"evaluate {run.folder.name}", len(videos)) as tick:
        logits, labels = predict(
            test_dataset(store, run, videos),
            forward,
            batch_size=settings.eval.batch_size,
            workers=settings.train.workers,
            device=device,
            tick=tick,
        )
    names = [f"{store.videos[video].class_name}/{store.videos[video].name}" for video in videos]
    predictions = Predictions(logits, labels, names, store.fingerprint, weights)
    save_predictions(path, predictions)
    return predictions


def score(place: Place, run: Run, store: Store, predictions: Predictions) -> dict[str, Any]:
    """The document of `evaluate`."""
    record = run.record
    scores = recognition_scores(predictions.logits, predictions.labels, store.classes, record["recipe"])
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


def _comparison(place: Place, console: Console, store: Store, videos: list[int]) -> list[dict[str, Any]]:
    """The newest complete run of each kind on the same videos; saved predictions serve where they fit."""
    rows: list[dict[str, Any]] = []
    for name, stage, method in _COMPARED:
        try:
            run = newest(place, console, stage, store.classes, method)
        except GkdError:
            console.note(f"no {name} to compare with")
            continue
        scores = score(place, run, store, _predictions(place, console, run, store, videos, "may"))
        teacher_gmac = rows[0]["gmac"] if rows else scores["gmac"]
        rows.append(
            {
                "model": name,
                "top1": scores["top1"],
                "top5": scores["top5"],
                "parameters": scores["parameters"],
                "gmac": scores["gmac"],
                "compute": f"{scores['gmac'] / teacher_gmac:.0%}",
                "steps": run.record["progress"]["step"],
                "training_seconds": round(run.record["seconds"] or 0.0, 1) or None,
                "run": str(run.folder),
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
