"""What needs CUDA (`make gpu`): the same commands on the device, and the same numbers as on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gkdcli.data.tvl1 import compile_tvl1, tvl1_flow
from gkdcli.models.boundary import boundary_max_pool
from gkdcli.models.detector import Detector
from gkdcli.models.network import build_cvae
from gkdcli.models.recognizer import Recognizer
from tests.conftest import borrow
from tests.data.test_tvl1 import pair as texture_pair
from tests.videos import draw, write_video

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def test_the_networks_agree_with_the_cpu() -> None:
    torch.manual_seed(0)
    network = Recognizer("top-i3d", 5, length=16, crop=64, width=0.25).eval()
    clip = torch.randn(2, 3, 16, 64, 64)
    with torch.inference_mode():
        wanted = network(clip)
        found = network.cuda()(clip.cuda()).cpu()
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-3)  # TF32 convolutions


def test_the_detector_agrees_with_the_cpu() -> None:
    """What is coarse; a boundary that rounding tips may change what is refined."""
    torch.manual_seed(0)
    network = Detector("top-i3d", 5, length=128, crop=32, width=0.25).eval()
    clip = torch.randn(2, 3, 128, 32, 32)
    with torch.inference_mode():
        wanted = network(clip)
        found = network.cuda()(clip.cuda())
    for name in ("loc", "conf"):
        torch.testing.assert_close(getattr(found, name).cpu(), getattr(wanted, name), rtol=1e-2, atol=1e-2)


def test_the_cvae_generates_on_the_device() -> None:
    network = Recognizer("top-i3d", 5, length=16, crop=64, width=0.25).cuda()
    generators = build_cvae(network).cuda()
    maps = network.attend(network.features(torch.randn(2, 3, 16, 64, 64, device="cuda")))
    noise = torch.randn(2, *maps["Mixed_5c"].shape[:0:-1], device="cuda")
    assert generators["Mixed_5c"].generate(maps["Mixed_5c"], noise).isfinite().all()


@pytest.mark.parametrize("schedule", ["epoch", "step"])
def test_the_commands_run_on_the_device(gkd, workspace, schedule) -> None:
    common = ("demo-tiny", "--root", workspace, "--device", "cuda", "--set", f"train.schedule={schedule}")
    for command in ("pretrain-attention", "distill", "evaluate"):
        gkd(command, *common).must()


def test_boundary_pooling_and_its_gradient_agree_with_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    feature = torch.randn(2, 8, 64, generator=generator)
    segments = torch.randint(-9, 80, (2, 20, 4), generator=generator).float()
    segments[0, 0] = torch.tensor([-torch.inf, torch.inf, torch.inf, -torch.inf])
    found = []
    for device in ("cpu", "cuda"):
        leaf = feature.to(device, copy=True).requires_grad_()
        pooled = boundary_max_pool(leaf, segments.to(device))
        pooled.square().sum().backward()
        assert leaf.grad is not None
        found.append((pooled.detach().cpu(), leaf.grad.cpu()))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize("schedule", ["epoch", "step"])
@pytest.mark.parametrize("recipe", ["official", "corrected"])
def test_detection_runs_on_the_device(gkd, tiny_detection_store, tmp_path, schedule, recipe) -> None:
    root = borrow(tiny_detection_store, tmp_path / "root")
    sets = (f"train.schedule={schedule}", f"recipe={recipe}", "optim.batch_size=1", "optim.epochs=1")
    chosen = [word for one in sets for word in ("--set", one)]
    for command in ("pretrain-attention", "distill", "evaluate"):
        gkd(command, "demo-detection-tiny", "--root", root, "--device", "cuda", *chosen).must()


@pytest.mark.parametrize("fused", [False, True])
def test_tvl1_on_the_device_is_that_of_the_cpu_and_never_waits(fused: bool) -> None:
    """No operation makes the host wait for what it has just asked for: PyTorch would refuse it here."""
    pairs = [texture_pair(0.0), texture_pair(0.5, seed=1), texture_pair(3.0, seed=2)]
    before, after = (torch.from_numpy(np.stack(frames)) for frames in zip(*pairs, strict=True))
    wanted = tvl1_flow(before, after)
    before, after = before.cuda(), after.cuda()
    compiled = compile_tvl1() if fused else None
    with torch.inference_mode():
        tvl1_flow(before, after, compiled=compiled)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = tvl1_flow(before, after, compiled=compiled)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.linalg.vector_norm(found.cpu() - wanted, dim=1).mean() < 0.02
    # nothing moves in the first, and what the others go on doing leaves it alone; 1e-17 px is rounding
    assert found[0].abs().max() < 1e-6


def test_flow_is_prepared_on_the_device(gkd, tmp_path) -> None:
    write_video(tmp_path / "videos" / "up" / "a.mp4", draw(12, 96, 64))
    words = (
        "prepare",
        "folder",
        tmp_path / "videos",
        "--name",
        "own",
        "--root",
        tmp_path,
        "--modality",
        "flow",
    )
    found = gkd(*words, "--flow", "tvl1-torch", "--device", "cuda", "--json")
    assert found.must().json["result"]["prepared"] == 1
