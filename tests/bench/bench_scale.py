"""A store of 100,000 videos: how long a finished set takes to be looked through again, and to be opened.

    python tests/bench/bench_scale.py [--videos N] [--folder DIR] [--profile]

One tiny video is prepared; the others are copies of its file and of its part, each with a content, a digest
and a name of its own, byte for byte what `gkd prepare` writes of them. "again" is the whole call on a
complete set (listing not counted), "half" the same with every other part missing, until the first video is
done. Clips of random videos are read from this store and from one of a hundredth of its size: equal bytes
are asserted.
Files in the page cache.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import hashlib
import json
import os
import pstats
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gkdcli.data.annotations import Listing, scan_folder
from gkdcli.data.extract import Report, prepare_parts
from gkdcli.data.parts import part_path, read_about, read_attributes
from gkdcli.data.store import Store
from gkdcli.errors import Interrupted
from gkdcli.settings import DataSettings
from tests.videos import draw, write_video

CLASSES, FRAMES = 100, 16
DATA = DataSettings(short_side=0)


def _name(number: int) -> str:
    return f"v{number:07}"


def _prepare(root: Path, listing: Listing, progress: Callable[..., None] | None = None) -> Report:
    return prepare_parts(listing, root / "mine", "mine", ("rgb",), DATA, workers=1, progress=progress)


def grow(root: Path, count: int, classes: int = CLASSES) -> None:
    """Writes `root/videos` and the parts of its store; only the index is missing."""
    seed = write_video(root / "seed" / "videos" / "c" / f"{_name(0)}.mp4", draw(FRAMES))
    content = seed.read_bytes() + b"\x00\x00\x00\x10free"  # a box that players pass over
    seed.write_bytes(content + bytes(8))
    os.utime(seed, ns=(0, 1_700_000_000_123_456_789))
    old = hashlib.sha256(seed.read_bytes()).hexdigest().encode()
    _prepare(root / "seed", scan_folder(root / "seed" / "videos", 0.5))
    master = part_path(root / "seed" / "mine" / "rgb", "c", _name(0)).read_bytes()
    for place in range(classes):
        for folder in ("videos", "mine/rgb"):
            (root / folder / f"class{place:03}").mkdir(parents=True)
    for number in range(count):
        name, class_name = _name(number), f"class{number % classes:03}"
        file = root / "videos" / class_name / f"{name}.mp4"
        unlike = content + number.to_bytes(8)
        file.write_bytes(unlike)
        os.utime(file, ns=(0, 1_700_000_000_123_456_789))
        part = master.replace(old, hashlib.sha256(unlike).hexdigest().encode())
        part_path(root / "mine" / "rgb", class_name, name).write_bytes(
            part.replace(_name(0).encode(), name.encode())
        )


def _check_copies(root: Path, listing: Listing) -> None:
    """A part that was copied is what preparing its video gives."""
    source = listing.sources[len(listing.sources) // 2]
    _prepare(root / "check", Listing(listing.classes, [source]))
    parts = [
        part_path(root / place / "mine" / "rgb", source.class_name, source.name) for place in (".", "check")
    ]
    assert parts[0].read_bytes() == parts[1].read_bytes()


@contextlib.contextmanager
def _profiled(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    profile = cProfile.Profile()
    with profile:
        yield
    pstats.Stats(profile).sort_stats("cumulative").print_stats(28)


def _timed(what: str, action: Callable[[], Any], profile: bool) -> Any:
    started, cpu = time.perf_counter(), time.process_time()
    with _profiled(profile):
        result = action()
    took, cpu = time.perf_counter() - started, time.process_time() - cpu
    print(json.dumps({"what": what, "sec": round(took, 2), "cpu_sec": round(cpu, 2)}), flush=True)
    return result


def _until_first(root: Path, listing: Listing) -> None:
    """Prepares, and stops as a user would as soon as one video is done."""
    with contextlib.suppress(Interrupted):
        _prepare(root, listing, lambda *_: os.kill(os.getpid(), signal.SIGINT))


def _read(store: Store, videos: list[int]) -> list[bytes]:
    return [b"".join(frame.tobytes() for frame in store.frames(video, 4, 8)) for video in videos]


def _attributes(root: Path, listing: Listing) -> None:
    """What planning has to know of a part: from its second line, and asked of HDF5."""
    sources = listing.sources[:: max(1, len(listing.sources) // 500)]
    parts = [part_path(root / "mine" / "rgb", source.class_name, source.name) for source in sources]
    cpu = {"line": 0.0, "hdf5": 0.0}
    for part in parts:
        found = []
        for way, read in (("line", read_about), ("hdf5", read_attributes)):
            before = time.process_time()
            found.append(read(part))
            cpu[way] += time.process_time() - before
        assert found[0] == found[1]
    told = {f"{way}_cpu_us": round(1e6 * sec / len(parts)) for way, sec in cpu.items()}
    print(json.dumps({"what": "attributes of a part", **told, "ratio": round(cpu["hdf5"] / cpu["line"], 1)}))


def _links_plainly(index: Path) -> list[str]:
    """The index is one tree for users: every part is reached through it."""
    with h5py.File(index) as file:
        videos = file["videos"]
        return [
            videos[class_name].get(name, getlink=True).filename
            for class_name in videos
            for name in videos[class_name]
        ]


def main() -> None:
    """Prints one JSON object per step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--videos", type=int, default=100_000)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--folder", type=Path, help="of temporary files: two for each video")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        big, small = Path(name) / "big", Path(name) / "small"
        _timed("written", lambda: grow(big, options.videos), False)
        grow(small, max(options.videos // 100, CLASSES))
        listing = _timed("listed", lambda: scan_folder(big / "videos", 0.2), options.profile)
        assert len(listing.sources) == options.videos
        _check_copies(big, listing)
        report = _timed("again", lambda: _prepare(big, listing), options.profile)
        assert (report.prepared, report.skipped, report.rejected) == (0, options.videos, [])
        print(json.dumps({"what": "index", "mb": round(report.indexes["rgb"].stat().st_size / 1e6, 1)}))
        _timed("again, with an index", lambda: _prepare(big, listing), False)
        _attributes(big, listing)
        store = _timed("opened", lambda: Store.open(report.indexes["rgb"]), options.profile)
        assert sum(row.frames for row in store.videos) == options.videos * FRAMES
        assert len(_links_plainly(report.indexes["rgb"])) == options.videos
        few = _prepare(small, scan_folder(small / "videos", 0.2))
        stores = {"big": store, "small": Store.open(few.indexes["rgb"])}
        rng = np.random.default_rng(0)
        times: dict[str, list[float]] = {size: [] for size in stores}
        for _ in range(20):
            content = []
            for size, opened in stores.items():
                videos = rng.integers(0, len(opened.videos), 100).tolist()
                _read(opened, videos)
                opened.close()
                before = time.perf_counter()
                content.append(set(_read(opened, videos)))
                times[size].append((time.perf_counter() - before) / 100)
            assert content[0] == content[1]
        medians = {size: float(np.median(values)) for size, values in times.items()}
        print(
            json.dumps(
                {
                    "what": "a clip of a random video",
                    "big_us": round(1e6 * medians["big"]),
                    "small_us": round(1e6 * medians["small"]),
                    "ratio": round(medians["big"] / medians["small"], 2),
                }
            )
        )
        for source in listing.sources[::2]:
            part_path(big / "mine" / "rgb", source.class_name, source.name).unlink()
        _timed("half, until the first video is done", lambda: _until_first(big, listing), options.profile)


if __name__ == "__main__":
    main()
