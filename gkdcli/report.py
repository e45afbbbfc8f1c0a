"""Pictures of what people would rather look at than read."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gkdcli.files import atomic_path


def draw_confusion(confusion: Sequence[Sequence[int]], classes: Sequence[str], path: Path) -> None:
    """The confusion matrix as a PNG: rows true, columns predicted, shares of each row."""
    import numpy as np

    counts = np.asarray(confusion, dtype=float)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = max(4.0, 0.3 * len(classes) + 2)
    figure, axes = new_figure(side, side)
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    if len(classes) <= 60:
        names = [drawable(name) for name in classes]
        axes.set_xticks(range(len(classes)), names, rotation=90, fontsize=8, parse_math=False)
        axes.set_yticks(range(len(classes)), names, fontsize=8, parse_math=False)
    axes.set(xlabel="predicted", ylabel="true", title="share of each class's test videos")
    if len(classes) <= 20:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(
                column, row, f"{counts[row, column]:.0f}", ha="center", va="center", color=colour, fontsize=7
            )
    figure.colorbar(image, ax=axes, fraction=0.046)
    save_figure(figure, path)


def draw_curves(entries: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Every loss term's mean per epoch, the held-out score, and the learning rate by step, as a PNG.

    Args:
        entries: the lines of `metrics.jsonl`.
        path: of the picture; where no epoch is whole there is none.
    """
    epochs: list[Mapping[str, Any]] = []
    rates: list[float] = []
    steps = 1.0  # of an epoch
    for entry in entries:
        if "mean" in entry:
            epochs.append(entry)
            steps = len(rates) / entry["epoch"]
        else:
            rates.append(entry["learning_rate"])
    if not epochs:
        return
    figure, (axes, below) = new_figure(8, 6.5, nrows=2, sharex=True, height_ratios=[3, 1])
    thin = max(len(rates) // 2000, 1)  # more would not be seen
    below.plot([(step + 1) / steps for step in range(0, len(rates), thin)], rates[::thin])
    below.set(xlabel="epoch", ylabel="learning rate", ylim=(0, None))
    below.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    numbers = [entry["epoch"] for entry in epochs]
    for name in dict.fromkeys(name for entry in epochs for name in entry["mean"]):
        axes.plot(numbers, [entry["mean"].get(name) for entry in epochs], marker=".", label=name)
    axes.set(ylabel="loss term, mean", yscale="log")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.12, 1))
    held = next((name for name in epochs[0] if name.startswith("held_out_")), None)
    if held is not None:
        right = axes.twinx()
        right.plot(numbers, [entry[held] for entry in epochs], color="black", linestyle="--")
        right.set(ylabel=f"held-out {held.removeprefix('held_out_')} (dashed)", ylim=(0, 1))
    save_figure(figure, path)


def drawable(name: str) -> str:
    """Shortened, and without the bytes of a file name that are no text."""
    text = name.encode("utf-8", "replace").decode()
    return text if len(text) <= 40 else f"{text[:39]}…"


def new_figure(width: float, height: float, **grid: Any) -> tuple[Any, Any]:
    """A figure of so many inches and its axes: one, or as many as `grid` asks (`Figure.subplots`)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(**grid)


def save_figure(figure: Any, path: Path) -> None:
    """Writes a PNG, whole or not at all."""
    with atomic_path(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks are drawn as boxes
        figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight")
