"""Which videos `gkd prepare` is about: its input checked, drawn where the preset draws, and listed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gkdcli.console import Console, counted
from gkdcli.data.annotations import Listing, read_list, scan_folder
from gkdcli.data.demo import CLASSES, draw_videos
from gkdcli.data.demo_detection import draw_untrimmed
from gkdcli.data.detection_files import find_annotations, read_annotations
from gkdcli.data.detection_videos import list_arrays, list_videos
from gkdcli.data.lists import find_split_lists, read_split_lists
from gkdcli.data.sources import SUBSETS
from gkdcli.errors import GkdError, usage_error
from gkdcli.files import locked
from gkdcli.runs import Place

_DRAW_SEC = 3600.0


def read_listing(
    place: Place,
    console: Console,
    folder: Path,
    *,
    annotations: Path | None,
    modalities: Sequence[str],
    frames: bool,
    arrays: bool,
) -> Listing:
    """The videos that belong to the data set; who says so is said. `frames`, `arrays`: what lies in `folder`.

    Raises:
        GkdError: see `prepare`.
    """
    if place.settings.task == "detection":
        return _untrimmed(place, console, folder, annotations, modalities, arrays)
    return _listing(place, console, folder, annotations, frames)


def _listing(place: Place, console: Console, folder: Path, annotations: Path | None, frames: bool) -> Listing:
    data = place.settings.data
    if annotations is None and data.source == "listed":
        annotations = find_split_lists(folder) or find_split_lists(place.videos)
        if annotations is None:
            raise GkdError(
                f"there are no split lists of {place.settings.dataset}",
                f"looked in {' and '.join(sorted({str(folder), str(place.videos)}))}, and one folder below",
                "unpack them there (UCF101: ucfTrainTestlist; HMDB51: testTrainMulti_7030_splits), or name"
                " their folder with `--annotations DIR`",
            )
        console.note(f"split lists: {annotations} (`--annotations DIR` names others)")
    if annotations is None:
        return scan_folder(folder, data.test_fraction, frames)
    if annotations.is_dir():
        return read_split_lists(annotations, folder, frames=frames)
    return read_list(annotations, folder, data.test_fraction, frames)


def check_input(place: Place, frames: Path | None, arrays: Path | None) -> None:
    """Refuses what the task or the data set cannot be made of."""
    settings = place.settings
    drawn, detection = settings.data.source == "drawn", settings.task == "detection"
    for flag, given in (("--from-frames", frames), ("--from-npy", arrays)):
        if given is None:
            continue
        what = hint = ""
        if drawn:
            kind = "extracted images" if flag == "--from-frames" else "arrays"
            what = f"this data set draws its own videos and takes no {kind}"
            hint = "`gkd prepare folder --from-frames DIR --name mine`"
        elif detection and flag == "--from-frames":
            what = "extracted images say no frame rate, so actions cannot be found in them"
            hint = "name the folder of the videos, or of .npy arrays with `--from-npy`"
        elif not detection and flag == "--from-npy":
            what = "arrays are read for detection only"
            hint = "`gkd prepare thumos14 --from-npy DIR`; recognition takes videos or `--from-frames`"
        if what:
            raise usage_error(what, f"{flag} {given}", hint)


def _untrimmed(
    place: Place,
    console: Console,
    folder: Path,
    annotations: Path | None,
    modalities: Sequence[str],
    arrays: bool,
) -> Listing:
    """Annotated videos of a detection set; who says what is done in them is said."""
    if annotations is None and place.settings.data.source == "drawn":
        annotations = folder / "annotations.json"
    if annotations is not None and not annotations.exists():
        what = "there is no such annotation file or folder"
        raise usage_error(what, f"--annotations {annotations}", "name what holds the annotated actions")
    found = read_annotations(find_annotations(annotations, [folder, place.videos]))
    listing = list_arrays(found, folder, modalities) if arrays else list_videos(found, folder)
    for subset in SUBSETS:
        truth = found.ground_truth[subset]
        if not truth.videos:
            console.warn(
                f"no video is annotated for {subset}ing",
                found.files.get(subset) or str(annotations or folder),
                "the store can be prepared, but training and evaluation need one subset each",
            )
            continue
        counts = ", ".join(
            counted(getattr(truth, f"{one}s"), one) for one in ("video", "segment", "duplicate")
        )
        said = f"annotations for {subset}ing: {found.files[subset]}: {counts}"
        console.note(f"{said} (`--annotations PATH` names others)")
        if truth.without:
            without = counted(len(truth.without), f"listed {subset} video is", f"listed {subset} videos are")
            console.note(f"{without} not in it, so without ground truth: {_first_few(truth.without)}")
    return listing


def _first_few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def draw(place: Place, console: Console, folder: Path, workers: int) -> None:
    """Draws the videos of a set that is drawn; those that are there are kept."""
    lock, purpose = place.store_folder / ".draw.lock", f"the videos of {place.settings.dataset}"
    with locked(lock, purpose, patience_sec=_DRAW_SEC):  # the first of some shards draws, the others wait
        _draw_alone(place, console, folder, workers)


def _draw_alone(place: Place, console: Console, folder: Path, workers: int) -> None:
    data = place.settings.data
    counts = {"train": data.draw_train, "test": data.draw_test}
    if place.settings.task == "detection":
        with console.progress(f"draw {place.settings.dataset}", sum(counts.values())) as tick:
            draw_untrimmed(folder, counts, data.draw_seed, workers, lambda done, total: tick(done))
        return
    with console.progress(f"draw {place.settings.dataset}", len(CLASSES) * sum(counts.values())) as tick:
        draw_videos(folder, counts, data.draw_seed, workers, lambda done, total: tick(done))
