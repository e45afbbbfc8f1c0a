"""Files as others write them: the published names at any width, their CVAE with its idle branch."""

from __future__ import annotations

import random
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gkdcli.models.cvae import CVAE
from gkdcli.models.network import build_cvae
from gkdcli.models.recognizer import Recognizer
from gkdcli.resolve import resolve
from gkdcli.tasks import recognition

# ours -> published; the first that matches wins
NAMES = (
    ("classifier.", "backbone._model.logits.conv3d."),
    ("backbone.", "backbone._model."),
    ("attention.Mixed_5c.squeeze_norm.", "deconv1.1."),
    ("attention.Mixed_5c.squeeze.", "deconv1.0."),
    ("attention.Mixed_5c.expand_norm.", "Att_Head_5c.1."),
    ("attention.Mixed_5c.expand.", "Att_Head_5c.0.conv1d."),
    ("attention.Mixed_5c.time.", "Att_Head_5c.3."),
    ("Mixed_5c.encoder.conv.", "cencoder.con1.0."),
    ("Mixed_5c.encoder.norm.", "cencoder.con1.1."),
    ("Mixed_5c.encoder.", "cencoder."),
    ("Mixed_5c.decoder.conv.", "cdecoder.deconv.0."),
    ("Mixed_5c.decoder.norm.", "cdecoder.deconv.1."),
    ("Mixed_5c.decoder.", "cdecoder."),
    ("Mixed_4f.encoder.conv.", "cencoder_832.con2.0."),
    ("Mixed_4f.encoder.norm.", "cencoder_832.con2.1."),
    ("Mixed_4f.encoder.", "cencoder_832."),
    ("Mixed_4f.decoder.conv.", "cdecoder_832.deconv.0."),
    ("Mixed_4f.decoder.norm.", "cdecoder_832.deconv.1."),
    ("Mixed_4f.decoder.", "cdecoder_832."),
)

# of the detector, besides: attention of the second tap, pyramid, towers, branches, heads
_HEAD = "coarse_pyramid_detection."
DETECTION_NAMES = (
    ("attention.Mixed_4f.squeeze_norm.", "deconv2.1."),
    ("attention.Mixed_4f.squeeze.", "deconv2.0."),
    ("attention.Mixed_4f.expand_norm.", "Att_Head_4f.1."),
    ("attention.Mixed_4f.expand.", "Att_Head_4f.0.conv1d."),
    ("attention.Mixed_4f.time.", "Att_Head_4f.3."),
    *((f"head.pyramid.{n}.norm.", f"{_HEAD}pyramids.{n}.1.") for n in range(6)),
    *((f"head.pyramid.{n}.conv.", f"{_HEAD}pyramids.{n}.0.conv{3 if n < 2 else 1}d.") for n in range(6)),
    *((f"head.frame_level.{n}.norm.", f"{_HEAD}deconv.{3 * n + 1}.") for n in range(3)),
    *((f"head.frame_level.{n}.conv.", f"{_HEAD}deconv.{3 * n}.conv1d.") for n in range(3)),
    *((f"head.loc_scales.{n}", f"{_HEAD}loc_heads.{n}.scale") for n in range(6)),
    *(
        (f"head.{kind}_tower.{n}.{ours}.", f"{_HEAD}{kind}_tower.{n}.{theirs}.")
        for kind in ("loc", "conf")
        for n in range(2)
        for ours, theirs in (("conv", "0.conv1d"), ("norm", "1"))
    ),
    *(
        (f"head.{kind}_branch.{ours}.{part}.", f"{_HEAD}{kind}_proposal_branch.{theirs}_conv.{number}.")
        for kind in ("loc", "conf")
        for ours, theirs in (
            ("short", "cur_point"),
            ("boundary", "lr"),
            ("roi", "roi"),
            ("proposal", "proposal"),
        )
        for part, number in (("conv", "0.conv1d"), ("norm", "1"))
    ),
    *(
        (f"head.{name}_head.", f"{_HEAD}{name}_head.conv1d.")
        for name in ("loc", "conf", "prop_loc", "prop_conf", "center")
    ),
)


def published_names(module: torch.nn.Module) -> OrderedDict[str, Tensor]:
    """A module's weights under the published names."""
    state = OrderedDict()
    for name, value in module.state_dict().items():
        pairs = (*NAMES, *DETECTION_NAMES)
        ours, theirs = next(pair for pair in pairs if name.startswith(pair[0]))
        state[theirs + name.removeprefix(ours)] = value
    return state


def tiny_network(role: str, classes: int = 12, modality: str = "rgb", seed: int = 0) -> Recognizer:
    """The teacher or student of `demo-tiny`, with weights that are nobody's default."""
    page = resolve("demo-tiny", stage="import", modality=modality, root=Path()).settings
    torch.manual_seed(seed)
    network = recognition.build_network(page, role, classes, modality)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


def tiny_generators(role: str, seed: int = 1) -> torch.nn.ModuleDict:
    """Its CVAEs, with the idle 4f branch: of 6x6 kernels in the student's, always (FINDINGS 15)."""
    torch.manual_seed(seed)
    generators = build_cvae(tiny_network(role))
    side = 2 if role == "teacher" else 6
    generators["Mixed_4f"] = CVAE((52, 4, side, side))
    return generators


def nested(state: dict[str, Tensor], network: torch.nn.Module) -> dict[str, object]:
    """As training scripts save it: epoch, optimiser and the states of all random generators."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {
        "epoch": 20,
        "best": np.float64(0.5),
        "rng": [torch.get_rng_state(), np.random.get_state(), random.getstate()],
        "optimizer": optimizer.state_dict(),
        "state_dict": state,
    }
