"""Weights of others: published checkpoints, public Kinetics files, our own; recognised by name and shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gkdcli.console import counted
from gkdcli.errors import GkdError
from gkdcli.models.i3d import ENDPOINTS
from gkdcli.models.weights import Fit, fit, read_file, require_fit

_STEM = f"{ENDPOINTS[0]}.conv3d.weight"
# tensors that only torchvision's video networks have; the residual ones share their first
_RESNET, _RESNET_STEM, _S3D = "layer1.0.conv1.0.", "stem.0.weight", "features.0.0.0.weight"


@dataclass(frozen=True)
class _Layout:
    """How someone names the tensors of a network or of its CVAEs.

    Args:
        origin: whose names they are.
        anchor: a tensor that every such file holds; what stands before it is the file's prefix.
        names: beginnings, theirs and ours; the first that matches wins.
    """

    origin: str
    anchor: str
    names: tuple[tuple[str, str], ...]

    def ours(self, name: str) -> str | None:
        """Our name for one of theirs, the prefix taken off; None if it has none here."""
        for theirs, ours in self.names:
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
        return None

    def prefix(self, tensors: dict[str, Tensor]) -> str | None:
        """What stands before the anchor (`module.`, `network.` or nothing); None where it is absent."""
        for name in tensors:
            if name == self.anchor or name.endswith(f".{self.anchor}"):
                return name.removesuffix(self.anchor)
        return None


def _head_names() -> tuple[tuple[str, str], ...]:
    """The published detection head's names and ours."""
    units = [
        *((f"pyramids.{level}", f"pyramid.{level}") for level in range(6)),
        *((f"{kind}_tower.{n}", f"{kind}_tower.{n}") for kind in ("loc", "conf") for n in range(2)),
        *(
            (f"{kind}_proposal_branch.{theirs}_conv", f"{kind}_branch.{ours}")
            for kind in ("loc", "conf")
            for theirs, ours in _BRANCHES
        ),
    ]
    names = [
        *((f"{theirs}.0.conv{n}d.", f"{ours}.conv.") for theirs, ours in units for n in (1, 3)),
        *((f"{theirs}.1.", f"{ours}.norm.") for theirs, ours in units),
        *((f"deconv.{3 * n}.conv1d.", f"frame_level.{n}.conv.") for n in range(3)),
        *((f"deconv.{3 * n + 1}.", f"frame_level.{n}.norm.") for n in range(3)),
        *((f"loc_heads.{level}.scale", f"loc_scales.{level}") for level in range(6)),
        *((f"{name}_head.conv1d.", f"{name}_head.") for name in _HEADS),
    ]
    return tuple((f"coarse_pyramid_detection.{theirs}", f"head.{ours}") for theirs, ours in names)


_BRANCHES = (("cur_point", "short"), ("lr", "boundary"), ("roi", "roi"), ("proposal", "proposal"))
_HEADS = ("loc", "conf", "prop_loc", "prop_conf", "center")
_NETWORKS = (
    _Layout(
        "published",
        f"backbone._model.{_STEM}",
        (
            ("backbone._model.logits.conv3d.", "classifier."),
            ("backbone._model.", "backbone."),
            ("deconv1.0.", "attention.Mixed_5c.squeeze."),
            ("deconv1.1.", "attention.Mixed_5c.squeeze_norm."),
            ("Att_Head_5c.0.conv1d.", "attention.Mixed_5c.expand."),
            ("Att_Head_5c.1.", "attention.Mixed_5c.expand_norm."),
            ("Att_Head_5c.3.", "attention.Mixed_5c.time."),
            ("deconv2.0.", "attention.Mixed_4f.squeeze."),
            ("deconv2.1.", "attention.Mixed_4f.squeeze_norm."),
            ("Att_Head_4f.0.conv1d.", "attention.Mixed_4f.expand."),
            ("Att_Head_4f.1.", "attention.Mixed_4f.expand_norm."),
            ("Att_Head_4f.3.", "attention.Mixed_4f.time."),
            *_head_names(),
        ),
    ),
    _Layout(
        "gkd",
        f"backbone.{_STEM}",
        (
            ("backbone.logits.conv3d.", "classifier."),  # a public file under a common prefix
            ("backbone.", "backbone."),
            ("attention.", "attention."),
            ("classifier.", "classifier."),
            ("head.", "head."),
        ),
    ),
    *(
        _Layout(
            "gkd",
            f"backbone.{anchor}",
            tuple((f"{part}.", f"{part}.") for part in ("backbone", "attention", "classifier")),
        )
        for anchor in (_RESNET_STEM, _S3D)
    ),
    _Layout(
        "torchvision",
        _RESNET_STEM,
        tuple((f"{part}.", f"backbone.{part}.") for part in ("stem", "layer1", "layer2", "layer3", "layer4")),
    ),
    _Layout("torchvision", _S3D, (("features.", "backbone.features."), ("classifier.1.", "classifier."))),
    _Layout(
        "public I3D",
        _STEM,
        (
            ("logits.conv3d.", "classifier."),
            *((f"{name}.", f"backbone.{name}.") for name in ENDPOINTS),
        ),
    ),
)
_GENERATORS = (
    _Layout(
        "published",
        "cencoder.con1.0.weight",
        (
            ("cencoder.con1.0.", "Mixed_5c.encoder.conv."),
            ("cencoder.con1.1.", "Mixed_5c.encoder.norm."),
            ("cencoder.fc", "Mixed_5c.encoder.fc"),
            ("cdecoder.deconv.0.", "Mixed_5c.decoder.conv."),
            ("cdecoder.deconv.1.", "Mixed_5c.decoder.norm."),
            ("cdecoder.fc", "Mixed_5c.decoder.fc"),
            ("cencoder_832.con2.0.", "Mixed_4f.encoder.conv."),
            ("cencoder_832.con2.1.", "Mixed_4f.encoder.norm."),
            ("cencoder_832.fc", "Mixed_4f.encoder.fc"),
            ("cdecoder_832.deconv.0.", "Mixed_4f.decoder.conv."),
            ("cdecoder_832.deconv.1.", "Mixed_4f.decoder.norm."),
            ("cdecoder_832.fc", "Mixed_4f.decoder.fc"),
        ),
    ),
    _Layout(
        "gkd",
        "Mixed_5c.encoder.conv.weight",
        tuple((f"{tap}.{half}.",) * 2 for tap in ("Mixed_5c", "Mixed_4f") for half in ("encoder", "decoder")),
    ),
)
# Only the detection networks have these.
_DETECTION = ("head.", "attention.Mixed_4f.")
# sides of the kernels of 5c and 4f: of 96 px; of 224 px, the student's idle 4f branch being made for 96
_CVAE_TASKS: dict[tuple[int | None, int | None], str] = {
    (3, 6): "detection",
    (7, 14): "recognition",
    (7, 6): "recognition",
}
_KINDS = {(7, 3): "i3d", (1, 3): "top-i3d", (7, 1): "bottom-i3d", (1, 1): "i2d"}


def official_name(key: str) -> str | None:
    """Our name for a tensor of the published recognition networks and CVAEs; None if it has none here.

    Network keys map to `Recognizer`'s, CVAE keys to those of `build_cvae`'s dictionary.
    """
    return _NETWORKS[0].ours(key) or _GENERATORS[0].ours(key)


@dataclass(frozen=True)
class Found:
    """The tensors of one network, or of its CVAEs, in a file.

    Args:
        origin: whose names the file uses: `published`, `public I3D` or `gkd`.
        within: the entry of the file they lie in (`state_dict`), empty where it is the file itself.
        tensors: under our names.
        unknown: names in the same state dict that mean nothing here.
    """

    origin: str
    within: str
    tensors: dict[str, Tensor]
    unknown: list[str]

    def fit(self, module: nn.Module, part: str = "") -> Fit:
        """Copies what fits into a module, see `weights.fit`; what is unknown counts as unexpected."""
        result = fit(module, self.tensors, part)
        if not part:
            result.unexpected += self.unknown
        return result


@dataclass(frozen=True)
class Contents:
    """What a weights file holds; None for what it does not.

    Args:
        path: the file.
        network: backbone, and attention and classifier where they are there.
        generators: the CVAEs.
        task: `recognition` or `detection`, where that can be told from it.
        names: of all tensors in it.
    """

    path: Path
    network: Found | None
    generators: Found | None
    task: str | None
    names: list[str]

    def require_network(self) -> Found:
        """The network.

        Raises:
            GkdError: none of these tensors belongs to an I3D.
        """
        if self.network is not None:
            return self.network
        first = f", the first is `{self.names[0]}`" if self.names else ""
        raise GkdError(
            f"nothing in these weights is an I3D backbone: no tensor is called `{_STEM}`",
            f"{self.path}, {counted(len(self.names), 'tensor')}{first}",
            "public files for I3D are called rgb_imagenet.pt and flow_imagenet.pt",
        )


def open_weights(path: Path, content: dict[Any, Any] | None = None) -> Contents:
    """Reads a weights file of any origin, or goes by its `content` where that was read already.

    Plain, under a common prefix (`module.` of DataParallel), or inside a dictionary with other things: of
    its nested dictionaries the one is taken that has most names in common with ours.

    Raises:
        GkdError: see `weights.read_file`.
    """
    candidates = list(state_dicts(read_file(path) if content is None else content))
    network, generators = _best(candidates, _NETWORKS), _best(candidates, _GENERATORS)
    names = [name for _, tensors in candidates for name in tensors]
    return Contents(path, network, generators, _task(network, generators), names)


def _task(network: Found | None, generators: Found | None) -> str | None:
    """Of a head, or else of a CVAE of a published size; a backbone alone serves either."""
    if network is not None:
        if any(name.startswith(_DETECTION) for name in network.tensors):
            return "detection"
        return "recognition" if any(name.startswith("classifier.") for name in network.tensors) else None
    if generators is None or generators.origin != "published":
        return None
    return _CVAE_TASKS.get((kernel(generators, "5c"), kernel(generators, "4f")))


def state_dicts(
    content: dict[Any, Any], within: str = "", seen: frozenset[int] = frozenset()
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dictionary with named tensors in it, and where it lies."""
    tensors = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor) and value.layout is torch.strided
    }
    if tensors:
        yield within, tensors
    seen |= {id(content)}  # a file may well put a dictionary into itself
    for name, value in content.items():
        if isinstance(value, dict) and id(value) not in seen:
            yield from state_dicts(value, f"{within}.{name}" if within else str(name), seen)


def _best(candidates: list[tuple[str, dict[str, Tensor]]], layouts: tuple[_Layout, ...]) -> Found | None:
    """The candidate with most names that we know; the first of equals."""
    found = [
        _translate(tensors, within, layout, prefix)
        for within, tensors in candidates
        for layout in layouts
        if (prefix := layout.prefix(tensors)) is not None
    ]
    return max(found, key=lambda one: len(one.tensors), default=None)


def _translate(tensors: dict[str, Tensor], within: str, layout: _Layout, prefix: str) -> Found:
    others = [other for other in (*_NETWORKS, *_GENERATORS) if other is not layout]
    known, unknown = {}, []
    for name, value in tensors.items():
        ours = layout.ours(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if ours is not None:
            known[ours] = value
        # network and CVAE may share a dictionary, as in our own runs, where optimiser states lie there too
        elif not (name.startswith("optim.") or any(_belongs(other, tensors, name) for other in others)):
            unknown.append(name.removeprefix(prefix))
    return Found(layout.origin, within, known, unknown)


def _belongs(layout: _Layout, tensors: dict[str, Tensor], name: str) -> bool:
    prefix = layout.prefix(tensors)
    return prefix is not None and name.startswith(prefix) and bool(layout.ours(name.removeprefix(prefix)))


def kernel(generators: Found, tap: str) -> int | None:
    """Height of the kernel of the CVAE of `5c` or `4f`: the side of the feature that it was made for."""
    weight = generators.tensors.get(f"Mixed_{tap}.encoder.conv.weight")
    return weight.shape[3] if weight is not None and weight.ndim == 5 else None


def looks_like(tensors: dict[str, Tensor]) -> tuple[str, str]:
    """The kind of network these names and shapes are of, and the prefix of its tensors' names.

    Returns:
        kind: one of `TRUNKS`, `i3d` for I3D or a sibling, or "" for anything else.
        prefix: `module.`, `network.backbone.` or the like, usually empty.
    """
    for name in tensors:
        for anchor in (_S3D, _STEM):
            if name == anchor or name.endswith(f".{anchor}"):
                return ("s3d" if anchor == _S3D else "i3d"), name.removesuffix(anchor)
        start, found, _ = name.partition(_RESNET)
        if found and (not start or start.endswith(".")):
            # past its first layer mc3 sees one frame at a time; r2plus1d takes two convolutions for one
            if f"{start}{_RESNET}0.weight" in tensors:
                return "r2plus1d_18", start
            later = tensors.get(f"{start}layer2.0.conv1.0.weight")
            if later is not None and later.ndim == 5:
                return ("mc3_18" if later.shape[2] == 1 else "r3d_18"), start
    return "", ""


def first_kernel(network: Found) -> Tensor:
    """The weight that meets the clip, (C, channels, time, height, width)."""
    names = (f"backbone.{name}" for name in (_STEM, _RESNET_STEM, _S3D))
    return next(network.tensors[name] for name in names if name in network.tensors)


def backbone_kind(network: Found) -> str | None:
    """Which backbone a network has: of `i3d.KINDS` (by the time extents of two kernels) or torchvision's."""
    first = network.tensors.get(f"backbone.{_STEM}")
    if first is None:
        return looks_like(network.tensors)[0] or None
    last = network.tensors.get("backbone.Mixed_5c.b1b.conv3d.weight", first)
    return _KINDS.get((first.shape[2], last.shape[2])) if first.ndim == last.ndim == 5 else None


def load_backbone(network: nn.Module, path: Path, content: dict[Any, Any] | None = None) -> Fit:
    """Starts a network's backbone from a file: public I3D (`rgb_imagenet.pt`), published, or ours.

    The classifier is loaded where its shape agrees; with another number of classes it keeps its fresh
    weights and is listed in `wrong_shape`.

    Args:
        network: with a sub-module `backbone` (I3D) and, for recognition, `classifier`.
        path: the file.
        content: what is in it, where it was read already.

    Raises:
        GkdError: the file cannot be read, is no I3D, or a tensor of the backbone does not fit.
    """
    found = open_weights(path, content).require_network()
    result = found.fit(network.get_submodule("backbone"), "backbone.")
    require_fit(result, str(path), "backbone")
    if hasattr(network, "classifier"):
        result.take(found.fit(network.get_submodule("classifier"), "classifier."), "classifier.")
    return result
