"""First weights of a backbone out of a public Kinetics file: I3D's, or torchvision's video networks'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from gkdcli.console import counted
from gkdcli.errors import GkdError
from gkdcli.models.foreign import load_backbone, looks_like, state_dicts
from gkdcli.models.network import Network
from gkdcli.models.video_backbones import TRUNKS, VideoBackbone
from gkdcli.models.weights import Fit, fit, read_file, require_fit

_HEADS = ("fc.", "classifier.1.")
# torchvision's files
PUBLIC = {
    "r3d_18": "r3d_18-b3b3357e.pth",
    "mc3_18": "mc3_18-a90a0ba3.pth",
    "r2plus1d_18": "r2plus1d_18-91a641e6.pth",
    "s3d": "s3d-d76dad2f.pth",
}


def start_backbone(network: Network, path: Path) -> Fit:
    """Starts a network's backbone from a file of its own kind.

    The classifier is loaded where its shape agrees. Of torchvision's networks the first convolution stays
    fresh for flow, which no public file has, and so does the unit between trunk and tap.

    Args:
        network: freshly built.
        path: a state dict, `rgb_imagenet.pt`, `r3d_18-b3b3357e.pth` and their kind.

    Returns:
        What was loaded; what stays fresh is `missing` or `wrong_shape`, tensors of the file that nothing
        takes are `unexpected`.

    Raises:
        GkdError: the file cannot be read, is of another kind (it is named), or does not fit.
    """
    backbone = network.backbone
    content = read_file(path)
    tensors, kind, prefix = _known_tensors(content)
    if isinstance(backbone, VideoBackbone) and kind == backbone.kind:
        return _start_trunk(network, backbone, tensors, prefix, path)
    if isinstance(backbone, VideoBackbone) or kind in TRUNKS:
        raise _other_kind(str(backbone.kind), kind, tensors, path)
    return load_backbone(network, path, content)


def _known_tensors(content: dict[Any, Any]) -> tuple[dict[str, Tensor], str, str]:
    """The first dictionary of a file that looks like anything; kind and prefix as of `looks_like`."""
    found = [tensors for _, tensors in state_dicts(content)]
    for tensors in found:
        kind, prefix = looks_like(tensors)
        if kind:
            return tensors, kind, prefix
    return (found[0] if found else {}), "", ""


def _other_kind(wanted: str, kind: str, tensors: dict[str, Tensor], path: Path) -> GkdError:
    first = next(iter(tensors), None)
    hints = []
    if wanted in PUBLIC:
        hints.append(f"torchvision's file for {wanted} is called {PUBLIC[wanted]}")
    if kind:
        hints.append(f"`--set model.teacher={kind}` (or model.student) builds a backbone for this one")
    return GkdError(
        f"these weights are no {wanted} backbone" + (f"; they look like {kind}" if kind else ""),
        f"{path}, {counted(len(tensors), 'tensor')}" + (f", the first is `{first}`" if first else ""),
        "; ".join(hints),
    )


def _start_trunk(
    network: Network, backbone: VideoBackbone, tensors: dict[str, Tensor], prefix: str, path: Path
) -> Fit:
    heads = tuple(prefix + head for head in _HEADS)
    body = {name: value for name, value in tensors.items() if not name.startswith(heads)}
    found = fit(backbone, body, prefix)
    stem = backbone.first_convolution()
    fresh = [
        entry for entry in found.wrong_shape if entry[0] == f"{stem}.weight" and entry[1][1] != entry[2][1]
    ]
    trunk = [name for name in found.missing if not name.startswith("to_tap.")]
    odd = [entry for entry in found.wrong_shape if entry not in fresh]
    require_fit(Fit(found.loaded, trunk, found.unexpected, odd), str(path), f"{backbone.kind} backbone")
    found.take(fit(network.get_submodule("classifier"), tensors, f"{prefix}classifier.1."), "classifier.")
    found.unexpected += [name for name in tensors if name.startswith(f"{prefix}fc.")]
    return found


def told(found: Fit) -> str:
    """What `start_backbone` did, for the log: `102 tensors; fresh: classifier; not taken: fc.bias`."""
    odd = [*found.missing, *(entry[0] for entry in found.wrong_shape)]
    fresh = sorted({name.rpartition(".")[0] for name in odd})
    lists = (("fresh", fresh), ("not taken", found.unexpected))
    return counted(len(found.loaded), "tensor") + "".join(
        f"; {title}: {', '.join(names)}" for title, names in lists if names
    )
