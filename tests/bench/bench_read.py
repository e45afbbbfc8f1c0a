"""A random clip of 64 frames out of the store against 64 JPEG files: bytes, and the decoded clip.

    python tests/bench/bench_read.py [--clips N]

Warm: the files are in the page cache. Cold: they were dropped from it before each clip. "open" counts
opening the part, as when every clip is of another video; "kept" reads from a part that is open already.
Decoding is torchvision's, one thread, the same for both. Equal bytes are asserted. Medians.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from torchvision.io import decode_jpeg

from gkdcli.data.annotations import Listing, Source
from gkdcli.data.parts import PartWriter, part_path
from gkdcli.data.store import Store, build_index
from tests.bench.bench_prepare import draw_texture

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


def main() -> None:
    """Prints one JSON object per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clips", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:  # a disk, where /tmp may be memory
        root = Path(name)
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
