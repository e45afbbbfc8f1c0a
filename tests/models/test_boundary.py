"""Boundary max pooling against an obvious loop, and the arithmetic of its segments."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gkdcli.models.boundary import boundary_max_pool, frame_segments, level_segments, proposal_segments


def obvious(feature: Tensor, segments: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What the pooling means, element by element, and its gradient for a gradient `given` of the result."""
    batch, channels, frames = feature.shape
    count = segments.shape[1]
    pooled, gradient = feature.new_zeros(batch, channels, count), torch.zeros_like(feature)
    for b in range(batch):
        for c in range(channels):
            for n in range(count):
                first, last = segments[b, n, :2] if c < channels // 2 else segments[b, n, 2:]
                left = min(max(int(first), 0), frames - 1)
                right = min(max(int(last), 0), frames - 1)
                best = left
                for t in range(left, right + 1):
                    if feature[b, c, t] > feature[b, c, best]:
                        best = t
                pooled[b, c, n] = feature[b, c, best]
                if given is not None:
                    gradient[b, c, best] += given[b, c, n]
    return pooled, gradient


def drawn(
    shape: tuple[int, int, int], count: int, seed: int, ties: bool, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Feature, segments well beyond both ends (a third of them empty) and a gradient of the result."""
    generator = torch.Generator().manual_seed(seed)
    feature = torch.randn(shape, generator=generator, dtype=dtype)
    if ties:
        feature = feature.round()
    frames = shape[2]
    segments = (torch.rand(shape[0], count, 4, generator=generator) * 2 - 0.5) * frames
    ordered = segments.view(shape[0], count, 2, 2).sort(dim=3).values.flatten(2)
    keep_order = torch.rand(shape[0], count, 1, generator=generator) < 1 / 3
    segments = torch.where(keep_order, segments, ordered)
    return feature, segments, torch.randn(*shape[:2], count, generator=generator, dtype=dtype)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("shape", "count"),
    [((1, 4, 1), 3), ((2, 2, 2), 9), ((2, 6, 7), 20), ((3, 4, 8), 8), ((1, 2, 33), 40), ((2, 4, 64), 21)],
)
def test_values_and_gradients_equal_the_obvious_loop(shape, count, ties):
    feature, segments, given = drawn(shape, count, seed=shape[2], ties=ties)
    wanted, wanted_gradient = obvious(feature, segments, given)
    with torch.no_grad():
        assert torch.equal(boundary_max_pool(feature, segments), wanted)
    feature.requires_grad_()
    pooled = boundary_max_pool(feature, segments)
    assert torch.equal(pooled, wanted)
    pooled.backward(given)
    torch.testing.assert_close(feature.grad, wanted_gradient, rtol=0, atol=1e-12)
    assert shape[2] <= 2 or wanted_gradient.eq(0).any()


def test_every_range_of_a_feature_with_ties():
    """All starts and ends, whole numbers: no length or place is wrong at a power of two."""
    frames = 17
    feature = torch.randint(0, 3, (1, 2, frames), generator=torch.Generator().manual_seed(0)).float()
    ends = torch.cartesian_prod(torch.arange(-1, frames + 1), torch.arange(-1, frames + 1)).float()
    segments = torch.cat([ends, ends.flip(0)], dim=1).unsqueeze(0)
    given = torch.randn(1, 2, len(ends), generator=torch.Generator().manual_seed(1))
    wanted, gradient = obvious(feature, segments, given)
    feature.requires_grad_()
    pooled = boundary_max_pool(feature, segments)
    pooled.backward(given)
    assert torch.equal(pooled, wanted)
    torch.testing.assert_close(feature.grad, gradient)


def test_the_first_of_equal_maxima_takes_the_whole_gradient():
    feature = torch.tensor([[[0.0, 2.0, 2.0, 1.0], [2.0, 2.0, 2.0, 2.0]]], requires_grad=True)
    segments = torch.tensor([[[0.0, 3.0, 1.0, 3.0], [2.0, 3.0, 3.0, 1.0]]])
    pooled = boundary_max_pool(feature, segments)
    assert pooled.tolist() == [[[2.0, 2.0], [2.0, 2.0]]]
    pooled.backward(torch.tensor([[[1.0, 10.0], [100.0, 1000.0]]]))
    assert feature.grad.tolist() == [[[0.0, 1.0, 10.0, 0.0], [0.0, 100.0, 0.0, 1000.0]]]


def test_ends_are_truncated_toward_zero_and_clamped_and_take_no_gradient():
    feature = torch.tensor([[[3.0, 1.0, 2.0], [1.0, 2.0, 3.0]]], requires_grad=True)
    segments = torch.tensor(
        [[[-0.9, 0.9, 1.9, 1.9], [1.9, 99.0, -99.0, -1.0], [float("-inf"), 0.0, 0.0, float("inf")]]],
        requires_grad=True,
    )
    pooled = boundary_max_pool(feature, segments)
    assert pooled.tolist() == [[[3.0, 2.0, 3.0], [2.0, 1.0, 3.0]]]
    pooled.sum().backward()
    assert segments.grad is None


def test_segments_that_are_no_numbers_do_not_leave_the_feature():
    """A run whose loss is no longer finite must live to say so; a gather out of bounds would end it."""
    pooled = boundary_max_pool(torch.ones(1, 2, 4), torch.full((1, 3, 4), float("nan")))
    assert pooled.tolist() == [[[1.0] * 3] * 2]


def test_no_segments_and_other_precisions():
    assert boundary_max_pool(torch.ones(2, 4, 5), torch.ones(2, 0, 4)).shape == (2, 4, 0)
    feature, segments, _ = drawn((1, 4, 16), 5, seed=0, ties=True, dtype=torch.bfloat16)
    assert torch.equal(boundary_max_pool(feature, segments), obvious(feature, segments)[0])


class Pools(nn.Module):
    """A convolution, segments from distances, pooling: as in the detector, with gradient and without."""

    def __init__(self, frames: int) -> None:
        super().__init__()
        self.frames = frames
        self.conv = nn.Conv1d(6, 6, 1)
        self.register_buffer("priors", (torch.arange(8) + 0.5) / 8)

    def forward(self, feature: Tensor, distances: Tensor) -> Tensor:
        """(B, 6, T), (B, 8, 2) -> (B, 12, 8)."""
        feature, segments = self.conv(feature), frame_segments(distances, self.priors, self.frames)
        pooled = [boundary_max_pool(either, segments) for either in (feature, feature.detach())]
        return torch.cat(pooled, dim=1)


def test_the_exported_graph_pools_alike_for_any_batch():
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    module = Pools(20).eval()

    def inputs(batch: int) -> tuple[Tensor, Tensor]:
        return torch.randn(batch, 6, 20), torch.rand(batch, 8, 2) * 16

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = torch.export.Dim("batch")
        program = torch.onnx.export(
            module,
            inputs(2),
            dynamo=True,
            opset_version=20,
            input_names=["feature", "distances"],
            dynamic_shapes={"feature": {0: batch}, "distances": {0: batch}},
            verbose=False,
        )
    held = io.BytesIO()
    program.save(held)
    session = onnxruntime.InferenceSession(held.getvalue(), providers=["CPUExecutionProvider"])
    for size in (1, 2, 5):
        feature, distances = inputs(size)
        (got,) = session.run(None, {"feature": feature.numpy(), "distances": distances.numpy()})
        with torch.inference_mode():
            np.testing.assert_allclose(got, module(feature, distances).numpy(), rtol=0, atol=1e-6)


def test_level_segments_by_hand():
    """256 frames on 8 steps: distances shrink 32 times; halves go to the even number, margins are >= 1."""
    priors = (torch.arange(8) + 0.5) / 8
    distances = torch.zeros(1, 8, 2)
    distances[0, 0] = torch.tensor([16.0, 16.0])  # 0.5 and 0.5: both margins 1
    distances[0, 4] = torch.tensor([64.0, 320.0])  # 2 and 10: length 12, margins 3 and 1.2
    got = level_segments(distances, priors, 256)
    assert got[0, 0].tolist() == [-2.0, 0.0, 0.0, 2.0]  # -1.5, 0.5, -0.5, 1.5
    assert got[0, 4].tolist() == [1.0, 5.0, 11.0, 15.0]  # 4-2-1.2, 4-2+3, 4+10-3, 4+10+1.2
    assert got[0, 7].tolist() == [6.0, 8.0, 6.0, 8.0]


def test_frame_segments_by_hand():
    priors = torch.tensor([0.5, 0.25])
    distances = torch.tensor([[[10.0, 29.0], [0.25, 0.25]]], requires_grad=True)
    got = frame_segments(distances, priors, 256)
    assert got[0, 0].tolist() == [114.0, 128.0, 147.0, 161.0]  # 118 to 157, length 40, margins 10 and 4
    assert got[0, 1].tolist() == [
        63.0,
        65.0,
        63.0,
        65.0,
    ]  # 63.75 to 64.25, margins 1: 62.75, 64.75, 63.25, 65.25
    assert not got.requires_grad
    same = proposal_segments(torch.tensor([[[118.0, 157.0], [63.75, 64.25]]]))
    assert torch.equal(got, same)


def test_segments_are_computed_in_the_precision_of_the_priors():
    """bfloat16 distances of 200 frames would round to whole frames, and places beyond 256 to even ones."""
    priors = torch.tensor([0.75])
    distances = torch.tensor([[[1.0, 60.5]]])
    exact = frame_segments(distances, priors, 256)
    assert torch.equal(frame_segments(distances.bfloat16(), priors, 256), exact)
    assert level_segments(distances.bfloat16(), priors, 256).dtype == torch.float32
