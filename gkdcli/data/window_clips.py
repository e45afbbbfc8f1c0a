"""Store -> tensors of untrimmed videos: training clips with their segments, and the windows of whole videos.

Which clips, and what is in them: `gkdcli.data.windows`. Pixels stay uint8, as in `gkdcli.data.clips`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from gkdcli.data.batches import ClipBatch, Keys
from gkdcli.data.clips import mirror, read_frames, to_working_size, working_size
from gkdcli.data.loader import read_ahead
from gkdcli.data.segments import Segment
from gkdcli.data.store import Store
from gkdcli.data.windows import (
    Segments,
    Splice,
    Window,
    boundary_maps,
    splice,
    test_offsets,
    training_windows,
)
from gkdcli.errors import GkdError
from gkdcli.settings import CHANNELS, ClipSettings

_VIEWS = 4  # first word of their seeds, see `clips._VIEWS`


class WindowItem(NamedTuple):
    """One training clip: pixels (C, T, crop, crop) uint8, real frames, segments (m, 3), splice, position."""

    clip: Tensor
    frames: int
    segments: Segments
    splice: Splice | None
    sample: int


class WindowDataset(Dataset[WindowItem]):
    """Training clips of untrimmed videos (METHOD.md 5); items are named as those of `ClipDataset`.

    Args:
        store: read lazily, once per process.
        videos: rows of the store.
        segments: of every row of the store; a video without actions has no clips.
        clips: settings.
        recipe: `official` pads short videos with black, `corrected` with what normalisation makes 0.
        seed: of crop, mirroring and splice; None gives centre crops and neither of the others.

    Attributes:
        windows: (row of the store, clip, length of the piece to splice) of each.
    """

    def __init__(
        self,
        store: Store,
        videos: Sequence[int],
        segments: Sequence[Sequence[Segment]],
        clips: ClipSettings,
        recipe: str,
        seed: int | None,
    ) -> None:
        self.store = store
        self.clips = clips
        self.recipe = recipe
        self.seed = seed
        self.windows: list[tuple[int, Window, int]] = []
        for video in videos:
            frames = store.videos[video].frames
            rows = segment_rows(segments[video])
            found, shortest = training_windows(frames, rows, clips.length, clips.stride)
            self.windows += [(video, window, shortest) for window in found]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, key: tuple[int, int, int]) -> WindowItem:
        """The clip of a (position, epoch, part)."""
        position, epoch, part = key
        video, window, shortest = self.windows[position]
        row, side = self.store.videos[video], self.clips.crop
        height, width = working_size(row.height, row.width, self.clips)
        (top, left), flip, spliced = _centre(height, width, side), False, None
        if self.seed is not None:
            rng = np.random.default_rng([_VIEWS, self.seed, epoch, part, position])
            top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
            flip = bool(rng.integers(2)) and self.clips.flip
            spliced = splice(window.segments, shortest, self.clips.length, rng, self.recipe)
        count = min(self.clips.length, row.frames - window.offset)
        (clip,) = _black(self.store, self.clips, 1)
        clip[:, :count] = _read_square(self.store, video, window.offset, count, (top, left), self.clips)
        if flip:
            clip[:, :count] = mirror(clip[:, :count], self.store.modality, self.recipe)
        real = self.clips.length if self.recipe == "official" else count
        return WindowItem(clip, real, window.segments, spliced, position)

    def __getitems__(self, keys: Keys) -> list[WindowItem] | GkdError:
        """The clips of a batch; an error is handed over whole, for PyTorch would make a traceback of it."""
        try:
            return [self[key] for key in keys]
        except GkdError as error:
            return error

    def collate(self, items: list[WindowItem]) -> ClipBatch:
        """Clips with their targets; M is the most segments that one of them has.

        segments: (B, M, 2), float32, first and last frame relative to the clip, in [1, T]; 0 where unused.
        labels: (B, M), int64, class + 1; 0 where unused. valid: (B, M), where there is a segment.
        maps: (B, 2, T), float32, see `boundary_maps`.
        splices: (B, T), int64: the spliced clip is `clip[:, splices]`. spliced: (B,), where there is one.
        proposals: (B, 3, 2), float32, of the spliced clip, see `Splice`.
        frames: (B,), int64: frames from here on become 0 after normalisation, before any splice (METHOD.md 8
        (16)); T in recipe `official`, where what follows a short video is black.
        """
        length = items[0].clip.shape[1]
        most = max(len(item.segments) for item in items)
        padded = np.zeros((len(items), most, 3))
        splices = np.tile(np.arange(length), (len(items), 1))
        proposals = np.zeros((len(items), 3, 2), np.float32)
        for row, item in enumerate(items):
            padded[row, : len(item.segments)] = item.segments
            if item.splice is not None:
                splices[row], proposals[row] = item.splice
        labels = torch.from_numpy(padded[:, :, 2]).long()
        targets = {
            "segments": torch.from_numpy(padded[:, :, :2]).float(),
            "labels": labels,
            "valid": labels > 0,
            "maps": torch.from_numpy(np.stack([boundary_maps(item.segments, length) for item in items])),
            "splices": torch.from_numpy(splices),
            "spliced": torch.tensor([item.splice is not None for item in items]),
            "proposals": torch.from_numpy(proposals),
            "frames": torch.tensor([item.frames for item in items]),
        }
        return ClipBatch(torch.stack([item.clip for item in items]), targets, [item.sample for item in items])

    def name_of(self, sample: int) -> str:
        """Video and first frame of a clip."""
        video, window, _ = self.windows[sample]
        row = self.store.videos[video]
        return f"{row.class_name}/{row.name}@{window.offset}"

    def digest(self) -> str:
        """Changes with the store, with which clips these are, and with what is said of them."""
        found = hashlib.sha256(self.store.fingerprint.encode())
        for video, window, shortest in self.windows:
            found.update(f"\n{video} {window.offset} {shortest} {window.segments.tolist()}".encode())
        return found.hexdigest()


def segment_rows(segments: Sequence[Segment]) -> Segments:
    """The actions of a video as `gkdcli.data.windows` wants them: (n, 3), first, last, class + 1."""
    return np.array([(one.first, one.last, one.label + 1) for one in segments], np.float64).reshape(-1, 3)


class Block(NamedTuple):
    """Consecutive windows of a video.

    Args:
        video: its row in the store.
        offsets: (W,), int64, where they start.
        clips: (W, C, T, crop, crop), uint8; a short video is followed by zeros.
        frames: (W,), int64, how many frames are real; the others become 0 after normalisation.
        last: whether the video ends here.
    """

    video: int
    offsets: Tensor
    clips: Tensor
    frames: Tensor
    last: bool


def window_blocks(
    store: Store,
    videos: Sequence[int],
    clips: ClipSettings,
    *,
    stride: int,
    batch: int,
    workers: int,
    pin: bool = False,
) -> Generator[Block, None, None]:
    """The windows of whole videos, centre crop (METHOD.md 5, inference); no frame is read or decoded twice.

    Blocks of a video come in order; with several workers those of several videos come by turns, always the
    same. In memory are the blocks in work, however long and many the videos are. Close the iterator to end
    its processes before it is exhausted.

    Args:
        store: read from.
        videos: rows of the store.
        clips: settings.
        stride: from one window to the next, frames.
        batch: at most so many windows in a block.
        workers: processes, each with its own share of the videos; 0: this one reads.
        pin: into page-locked memory.

    Raises:
        GkdError: a video is damaged, or a worker was killed.
    """
    reader = _WindowReader(store, videos, clips, stride, batch)
    return read_ahead(reader, workers, batch_size=None, collate_fn=_as_it_is, pin_memory=pin)


class _WindowReader(IterableDataset[Block | GkdError]):
    """See `window_blocks`; an error ends it and is handed over whole."""

    def __init__(
        self, store: Store, videos: Sequence[int], clips: ClipSettings, stride: int, batch: int
    ) -> None:
        self.store, self.videos, self.clips, self.stride, self.batch = (
            store,
            list(videos),
            clips,
            stride,
            batch,
        )

    def __iter__(self) -> Iterator[Block | GkdError]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        try:
            for video in self.videos[first::step]:
                yield from self._blocks(video)
        except GkdError as error:
            yield error

    def _blocks(self, video: int) -> Iterator[Block]:
        frames = self.store.videos[video].frames
        offsets = test_offsets(frames, self.clips.length, self.stride)
        before: tuple[int, Tensor] | None = None  # the last window: where, and its pixels
        for first in range(0, len(offsets), self.batch):
            chosen = offsets[first : first + self.batch]
            windows = _black(self.store, self.clips, len(chosen))
            for offset, window in zip(chosen, windows, strict=True):
                self._fill(window, video, offset, before)
                before = offset, window
            real = torch.tensor([min(frames - offset, self.clips.length) for offset in chosen])
            last = first + self.batch >= len(offsets)
            if before is not None and not last:
                # a worker's block is moved to shared memory by another thread while the next one is made
                before = before[0], before[1].clone()
            yield Block(video, torch.tensor(chosen), windows, real, last)

    def _fill(self, window: Tensor, video: int, offset: int, before: tuple[int, Tensor] | None) -> None:
        """Copies what the window before has too, and reads the rest."""
        row, length, known = self.store.videos[video], self.clips.length, 0
        if before is not None and before[0] + length > offset:
            known = before[0] + length - offset
            window[:, :known] = before[1][:, length - known :]
        count = min(row.frames - offset, length) - known
        corner = _centre(*working_size(row.height, row.width, self.clips), self.clips.crop)
        window[:, known : known + count] = _read_square(
            self.store, video, offset + known, count, corner, self.clips
        )


def _as_it_is(block: Block | GkdError) -> Block | GkdError:
    return block


def _black(store: Store, clips: ClipSettings, count: int) -> Tensor:
    """Clips without content, (count, C, T, crop, crop) uint8."""
    shape = (count, CHANNELS[store.modality], clips.length, clips.crop, clips.crop)
    return torch.zeros(shape, dtype=torch.uint8)


def _centre(height: int, width: int, side: int) -> tuple[int, int]:
    """Top and left of the square in the middle."""
    return round((height - side) / 2), round((width - side) / 2)


def _read_square(
    store: Store, video: int, start: int, count: int, corner: tuple[int, int], clips: ClipSettings
) -> Tensor:
    """Frames [start, start + count), scaled and cut: (C, count, crop, crop) uint8, a view.

    Args:
        store: read from.
        video: row of the store.
        start: first frame.
        count: frames.
        corner: top and left of the square in the scaled frames, px.
        clips: settings.
    """
    frames = to_working_size(read_frames(store, video, start, count), clips)
    top, left = corner
    return frames[:, :, top : top + clips.crop, left : left + clips.crop].transpose(0, 1)
