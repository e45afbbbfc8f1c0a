"""What needs CUDA (`make gpu`): the same commands on the device, and the same numbers as on the CPU."""

from __future__ import annotations

import pytest
import torch

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


@pytest.mark.parametrize("schedule", ["epoch", "step"])
def test_the_commands_run_on_the_device(gkd, workspace, schedule) -> None:
    common = ("demo-tiny", "--root", workspace, "--device", "cuda", "--set", f"train.schedule={schedule}")
    for command in ("pretrain-attention", "distill", "evaluate"):
        gkd(command, *common).must()
