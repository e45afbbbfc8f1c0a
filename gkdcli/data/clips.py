"""Store -> training tensors: which frames, which crop, one decision per clip (METHOD.md 4, 8).

Clips stay uint8 until they are on the device; `normalise` is the last step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_jpeg

from gkdcli.data.batches import ClipBatch, Keys
from gkdcli.data.clock import spent
from gkdcli.data.store import Store, VideoRow
from gkdcli.errors import GkdError
from gkdcli.settings import ClipSettings

# (row, column) in quarters of the free space: corners and centre, then edge midpoints and inner quarters
_POSITIONS = (
    (0, 0), (0, 4), (4, 0), (4, 4), (2, 2), (2, 0), (2, 4), (4, 2), (0, 2), (1, 1), (1, 3), (3, 1), (3, 3),
)  # fmt: skip
_VIEWS = 1  # first word of their seeds; the loader's orders have 2, the noise of training 3


@dataclass(frozen=True)
class View:
    """One decision about a clip: first frame, crop box in pixels of the (rescaled) frame, mirrored or not."""

    start: int
    top: int
    left: int
    height: int
    width: int
    flip: bool


def working_size(height: int, width: int, clips: ClipSettings) -> tuple[int, int]:
    """Size of a frame after `clips.short_side`, and scaled up to the crop where it is smaller."""
    short = clips.short_side or min(height, width)
    short = max(short, clips.crop)
    if short == min(height, width):
        return height, width
    scale = short / min(height, width)
    return max(short, round(height * scale)), max(short, round(width * scale))


def training_view(
    rng: np.random.Generator, frames: int, height: int, width: int, clips: ClipSettings, recipe: str
) -> View:
    """A random window, multi-scale crop and flip (METHOD.md 4).

    Args:
        rng: seeded by (seed, epoch, sample).
        frames: of the video; fewer than a clip means that all are taken.
        height: of the frames after `working_size`, pixels.
        width: likewise.
        clips: settings.
        recipe: `official` lays the grid of positions by the network's crop, `corrected` by the crop drawn.
    """
    start = int(rng.integers(0, max(frames - clips.length, 0) + 1))
    sides = [int(min(height, width) * scale) for scale in clips.scales]
    pairs = [(i, j) for i in range(len(sides)) for j in range(len(sides)) if abs(i - j) <= 1]
    i, j = pairs[int(rng.integers(len(pairs)))]
    crop_height, crop_width = sides[i], sides[j]
    grid_height, grid_width = (clips.crop, clips.crop) if recipe == "official" else (crop_height, crop_width)
    row, column = _POSITIONS[int(rng.integers(len(_POSITIONS)))]
    top, left = row * ((height - grid_height) // 4), column * ((width - grid_width) // 4)
    flip = bool(rng.integers(2)) and clips.flip
    return View(start, top, left, min(crop_height, height - top), min(crop_width, width - left), flip)


def test_view(frames: int, height: int, width: int, clips: ClipSettings) -> View:
    """The middle window and the centre crop (METHOD.md 4, 6): first frame int((n - (length - 1)) / 2)."""
    start = min(max((frames - (clips.length - 1)) // 2, 0), max(frames - clips.length, 0))
    top, left = round((height - clips.crop) / 2), round((width - clips.crop) / 2)
    return View(start, top, left, clips.crop, clips.crop, False)


test_view.__test__ = False  # type: ignore[attr-defined]  # not a test, whatever pytest thinks of its name


class ClipDataset(Dataset[tuple[Tensor, int, int]]):
    """Clips of some videos of a store; an item is named by (position, epoch, part), so that it has no state.

    Args:
        store: read lazily, once per process.
        videos: rows of the store.
        clips: settings.
        recipe: see `training_view`.
        seed: None gives test views, a number gives training views.
    """

    def __init__(
        self, store: Store, videos: Sequence[int], clips: ClipSettings, recipe: str, seed: int | None
    ) -> None:
        self.store = store
        self.videos = list(videos)
        self.clips = clips
        self.recipe = recipe
        self.seed = seed

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Tensor, int, int]:
        """The clip (C, T, crop, crop) uint8, its label, and its video's row in the store."""
        position, epoch, part = key
        video = self.videos[position]
        row = self.store.videos[video]
        height, width = working_size(row.height, row.width, self.clips)
        if self.seed is None:
            view = test_view(row.frames, height, width, self.clips)
        else:
            rng = np.random.default_rng([_VIEWS, self.seed, epoch, part, video])
            view = training_view(rng, row.frames, height, width, self.clips, self.recipe)
        frames = self.read(video, view.start)
        return self.cut(frames, view), row.label, video

    def __getitems__(self, keys: Keys) -> list[tuple[Tensor, int, int]] | GkdError:
        """The clips of a batch; an error is handed over whole, for PyTorch would make a traceback of it."""
        try:
            return [self[key] for key in keys]
        except GkdError as error:
            return error

    def collate(self, items: list[tuple[Tensor, int, int]]) -> ClipBatch:
        """Clips and `labels` (B,), int64; a clip's noise is seeded by its video's row in the store."""
        clips, labels, videos = zip(*items, strict=True)
        return ClipBatch(torch.stack(clips), {"labels": torch.tensor(labels)}, list(videos))

    def name_of(self, sample: int) -> str:
        """Class and name of a video."""
        row = self.store.videos[sample]
        return f"{row.class_name}/{row.name}"

    def digest(self) -> str:
        """Changes with the store, and with which videos these are."""
        return hashlib.sha256(f"{self.store.fingerprint} {self.videos}".encode()).hexdigest()

    def read(self, video: int, start: int) -> Tensor:
        """Decoded frames from `start`, (T, C, H, W) uint8; a short video repeats its last frame."""
        count = min(self.clips.length, self.store.videos[video].frames - start)
        frames = read_frames(self.store, video, start, count)
        if count < self.clips.length:
            frames = torch.cat([frames, frames[-1:].expand(self.clips.length - count, -1, -1, -1)])
        return to_working_size(frames, self.clips)

    def cut(self, frames: Tensor, view: View) -> Tensor:
        """(T, C, H, W) -> (C, T, crop, crop)."""
        clip = frames[:, :, view.top : view.top + view.height, view.left : view.left + view.width]
        if clip.shape[2:] != (self.clips.crop, self.clips.crop):
            clip = _resize(clip, (self.clips.crop, self.clips.crop))
        clip = clip.transpose(0, 1).contiguous()
        return mirror(clip, self.store.modality, self.recipe) if view.flip else clip


def read_frames(store: Store, video: int, start: int, count: int) -> Tensor:
    """Frames [start, start + count) of a video, decoded: (count, C, H, W) uint8.

    Raises:
        GkdError: the part is missing or damaged.
    """
    stored = spent("read", store.frames, video, start, count)
    try:
        found: Tensor = spent("decode", decode, stored, store.modality)
        return found
    except RuntimeError as error:
        row = store.videos[video]
        raise GkdError(
            f"a stored frame cannot be decoded: {str(error).splitlines()[0]}",
            f"{row.class_name}/{row.name}, frames {start} to {start + count - 1}",
            "the part is damaged: delete it and run the same `gkd prepare` again",
        ) from None


def decode(stored: list[np.ndarray] | np.ndarray, modality: str) -> Tensor:
    """What `Store.frames` returns -> (T, C, H, W); flow in JPEG is all pictures of x, then all of y."""
    if isinstance(stored, np.ndarray):  # raw: (T, H, W, C)
        return torch.from_numpy(stored).permute(0, 3, 1, 2)
    mode = ImageReadMode.RGB if modality == "rgb" else ImageReadMode.GRAY
    pictures = torch.stack(decode_jpeg([torch.from_numpy(image) for image in stored], mode=mode))
    return pictures if modality == "rgb" else torch.cat(pictures.chunk(2), dim=1)


def mirror(clip: Tensor, modality: str, recipe: str) -> Tensor:
    """(C, T, H, W) with left and right exchanged; in flow `corrected` negates x too (METHOD.md 8 (18))."""
    clip = clip.flip(3)
    if modality == "flow" and recipe == "corrected":
        clip[0] = 255 - clip[0]  # what moved to the right moves to the left
    return clip


def to_working_size(frames: Tensor, clips: ClipSettings) -> Tensor:
    """Scales frames (T, C, H, W) as `working_size` says."""
    size = working_size(frames.shape[2], frames.shape[3], clips)
    return frames if size == tuple(frames.shape[2:]) else _resize(frames, size)


def _resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear without antialiasing, as the two-stream code resizes."""
    return F.interpolate(frames.contiguous(), size=size, mode="bilinear", align_corners=False)


def normalise(clips: Tensor, settings: ClipSettings, frames: Tensor | None = None) -> Tensor:
    """uint8 (B, C, T, H, W) -> float32, (pixel / 255 - mean) / std per channel.

    Channels lie innermost in memory: every network wants them so, and here the rearrangement costs nothing.

    Args:
        clips: as they were read.
        settings: mean and deviation.
        frames: how many of each clip are real, (B,); the others become 0. None: all are.

    Raises:
        GkdError: another number of channels than of means or deviations.
    """
    channels = clips.shape[1]
    require_channels(settings, channels)
    mean, std = (
        torch.tensor(values * channels if len(values) == 1 else values, device=clips.device)
        for values in (list(settings.mean), list(settings.std))
    )
    scale = 1 / (255 * std)
    floats = clips.to(torch.float32, memory_format=torch.channels_last_3d)
    floats.mul_(scale.view(1, -1, 1, 1, 1)).sub_((mean / std).view(1, -1, 1, 1, 1))
    if frames is not None and (frames < clips.shape[2]).any():
        padded = torch.arange(clips.shape[2], device=clips.device) >= frames[:, None]  # (B, T)
        floats.masked_fill_(padded[:, None, :, None, None], 0)
    return floats


def require_channels(settings: ClipSettings, channels: int) -> None:
    """Refuses a mean or deviation for another number of channels.

    Raises:
        GkdError: with both numbers.
    """
    mean, std = len(settings.mean), len(settings.std)
    if mean not in (1, channels) or std not in (1, channels):
        raise GkdError(
            f"clips have {channels} channels, but clips.mean has {mean} values and clips.std {std}",
            "settings clips.mean and clips.std",
            "give one value for all channels, or one per channel, for flow in a table [flow.clips]",
        )


def hold_out(rows: Sequence[VideoRow], videos: Sequence[int], fraction: float) -> tuple[list[int], list[int]]:
    """Divides training videos into (trained on, held out), by class, whole groups together.

    The choice hangs on names alone, so that teacher and student agree whatever their seeds. Of a class with
    fewer than five groups nothing is held out.
    """
    if fraction == 0:
        return list(videos), []
    groups: dict[int, dict[str, list[int]]] = {}
    for video in videos:
        row = rows[video]
        groups.setdefault(row.label, {}).setdefault(row.group or row.name, []).append(video)
    held: set[int] = set()
    for members in groups.values():
        if len(members) >= 5:
            ranked = sorted(
                members, key=lambda group: hashlib.sha256(group.encode("utf-8", "surrogateescape")).digest()
            )
            for group in ranked[: max(1, round(fraction * len(members)))]:
                held.update(members[group])
    return [video for video in videos if video not in held], [video for video in videos if video in held]
