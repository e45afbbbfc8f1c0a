"""Model x store -> what the detector says of every window, kept so that fusion and scoring run again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gkdcli.console import Ticker
from gkdcli.data.clips import normalise
from gkdcli.data.parts import plain_value
from gkdcli.data.store import Store
from gkdcli.data.window_clips import Block, window_blocks
from gkdcli.data.windows import test_offsets
from gkdcli.errors import GkdError
from gkdcli.evaluation.decode import Heads
from gkdcli.files import atomic_path
from gkdcli.settings import ClipSettings

# what h5py raises for damaged files, by kind of damage
_UNREADABLE = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError)
Forward = Callable[[Tensor], Sequence[Tensor]]  # normalised clips (W, C, T, H, W) -> the five of `Heads`


@dataclass(frozen=True)
class VideoWindows:
    """One video.

    Args:
        name: in its ground truth and in a submission.
        fps: of the frames that the network saw.
        offsets: (W,), where its windows start, frames.
        heads: of these windows.
    """

    name: str
    fps: float
    offsets: NDArray[np.int64]
    heads: Heads


def predict_windows(
    store: Store,
    videos: Sequence[int],
    forward: Forward,
    clips: ClipSettings,
    *,
    stride: int,
    batch_size: int,
    workers: int,
    device: torch.device,
    tick: Ticker,
) -> Iterator[VideoWindows]:
    """Runs `forward` over all windows of whole videos; at most a few videos are in memory.

    Args:
        store: read from; every frame once.
        videos: rows of the store.
        forward: the detector in evaluation mode.
        clips: settings that it was trained with.
        stride: from one window to the next, frames.
        batch_size: windows per pass.
        workers: of the reader.
        device: where `forward` runs.
        tick: told how many windows are done.

    Yields:
        Videos as they are finished, in the order of `videos` where this process reads.

    Raises:
        GkdError: a video is damaged, or the device has too little memory.
    """
    done, unfinished = 0, dict[int, list[tuple[Tensor, list[NDArray[np.float32]]]]]()
    pin = device.type == "cuda"
    blocks = window_blocks(store, videos, clips, stride=stride, batch=batch_size, workers=workers, pin=pin)
    with contextlib.closing(blocks):
        for block in blocks:
            parts = unfinished.setdefault(block.video, [])
            parts.append((block.offsets, _forward(forward, block, clips, batch_size, device)))
            done += len(block.offsets)
            tick(done)
            if block.last:
                row = store.videos[block.video]
                offsets, outputs = zip(*unfinished.pop(block.video), strict=True)
                heads = Heads(*(np.concatenate(each) for each in zip(*outputs, strict=True)))
                yield VideoWindows(row.name, row.fps, torch.cat(offsets).numpy(), heads)


def _forward(
    forward: Forward, block: Block, clips: ClipSettings, batch_size: int, device: torch.device
) -> list[NDArray[np.float32]]:
    try:
        with torch.inference_mode():
            pixels = normalise(block.clips.to(device), clips, block.frames.to(device))
            return [output.float().cpu().numpy() for output in forward(pixels)]
    except torch.OutOfMemoryError:
        raise GkdError(
            f"out of memory in evaluation: batch {batch_size} of {tuple(block.clips.shape[1:])}",
            str(device),
            f"`--set eval.batch_size={max(batch_size // 2, 1)}`; the scores do not depend on it",
        ) from None


def count_windows(store: Store, videos: Sequence[int], length: int, stride: int) -> int:
    """How many windows these videos have."""
    return sum(len(test_offsets(store.videos[video].frames, length, stride)) for video in videos)


class WindowFile:
    """`predictions.h5` of a detector: per video its windows, read one at a time; open only while it is read.

    Attributes:
        path: of the file.
        made_with: identifies store, weights and settings; plain values.
        names: of the videos, in the order of the file.

    Raises:
        GkdError: there is none, or it is damaged.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise GkdError("there are no saved predictions to score again", str(path), "drop --rescore once")
        self.path = path
        with self._opened() as file:
            self.made_with, self.names = _contents(file)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> VideoWindows:
        """The windows of a video, by its place in `names`."""
        with self._opened() as file:
            if _contents(file) != (self.made_with, self.names):
                what = "the saved predictions have changed while they were read"
                raise GkdError(what, str(self.path), "another command evaluates the same run; wait for it")
            group = file[f"videos/{number}"]
            heads = Heads(*(group[name][:] for name in Heads._fields))
            return VideoWindows(self.names[number], float(group.attrs["fps"]), group["offsets"][:], heads)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[h5py.File]:
        try:
            with h5py.File(self.path, "r", locking=False) as file:
                yield file
        except _UNREADABLE as error:
            raise GkdError(
                f"the saved predictions are damaged: {error}", str(self.path), "drop --rescore once"
            ) from None


def _contents(file: h5py.File) -> tuple[dict[str, Any], list[str]]:
    """What the predictions were made with, and the names of the videos."""
    made_with = {name: plain_value(value) for name, value in file.attrs.items()}
    return made_with, file["names"].asstr(errors="surrogateescape")[:].tolist()


def save_windows(path: Path, videos: Iterable[VideoWindows], made_with: Mapping[str, Any]) -> None:
    """Writes what `predict_windows` yields, video by video; the file gets its name when all are in it.

    Args:
        path: final name.
        videos: each is needed until the next is there.
        made_with: plain values that identify the predictions.
    """
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        names = []
        for number, video in enumerate(videos):
            group = file.create_group(f"videos/{number}")
            group.attrs["fps"] = video.fps
            group["offsets"] = video.offsets
            for name, values in video.heads._asdict().items():
                group[name] = values
            names.append(video.name.encode("utf-8", "surrogateescape"))
        file["names"] = np.array(names, dtype=h5py.string_dtype())
        file.attrs.update(made_with)
