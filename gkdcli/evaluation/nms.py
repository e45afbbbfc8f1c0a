"""Gaussian soft-NMS over many classes and videos at once (METHOD.md 5). NumPy alone.

Greedy: of the open candidates of a group the best is picked, and the scores of the others fall by the
factor exp(-iou^2 / sigma) of their overlap with it, until none is left above the floor. As scores only
fall, whoever is above all that overlap with it is picked before them, with the score it has now. Hence
whole rounds are picked at once: candidates lie by start in tiles, and the best of a tile is picked where it
is above every tile that it reaches. Levels stand for scores, sigma * log(score), from which iou^2 is taken
in any order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Places = NDArray[np.int64]
Mask = NDArray[np.bool_]

_TILE = 16  # candidates
_BATCH = 1 << 17  # candidates in work; these three only cost or save time
_ROUNDS = 3  # before it is looked whether the closed ones can be left out
_MIN_WIDTH = 1e-5  # of the picked one, in units of the segments
_TIE = 1e-13  # of log(score), per position: of equal scores the first in the input is picked


class _Candidates(NamedTuple):
    """Some groups, by group and then in the order of the input: all (N,)."""

    start: Array
    end: Array
    level: Array
    group: Places  # 0, 1, ...


def soft_nms(
    segments: Array,
    scores: Array,
    *,
    sigma: float,
    floor: float = 0.001,
    top_k: int = 5000,
    recipe: str = "corrected",
    groups: NDArray[np.integer[Any]] | None = None,
) -> tuple[Places, Array]:
    """Which candidates stay, and with what score; the arguments are left as they are.

    Args:
        segments: (N, 2), start and end in seconds; an end before the start counts as no length.
        scores: (N,), up to 1; those of 0 never stay.
        sigma: of the Gaussian.
        floor: a candidate is open as long as its score is not below.
        top_k: most picks of a group.
        recipe: `official` ends when one candidate is left open, which is lost, and returns in the order of
            the input; `corrected` keeps it and returns by group, then falling score (FINDINGS 12).
        groups: (N,), whole numbers of class, or of class and video: who competes with whom; default: all do.

    Returns:
        Positions among the N, and their new scores.
    """
    scores = np.asarray(scores, np.float64)
    groups = np.zeros(len(scores), np.int64) if groups is None else np.asarray(groups)
    places = np.nonzero((scores >= floor) & (scores > 0))[0]
    if (np.diff(groups) < 0).any():
        places = places[np.argsort(groups[places], kind="stable")]
    bottom = sigma * float(np.log(max(floor, np.finfo(np.float64).tiny)) - _TIE * len(places))
    parts = [(np.zeros(0, np.int64), np.zeros(0))]
    for part, firsts in _batches(places, groups):
        group = np.repeat(np.arange(len(firsts)), np.diff(firsts, append=len(part)))
        tie = _TIE * (np.arange(len(part)) - firsts[group])
        start, end = (np.asarray(segments[:, side].take(part), np.float64) for side in (0, 1))
        given = _Candidates(start, np.maximum(start, end), sigma * (np.log(scores[part]) - tie), group)
        found = _pick(given, bottom)
        level = found[1]
        order = np.nonzero(found[0])[0]
        order = order[np.lexsort((-level[order], group[order]))]
        edges = np.searchsorted(group[order], np.arange(len(firsts) + 1))
        stays = np.arange(len(order)) - edges[group[order]] < top_k
        if recipe == "official":
            alone = (np.diff(edges) <= top_k) & ~_rivals(given, found, order, edges, bottom)
            stays[edges[1:][alone] - 1] = False
        order = order[stays]
        parts.append((part[order], level[order] / sigma + tie[order]))
    kept, logs = (np.concatenate(column) for column in zip(*parts, strict=True))
    if recipe == "official":
        by_input = np.argsort(kept)
        kept, logs = kept[by_input], logs[by_input]
    return kept, np.exp(logs)


def _batches(places: Places, groups: NDArray[np.integer[Any]]) -> Iterator[tuple[Places, Places]]:
    """Positions of some whole groups, and where each group begins among them."""
    if not len(places):
        return
    edges = np.concatenate([[0], np.nonzero(np.diff(groups[places]))[0] + 1, [len(places)]])
    first = 0
    while first < len(edges) - 1:
        past = int(np.searchsorted(edges, edges[first] + _BATCH, side="right")) - 1
        past = max(past, first + 1)
        yield places[edges[first] : edges[past]], edges[first:past] - edges[first]
        first = past


class _Tiles:
    """Open candidates by group and start, in tiles of one group each; padded with what reaches nowhere.

    Tables are (width, tiles): row after row, so that operations run along many tiles.
    """

    def __init__(self, given: _Candidates, level: Array, place: Places) -> None:
        group = given.group[place]
        size = np.bincount(group)
        # as candidates close, the rest lies wider apart: tiles of fewer are about as long in time
        power = max((_TILE * len(place) // len(given.group)).bit_length() - 1, 0)
        width = 1 << power
        tiles = (size + width - 1) >> power
        number = np.repeat(np.arange(len(size)), tiles)
        shift = ((np.cumsum(tiles) - tiles) << power) - (np.cumsum(size) - size)
        at = np.arange(len(place)) + shift[group]
        at = (at & (width - 1)) * len(number) + (at >> power)

        def spread(values: Any, empty: float) -> Any:
            table = np.full(len(number) * width, empty, values.dtype)
            table[at] = values
            return table.reshape(width, -1)

        self.place = spread(place, -1)
        self.start, self.end = spread(given.start[place], np.inf), spread(given.end[place], -np.inf)
        self.level = spread(level[place], -np.inf)
        self.first, self.last = self.start.min(axis=0), self.end.max(axis=0)
        # on one time line: each group begins after all ends of the one before
        far = number * (self.last.max() - self.first.min() + 1)
        begins, stops = self.first + far, self.last + far
        index = np.arange(len(begins))  # even a tile of segments without length reaches itself
        self.low = np.minimum(np.searchsorted(np.maximum.accumulate(stops), begins, side="right"), index)
        self.high = np.maximum(np.searchsorted(np.minimum.accumulate(begins[::-1])[::-1], stops), index + 1)


def _pick(given: _Candidates, bottom: float) -> tuple[Mask, Array, Places]:
    """Picks until nothing is open.

    Returns:
        What is picked, levels, and times, all (N,): the level is that of the time, which is when one was
        picked, or some moment after it fell below `bottom`; later falls of closed ones are not followed.
    """
    level, picked = given.level.copy(), np.zeros(len(given.group), np.bool_)
    time = np.zeros(len(given.group), np.int64)
    place = _by_start(given)
    while len(place):
        tiles = _Tiles(given, level, place)
        time[place] += 1
        left: int | np.signedinteger[Any] = len(place)
        while left > 0.5 * len(place):
            for _ in range(_ROUNDS):
                chosen, reached = _round(tiles, bottom)
                picked[chosen], level[chosen] = True, reached
            left = np.count_nonzero(tiles.level >= bottom)
        known = tiles.level > -np.inf
        level[tiles.place[known]] = tiles.level[known]
        place = tiles.place.T[(tiles.level >= bottom).T]
    return picked, level, time


def _by_start(given: _Candidates) -> Places:
    """Positions by group and, nearly, by start: numbers of 16 bits are sorted in a fraction of the time."""
    parts = 65536 // (int(given.group[-1]) + 1)
    first = given.start.min()
    part = (given.start - first) * (max(parts - 1, 0) / max(float(given.start.max() - first), _MIN_WIDTH))
    key = given.group * parts + part.astype(np.int64)
    return np.argsort(key.astype(np.uint16) if parts else given.group, kind="stable")


def _round(tiles: _Tiles, bottom: float) -> tuple[Places, Array]:
    """Picks the best of some tiles and lowers all that they reach: positions and levels of the picks."""
    best = tiles.level.max(axis=0)
    # picks are to be some tiles apart: those that are not would be refused below, after more work
    around = np.maximum(best, np.concatenate([best[1:], best[-1:]]))
    around = np.maximum(around, np.concatenate([around[:1], around[:-1]]))
    around = np.maximum(around, np.concatenate([around[2:], around[-2:]]))
    around = np.maximum(around, np.concatenate([around[:2], around[:-2]]))
    open_ = best >= bottom
    tile = np.nonzero(open_ & (best == around))[0]
    if not len(tile):
        return tile, best[tile]
    if len(tile) * 32 < len(best) and np.sum(tiles.high - tiles.low) < 64 * len(best):
        tile = np.nonzero(open_)[0]  # scores that rise or fall for long: few stand out, many may be free
    row = tiles.level.take(tile, axis=1).argmax(axis=0)
    start, end = tiles.start[row, tile], tiles.end[row, tile]
    low = tiles.low.take(tile)
    reach = tiles.high.take(tile) - low
    begin = np.cumsum(reach) - reach
    pick = np.repeat(np.arange(len(tile)), reach)
    other = np.arange(len(pick))
    other += (low - begin).take(pick)
    near = tiles.first.take(other) < end.take(pick)
    near &= tiles.last.take(other) > start.take(pick)
    near[begin + tile - low] = True
    ok = np.maximum.reduceat(np.where(near, best.take(other), -np.inf), begin) == best[tile]
    near &= ok.take(pick)
    pairs = np.nonzero(near)[0]
    pick, other = pick.take(pairs), other.take(pairs)
    falls = _falls(
        start.take(pick), end.take(pick), tiles.start.take(other, axis=1), tiles.end.take(other, axis=1)
    )
    tile, row = tile[ok], row[ok]
    tiles.level[row, tile] = -np.inf
    width, count = tiles.level.shape
    if width > 1:
        other = (np.arange(0, width * count, count)[:, None] + other).ravel()
    tiles.level -= np.bincount(other, falls.ravel(), width * count).reshape(width, count)
    return tiles.place[row, tile], best[tile]


def _falls(picked_start: Array, picked_end: Array, start: Array, end: Array) -> Array:
    """iou^2: what a level loses where another is picked."""
    common = np.minimum(picked_end, end)
    common -= np.maximum(picked_start, start)
    np.maximum(common, 0, out=common)
    union = end - start
    union += np.maximum(picked_end - picked_start, _MIN_WIDTH)
    union -= common
    common /= union
    common *= common
    return common


def _rivals(
    given: _Candidates, found: tuple[Mask, Array, Places], order: Places, edges: Places, bottom: float
) -> Mask:
    """Of each group, whether anything else was open when the last of its picks was taken.

    Args:
        given: the candidates.
        found: as `_pick` returns it.
        order: the picks, by group and falling level.
        edges: (groups + 1,), where in `order` the picks of each group begin; each has some.
        bottom: the level below which candidates are closed.
    """
    picked, level, time = found
    rivals = np.zeros(len(edges) - 1, np.bool_)
    last = order[edges[1:] - 1]
    start, end = given.start[last], given.end[last]
    # it must have closed one that it overlaps with, so one that had not been left out long before
    near = (given.start < end.take(given.group)) & (given.end > start.take(given.group)) & ~picked
    one = np.nonzero(near & (time >= time[last].take(given.group)))[0]
    group = given.group[one]
    late = level[one] + _falls(start[group], end[group], given.start[one], given.end[one])
    for place in one[late >= bottom]:  # few
        group = given.group[place]
        if not rivals[group]:
            before = order[edges[group] : edges[group + 1] - 1]
            falls = _falls(given.start[before], given.end[before], given.start[place], given.end[place])
            rivals[group] = given.level[place] - falls.sum() >= bottom
    return rivals
