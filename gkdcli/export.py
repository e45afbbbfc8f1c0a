"""What leaves the house: weights, their card, an ONNX graph checked against the model."""

from __future__ import annotations

import copy
import importlib.resources
import json
import logging
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from gkdcli.card import describe, readable
from gkdcli.errors import GkdError
from gkdcli.files import atomic_path, digest, write_json, write_text
from gkdcli.models.detector import Detector
from gkdcli.models.network import Network
from gkdcli.models.weights import save_tensors
from gkdcli.runs import Run
from gkdcli.settings import ExportSettings

Graph = Callable[[torch.Tensor], list[torch.Tensor]]  # normalised clips -> the outputs


def write_export(
    run: Run,
    network: Network,
    settings: ExportSettings,
    formats: list[str],
    folder: Path,
    on_whole_videos: Callable[[Graph], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Writes `model.safetensors`, `card.json` and `README.md`, and `model.onnx` where asked for.

    Args:
        run: where the network comes from.
        network: rebuilt, in evaluation mode.
        settings: operator set and tolerance.
        formats: of `safetensors`, `onnx`.
        folder: is made.
        on_whole_videos: compares the graph once more, before it gets its name; raises where it fails.

    Returns:
        The files, for ONNX the largest difference found, and what `on_whole_videos` says.

    Raises:
        GkdError: the export extra is absent, or the graph does not agree with the live model.
    """
    card = describe(run, network)
    payload: dict[str, Any] = {
        "folder": str(folder),
        "classes": len(card["classes"]),
        "parameters": card["parameters"],
    }
    if "onnx" in formats:
        payload |= _write_onnx(network, card, settings, folder / "model.onnx", on_whole_videos)
        card["onnx"] = payload["onnx"]
    if "safetensors" in formats:
        path = folder / "model.safetensors"
        try:
            save_tensors(path, dict(network.state_dict()), {"card": json.dumps(card)})
        except SafetensorError as error:
            raise GkdError(f"cannot write the weights: {error}", str(path), "make room there") from None
        payload["safetensors"] = {"file": str(path), "bytes": path.stat().st_size, "sha256": digest(path)}
        card["safetensors_sha256"] = payload["safetensors"]["sha256"]
    if isinstance(network, Detector):
        for name in ("decode.py", "nms.py"):
            source = importlib.resources.files("gkdcli.evaluation") / name
            write_text(folder / name, source.read_text(encoding="utf-8"))
    write_json(folder / "card.json", card)
    write_text(folder / "README.md", readable(card))
    return payload | {"card": str(folder / "README.md")}


def _write_onnx(
    network: Network,
    card: dict[str, Any],
    settings: ExportSettings,
    path: Path,
    on_whole_videos: Callable[[Graph], dict[str, Any]] | None,
) -> dict[str, Any]:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - the exporter needs it
    except ImportError as error:
        raise GkdError(
            f"--format onnx needs the export extra: {error.name} is not installed",
            "--format onnx",
            "`pip install 'gkdcli[export]'`",
        ) from None
    shape = tuple(card["input"]["shape"][1:])
    clip = torch.from_numpy(np.random.default_rng(0).standard_normal((2, *shape), dtype=np.float32))
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's own deprecations are none of the user's business
        program = torch.onnx.export(
            network,
            (clip,),
            dynamo=True,
            opset_version=settings.opset,
            input_names=["clip"],
            output_names=[output["name"] for output in card["outputs"]],
            dynamic_shapes={"clip": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    for key in ("classes", "preprocessing", "input", "outputs", "run", "run_weights_sha256"):
        model.metadata_props.add(key=key, value=json.dumps(card[key], ensure_ascii=False))
    with atomic_path(path) as temporary:
        onnx.save(model, str(temporary))
        onnx.checker.check_model(str(temporary))
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        difference, rounding = _differences(network, session, shape)
        accepted = max(settings.tolerance, 10 * rounding)
        if not difference <= accepted:
            raise GkdError(
                f"the ONNX graph differs from the live model by {difference:.2g} of the logits' size",
                str(path),
                f"accepted is export.tolerance = {settings.tolerance:g}; nothing was written",
            )
        checked = {}
        if on_whole_videos is not None:
            checked["whole_videos"] = on_whole_videos(partial(_run, session))
    written = {
        "file": str(path),
        "bytes": path.stat().st_size,
        "opset": settings.opset,
        "largest_relative_difference": difference,
        "accepted_difference": accepted,
    }
    return {"onnx": written} | checked


def _run(session: Any, clips: torch.Tensor) -> list[torch.Tensor]:
    return [torch.from_numpy(part) for part in session.run(None, {"clip": clips.numpy()})]


_DRAWS = 8  # of clips, until one is comparable


def _differences(network: Network, session: Any, shape: tuple[int, ...]) -> tuple[float, float]:
    """How far the graph, and the live model by float32 rounding, are from the model in float64.

    Relative to the largest value of each output, over batches of 1 and 3. Normalising few values magnifies
    rounding, in narrow networks beyond any fixed tolerance, and the graph need not be better than the model
    itself. A detector rounds where it pools: clips where rounding errors tip one of these are left out.

    Raises:
        GkdError: no comparable clip was found, so the two do not agree.
    """
    exact = copy.deepcopy(network).double()
    difference = rounding = 0.0
    for batch in (1, 3):
        for draw in range(_DRAWS):
            clip = np.random.default_rng([batch, draw]).standard_normal((batch, *shape), dtype=np.float32)
            with torch.inference_mode():
                wanted = _arrays(exact(torch.from_numpy(clip).double()))
                live = _arrays(network(torch.from_numpy(clip)))
            exported = session.run(None, {"clip": clip})
            if not isinstance(network, Detector) or network.pools_alike(wanted[0], live[0], exported[0]):
                break
        else:
            raise GkdError(
                "the ONNX graph looks at other frames than the live model",
                f"all of {_DRAWS} clips",
                "nothing was written; `--set export.opset=18` may do, and please report this",
            )
        for ours, alive, theirs in zip(wanted, live, exported, strict=True):
            size = max(np.abs(ours).max(), 1e-12)
            difference = max(difference, float(np.abs(theirs - ours).max() / size))
            rounding = max(rounding, float(np.abs(alive - ours).max() / size))
    return difference, rounding


def _arrays(outputs: Any) -> list[Any]:
    """One tensor or several, as arrays."""
    return [output.numpy() for output in ((outputs,) if isinstance(outputs, torch.Tensor) else outputs)]
