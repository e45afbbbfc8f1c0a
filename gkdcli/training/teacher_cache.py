"""The teacher's attention, computed once for K views of each clip and kept beside the store (METHOD.md 4).

It is all that the losses take of the teacher's network: its CVAE is fed what the student has seen. With the
cache, epoch e shows view 1 + (e - 1) mod K of each clip in its network pass, which is what epoch 1, 2, ... K
shows without; the generator pass, noise and dropout go on as ever.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import torch
from torch import Tensor, nn

from gkdcli.data.batches import ClipBatch, Clips, Keys
from gkdcli.errors import GkdError
from gkdcli.settings import Settings
from gkdcli.training.schedule import NETWORK
from gkdcli.training.steps import Taught, has_spliced

SCHEMA = 1
CLIPS = 64  # of one part
_MAPS, _SPLICED = "teacher.", "teacher.spliced."  # names of targets: the map of a tap, of the spliced clip's


def views_of(settings: Settings) -> int:
    """How many views of each clip a run takes from the cache; 0: there is none."""
    return min(settings.train.teacher_cache, settings.optim.epochs)


def bytes_per_view(shapes: Mapping[str, Sequence[int]], settings: Settings) -> int:
    """Of one view of a clip, at most: in detection not every clip has a spliced version.

    Args:
        shapes: (C, T', ...) of each tap.
        settings: of the run.
    """
    maps = 2 * sum(shape[0] * shape[1] for shape in shapes.values())  # float16
    return maps * (1 + has_spliced(settings))


def fingerprint_of(teacher: Any, clips: Clips, settings: Settings) -> str:
    """Changes with the teacher's backbone and attention, and with all that makes a view but its number."""
    weights = hashlib.sha256()
    for part in ("backbone", "attention"):
        module: nn.Module = getattr(teacher, part)
        for name, value in module.state_dict().items():
            weights.update(f"{part}.{name} {value.dtype} {tuple(value.shape)}\n".encode())
            weights.update(value.cpu().contiguous().numpy().tobytes())
    made_of = {
        "schema": SCHEMA,
        "teacher": [teacher.backbone.kind, weights.hexdigest()],
        "clips": clips.digest(),
        "views": settings.clips.model_dump(mode="json"),
        "recipe": settings.recipe,
        "seed": settings.train.seed,
        "precision": settings.train.precision,
        "spliced": has_spliced(settings),
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


def taught(targets: Mapping[str, Tensor]) -> Taught | None:
    """What a batch brings of the teacher's maps, of the clips and of the spliced ones; None without cache."""
    maps = {
        name.removeprefix(_MAPS): value.float()
        for name, value in targets.items()
        if name.startswith(_MAPS) and not name.startswith(_SPLICED)
    }
    spliced = {
        name.removeprefix(_SPLICED): value[targets["spliced"]].float()
        for name, value in targets.items()
        if name.startswith(_SPLICED)
    }
    return Taught(maps, spliced) if maps else None


class _Item(NamedTuple):
    """A clip as its data set gives it, and the teacher's maps by the targets' names."""

    item: Any
    maps: dict[str, Tensor]


@dataclass(frozen=True)
class CachedClips:
    """A data set of which the network pass brings the teacher's maps as targets: `Clips`.

    Args:
        clips: the data set.
        folder: of the cache; its name is the fingerprint.
        shapes: (C, T') of each tap's map.
        views: K.
        spliced: whether spliced clips have maps too.
    """

    clips: Clips
    folder: Path
    shapes: dict[str, tuple[int, int]]
    views: int
    spliced: bool

    def __len__(self) -> int:
        return len(self.clips)

    def name_of(self, sample: int) -> str:
        """Which clip a message means."""
        return self.clips.name_of(sample)

    def digest(self) -> str:
        """Of the data set."""
        return self.clips.digest()

    def __getitems__(self, keys: Keys) -> list[_Item] | GkdError:
        """The clips of a batch with what is known of them, or the error that reading one of them met."""
        chosen = [
            (position, 1 + (epoch - 1) % self.views if part == NETWORK else epoch, part)
            for position, epoch, part in keys
        ]
        items = self.clips.__getitems__(chosen)
        if isinstance(items, GkdError):
            return items
        try:
            return [
                _Item(item, self.read(position, view) if part == NETWORK else {})
                for item, (position, view, part) in zip(items, chosen, strict=True)
            ]
        except GkdError as error:
            return error

    def collate(self, items: Sequence[_Item]) -> ClipBatch:
        """The batch of the data set, with targets `teacher.<tap>` and `teacher.spliced.<tap>`, (B, C, T')."""
        batch = self.clips.collate([item.item for item in items])
        for name in items[0].maps:
            batch.targets[name] = torch.stack([item.maps[name] for item in items])
        return batch

    def part(self, number: int, view: int) -> Path:
        """The file that holds clips [number * CLIPS, ...) of a view."""
        return self.folder / f"view{view:04}-{number:05}.h5"

    def read(self, position: int, view: int) -> dict[str, Tensor]:
        """The maps (C, T') of a clip, float16; those of its spliced version are 0 where there is none.

        Raises:
            GkdError: the part is missing, damaged, or another one.
        """
        number, row = divmod(position, CLIPS)
        path = self.part(number, view)
        found = {}
        try:
            with h5py.File(path, "r", locking=False) as file:
                if file.attrs["fingerprint"] != self.folder.name:
                    raise ValueError("it is of another teacher, or of other views")
                for tap, shape in self.shapes.items():
                    found[f"{_MAPS}{tap}"] = _read(file[tap], row, shape)
                if self.spliced:
                    place = int(file["spliced_row"][row])
                    for tap, shape in self.shapes.items():
                        none = torch.zeros(shape, dtype=torch.float16)
                        spliced = none if place < 0 else _read(file[f"spliced.{tap}"], place, shape)
                        found[f"{_SPLICED}{tap}"] = spliced
        except (OSError, LookupError, ValueError, RuntimeError) as error:
            raise GkdError(
                f"the teacher's attention cannot be read: {error}",
                str(path),
                "delete that file and run the same command again: only what is missing is computed",
            ) from None
        return found

    def missing(self, views: int) -> list[tuple[int, int]]:
        """(view, number) of the parts that are not there, of views 1 to `views`."""
        parts = range(-(-len(self) // CLIPS))
        there = {path.name for path in self.folder.glob("view*.h5")}
        wanted = [(view, number) for view in range(1, views + 1) for number in parts]
        return [(view, number) for view, number in wanted if self.part(number, view).name not in there]

    def positions(self, number: int) -> range:
        """The clips of a part."""
        return range(number * CLIPS, min((number + 1) * CLIPS, len(self)))


def _read(maps: Any, row: int, shape: tuple[int, int]) -> Tensor:
    if maps.shape[1:] != shape:
        raise ValueError(f"a map is {maps.shape[1:]}, not {shape}")
    return torch.from_numpy(maps[row])
