"""Weights: reading and writing files, loading by name and shape, public and official names (METHOD.md 1)."""

from __future__ import annotations

import pickle
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gkdcli.errors import GkdError
from gkdcli.files import atomic_path
from gkdcli.models.i3d import ENDPOINTS

# Official names on the left, ours on the right; the first match wins. {tap} is the tap's name.
_OFFICIAL = (
    ("backbone._model.logits.conv3d.", "classifier."),
    ("backbone._model.", "backbone."),
    ("deconv1.0.", "attention.Mixed_5c.squeeze."),
    ("deconv1.1.", "attention.Mixed_5c.squeeze_norm."),
    ("Att_Head_5c.0.conv1d.", "attention.Mixed_5c.expand."),
    ("Att_Head_5c.1.", "attention.Mixed_5c.expand_norm."),
    ("Att_Head_5c.3.", "attention.Mixed_5c.time."),
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
)
# What `torch.load` raises for damaged or foreign files, by kind of damage.
_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    KeyError,
    AttributeError,
    IndexError,
    TypeError,
)
_COUNTER = "num_batches_tracked"
_AGAIN = "download or copy it again; expected is .safetensors or a file written by torch.save"
_PLAIN = "save tensors under their names: torch.save(model.state_dict(), FILE)"


@dataclass
class Fit:
    """What loading found; empty lists but `loaded` (and `deflated`) mean that everything fitted.

    `wrong_shape` holds (name, shape in the file, shape in the network); `deflated` those of `loaded` that
    `init_student` summed over time.
    """

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong_shape: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    deflated: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether file and network agree in every name and shape."""
        return not (self.missing or self.unexpected or self.wrong_shape)


def official_name(key: str) -> str | None:
    """Our name for a tensor of the published recognition networks and CVAEs; None if it has none here.

    Network keys map to `Recognizer`'s, CVAE keys to those of `build_cvae`'s dictionary.
    """
    for theirs, ours in _OFFICIAL:
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a plain state dict from a .safetensors file or a PyTorch file, on the CPU.

    Raises:
        GkdError: there is no such file, it is damaged, it needs arbitrary pickle, or holds other things
            than tensors.
    """
    if not path.is_file():
        raise GkdError("there is no weights file", str(path), "check the path; a run folder is not a file")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as handle:
                return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise GkdError(f"the weights file is damaged ({error})", str(path), _AGAIN) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they advise programmers; what matters to users is raised below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise GkdError(f"the weights file cannot be opened: {error.strerror}", str(path)) from None
    except _UNREADABLE as error:
        if isinstance(error, pickle.UnpicklingError) and "Unsupported" in str(error):
            raise GkdError(
                "the weights file holds Python objects, which could run code; only tensors are read",
                str(path),
                "where it comes from, save its state dict alone: torch.save(model.state_dict(), FILE)",
            ) from None
        if "TorchScript" in str(error):
            raise GkdError("the weights file is a TorchScript program", str(path), _PLAIN) from None
        raise GkdError("the weights file is damaged, or is no weights file", str(path), _AGAIN) from None
    if not isinstance(content, dict):
        raise GkdError(
            f"the weights file holds a {type(content).__name__}, not a state dict", str(path), _PLAIN
        )
    for name, value in content.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise GkdError(
                f"the weights file is no plain state dict: `{name}` is a {type(value).__name__}",
                str(path),
                _PLAIN,
            )
    return dict(content)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes .safetensors atomically; `metadata` (text to text) can be read without the tensors."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(whole, temporary, metadata)


def load_metadata(path: Path) -> dict[str, str]:
    """The metadata of a .safetensors file.

    Raises:
        GkdError: the file is absent or damaged.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            return dict(handle.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise GkdError(f"the weights file cannot be read: {error}", str(path), _AGAIN) from None


def fit(module: nn.Module, tensors: dict[str, Tensor], prefix: str = "") -> Fit:
    """Copies tensors into a module by name and shape, never by position.

    Args:
        module: receives what fits.
        tensors: names and values.
        prefix: what the module's names carry in front in `tensors`; names without it belong to others
            and are passed over.

    Batch norm's `num_batches_tracked` may be absent: public files come without it.
    """
    given = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    wanted = module.state_dict()
    result = Fit(unexpected=[name for name in given if name not in wanted])
    with torch.no_grad():
        for name, target in wanted.items():
            value = given.get(name)
            if value is None:
                if not name.endswith(_COUNTER):
                    result.missing.append(name)
            elif value.shape != target.shape:
                result.wrong_shape.append((name, tuple(value.shape), tuple(target.shape)))
            else:
                target.copy_(value)
                result.loaded.append(name)
    return result


def require_fit(result: Fit, where: str, whom: str = "network") -> None:
    """Accepts a complete fit only.

    Args:
        result: what `fit` returned.
        where: the file.
        whom: whose weights they should be, for instance "flow student".

    Raises:
        GkdError: with the counts and the first tensor that does not fit.
    """
    if result.complete:
        return
    shapes, missing, unexpected = len(result.wrong_shape), len(result.missing), len(result.unexpected)
    noun = "1 tensor has another shape" if shapes == 1 else f"{shapes} tensors have another shape"
    hint = "name a file written for the same network, clip length, crop, width and classes"
    if result.wrong_shape:
        name, got, wanted = result.wrong_shape[0]
        first = f"{name} is {_times(got)}, the model wants {_times(wanted)}"
        if name.endswith("Conv3d_1a_7x7.conv3d.weight") and {got[1], wanted[1]} == {2, 3}:
            number, stream = ("three", "an rgb") if got[1] == 3 else ("two", "a flow")
            hint = f"{number} input channels mean {stream} checkpoint; try `--modality {stream.split()[1]}`"
    elif result.missing:
        first = f"{result.missing[0]} is not in the file"
    else:
        first = f"{result.unexpected[0]} is not in the model"
    raise GkdError(
        f"these weights do not fit the {whom}: {noun}, {missing} missing, {unexpected} unexpected",
        f"{where}, {first}",
        hint,
    )


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def load_backbone(network: nn.Module, path: Path) -> Fit:
    """Starts a network's backbone from a public I3D file (`rgb_imagenet.pt` and its kind; METHOD.md 1).

    The names may carry a common prefix (`module.`, `backbone.`, ...). The classifier is loaded where its
    shape agrees; with another number of classes it keeps its fresh weights and is listed in `wrong_shape`.

    Args:
        network: with a sub-module `backbone` (I3D) and, for recognition, `classifier`.
        path: the file.

    Raises:
        GkdError: the file cannot be read, is no I3D, or a tensor of the backbone does not fit.
    """
    tensors = load_tensors(path)
    stem = f"{ENDPOINTS[0]}.conv3d.weight"
    prefix = next((name.removesuffix(stem) for name in tensors if name.endswith(stem)), None)
    if prefix is None:
        first = next(iter(tensors), None)
        raise GkdError(
            f"nothing in these weights is an I3D backbone: no tensor is called `{stem}`",
            f"{path}, {len(tensors)} tensors" + (f", the first is `{first}`" if first else ""),
            "public files for I3D are called rgb_imagenet.pt and flow_imagenet.pt",
        )
    logits = f"{prefix}logits.conv3d."
    blocks = tuple(f"{prefix}{endpoint}." for endpoint in ENDPOINTS)
    result = fit(
        network.get_submodule("backbone"),
        {name: value for name, value in tensors.items() if name.startswith(blocks)},
        prefix,
    )
    require_fit(result, str(path), "backbone")
    if hasattr(network, "classifier"):
        head = fit(network.get_submodule("classifier"), tensors, logits)
        result.loaded += [f"classifier.{name}" for name in head.loaded]
        result.wrong_shape += [(f"classifier.{name}", got, wanted) for name, got, wanted in head.wrong_shape]
        result.missing += [f"classifier.{name}" for name in head.missing]
    return result


def init_student(student: nn.Module, teacher: nn.Module, backbone: bool = True) -> Fit:
    """Starts a student from its teacher: backbone, attention and classifier alike (METHOD.md 9).

    Tensors of equal shape are copied. Where only the time extent of a kernel differs and the student's is 1,
    the teacher's is summed over time: on a clip that stands still both compute the same, away from its ends.
    A kernel longer in time than the teacher's stays fresh and is listed in `wrong_shape`, what the teacher
    lacks in `missing`; what the student lacks is no concern. Without `backbone` that stays fresh altogether.
    """
    wanted = student.state_dict()
    shared = (name for name in wanted if backbone or not name.startswith("backbone."))
    theirs = teacher.state_dict()
    tensors = {name: theirs[name] for name in shared if name in theirs}
    deflated = []
    for name, value in tensors.items():
        if value.ndim == 5 and value.shape != wanted[name].shape:
            flat = value.sum(dim=2, keepdim=True)
            if flat.shape == wanted[name].shape:
                tensors[name] = flat
                deflated.append(name)
    result = fit(student, tensors)
    result.deflated = deflated
    return result
