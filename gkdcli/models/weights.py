"""Weights: reading and writing files, loading by name and shape."""

from __future__ import annotations

import contextlib
import pickle
import pickletools
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gkdcli.console import counted
from gkdcli.errors import GkdError
from gkdcli.files import atomic_path
from gkdcli.models.attention import attention_kind

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

    def take(self, part: Fit, prefix: str) -> None:
        """Adds what was found for a sub-module under its own names; what that did not expect is left out."""
        self.loaded += [f"{prefix}{name}" for name in part.loaded]
        self.missing += [f"{prefix}{name}" for name in part.missing]
        self.wrong_shape += [(f"{prefix}{name}", got, wanted) for name, got, wanted in part.wrong_shape]


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a plain state dict from a .safetensors file or a PyTorch file, on the CPU.

    Raises:
        GkdError: see `read_file`; or it holds other things than tensors.
    """
    content = read_file(path)
    for name, value in content.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise GkdError(
                f"the weights file is no plain state dict: `{name}` is a {type(value).__name__}",
                str(path),
                _PLAIN,
            )
    return content


def read_file(path: Path) -> dict[Any, Any]:
    """The dictionary in a .safetensors file or a PyTorch file (zipped or older), tensors on the CPU.

    Nothing in the file is executed. NumPy's arrays and numbers, as checkpoints hold them beside the tensors
    (states of random generators, best scores), are passed over: stand-ins take their places.

    Raises:
        GkdError: there is no such file, it is damaged, it needs arbitrary pickle (the type is named), or
            holds something else than a dictionary.
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
        with warnings.catch_warnings(), torch.serialization.safe_globals(_NUMPY):
            warnings.simplefilter("ignore")  # they advise programmers; what matters to users is raised below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise GkdError(f"the weights file cannot be opened: {error.strerror}", str(path)) from None
    except _UNREADABLE as error:
        raise _refusal(path, error) from None
    if not isinstance(content, dict):
        raise GkdError(
            f"the weights file holds a {type(content).__name__}, not a state dict", str(path), _PLAIN
        )
    return content


class _Dropped:
    """Stands where a file holds something of NumPy's; it takes anything and keeps nothing."""

    def __init__(self, *given: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# What checkpoints hold besides tensors, under NumPy's old and new names. Nothing of NumPy is called for it.
_NUMPY: list[Any] = [
    (_Dropped, name)
    for name in (
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "numpy.ndarray",
        "numpy.dtype",
        "_codecs.encode",  # how the older pickle writes an array's bytes
    )
]


def _refusal(path: Path, error: Exception) -> GkdError:
    """Why PyTorch would not read a file, for its user."""
    text, where = str(error), str(path)
    if "TorchScript" in text:
        return GkdError("the weights file is a TorchScript program", where, _PLAIN)
    named = re.search(r"GLOBAL ([\w.]+)", text)
    if isinstance(error, pickle.UnpicklingError) and (named or "Unsupported" in text):
        harmless = ("collections.OrderedDict",)
        kind = named[1] if named else next((name for name in _imports(path) if name not in harmless), "")
        return GkdError(
            f"the weights file holds Python objects{f' (`{kind}`)' if kind else ''}, which could run code;"
            " only tensors are read",
            where,
            "where it comes from, save its state dict alone: torch.save(model.state_dict(), FILE)",
        )
    return GkdError("the weights file is damaged, or is no weights file", where, _AGAIN)


def _imports(path: Path) -> Iterator[str]:
    """What a bare pickle would import, read from its instructions without following them."""
    texts: list[str] = []
    with open(path, "rb") as handle, contextlib.suppress(ValueError):
        for instruction, value, _ in pickletools.genops(handle):
            if instruction.name == "GLOBAL":
                yield str(value).replace(" ", ".")
            elif instruction.name == "STACK_GLOBAL":
                yield ".".join(texts[-2:])
            elif isinstance(value, str):
                texts.append(value)


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
    noun = counted(shapes, "tensor has another shape", "tensors have another shape")
    hint = "name a file of the same network, clip length, crop, width (`--set model.width=...`) and classes"
    if result.wrong_shape:
        name, got, wanted = result.wrong_shape[0]
        first = f"{name} is {times(got)}, the model wants {times(wanted)}"
        if name.endswith("Conv3d_1a_7x7.conv3d.weight") and {*got[1:2], wanted[1]} == {2, 3}:
            number, stream = ("three", "an rgb") if got[1] == 3 else ("two", "a flow")
            hint = f"{number} input channels mean {stream} checkpoint; try `--modality {stream.split()[1]}`"
    elif result.missing:
        first = f"{result.missing[0]} is not in the file"
    else:
        first = f"{result.unexpected[0]} is not in the model"
    ours, theirs = attention_kind(result.missing), attention_kind(result.unexpected)
    if ours and theirs and ours != theirs:
        hint = (
            f"these weights have the {theirs} attention, the network the {ours} one: model.attention decides"
        )
    raise GkdError(
        f"these weights do not fit the {whom}: {noun}, {missing} missing, {unexpected} unexpected",
        f"{where}, {first}",
        hint,
    )


def times(shape: tuple[int, ...]) -> str:
    """A shape in words: `64x3x7x7x7`."""
    return "x".join(map(str, shape)) or "a scalar"


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
