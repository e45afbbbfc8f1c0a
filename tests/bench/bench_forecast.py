"""What `gkd prepare --dry-run` foretells against what the run comes to: seconds, bytes, frames, memory.

    python tests/bench/bench_forecast.py [--clips N] [--rounds N] [--videos DIR] [--modality rgb|flow|both]

Clips are drawn as UCF101's are made: mpeg4, 320x240, 25 frames per second, moving textures of differing
contrast; their lengths are those of its published lists, or where these are absent, of a like distribution.
Each round foretells and then runs, one right after the other; ratios are foretold / real. DIR keeps clips.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import tempfile
import threading
import time
from pathlib import Path

import cv2
import numpy as np

from gkdcli.data.annotations import scan_folder
from gkdcli.data.extract import plan_run, prepare_parts
from gkdcli.data.forecast import forecast, peak_memory
from gkdcli.data.workers import available_cores
from gkdcli.settings import DataSettings
from tests.videos import write_video

LISTS = Path(__file__).parents[3] / "shared/data/annotations/ucf101/two_stream_lists"


def lengths(count: int, seed: int = 0) -> list[int]:
    """Frames of so many clips, drawn from the lists."""
    rng = np.random.default_rng(seed)
    files = [LISTS / "train_rgb_split1.txt", LISTS / "val_rgb_split1.txt"]
    if all(file.is_file() for file in files):
        known = [int(line.split()[1]) for file in files for line in file.read_text().splitlines() if line]
        return [int(frames) for frames in rng.choice(known, count, replace=False)]
    return [int(frames) for frames in np.clip(rng.lognormal(np.log(168), 0.48, count), 29, 1776)]


def draw_clip(frames: int, seed: int) -> np.ndarray:
    """(frames, 240, 320, 3): a texture that pans, of its own contrast, and a patch that crosses it."""
    rng = np.random.default_rng(seed)
    field = np.zeros((240 + 96, 320 + 96, 3))
    contrast = rng.uniform(0.3, 1.3)
    for scale, weight in ((64, 90), (16, 40), (4, 16), (1, 5)):
        shape = (field.shape[0] // scale + 2, field.shape[1] // scale + 2, 3)
        small = rng.normal(size=shape) * weight * contrast
        field += cv2.resize(small, (field.shape[1], field.shape[0]), interpolation=cv2.INTER_CUBIC)
    picture = np.clip(field + rng.uniform(80, 170), 0, 255).astype(np.uint8)
    steps = 48 + 48 * np.sin(np.cumsum(rng.uniform(0, 0.05, (frames, 2)), 0))
    clip = np.stack([picture[y : y + 240, x : x + 320] for y, x in steps.astype(int)])
    patch = picture[:60, :60][::-1, ::-1]
    for place, column in enumerate((np.arange(frames) * rng.uniform(0.5, 4)).astype(int) % 260):
        clip[place, 90:150, column : column + 60] = patch
    return clip


def draw_folder(folder: Path, count: int) -> None:
    """Draws the clips that are not there."""
    for number, frames in enumerate(lengths(count)):
        path = folder / f"class{number % 10}" / f"clip{number:05}.avi"
        if not path.exists():
            temporary = path.with_suffix(".part.avi")
            options = {"qmin": "3", "qmax": "5", "b": "600000"}
            write_video(temporary, draw_clip(frames, number), codec="mpeg4", options=options)
            temporary.rename(path)


class _Watched:
    """The peak memory of this process and of those it starts, looked at ten times a second."""

    def __enter__(self) -> _Watched:
        self._peaks: dict[int, int] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            for process in multiprocessing.active_children():
                try:
                    text = Path(f"/proc/{process.pid}/status").read_text()
                except OSError:
                    continue
                if found := [line for line in text.splitlines() if line.startswith("VmHWM:")]:
                    self._peaks[process.pid or 0] = int(found[0].split()[1]) * 1024

    @property
    def peak(self) -> int:
        return sum(self._peaks.values()) + peak_memory()


def main() -> None:
    """Prints one JSON object per round, and one of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clips", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--videos", type=Path, help="keep the clips here, or take what is here")
    parser.add_argument("--modality", choices=["rgb", "flow", "both"], default="rgb")
    parser.add_argument("--flow", choices=["tvl1", "dis", "farneback"], default="farneback")
    parser.add_argument("--workers", type=int, default=available_cores())
    parser.add_argument("--draw-only", action="store_true")
    options = parser.parse_args()
    modalities = ("rgb", "flow") if options.modality == "both" else (options.modality,)
    data = DataSettings(short_side=0, flow=options.flow)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:  # a disk, where /tmp may be memory
        videos = options.videos or Path(name) / "videos"
        draw_folder(videos, options.clips)
        if options.draw_only:
            return
        listing = scan_folder(videos, 0.2)
        ratios: dict[str, list[float]] = {"seconds": [], "bytes": [], "frames": [], "memory_bytes": []}
        for number in range(options.rounds):
            store = Path(name) / "store"
            shutil.rmtree(store, ignore_errors=True)
            started = time.perf_counter()
            told = forecast(plan_run(listing, store, modalities, data).jobs, options.workers, seed=number)
            took = time.perf_counter() - started
            with _Watched() as memory:
                report = prepare_parts(listing, store, "bench", modalities, data, workers=options.workers)
            assert not report.rejected, report.rejected
            real = {
                "seconds": round(report.seconds, 1),
                "bytes": report.bytes_written,
                "frames": report.frames,
                "memory_bytes": memory.peak,
            }
            for key, value in real.items():
                ratios[key].append(told.row()[key] / value)
            result = {"forecast_sec": round(took, 1), "foretold": told.row(), "real": real}
            result["ratio"] = {key: round(values[-1], 3) for key, values in ratios.items()}
            result["in_range"] = {
                key: told.row()[f"{key}_low"] <= real[key] <= told.row()[f"{key}_high"]
                for key in ("seconds", "bytes")
            }
            print(json.dumps(result), flush=True)
        print(json.dumps({f"median_{key}_ratio": round(float(np.median(r)), 3) for key, r in ratios.items()}))


if __name__ == "__main__":
    main()
