"""`gkd evaluate --predictions`: files of detections and of ground truth -> scores, without a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gkdcli.console import Console, counted
from gkdcli.errors import ExitCode, GkdError, usage_error
from gkdcli.evaluation.detection import (
    USUAL_TIOU,
    beyond_end,
    detection_scores,
    remarks,
    shuffled,
    tiou_text,
)
from gkdcli.evaluation.profile import what_is_wrong
from gkdcli.evaluation.scores import check_requirements, parse_requirement
from gkdcli.evaluation.submission import read_ground_truth, read_submission
from gkdcli.files import digest, write_json
from gkdcli.result import Result, jsonable
from gkdcli.runs import Place
from gkdcli.tasks.detection_pictures import draw_found

_NAMES = ("thumos_gt.json", "annotations.json")  # the published one, and what the drawn set brings along


def score_file(
    place: Place,
    console: Console,
    *,
    predictions: Path,
    ground_truth: Path | None,
    require: list[str],
    output: Path | None,
    dry_run: bool,
) -> Result:
    """Scores of detections that may come from anywhere.

    Args:
        place: whose `eval.tiou` and data set count.
        console: who is told.
        predictions: a submission, .json or .json.gz.
        ground_truth: ActivityNet JSON; None to look for it under `datasets/<dataset>/`.
        require: `average_map>=0.3`, `map.0.5>=0.3` and the like.
        output: where to write the scores as JSON; pictures of what is wrong go beside it.
        dry_run: read both files and score nothing.

    Raises:
        GkdError: a file that cannot be used; a preset that is not of detection (exit code 2).
    """
    settings = place.settings
    if settings.task != "detection":
        what = f"{settings.name} is of recognition; a file of detections is scored with a preset of detection"
        raise usage_error(what, f"--predictions {predictions}", "for example `gkd evaluate thumos14`")
    requirements = [parse_requirement(text) for text in require]
    source = ground_truth or _find_ground_truth(place, console)
    _keep_inputs(output, predictions, source)
    read = read_ground_truth(source)
    if read.problems:
        first = read.problems[0]
        at = f"{first.video} annotation {first.line}" if first.line else first.video
        console.warn(
            f"{counted(len(read.problems), 'annotation')} of the ground truth may be wrong",
            f"{source}; first: {at}: {first.reason}",
            "all scores are of what is left",
        )
    found = read_submission(predictions, read.truth)
    protocol = {
        "dataset": settings.dataset,
        "predictions": str(predictions),
        "predictions_sha256": digest(predictions),
        "ground_truth": str(source),
        "subset": read.subset,
    }
    if dry_run:
        counts = {
            "videos": len(read.truth.videos),
            "segments": len(read.truth.labels),
            "classes": len(read.truth.classes),
            "detections": len(found.scores),
        }
        return Result(protocol | counts)
    scores = detection_scores(read.truth, found, settings.eval.tiou, source.name)
    scores["ground_truth"]["beyond_end"] = beyond_end(read.truth, read.durations)
    by_chance = detection_scores(read.truth, shuffled(found, settings.train.seed), settings.eval.tiou)
    payload: dict[str, Any] = {
        "average_map": scores["average_map"],
        "average_map_official": scores["average_map_official"],
        "average_map_of_shuffled_scores": by_chance["average_map"],
        **scores,
        **what_is_wrong(read.truth, found),
        "protocol": protocol | {"averaged_over": ",".join(map(tiou_text, settings.eval.tiou or USUAL_TIOU))},
    }
    for remark in remarks(scores):
        console.warn(*remark)
    if not scores["ground_truth"]["detections_used"]:
        console.warn(
            "no detection is of a video and a class that the ground truth knows",
            f"{predictions}, {source}",
            f"its videos are called like {read.truth.videos[0]}, its classes like {read.truth.classes[0]}",
        )
    if output is not None:
        write_json(output, jsonable(payload))
        pictures = draw_found(payload, read.truth, found, read.durations, output.parent, f"{output.stem}-")
        console.note(f"pictures: {', '.join(map(str, pictures))}")
    error = check_requirements(payload, requirements)
    return Result(payload, None, error.code if error else ExitCode.DONE, error)


def _find_ground_truth(place: Place, console: Console) -> Path:
    for depth in ("", "*/", "*/*/"):
        for name in _NAMES:
            for path in sorted(place.videos.glob(depth + name)):
                if path.is_file():
                    console.note(f"ground truth: {path} (`--ground-truth FILE` names another)")
                    return path
    raise GkdError(
        f"there is no ground truth for {place.settings.dataset}",
        f"looked for {' and '.join(_NAMES)} under {place.videos}, two folders deep",
        "name the file with `--ground-truth FILE.json`",
    )


def _keep_inputs(output: Path | None, *inputs: Path) -> None:
    """Scores are not written over what they are made of."""
    for path in inputs if output is not None and output.exists() else ():
        if path.exists() and path.samefile(output):  # type: ignore[arg-type]
            what = "the scores would overwrite what they are made of"
            raise usage_error(what, f"--output {output}", "name another file")
