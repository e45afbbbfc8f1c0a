"""A random clip of 64 frames out of the store against 64 JPEG files: bytes, the decoded clip, the loader.

    python tests/bench/bench_read.py [--clips N] [--batches N] [--loader-only]

Warm: the files are in the page cache. Cold: they were dropped from it before each clip. "open" counts
opening the part, as when every clip is of another video; "kept" reads from a part that is open already.
Decoding is torchvision's, one thread, the same for both. Equal bytes are asserted. Medians.

"loader": training clips a second (random window, crop, scaled to 224x224) through the loader with one and
with two processes, warm: out of the store, out of JPEG files, out of the source video (PyAV: seek, then
decode), and out of a .npy file of all frames, memory-mapped. All use the same views and the same crop; equal
pixels are asserted for files and .npy, likeness for the source, of which the JPEGs are copies. The ways take
turns, the best turn counts. Memory is of one process, in MB: resident, and its share where pages are shared.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import torch
from torchvision.io import decode_jpeg

from gkdcli.data.annotations import Listing, Source, scan_folder
from gkdcli.data.clips import ClipDataset, to_working_size
from gkdcli.data.extract import prepare_parts
from gkdcli.data.loader import load, training_order
from gkdcli.data.parts import PartWriter, part_path
from gkdcli.data.store import Store, build_index
from gkdcli.settings import ClipSettings, DataSettings
from tests.bench.bench_prepare import draw_texture
from tests.videos import write_video

LENGTH, FRAMES, VIDEOS = 64, 300, 8


def _write(root: Path) -> None:
    """The same JPEGs as files and as parts."""
    sources = []
    for video in range(VIDEOS):
        name = f"{video:04}"
        (root / "jpegs" / name).mkdir(parents=True)
        attributes = {"fps": 30.0, "width": 340, "height": 256, "source_digest": name}
        with PartWriter(part_path(root / "mine" / "rgb", "a", name), "jpeg", attributes) as part:
            for place, picture in enumerate(draw_texture(FRAMES, 340, 256, video)):
                jpeg = cv2.imencode(".jpg", picture)[1].tobytes()
                part.append(jpeg)
                (root / "jpegs" / name / f"{place:06}.jpg").write_bytes(jpeg)
        sources.append(Source(Path(name), "a", name, {1: "train"}))
    build_index(root / "mine", "mine", "rgb", Listing(["a"], sources), {})
    os.sync()  # only clean pages can be dropped


def _drop(root: Path, video: int) -> None:
    """Takes a video's files out of the page cache."""
    for path in [
        part_path(root / "mine" / "rgb", "a", f"{video:04}"),
        *(root / "jpegs" / f"{video:04}").iterdir(),
    ]:
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def _decode(jpegs: list[np.ndarray]) -> torch.Tensor:
    return torch.stack(decode_jpeg([torch.from_numpy(jpeg) for jpeg in jpegs]))


class FileClips(ClipDataset):
    """Clips out of a folder of JPEG files per video, beside the store."""

    def read(self, video: int, start: int) -> torch.Tensor:
        """As `ClipDataset.read`."""
        folder = f"{self.store.path.parent}/jpegs/{self.store.videos[video].name}"
        places = range(start, start + self.clips.length)
        jpegs = [np.fromfile(f"{folder}/{place:06}.jpg", np.uint8) for place in places]
        return to_working_size(_decode(jpegs), self.clips)


class ArrayClips(ClipDataset):
    """Clips out of one array of decoded frames per video."""

    def read(self, video: int, start: int) -> torch.Tensor:
        """As `ClipDataset.read`."""
        path = f"{self.store.path.parent}/arrays/{self.store.videos[video].name}.npy"
        frames = np.array(np.load(path, mmap_mode="r")[start : start + self.clips.length])
        return to_working_size(torch.from_numpy(frames).permute(0, 3, 1, 2), self.clips)


class SourceClips(ClipDataset):
    """Clips out of the source videos: to the key frame before the window, and on from there."""

    def read(self, video: int, start: int) -> torch.Tensor:
        """As `ClipDataset.read`."""
        row = self.store.videos[video]
        (path,) = (self.store.path.parent / "videos" / row.class_name).glob(f"{row.name}.*")
        frames: list[np.ndarray] = []
        with av.open(str(path)) as container:
            stream: Any = container.streams.video[0]
            stream.thread_type, stream.codec_context.thread_count = "SLICE", 1
            first = stream.start_time or 0
            container.seek(first + round(start / row.fps / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if round(float((frame.pts - first) * stream.time_base) * row.fps) >= start:
                    frames.append(frame.to_ndarray(format="rgb24"))
                if len(frames) == self.clips.length:
                    break
        return to_working_size(torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2), self.clips)


WAYS = {"store": ClipDataset, "files": FileClips, "source": SourceClips, "npy": ArrayClips}


def _write_all_ways(root: Path) -> Store:
    """The same videos as a store, as files, as arrays, and as they were: h264 and mpeg4."""
    folder = root / "all"
    for video in range(VIDEOS):
        frames = draw_texture(FRAMES, 340, 256, video)[..., ::-1]
        kind = ("mp4", "libx264", {"preset": "medium", "crf": "21"})
        if video % 2:
            kind = ("avi", "mpeg4", {"qmin": "3", "qmax": "3"})
        write_video(folder / "videos" / "a" / f"{video:04}.{kind[0]}", frames, 25, kind[1], options=kind[2])
    listing = scan_folder(folder / "videos", 0.2)
    prepare_parts(listing, folder, "all", ("rgb",), DataSettings(short_side=0), workers=1)
    store = Store.open(folder / "rgb.h5")
    (folder / "arrays").mkdir()
    for place, row in enumerate(store.videos):
        (folder / "jpegs" / row.name).mkdir(parents=True)
        jpegs = store.frames(place, 0, row.frames)
        for number, jpeg in enumerate(jpegs):
            jpeg.tofile(folder / "jpegs" / row.name / f"{number:06}.jpg")
        np.save(folder / "arrays" / f"{row.name}.npy", _decode(list(jpegs)).permute(0, 2, 3, 1).numpy())
    store.close()
    return store


def _memory_mb() -> tuple[float, float]:
    """The most resident, and the most of its own share, that a loading process has now."""
    found = []
    for process in multiprocessing.active_children():
        text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        kilobytes = [int(re.search(rf"^{key}:\s+(\d+)", text, re.M)[1]) for key in ("Rss", "Pss")]  # type: ignore[index]
        found.append(tuple(round(count / 1024) for count in kilobytes))
    return max(found)


def _loaders(root: Path, batches: int) -> None:
    """Clips per second of the training loader's path, each way."""
    store = _write_all_ways(root)
    clips = ClipSettings(length=LENGTH)
    sets = {way: kind(store, range(VIDEOS), clips, "official", 0) for way, kind in WAYS.items()}
    for key in [(video, 1, 1) for video in range(VIDEOS)]:
        expected = sets["store"][key][0]
        for way in ("files", "npy"):
            assert torch.equal(sets[way][key][0], expected), way
        apart = (sets["source"][key][0].float() - expected.float()).abs().mean()
        assert apart < 3, f"another window: {apart:.1f} of 255 on average"
    store.close()
    for workers in (1, 2):
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        memory: dict[str, tuple[float, float]] = {}
        for _ in range(3):
            for way, dataset in sets.items():
                order = [keys for epoch in range(1, 99) for keys in training_order(VIDEOS, 4, 0, epoch, 1)]
                loading = load(dataset, order, workers)
                for _ in range(2 * workers):  # until the processes have started
                    next(loading)
                before = time.perf_counter()
                for _ in range(batches):
                    next(loading)
                seconds[way].append((time.perf_counter() - before) / (4 * batches))
                memory[way] = _memory_mb()
                loading.close()
        best = {way: min(values) for way, values in seconds.items()}
        result: dict[str, Any] = {"what": "loader", "workers": workers}
        result |= {f"{way}_clips_per_sec": round(1 / value, 2) for way, value in best.items()}
        result |= {
            f"store_against_{way}": round(best[way] / best["store"], 2) for way in WAYS if way != "store"
        }
        result |= {f"{way}_rss_pss_mb": sizes for way, sizes in memory.items()}
        print(json.dumps(result), flush=True)


def main() -> None:
    """Prints one JSON object per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clips", type=int, default=60)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--loader-only", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:  # a disk, where /tmp may be memory
        root = Path(name)
        _loaders(root, options.batches)
        if options.loader_only:
            return
        _write(root)
        store = Store.open(root / "mine" / "rgb.h5")

        def files(video: int, start: int) -> list[np.ndarray]:
            folder = f"{root}/jpegs/{video:04}"
            return [
                np.fromfile(f"{folder}/{place:06}.jpg", np.uint8) for place in range(start, start + LENGTH)
            ]

        def kept(video: int, start: int) -> list[np.ndarray]:
            frames = store.frames(video, start, LENGTH)
            assert isinstance(frames, list)
            return frames

        def opened(video: int, start: int) -> list[np.ndarray]:
            store.close()
            return kept(video, start)

        ways: dict[str, Callable[[int, int], list[np.ndarray]]] = {
            "files": files,
            "store, open": opened,
            "store, kept": kept,
        }
        for decoded in (False, True):
            for cold in (False, True):
                times: dict[str, list[float]] = {way: [] for way in ways}
                for _ in range(options.clips):
                    video, start = int(rng.integers(VIDEOS)), int(rng.integers(FRAMES - LENGTH + 1))
                    expected = b"".join(frame.tobytes() for frame in files(video, start))
                    for way, read in ways.items():
                        store.close()
                        kept(video, start)  # warm, and open; "open" then closes one part, as in training
                        if cold:
                            _drop(root, video)
                        before = time.perf_counter()
                        jpegs = read(video, start)
                        if decoded:
                            _decode(jpegs)
                        times[way].append(time.perf_counter() - before)
                        assert b"".join(frame.tobytes() for frame in jpegs) == expected
                medians = {way: float(np.median(values)) for way, values in times.items()}
                result = {"what": "decoded clip" if decoded else "bytes", "cache": "cold" if cold else "warm"}
                result |= {f"{way}_ms": f"{1e3 * value:.2f}" for way, value in medians.items()}
                result |= {
                    f"{way}_ratio": f"{medians['files'] / medians[way]:.2f}" for way in ways if way != "files"
                }
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
