"""What a data set consists of: its videos, what each shows and when, and what is wrong with who says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

Subset = Literal["train", "test"]
SUBSETS: tuple[Subset, Subset] = ("train", "test")


class Action(NamedTuple):
    """One annotated action of an untrimmed video, as its file has it.

    Args:
        class_name: what is done.
        start: seconds.
        end: seconds.
        first_frame: of the source video, where the file says so.
        last_frame: likewise.
        line: of the file; in JSON the position among the video's annotations, from 1.
    """

    class_name: str
    start: float
    end: float
    first_frame: float | None = None
    last_frame: float | None = None
    line: int = 0


@dataclass(frozen=True, slots=True)
class Stated:
    """What annotation files say about a video; 0 where they say nothing.

    Args:
        fps: of the source.
        count: frames of the source.
        sample_fps: of the sampled frames.
        sample_count: sampled frames.
        duration: seconds.
        file: which says so, but for the duration.
    """

    fps: float = 0.0
    count: int = 0
    sample_fps: float = 0.0
    sample_count: int = 0
    duration: float = 0.0
    file: str = ""


class Problem(NamedTuple):
    """Something wrong with an annotation, or with how it fits its video.

    Args:
        file: the annotation file, or the video.
        line: of the file; in JSON the position among the video's annotations; 0 where there is none.
        video: its name.
        reason: what is wrong, and what was done about it.
    """

    file: str
    line: int
    video: str
    reason: str


@dataclass(frozen=True)
class GroundTruth:
    """What detections in a subset are compared with.

    Args:
        file: name of the file.
        videos: with at least one segment in it.
        segments: that can be used.
        duplicates: of them that repeat class, start and end of another; they are kept.
        without: videos of the subset that the file does not know.
    """

    file: str
    videos: int
    segments: int
    duplicates: int
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """One video of the user's.

    Args:
        path: where it lies.
        class_name: what it shows; of an untrimmed video the name of its subset's folder.
        name: what it is called in the store, unique within its class.
        splits: for the number of each split (from 1), whether it is trained on or tested there.
        group: videos of one group (one recording session) must not be divided; "" where unknown.
        flow: where its flow lies, if in a file of its own.
        segments: what is done in an untrimmed video, in the order of the file.
        annotated_by: path of the file that says so.
        stated: what annotation files say about the video.
    """

    path: Path
    class_name: str
    name: str
    splits: Mapping[int, Subset]
    group: str = ""
    flow: Path | None = None
    segments: tuple[Action, ...] = ()
    annotated_by: str = ""
    stated: Stated = field(default_factory=Stated)

    def file(self, modality: str) -> Path:
        """What a modality is made of."""
        return self.flow if modality == "flow" and self.flow is not None else self.path


@dataclass(frozen=True)
class Listing:
    """What was found.

    Args:
        classes: the position is the label.
        sources: sorted by class name and name.
        rejects: (path, reason) of what looks meant but cannot be used.
        ignored: files that are no videos by their extension.
        unlisted: videos that lie among the others and that no list names.
        ground_truth: of untrimmed videos, by subset; None where videos have one class each.
        problems: of the annotations.
    """

    classes: list[str]
    sources: list[Source]
    rejects: list[tuple[str, str]] = field(default_factory=list)
    ignored: int = 0
    unlisted: int = 0
    ground_truth: Mapping[Subset, GroundTruth] | None = None
    problems: list[Problem] = field(default_factory=list)

    def count(self, split: int, subset: Subset) -> int:
        """How many videos belong to a subset of a split."""
        return sum(source.splits.get(split) == subset for source in self.sources)
