"""`gkd --doctor`: is everything here that the commands need?"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gkdcli.errors import ExitCode, GkdError
from gkdcli.files import free_bytes, human_bytes
from gkdcli.result import Result
from gkdcli.runs import version

PACKAGES = (
    "torch",
    "torchvision",
    "av",
    "opencv-contrib-python-headless",
    "h5py",
    "numpy",
    "safetensors",
    "lightning-fabric",
    "pydantic",
    "typer",
    "rich",
    "matplotlib",
)
OPTIONAL = ("onnx", "onnxscript", "onnxruntime", "ray", "tensorboard")


def examine() -> Result:
    """Runs every check; the exit code is 1 if one that matters fails.

    Each check imports what it looks at: what is broken fails its own row and no other.
    """
    rows = [
        _row("gkd", version),
        _row("python", lambda: f"{platform.python_version()} ({sys.executable})"),
        _row("cores", lambda: f"{os.cpu_count()}"),
        *(_row(name, partial(importlib.metadata.version, name)) for name in PACKAGES),
        *(_row(name, partial(importlib.metadata.version, name), needed=False) for name in OPTIONAL),
        _row("torchvision beside torch", _torchvision),
        _row("CUDA", _cuda, needed=False),
        _row("driver", _driver, needed=False),
        _row("decoder", _decoder),
        _row("HDF5", _hdf5),
        _row("disk", lambda: f"{human_bytes(free_bytes(Path.cwd()))} free under {Path.cwd()}"),
    ]
    failed = [row["check"] for row in rows if row["state"] == "FAILED"]
    if not failed:
        return Result({"healthy": True, "checks": rows})
    error = GkdError(
        f"this installation lacks: {', '.join(failed)}", "`gkd --doctor`", "reinstall with `pip install .`"
    )
    return Result({"healthy": False, "checks": rows}, code=ExitCode.FAILED, error=error)


def _row(check: str, examine_it: Callable[[], str], needed: bool = True) -> dict[str, Any]:
    try:
        return {"check": check, "state": "ok", "found": examine_it()}
    except Exception as error:  # a check may fail in any way; that is its finding
        state = "FAILED" if needed else "absent"
        kind = "" if type(error) is RuntimeError else f"{type(error).__name__}: "
        text = " ".join(f"{kind}{error}".split())
        return {"check": check, "state": state, "found": text[:120]}


def _torchvision() -> str:
    import torch
    from torchvision.io import decode_jpeg, encode_jpeg

    picture = torch.zeros(3, 16, 16, dtype=torch.uint8)
    assert decode_jpeg(encode_jpeg(picture)).shape == picture.shape
    return "imports, encodes and decodes JPEG"


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError(f"no usable device (torch is built for CUDA {torch.version.cuda})")
    torch.ones(2, device="cuda").sum().item()
    return (
        f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"  # type: ignore[no-untyped-call]
    )


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        raise RuntimeError("nvidia-smi is not installed")
    query = [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


def _decoder() -> str:
    """Draws a clip, writes it as a real video, and decodes it."""
    from gkdcli.data.demo import CLASSES, write_clip
    from gkdcli.data.video import probe, read_frames
    from gkdcli.settings import DataSettings

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_clip(path, CLASSES[0], seed=0)
        info = probe(path)
        count = sum(1 for _ in read_frames(path, DataSettings()))
        assert count > 0, "nothing was decoded"
        return f"{info.codec} {info.width}x{info.height}, {count} frames written and read back"


def _hdf5() -> str:
    import h5py
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.h5"
        with h5py.File(path, "w") as file:
            file["x"] = np.arange(8)
        with h5py.File(path) as file:
            assert file["x"][7] == 7
    return f"{h5py.version.hdf5_version}, written and read back"
