"""Where annotations and prepared videos do not fit: rates, frame counts, and actions beyond the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gkdcli.data.action_files import told
from gkdcli.data.parts import part_path, read_about
from gkdcli.data.sources import Problem, Source
from gkdcli.settings import DataSettings

_TOLERATED_SEC = 1.0  # by which a stated duration may differ


def misfits(
    sources: Sequence[Source],
    parts: Path,
    data: DataSettings,
    known: Mapping[str, Mapping[str, Any]],
) -> list[Problem]:
    """What is to be said about annotated videos now that their frames are known; nothing is changed by it.

    Args:
        sources: those in the store; videos without segments and stated figures are passed over.
        parts: `stores/<dataset>/<modality>`.
        data: how frames were meant to be sampled.
        known: attributes of parts that were read already, by path.
    """
    found: list[Problem] = []
    for source in sources:
        if not source.annotated_by:
            continue
        part = part_path(parts, source.class_name, source.name)
        if str(part) in known or part.exists():
            attributes = known.get(str(part)) or read_about(part)
            found += (
                Problem(file or source.annotated_by, line, source.name, reason)
                for file, line, reason in _of(source, attributes, data)
            )
    return found


def _of(source: Source, part: Mapping[str, Any], data: DataSettings) -> Iterator[tuple[str, int, str]]:
    """(File, line, reason) of each misfit of one video."""
    frames, fps, stated = int(part["frame_count"]), float(part["fps"]), source.stated
    source_fps, source_frames = float(part["source_fps"]), int(part["source_frames"])
    arrays = part["codec"] == "npy"
    if fps < data.fps:
        kept = "" if arrays else ", every frame is kept"
        yield (
            "",
            0,
            f"the video has {fps:g} frames/s, under {data.fps:g}{kept}; its times follow its own rate",
        )
    if stated.sample_count and stated.sample_count != frames:
        counts = "" if arrays else f"; of the source, {stated.count} and {source_frames}"
        yield (
            stated.file,
            0,
            f"{stated.sample_count} sampled frames are annotated, {frames} are stored{counts}",
        )
    elif stated.count and not arrays and stated.count != source_frames:
        yield stated.file, 0, f"{stated.count} frames are annotated, the video has {source_frames}"
    if stated.fps and not arrays and abs(stated.fps - source_fps) > 0.01 * stated.fps:
        yield stated.file, 0, f"{stated.fps:g} frames/s are annotated, the video has {source_fps:g}"
    seconds = source_frames / source_fps if source_fps and not arrays else frames / fps
    if stated.duration and abs(stated.duration - seconds) > max(_TOLERATED_SEC, 0.02 * seconds):
        yield "", 0, f"{stated.duration:g} s are annotated, the video has {seconds:.1f} s"
    for action in source.segments:
        if action.end > seconds + 1 / fps:
            wholly = "wholly " if action.start >= seconds else ""
            yield "", action.line, f"{told(action)} is {wholly}beyond the end, {seconds:.1f} s; kept as it is"
