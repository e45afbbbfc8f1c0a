"""What needs CUDA (`make gpu`): the same commands on the device, and the same numbers as on the CPU."""

from __future__ import annotations

import pytest
import torch

from gkdcli.models.boundary import boundary_max_pool
from gkdcli.models.detector import Detector
from gkdcli.models.network import build_cvae
from gkdcli.models.recognizer import Recognizer

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


def test_the_cvae_generates_on_the_device() -> None:
    network = Recognizer("top-i3d", 5, length=16, crop=64, width=0.25).cuda()
    generators = build_cvae(network).cuda()
    maps = network.attend(network.features(torch.randn(2, 3, 16, 64, 64, device="cuda")))
    noise = torch.randn(2, *maps["Mixed_5c"].shape[:0:-1], device="cuda")
    assert generators["Mixed_5c"].generate(maps["Mixed_5c"], noise).isfinite().all()


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


def test_boundary_pooling_agrees_with_the_cpu_forwards_and_backwards() -> None:
    generator = torch.Generator().manual_seed(0)
    feature = torch.randint(0, 9, (2, 8, 64), generator=generator).float()  # many ties
    segments = torch.rand(2, 30, 4, generator=generator) * 80 - 8
    weights = torch.randn(2, 8, 30, generator=generator)
    found = []
    for device in ("cpu", "cuda"):
        x = feature.to(device).requires_grad_()
        pooled = boundary_max_pool(x, segments.to(device))
        (pooled * weights.to(device)).sum().backward()
        found.append((pooled.detach().cpu(), x.grad.cpu()))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("schedule", ["epoch", "step"])
@pytest.mark.parametrize("preset", ["demo-tiny", "demo-detection-tiny"])
def test_the_commands_run_on_the_device(gkd, workspace, preset, schedule) -> None:
    if "detection" in preset:
        gkd("prepare", preset, "--root", workspace).must()
    common = (preset, "--root", workspace, "--device", "cuda", "--set", f"train.schedule={schedule}")
    for command in ("pretrain-attention", "distill", "evaluate"):
        gkd(command, *common).must()
