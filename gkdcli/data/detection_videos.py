"""Brings annotated, untrimmed videos and files on disk together: mp4 and the like, or published arrays."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from gkdcli.data.action_files import readable
from gkdcli.data.detection_files import Annotations
from gkdcli.data.names import video_stem
from gkdcli.data.sources import SUBSETS, Listing, Problem, Source, Subset
from gkdcli.errors import GkdError

ARRAY = ".npy"
_DEEPEST = 8
_FOLDERS: dict[str, Subset] = {"train": "train", "training": "train", "test": "test", "testing": "test"}


def list_videos(annotations: Annotations, folder: Path) -> Listing:
    """Annotated videos anywhere below `folder`: `<name>.<extension>`, or `v_<name>.<extension>`.

    A class name of a source is the folder of its subset: `train` or, as in THUMOS14, `validation`; `test`.
    What is annotated and not there, or there twice, is a reject.

    Raises:
        GkdError: there is no such folder.
    """
    found: dict[str, list[Path]] = defaultdict(list)
    ignored = 0
    for path in _files(folder):
        stem = video_stem(path.name)
        if stem is not None:
            found[stem].append(path)
        else:
            ignored += not path.name.lower().endswith((".csv", ".json", ".txt", ARRAY))
    return _Match(annotations, folder, {"rgb": found}, (".mp4",), ignored).listing(("rgb",))


def list_arrays(annotations: Annotations, folder: Path, modalities: Iterable[str]) -> Listing:
    """The same for arrays `<name>.npy`; those below a folder with `flow` in its name are flow, others rgb.

    Where flow is wanted and there is no array of it, it is computed from the frames.

    Raises:
        GkdError: there is no such folder.
    """
    found: dict[str, dict[str, list[Path]]] = {"rgb": defaultdict(list), "flow": defaultdict(list)}
    for path in _files(folder):
        if path.name.endswith(ARRAY):
            above = [folder.name or folder.resolve().name, *path.relative_to(folder).parts[:-1]]
            kind = "flow" if any("flow" in name.lower() for name in above) else "rgb"
            found[kind][path.stem].append(path)
    return _Match(annotations, folder, found, ("_npy", ARRAY), 0).listing(tuple(modalities))


def _files(folder: Path) -> Iterator[Path]:
    """Every file below a folder, in order; hidden ones, loops of links and unreadable folders are skipped."""
    if not folder.is_dir():
        raise GkdError(
            "there is no folder of videos", str(folder), "name the folder that holds the annotated videos"
        )
    if not os.access(folder, os.R_OK | os.X_OK):
        raise GkdError("a folder cannot be read", str(folder), "check its permissions")
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        again = os.path.realpath(root) in seen or len(Path(root).relative_to(folder).parts) > _DEEPEST
        seen.add(os.path.realpath(root))
        folders[:] = sorted(name for name in folders if name[0] != ".") if not again else []
        yield from (Path(root, name) for name in sorted(names) if name[0] != "." and not again)


class _Match:
    """Looks listed videos up among the files that were found, by modality and stem."""

    def __init__(
        self,
        annotations: Annotations,
        folder: Path,
        found: Mapping[str, Mapping[str, list[Path]]],
        suffix: tuple[str, ...],
        ignored: int,
    ) -> None:
        self.annotations, self.folder, self.found, self.suffix = annotations, folder, found, suffix
        self.ignored = ignored
        self.rejects: list[tuple[str, str]] = []
        self.problems = list(annotations.problems)
        self.taken: set[Path] = set()
        validation = annotations.validation
        if not validation:  # the folders may say what the files do not
            names = {path.name.lower() for path in folder.iterdir() if path.is_dir()}
            named = any(name.startswith("validation") for name in names) and not names & {"train", "training"}
            validation = "train" if named else "unused"
        self.folders = dict(_FOLDERS)
        if validation != "unused":
            self.folders["validation"] = validation
        self.names: dict[Subset, str] = {
            "train": "validation" if validation == "train" else "train",
            "test": "test",
        }

    def listing(self, modalities: tuple[str, ...]) -> Listing:
        """Looks every listed video up, for these modalities."""
        sources = []
        for subset in SUBSETS:
            for video in sorted(self.annotations.listed[subset]):
                source = self._source(subset, video, modalities)
                if source is not None:
                    sources.append(source)
        sources.sort(key=lambda source: (source.class_name, source.name))
        there = {path for by_stem in self.found.values() for paths in by_stem.values() for path in paths}
        return Listing(
            self.annotations.classes,
            sources,
            self.rejects,
            self.ignored,
            len(there - self.taken),
            self.annotations.ground_truth,
            self.problems,
        )

    def _source(self, subset: Subset, video: str, modalities: tuple[str, ...]) -> Source | None:
        rgb = self._look_up("rgb", video, subset)
        flow = self._look_up("flow", video, subset) if "flow" in modalities else []
        found = [*flow, *rgb] if modalities == ("flow",) and flow else rgb
        several = next((paths for paths in (rgb, flow) if len(paths) > 1), None)
        if several:
            names = ", ".join(str(path.relative_to(self.folder)) for path in several)
            self.rejects.append((str(several[0]), f"there are several of that name: {names}"))
            return None
        if not found:
            expected = self._expected(subset, video)
            self.rejects.append((str(expected), "there is no such file; it is annotated"))
            return None
        path = found[0]
        if not path.is_file():
            self.rejects.append((str(path), "not a file, or a link that leads nowhere"))
            return None
        self._check_folder(path, subset, video)
        actions = self.annotations.actions[subset].get(video, [])
        return Source(
            path,
            self.names[subset],
            video,
            {1: subset},
            flow=flow[0] if flow and path != flow[0] else None,
            segments=tuple(actions),
            annotated_by=self.annotations.files.get(subset, ""),
            stated=self.annotations.listed[subset][video],
        )

    def _look_up(self, kind: str, video: str, subset: Subset) -> list[Path]:
        """Files of that name; of several, those in a folder of the subset where there are any."""
        found = self.found.get(kind, {})
        for name in (video, f"v_{video}", video_stem(video) or video):
            if name in found:
                self.taken.update(found[name])
                inside = [path for path in found[name] if self._subset_of(path) == subset]
                return inside or found[name]
        return []

    def _expected(self, subset: Subset, video: str) -> Path:
        if ARRAY in self.suffix:
            return self.folder / f"{self.names[subset]}_npy" / f"{video}{ARRAY}"
        inside = self.folder / self.names[subset]
        return (inside if inside.is_dir() else self.folder) / f"{video}.mp4"

    def _subset_of(self, path: Path) -> Subset | None:
        """Which subset the folders of a file say."""
        for name in reversed(path.relative_to(self.folder).parts[:-1]):
            word = name.lower().removesuffix("_npy").removesuffix("_flow")
            if word in self.folders:
                return self.folders[word]
        return None

    def _check_folder(self, path: Path, subset: Subset, video: str) -> None:
        lies = self._subset_of(path)
        if lies is not None and lies != subset:
            reason = f"it lies in a folder for {lies} and is annotated for {subset}, which counts"
            self.problems.append(Problem(str(path), 0, readable(video), reason))
