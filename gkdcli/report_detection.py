"""Pictures of detection: what is wrong with a detector's output, and when in a video it sees what."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gkdcli.console import counted
from gkdcli.report import drawable, new_figure, save_figure

# by kind of `evaluation.profile`, from the best to the worst: what it is called, colour. Green is right; blue
# found the place, orange missed it, the lighter of each with the right class; grey saw nothing
_KINDS = {
    "true_positive": ("true positive", "#2a8a3e"),
    "duplicate": ("duplicate", "#9ecae1"),
    "wrong_label": ("wrong label", "#2b6cb0"),
    "localisation": ("localisation", "#fdbe6f"),
    "confusion": ("localisation and label", "#d9690f"),
    "background": ("background", "#bdbdbd"),
}
_AT = {"1G": "#8fbf9a", "10G": "#2a8a3e"}
# strong throughout: a pale one would look like an unsure detection
_COLOURS = (
    *(
        "#1f77b4",
        "#ff7f0e",
        "#2ca02c",
        "#d62728",
        "#9467bd",
        "#17becf",
        "#e377c2",
        "#bcbd22",
        "#8c564b",
        "#7f7f7f",
    ),
    *(
        "#0b2a7a",
        "#a84300",
        "#00523a",
        "#6d0019",
        "#45108a",
        "#00687a",
        "#b0006d",
        "#6b6b00",
        "#3d2314",
        "#1c1c1c",
    ),
)
_LANES = 6  # of detections below each other in a timeline
_LEGEND = 40  # classes


def draw_profile(profile: Mapping[str, Any], recall: Mapping[str, Any], path: Path) -> None:
    """The false-positive profile and recall by length as one PNG.

    Args:
        profile: what `evaluation.profile.false_positive_profile` returns.
        recall: what `evaluation.profile.recall_by_length` returns.
        path: of the PNG.
    """
    figure, (left, right) = new_figure(12, 4.8, ncols=2, width_ratios=[7, 5])
    _draw_slices(left, profile)
    _draw_recall(right, recall)
    for axes in (left, right):
        axes.set_ylim(0, 1)
        axes.yaxis.grid(True, color="0.85")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def _draw_slices(axes: Any, profile: Mapping[str, Any]) -> None:
    places = range(len(profile["slices"]))
    floor = [0.0 for _ in places]
    for kind, (name, colour) in _KINDS.items():
        shares = [row["shares"][kind] or 0.0 for row in profile["slices"]]
        axes.bar(places, shares, 0.85, bottom=floor, color=colour, label=name)
        floor = [below + share for below, share in zip(floor, shares, strict=True)]
    axes.set_xticks(places, [f"{row['top']}\n{row['detections']}" for row in profile["slices"]], fontsize=8)
    axes.set(
        xlabel=f"slices of G = {profile['segments']} detections, best first (per class); below: how many",
        ylabel="share of the slice",
        title=f"What the best {profile['detections']} detections are, at tIoU {profile['tiou']:g}",
    )
    handles, names = axes.get_legend_handles_labels()  # from top to bottom, as the bars are stacked
    axes.legend(handles[::-1], names[::-1], fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def _draw_recall(axes: Any, recall: Mapping[str, Any]) -> None:
    for turn, (at, colour) in enumerate(_AT.items()):
        shown = [(place, row["recall"][at]) for place, row in enumerate(recall["bins"]) if row["segments"]]
        bars = axes.bar(
            [place + 0.4 * turn - 0.2 for place, _ in shown],
            [share for _, share in shown],
            0.38,
            color=colour,
            label=f"best {at}: {recall['detections'][at]} detections",
        )
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
    axes.set_xticks(range(len(recall["bins"])), [_bin(row) for row in recall["bins"]], fontsize=8)
    axes.set_xlim(-0.6, len(recall["bins"]) - 0.4)
    axes.set(
        xlabel="length of the segment; below: how many",
        ylabel="share of the segments that are found",
        title=f"Recall by length, at tIoU {recall['tiou']:g}",
    )
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.22), ncols=2, frameon=False)


def _bin(row: Mapping[str, Any]) -> str:
    above, upto = row["above"], row["up_to"]
    span = f"> {above:g} s" if upto is None else f"≤ {upto:g} s" if above == 0 else f"{above:g}-{upto:g} s"
    return f"{row['bin']}\n{span}\n{row['segments']}"


class Timeline(NamedTuple):
    """One video of `draw_timelines`.

    Args:
        name: of the video.
        truth: its segments: start and end in seconds, class name.
        found: its detections: start and end in seconds, class name, score.
        duration: seconds; None for as long as there is something to show.
    """

    name: str
    truth: Sequence[tuple[float, float, str]]
    found: Sequence[tuple[float, float, str, float]]
    duration: float | None = None


def draw_timelines(videos: Sequence[Timeline], path: Path) -> None:
    """Ground truth above detections over the seconds of each video, as one PNG.

    Detections are laid, the best first, on the first of six lanes that is free there; those that find none
    are left out and counted in the title. They are the more opaque the higher they score, relative to the
    best score in the picture. Without videos there is no picture.
    """
    if not videos:
        return
    laid = [(_lanes([row[:2] for row in video.truth], None), *_best_lanes(video)) for video in videos]
    rows = [max(1, 1 + max(truth, default=0)) + 1 + max(found, default=0) for truth, found, _ in laid]
    figure, grid = new_figure(
        13,
        0.8 + sum(0.75 + 0.2 * row for row in rows),
        nrows=len(videos),
        squeeze=False,
        height_ratios=[0.75 + 0.2 * row for row in rows],
    )
    colours = _colours(
        (row[2] for video in videos for row in video.truth), (row[2] for _, _, kept in laid for row in kept)
    )
    highest = max((row[3] for video in videos for row in video.found), default=0.0)
    for axes, video, (truth, found, kept) in zip(grid[:, 0], videos, laid, strict=True):
        height = max(1, 1 + max(truth, default=0))
        for lane in sorted(set(truth)):
            bars = [row for row, at in zip(video.truth, truth, strict=True) if at == lane]
            _bars(axes, height - lane, bars, [(*colours[row[2]], 1.0) for row in bars])
        for lane in sorted(set(found)):
            best = [row for row, at in zip(kept, found, strict=True) if at == lane]
            _bars(axes, -1 - lane, best, [(*colours[row[2]], _opacity(row[3], highest)) for row in best])
        lowest = -1 - max(found, default=0)
        axes.axhline(0, color="black", linewidth=0.6)
        ends = [row[1] for row in [*video.truth, *kept]]
        axes.set(xlim=(0, video.duration or max(ends, default=0) or 1), ylim=(lowest - 0.6, height + 0.6))
        axes.set_yticks([(height + 1) / 2, (lowest - 1) / 2], ["ground truth", "detections"], fontsize=8)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right", "left"]].set_visible(False)
        some = f"{len(kept)} of {len(video.found)}" if len(kept) < len(video.found) else f"{len(kept)}"
        title = f"{drawable(video.name)}: {counted(len(video.truth), 'segment')}, {some} detections"
        axes.set_title(title, fontsize=9, loc="left", parse_math=False)
    grid[-1, 0].set_xlabel(
        f"seconds (detections: the more opaque, the higher the score; full: {highest:.3g})"
    )
    _legend(figure, colours)
    save_figure(figure, path)


def _bars(axes: Any, height: int, rows: Sequence[Any], colours: Sequence[Any]) -> None:
    # the edge keeps actions visible that are shorter than a dot of a long video
    spans = [(row[0], row[1] - row[0]) for row in rows]
    axes.broken_barh(spans, (height - 0.4, 0.8), facecolors=colours, edgecolors=colours, linewidth=0.5)


def _opacity(score: float, highest: float) -> float:
    return min(1.0, max(0.12, score / highest)) if highest > 0 else 1.0


def _legend(figure: Any, colours: Mapping[str, Any]) -> None:
    from matplotlib.patches import Patch

    names = list(colours)[:_LEGEND]
    handles = [Patch(color=colours[name], label=drawable(name)) for name in names]
    if len(colours) > len(names):
        handles.append(Patch(color="none", label=f"and {len(colours) - len(names)} more"))
    if handles:
        legend = figure.legend(handles=handles, fontsize=8, loc="outside right upper", frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)


def _colours(true: Iterable[str], found: Iterable[str]) -> dict[str, Any]:
    """A colour for each class, the clearest for those in the ground truth; past twenty a rainbow."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    first = sorted(set(true))
    classes = [*first, *sorted(set(found) - set(first))]
    if len(classes) <= len(_COLOURS):
        return {name: to_rgb(colour) for name, colour in zip(classes, _COLOURS, strict=False)}
    return {name: colormaps["turbo"](n / (len(classes) - 1))[:3] for n, name in enumerate(classes)}


def _best_lanes(video: Timeline) -> tuple[list[int], list[tuple[float, float, str, float]]]:
    """The lanes of the detections that find one, and those detections, by falling score."""
    ranked = sorted(video.found, key=lambda row: -row[3])
    lanes = _lanes([row[:2] for row in ranked], _LANES)
    return (
        [lane for lane in lanes if lane >= 0],
        [row for row, lane in zip(ranked, lanes, strict=True) if lane >= 0],
    )


def _lanes(spans: Sequence[tuple[float, float]], most: int | None) -> list[int]:
    """The first lane of each span that no earlier one overlaps there; -1 where `most` lanes are taken."""
    taken: list[list[tuple[float, float]]] = []  # the spans of a lane from left to right
    lanes = []
    for span in spans:
        place = next((n for n, lane in enumerate(taken) if _free(lane, span)), len(taken))
        if place == most:
            place = -1
        elif place == len(taken):
            taken.append([span])
        else:
            insort(taken[place], span)
        lanes.append(place)
    return lanes


def _free(lane: Sequence[tuple[float, float]], span: tuple[float, float]) -> bool:
    place = bisect_left(lane, span)
    before = place == 0 or lane[place - 1][1] <= span[0]
    after = place == len(lane) or (span[1] <= lane[place][0] and span != lane[place])
    return before and after
