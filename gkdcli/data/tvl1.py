"""TV-L1 optical flow of many pairs of frames at once, in PyTorch (Zach, Pock and Bischof 2007; IPOL 2013).

The same algorithm, steps and defaults as OpenCV's `DualTVL1OpticalFlow`. From the coarsest picture to the
finest, the flow u is refined in `warps` rounds: the second frame and its gradient are taken where u points
to, the brightness is linearised there, and up to `outer` x `inner` iterations lower

    sum |grad u| + lambda |brightness of the second frame where u points to - that of the first|

by turns in an auxiliary flow (a threshold, pixel by pixel), in u, and in the dual p of its gradient. u passes
a 5x5 median before each `inner` iterations. A pair stops for the round as soon as u moved less than `epsilon`
px in the root mean square; its step is 0 from then on, so u and p stay what they are to the bit.

What moves: compiled, an iteration is at best two passes over the pixels of a level. The first reads u, p, the
unit gradient, the distance and the limit (2 + 4 + 2 + 1 + 1 numbers) and writes u (2), the second reads u and
p (6) and writes p (4): 22 numbers, `BYTES_PER_PIXEL`, for about 60 operations, so bandwidth is the limit. At
340x256 that is 7.7 MB per pair and iteration, 19 MB for one at each level: 3.35 TB/s (H100) allow 1750 pairs
per second of 100 iterations at each level. Operation by operation an iteration is 17 passes.

What is held: about 80 numbers per pixel of the finest level, most of them the median's: 28 MB for a pair
of 340x256 on a GPU. A CPU works at `_CACHED_PX` at a time, and holds 28 byte per pixel of the other pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from gkdcli.data.median import median

BYTES_PER_PIXEL = 22 * 4  # of an iteration, compiled
SMALLEST_PX = 3  # of a side of a frame
_SMALLEST_LEVEL_PX = 16
_BLOCK = 5  # iterations between two looks at what has stopped, on a GPU: up to twice as many are in vain
_CACHED_PX = 100_000  # of the pairs that a CPU works at together: more would leave its cache


@dataclass(frozen=True)
class Tvl1:
    """Parameters, by default OpenCV's.

    Args:
        tau: step of the dual, stable up to 0.25.
        lambda_: weight of the brightness.
        theta: how tightly the auxiliary flow is bound to the flow.
        scales: levels of the pyramid; those below 16 px are left out.
        scale_step: from one level's size to the next one's.
        warps: rounds per level.
        epsilon: a pair stops when it moves less than this, in px.
        inner: iterations from one median to the next.
        outer: medians per round.
    """

    tau: float = 0.25
    lambda_: float = 0.15
    theta: float = 0.3
    scales: int = 5
    scale_step: float = 0.8
    warps: int = 5
    epsilon: float = 0.01
    inner: int = 30
    outer: int = 10


class Counts(NamedTuple):
    """What was worked at one level.

    Args:
        pixels: of a frame.
        pairs: how many.
        iterations: of all pairs and rounds, those after a pair's stop left out.
    """

    pixels: int
    pairs: int
    iterations: Tensor


class _Round(NamedTuple):
    """What stays the same within a round.

    Args:
        normal: unit gradient of the second frame, (N, 2, H, W).
        rest: difference in brightness at u = 0 over the gradient's length, in px, (N, H, W).
        most: longest step towards equal brightness, in px, (N, H, W).
        least: -most.
    """

    normal: Tensor
    rest: Tensor
    most: Tensor
    least: Tensor


class _State(NamedTuple):
    """What iterations change, in place.

    Args:
        u: flow in px of the level, (N, 2, H, W).
        px: theta times the dual of the horizontal gradient, a column of zeros before it, (N, 2, H, W + 1).
        py: of the vertical gradient, a row of zeros before it, (N, 2, H + 1, W).
        live: 1 for pairs that go on and 0 for those that have stopped, (N, 1, 1, 1).
        done: iterations of each pair, (N,).
    """

    u: Tensor
    px: Tensor
    py: Tensor
    live: Tensor
    done: Tensor


Iterate = Callable[[_State, _Round, int, Tvl1], None]


class Compiled(NamedTuple):
    """What is worth compiling: where each operation alone would go through the memory.

    Args:
        iterate: `_fused`.
        median: `median`.
    """

    iterate: Iterate
    median: Callable[[Tensor], Tensor]


def tvl1_flow(
    before: Tensor,
    after: Tensor,
    method: Tvl1 | None = None,
    compiled: Compiled | None = None,
    counts: list[Counts] | None = None,
) -> Tensor:
    """Flow from the first frame to the second, for each pair.

    On a GPU the host never waits for what has just been asked of it. On a CPU pairs are worked at together as
    far as the cache holds them.

    Args:
        before: grey frames (N, H, W), uint8 or of the range 0 to 255.
        after: the next ones, likewise.
        method: its parameters.
        compiled: of `compile_tvl1`; None: operation by operation.
        counts: one entry per level is added, for benchmarks.

    Returns:
        Speeds in px, (N, 2, H, W) float32, x to the right and y downwards.

    Raises:
        ValueError: the frames are smaller than `SMALLEST_PX`.
    """
    method = method or Tvl1()
    if min(before.shape[1:]) < SMALLEST_PX:
        raise ValueError(f"frames need {SMALLEST_PX} px")
    levels = [torch.stack((before, after)).float()]
    while len(levels) < method.scales:
        size = [round(side * method.scale_step) for side in levels[-1].shape[-2:]]
        if min(size) < _SMALLEST_LEVEL_PX:
            break
        levels.append(_resize(levels[-1], size[0], size[1], 1 / method.scale_step, 1 / method.scale_step))
    height, width = levels[-1].shape[-2:]
    u = levels[-1].new_zeros((len(before), 2, height, width))
    for level in reversed(levels):
        height, width = level.shape[-2:]
        if u.shape[-2:] != level.shape[-2:]:
            coarse = u.shape[-2:]
            u = _resize(u, height, width, coarse[0] / height, coarse[1] / width).mul_(1 / method.scale_step)
        together = max(_CACHED_PX // (height * width), 1) if u.device.type == "cpu" else max(len(u), 1)
        done = []
        for start in range(0, len(u), together):
            some = slice(start, start + together)
            done.append(_refine(level[0, some], level[1, some], u[some], method, compiled))
        if counts is not None and done:
            counts.append(Counts(height * width, len(u), torch.cat(done)))
    return u


def _refine(before: Tensor, after: Tensor, u: Tensor, method: Tvl1, compiled: Compiled | None) -> Tensor:
    """All rounds of one level; changes u (N, 2, H, W). Returns the iterations of each pair (N,)."""
    pairs, height, width = before.shape
    state = _State(
        u,
        u.new_zeros((pairs, 2, height, width + 1)),
        u.new_zeros((pairs, 2, height + 1, width)),
        u.new_ones((pairs, 1, 1, 1)),
        u.new_zeros(pairs),
    )
    iterate, smooth = compiled or (_Stepwise(u), median)
    pictures = torch.stack((after, *_central(after)), 1).double()
    for _ in range(method.warps):
        fixed = _linearise(before, pictures, u, method)
        state.live.fill_(1)
        for count in _blocks(state, method, smooth):
            iterate(state, fixed, count, method)
    return state.done


def _blocks(state: _State, method: Tvl1, smooth: Callable[[Tensor], Tensor]) -> Iterator[int]:
    """How many iterations to do next, the median done before them where it is due, until all pairs stop.

    A GPU is asked for the next block before the answer about the last one has come, so that it never stands
    still; what it does in vain changes nothing.
    """
    on_gpu = state.u.device.type == "cuda"
    size = min(_BLOCK, method.inner) if on_gpu else 1
    look = _Look(state.live) if on_gpu else None
    for _ in range(method.outer):
        torch.where(state.live > 0, smooth(state.u), state.u, out=state.u)
        for start in range(0, method.inner, size):
            yield min(size, method.inner - start)
            if look.stopped() if look else not state.live.any():
                return


class _Look:
    """Asks a GPU whether all pairs have stopped, and gives the answer to the question before."""

    def __init__(self, live: Tensor) -> None:
        self._live = live
        self._answers = [torch.ones(1, pin_memory=True) for _ in range(2)]
        self._events: list[Any] = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        self._asked = 0

    def stopped(self) -> bool:
        now = self._asked % 2
        self._asked += 1
        self._answers[now].copy_(self._live.amax().reshape(1), non_blocking=True)
        self._events[now].record()
        if self._asked == 1:
            return False
        self._events[1 - now].synchronize()
        return not self._answers[1 - now].numpy()[0]


def _linearise(before: Tensor, pictures: Tensor, u: Tensor, method: Tvl1) -> _Round:
    """The second frame and its gradient (N, 3, H, W) where u points to; beyond the border they are 0."""
    height, width = before.shape[1:]
    # float64, for in float32 a place is 1e-5 px off, which a hundred iterations magnify to 1e-2
    rows, columns = (torch.arange(side, device=u.device, dtype=torch.float64) for side in (height, width))
    grid = torch.stack(
        ((columns + u[:, 0]) * (2 / (width - 1)) - 1, (rows[:, None] + u[:, 1]) * (2 / (height - 1)) - 1), -1
    )
    warped = functional.grid_sample(pictures, grid, "bicubic", "zeros", align_corners=True).float()
    gradient = warped[:, 1:]
    length = gradient.square().sum(1).sqrt_()
    inverse = length.reciprocal().masked_fill_(length == 0, 0)
    rest = (warped[:, 0] - before - (gradient * u).sum(1)).mul_(inverse)
    most = length.mul_(method.lambda_ * method.theta)
    return _Round(gradient * inverse[:, None], rest, most, -most)


class _Stepwise:
    """Iterations operation by operation, in buffers that are kept."""

    def __init__(self, u: Tensor) -> None:
        self._step, self._norm = torch.empty_like(u), torch.empty_like(u)
        self._gx, self._gy = torch.zeros_like(u), torch.zeros_like(u)  # the last column, the last row: 0
        self._rho = torch.empty_like(u[:, 0])

    def __call__(self, state: _State, fixed: _Round, count: int, method: Tvl1) -> None:
        u, px, py, live, done = state
        step, norm, gx, gy, rho = self._step, self._norm, self._gx, self._gy, self._rho
        inside_x, inside_y = px[..., 1:], py[..., 1:, :]
        for _ in range(count):
            torch.addcmul(fixed.rest, fixed.normal[:, 0], u[:, 0], out=rho)
            rho.addcmul_(fixed.normal[:, 1], u[:, 1])
            torch.clamp(rho, fixed.least, fixed.most, out=rho)
            torch.sub(inside_x, px[..., :-1], out=step)
            step.add_(inside_y).sub_(py[..., :-1, :])
            step.addcmul_(rho[:, None], fixed.normal, value=-1)
            u.addcmul_(step, live)
            torch.sub(u[..., 1:], u[..., :-1], out=gx[..., :-1])
            torch.sub(u[..., 1:, :], u[..., :-1, :], out=gy[..., :-1, :])
            torch.mul(gx, gx, out=norm)
            norm.addcmul_(gy, gy).sqrt_().mul_(live * (method.tau / method.theta)).add_(1)
            dual_step = live * method.tau
            inside_x.addcmul_(gx, dual_step).div_(norm)
            inside_y.addcmul_(gy, dual_step).div_(norm)
            _stop(torch.linalg.vector_norm(step, dim=(1, 2, 3)).square(), rho[0].numel(), live, done, method)


def _fused(state: _State, fixed: _Round, count: int, method: Tvl1) -> None:
    """The same, written for a compiler: nothing is kept but the state, and all shapes are alike."""
    u, px, py, live, done = state
    flow, dual_x, dual_y = u, px[..., 1:], py[..., 1:, :]
    height, width = u.shape[-2:]
    for _ in range(count):
        rho = fixed.rest + fixed.normal[:, 0] * flow[:, 0] + fixed.normal[:, 1] * flow[:, 1]
        rho = torch.minimum(torch.maximum(rho, -fixed.most), fixed.most)
        left = functional.pad(dual_x[..., :-1], (1, 0))
        above = functional.pad(dual_y[..., :-1, :], (0, 0, 1, 0))
        step = dual_x - left + dual_y - above - rho[:, None] * fixed.normal
        flow = flow + step * live
        gx = functional.pad(flow[..., 1:] - flow[..., :-1], (0, 1))
        gy = functional.pad(flow[..., 1:, :] - flow[..., :-1, :], (0, 0, 0, 1))
        norm = (gx * gx + gy * gy).sqrt() * (live * (method.tau / method.theta)) + 1
        dual_x = (dual_x + gx * (live * method.tau)) / norm
        dual_y = (dual_y + gy * (live * method.tau)) / norm
        # rows first: a sum for each pair alone would leave most of a GPU idle
        _stop(step.square().sum(-1).sum((1, 2)), height * width, live, done, method)
    u.copy_(flow)
    px[..., 1:] = dual_x
    py[..., 1:, :] = dual_y


def _stop(squares: Tensor, pixels: int, live: Tensor, done: Tensor, method: Tvl1) -> None:
    """Pairs whose last step was small stop; its squares are added up for each pair, (N,)."""
    done += live.view(-1)
    live *= (squares > method.epsilon**2 * pixels).view(-1, 1, 1, 1)


def compile_tvl1() -> Compiled:
    """For frames of every size; the compiler runs when they are first used, and may fail then."""
    return Compiled(torch.compile(_fused, dynamic=True), torch.compile(median, dynamic=True))


def _central(picture: Tensor) -> tuple[Tensor, Tensor]:
    """Half the difference of each pixel's neighbours in (N, H, W); beyond the border is what is on it."""
    padded = functional.pad(picture[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    gx = (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) * 0.5
    gy = (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) * 0.5
    return gx, gy


def _resize(pictures: Tensor, height: int, width: int, step_y: float, step_x: float) -> Tensor:
    """Bilinear, (..., H, W); neighbours of the result lie `step` px apart in the source, centre on centre."""
    pictures = _resize_last(pictures, width, step_x)
    return _resize_last(pictures.transpose(-1, -2), height, step_y).transpose(-1, -2).contiguous()


def _resize_last(pictures: Tensor, length: int, step: float) -> Tensor:
    # in float64, for the weights; they are few
    places = (torch.arange(length, device=pictures.device, dtype=torch.float64) + 0.5) * step - 0.5
    first = places.floor()
    share = (places - first).float()
    last = pictures.shape[-1] - 1
    index = first.long()
    near, far = pictures[..., index.clamp(0, last)], pictures[..., (index + 1).clamp(0, last)]
    return near * (1 - share) + far * share
