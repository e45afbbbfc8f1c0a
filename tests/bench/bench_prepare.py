"""Frames per CPU-second of `gkd prepare` against the plain way: OpenCV capture, resize, imwrite, one thread.

    python tests/bench/bench_prepare.py [--videos DIR [--together]] [--copies N] [--rounds N] [--parts-only]

Both sides run in one spawned process each, in turns, on the same files, at the same size and JPEG quality;
start-up, hashing, HDF5 and fsync are counted. The best round of each counts. Without DIR two kinds of
files are drawn: h264 340x256 and mpeg4 320x240. "two_workers_gain" is of wall-clock time.

"parts": decoding alone, then scaling alone, then JPEG encoding alone, and what a worker does with the same
files, all in one process and in turns. The shares say how much of the whole the three parts make up: of a
worker's time, and of that of a run, processes started and index written; of two workers, half the wall clock.
A run should last for a minute, or the start of its processes, a second, is what is measured.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np

from gkdcli.data.annotations import Listing, Source
from gkdcli.data.extract import prepare_parts
from gkdcli.data.jobs import Job, work
from gkdcli.data.store import Store
from gkdcli.data.video import VideoReader
from gkdcli.settings import DataSettings
from tests.videos import psnr, write_video

QUALITY = 95


def plain(videos: list[Path], folder: Path) -> None:
    """The reference: a folder of JPEG files per video."""
    cv2.setNumThreads(1)
    for number, path in enumerate(videos):
        (folder / str(number)).mkdir(parents=True)
        capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        place = 0
        while True:
            ok, frame = capture.read()
            if not ok:
                break
            cv2.imwrite(f"{folder}/{number}/{place:06}.jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
            place += 1


def _cpu_sec() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _measured(action: Callable[[], object]) -> tuple[float, float]:
    """CPU and wall-clock seconds."""
    cpu, wall = _cpu_sec(), time.perf_counter()
    action()
    return _cpu_sec() - cpu, time.perf_counter() - wall


def _plainly(videos: list[Path], folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    process = multiprocessing.get_context("spawn").Process(target=plain, args=(videos, folder))
    process.start()
    process.join()


def _ours(videos: list[Path], folder: Path, workers: int, short_side: int = 0) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    sources = [Source(path, "a", f"{number:04}", {1: "train"}) for number, path in enumerate(videos)]
    data = DataSettings(short_side=short_side, jpeg_quality=QUALITY)
    report = prepare_parts(Listing(["a"], sources), folder, "bench", ("rgb",), data, workers=workers)
    assert not report.rejected, report.rejected


def draw_texture(count: int, width: int, height: int, seed: int) -> np.ndarray:
    """Smooth noise that pans: about as hard to code as filmed video; (count, height, width, 3)."""
    rng = np.random.default_rng(seed)
    field = np.zeros((height + count, width + count, 3))
    for scale, weight in ((64, 90), (16, 40), (4, 16), (1, 5)):
        small = rng.normal(size=(field.shape[0] // scale + 2, field.shape[1] // scale + 2, 3)) * weight
        field += cv2.resize(small, (field.shape[1], field.shape[0]), interpolation=cv2.INTER_CUBIC)
    field = np.clip(field + 128, 0, 255)
    steps = (np.cumsum(rng.uniform(0, 1, (count, 2)), 0)).astype(int)
    return np.stack([field[y : y + height, x : x + width] for y, x in steps]).astype(np.uint8)


def _drawn(folder: Path) -> dict[str, Path]:
    h264 = {"preset": "medium", "crf": "21"}
    return {
        "h264 340x256": write_video(folder / "a.mp4", draw_texture(300, 340, 256, 0), 30, options=h264),
        "mpeg4 320x240": write_video(
            folder / "a.avi",
            draw_texture(164, 320, 240, 1),
            codec="mpeg4",
            options={"qmin": "3", "qmax": "3"},
        ),
    }


def _decoded(path: Path) -> Iterator[av.VideoFrame]:
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "SLICE"
        container.streams.video[0].codec_context.thread_count = 1
        yield from container.decode(video=0)


def parts_alone(videos: list[Path], folder: Path, short_side: int, connection: Connection) -> None:
    """Sends (CPU, wall-clock) seconds of decoding, scaling, encoding, each by itself, and of a whole job."""
    cv2.setNumThreads(1)
    data = DataSettings(short_side=short_side, jpeg_quality=QUALITY)
    quality = [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
    scaler = av.video.reformatter.VideoReformatter()
    spent = np.zeros((4, 2))

    def timed(part: int, found: Iterable[Any]) -> list[Any]:
        before = time.process_time(), time.perf_counter()
        kept = list(found)
        spent[part] += np.subtract((time.process_time(), time.perf_counter()), before)
        return kept

    for path in videos:
        with VideoReader(path) as video:
            method, width, height = video.scaling(data)
        how = {"interpolation": "BICUBIC" if method == "bicubic" else "AREA", "threads": 1}
        timed(0, (None for _ in _decoded(path)))  # held frames would cost page faults
        frames = list(_decoded(path))
        scaled = (scaler.reformat(frame, width, height, "bgr24", **how).to_ndarray() for frame in frames)
        pictures = timed(1, scaled)
        timed(2, (cv2.imencode(".jpg", picture, quality)[1] for picture in pictures))
        source = Source(path, "a", path.stem, {1: "train"})
        job = Job(source, {"rgb": folder / "alone.h5"}, data, path.stat().st_size)
        (result,) = timed(3, (work(job) for _ in range(1)))
        assert not result.reason, result
    connection.send(spent.tolist())


def _alone(videos: list[Path], folder: Path, short_side: int) -> np.ndarray:
    """(decoding, scaling, encoding, a worker's job) x (CPU, wall-clock) seconds."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=parts_alone, args=(videos, folder, short_side, theirs))
    process.start()
    spent = np.array(ours.recv())
    process.join()
    return spent


def _shares(videos: list[Path], folder: Path, short_side: int, rounds: int) -> dict[str, object]:
    """What the parts alone make up of the whole, the least of some rounds in turns."""
    alone, one, two = [], [], []
    for _ in range(rounds):
        alone.append(_alone(videos, folder, short_side))
        one.append(_measured(lambda: _ours(videos, folder, 1, short_side)))
        two.append(_measured(lambda: _ours(videos, folder, 2, short_side)))
    *parts, job = np.min(alone, 0)  # (2,) each
    (one_cpu, one_wall), (two_cpu, two_wall) = np.min(one, 0), np.min(two, 0)
    cpu, wall = np.sum(parts, 0)
    frames = sum(row.frames for row in Store.open(folder / "rgb.h5").videos)
    return {
        "short_side": short_side,
        "frames": frames,
        **{
            f"{name}_ms": round(1e3 * part[0] / frames, 3)
            for name, part in zip(("decode", "scale", "encode", "worker"), [*parts, job], strict=True)
        },
        "run_ms": round(1e3 * one_cpu / frames, 3),
        "cpu_share_of_worker": round(cpu / job[0], 3),
        "wall_share_of_worker": round(wall / job[1], 3),
        "cpu_share": round(cpu / one_cpu, 3),
        "cpu_share_two_workers": round(cpu / two_cpu, 3),
        "wall_share": round(wall / one_wall, 3),
        "wall_share_two_workers": round(wall / 2 / two_wall, 3),
    }


def _check(video: Path, jpegs: Path, store: Path) -> tuple[float, float, float, float]:
    """Equal frames and sizes; mean PSNR against the decoded source, and KB per frame, of both."""
    reader = Store.open(store / "rgb.h5")
    row = reader.videos[0]
    files = sorted((jpegs / "0").iterdir())
    assert len(files) == row.frames, (len(files), row.frames)
    stored = reader.frames(0, 0, row.frames)
    scores = []
    with av.open(str(video)) as container:
        for place, frame in enumerate(container.decode(video=0)):
            source = frame.to_ndarray(format="bgr24")
            theirs = cv2.imread(str(files[place]))
            ours = cv2.imdecode(np.asarray(stored[place]), cv2.IMREAD_COLOR)
            assert theirs.shape == ours.shape == source.shape
            scores.append((psnr(theirs, source), psnr(ours, source)))
    plain_db, ours_db = np.mean(scores, 0)
    assert ours_db > plain_db - 0.3, (plain_db, ours_db)
    plain_kb = sum(path.stat().st_size for path in files) / len(files) / 1e3
    return plain_db, ours_db, plain_kb, sum(map(len, stored)) / len(files) / 1e3


def main() -> None:
    """Prints one JSON object per kind of video."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--videos", type=Path, help="measure on the files of this folder, each by itself")
    parser.add_argument("--together", action="store_true", help="all of them as one set")
    parser.add_argument("--copies", type=int, default=12, help="how often each file is prepared per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts-only", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        if options.videos:
            files = {path.name: path for path in sorted(options.videos.iterdir()) if path.is_file()}
        else:
            files = _drawn(work)
        sets = {title: [path] for title, path in files.items()}
        if options.together:
            sets = {f"{len(files)} files": list(files.values())}
        for title, paths in sets.items():
            videos = paths * options.copies
            for short_side in (0, 128):
                shares = _shares(videos, work / "store", short_side, options.rounds)
                print(json.dumps({"video": title, "parts": shares}), flush=True)
            if options.parts_only:
                continue
            rounds = []
            for _ in range(options.rounds):
                theirs = _measured(lambda videos=videos: _plainly(videos, work / "jpegs"))
                ours = _measured(lambda videos=videos: _ours(videos, work / "store", 1))
                two = _measured(lambda videos=videos: _ours(videos, work / "store", 2))
                rounds.append((theirs[0], ours[0], ours[1], two[1]))
            plain_cpu, ours_cpu, one_wall, two_wall = np.min(rounds, 0)
            plain_db, ours_db, plain_kb, ours_kb = _check(videos[0], work / "jpegs", work / "store")
            frames = sum(row.frames for row in Store.open(work / "store" / "rgb.h5").videos)
            result = {
                "video": title,
                "frames": frames,
                "plain_frames_per_cpu_sec": round(frames / plain_cpu),
                "gkd_frames_per_cpu_sec": round(frames / ours_cpu),
                "ratio": round(plain_cpu / ours_cpu, 3),
                "two_workers_gain": round(one_wall / two_wall, 2),
                "plain_db": round(float(plain_db), 2),
                "gkd_db": round(float(ours_db), 2),
                "plain_kb_per_frame": round(plain_kb, 1),
                "gkd_kb_per_frame": round(ours_kb, 1),
            }
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
