"""What `gkd prepare` will take, foretold from a few videos that are really prepared, in a temporary folder.

Two samples, one within the other: many videos are only opened, which tells their lengths; a few of these are
prepared by as many processes as the run will have. What a video comes to is set in proportion to a guess made
from its length and size in pixels, and the whole to the sum of the guesses.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import numpy as np

from gkdcli.data.jobs import Cut, Job, Result, work
from gkdcli.data.parts import STREAMS, jpeg_bytes, read_attributes
from gkdcli.data.workers import Crew
from gkdcli.errors import GkdError
from gkdcli.settings import CHANNELS

_CUT = Cut(frames=300, seconds=1.5)  # of a long video
_OPENED = 2000  # videos at most, and no longer than this:
_OPENING_SEC = 4.0
_MEASURING_SEC = 12.0
_LATEST_SEC = 40.0  # those in work then are given up
_STRATA = 8
_ENOUGH = 16  # videos, if they agree within
_CLOSE = 0.03  # of the estimate
_SHARE = 0.25  # of what the run itself will take is the most that a forecast may
_UNSTEADY = 0.1  # of the time: how much the same work differs from one minute to the next; and
_BUSY = 0.4  # of the share of it in which the processes waited, for cores that others use or for the disk
_POLL_SEC = 0.2
_HELD_BYTES = 16 << 20  # see `parts`: of one stream in memory
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Forecast:
    """What the run will come to; four of five should end between `low` and `high`.

    Args:
        videos: to be prepared.
        frames: stored ones, of all videos.
        seconds: of wall-clock time with these workers; `seconds_low` and `seconds_high`: its range.
        core_seconds: of all workers together.
        bytes: of all parts; `bytes_low` and `bytes_high`: its range.
        bytes_by_modality: the same, divided.
        memory_bytes: at the peak, of the workers and of this process.
        workers: that the run will have.
        sampled_videos: that were prepared for this.
        opened_videos: whose lengths were read.
    """

    videos: int
    frames: int = 0
    seconds: float = 0.0
    seconds_low: float = 0.0
    seconds_high: float = 0.0
    core_seconds: float = 0.0
    bytes: int = 0
    bytes_low: int = 0
    bytes_high: int = 0
    bytes_by_modality: Mapping[str, int] = field(default_factory=dict)
    memory_bytes: int = 0
    workers: int = 0
    sampled_videos: int = 0
    opened_videos: int = 0

    def row(self) -> dict[str, Any]:
        """For a result: flat, in the order above."""
        row = asdict(self)
        row |= {f"{name}_bytes": size for name, size in row.pop("bytes_by_modality").items()}
        return {key: round(value, 1) if isinstance(value, float) else value for key, value in row.items()}


@dataclass(frozen=True)
class _Measured:
    """What a worker tells: sizes of parts, and of the images in them; seconds to read them for the index."""

    result: Result
    sizes: Mapping[str, int]
    images: Mapping[str, int]
    index_sec: float
    cpu_share: float
    memory_bytes: int


@dataclass(frozen=True)
class _Opened:
    """A video whose length is known: `weight` videos are like it, `guess` is of its bytes."""

    job: Job
    weight: float
    frames: float
    guess: float


@dataclass(frozen=True)
class _Whole:
    """What a sampled video comes to, as a whole where only its beginning was prepared."""

    seconds: float
    sizes: Mapping[str, float]
    frames: float
    index_sec: float
    cpu_share: float
    cut: bool

    def value(self, quantity: str, modality: str) -> float:
        """A field, or as `size` that of one part or of all."""
        if quantity == "size":
            return sum(size for key, size in self.sizes.items() if modality in ("", key))
        return float(getattr(self, quantity))


def forecast(jobs: Sequence[Job], workers: int, seed: int = 0) -> Forecast:
    """Prepares a few videos in the system's temporary folder, and leaves nothing there.

    Args:
        jobs: all that is to be prepared.
        workers: processes that the run will have.
        seed: of the samples.

    Raises:
        GkdError: the temporary folder cannot be written to.
    """
    if not jobs:
        return Forecast(0)
    workers = min(workers, len(jobs))
    jobs = sorted(jobs, key=lambda job: (job.size, str(job.source.path)))
    try:
        with TemporaryDirectory(prefix="gkd-forecast-") as folder, Crew(_measure, workers) as crew:
            lengths, start_sec = _lengths(crew, jobs, seed)
            sample = _Sample(_opened(jobs, lengths), len(jobs), workers, start_sec)
            if sample.videos:
                sample.measure(crew, Path(folder), seed)
            return sample.forecast()
    except OSError as error:
        raise GkdError(
            "no video can be prepared in the temporary folder, so there is no forecast",
            f"{error.filename or gettempdir()}: {error.strerror or error}",
            "name another folder in the variable TMPDIR",
        ) from None


def _measure(job: Job) -> _Measured:
    """In a worker: opens a video, or prepares it and removes the parts again."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work(job)
    share = min((time.process_time() - cpu) / (time.perf_counter() - wall), 1.0)
    sizes: dict[str, int] = {}
    images: dict[str, int] = {}
    index_sec = 0.0
    if not (job.probe_only or result.reason or result.failure or result.unchanged):
        for modality, part in job.parts.items():
            started = time.perf_counter()
            attributes = read_attributes(part)
            index_sec += time.perf_counter() - started
            sizes[modality] = part.stat().st_size
            pixels = int(attributes["frame_count"] * attributes["width"] * attributes["height"])
            images[modality] = jpeg_bytes(part) or pixels * CHANNELS[modality]
            part.unlink()
    return _Measured(result, sizes, images, index_sec, share, peak_memory())


def peak_memory() -> int:
    """The most that this process ever held, in bytes."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):  # of this program; getrusage counts what it was forked from
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def spread(weights: Sequence[float], seed: int) -> Iterator[int]:
    """Positions in a row without end, each as often as its weight asks, from a start that the seed chooses.

    However many are taken, they are spread evenly.
    """
    ends = np.cumsum(weights)
    place = float(np.random.default_rng(seed).random())
    while True:
        yield int(np.searchsorted(ends, place * ends[-1], side="right"))
        place = (place + _GOLDEN) % 1.0


def _through(
    crew: Crew[Job, _Measured], jobs: Iterable[Job], more: Callable[[], bool], latest_sec: float
) -> Iterator[tuple[Job, _Measured, float]]:
    """Hands out jobs while there should be more; yields each with its outcome and the seconds it took."""
    waiting = iter(jobs)
    job = next(waiting, None)
    given: dict[int, tuple[Job, float]] = {}
    latest = time.perf_counter() + latest_sec
    while (job is not None and more()) or crew.busy:
        while job is not None and more():
            given[id(job)] = job, time.perf_counter()
            if not crew.give(job):
                break
            job = next(waiting, None)
        for done, outcome in crew.collect(_POLL_SEC):
            # a crash is found again by the run; what was given up before may come in late
            if isinstance(outcome, _Measured) and id(done) in given:
                yield done, outcome, time.perf_counter() - given[id(done)][1]
        if time.perf_counter() > latest:
            return


def _lengths(crew: Crew[Job, _Measured], jobs: Sequence[Job], seed: int) -> tuple[dict[int, Result], float]:
    """What opening says of as many videos as time allows; and how long the processes took to start."""
    draws = spread([1.0] * len(jobs), seed)
    order = list(dict.fromkeys(next(draws) for _ in range(3 * min(len(jobs), _OPENED))))
    order += sorted(set(range(len(jobs))) - set(order)) if len(jobs) <= _OPENED else []
    probes = [replace(jobs[place], probe_only=True) for place in order[:_OPENED]]
    places = {id(probe): place for probe, place in zip(probes, order, strict=False)}
    lengths: dict[int, Result] = {}
    started, start_sec = time.perf_counter(), 0.0

    def more() -> bool:
        return time.perf_counter() - started < start_sec + _OPENING_SEC

    for probe, outcome, seconds in _through(crew, probes, more, _LATEST_SEC):
        start_sec = start_sec or seconds
        lengths[places[id(probe)]] = outcome.result
    return lengths, start_sec


def _opened(jobs: Sequence[Job], lengths: Mapping[int, Result]) -> list[_Opened]:
    """The videos whose length is known, in order of size, each standing for others of its size."""
    known = [place for place in sorted(lengths) if lengths[place].frames]
    size = sum(jobs[place].size for place in known)
    frames, guess = (
        sum(getattr(lengths[place], name) for place in known) / max(size, 1) for name in ("frames", "bytes")
    )
    found = []
    for stratum in np.array_split(np.arange(len(jobs)), min(_STRATA, len(jobs))):
        members = [int(place) for place in stratum if int(place) in lengths]
        total = sum(jobs[int(place)].size for place in stratum)
        weight = total / max(sum(jobs[place].size for place in members), 1)
        for place in members:
            result, job = lengths[place], jobs[place]
            if result.reason or not job.size:
                continue
            if result.frames:
                found.append(_Opened(job, weight, result.frames, max(result.bytes, 1)))
            else:  # the container does not say: as in others of its size, or wholly unknown
                found.append(_Opened(job, weight, job.size * frames, job.size * (guess or 1.0)))
    return found


class _Sample:
    """The videos that are prepared, drawn from `videos` that stand for `count`, and what they say of all."""

    def __init__(self, videos: list[_Opened], count: int, workers: int, start_sec: float) -> None:
        self.videos = videos
        self._count = count
        self._workers = workers
        self._start_sec = start_sec
        self._guess = sum(video.weight * video.guess for video in videos)
        self._drawn: list[int] = []
        self._found: dict[int, _Whole] = {}
        self._sizes: dict[str, int] = {}  # of the largest part that was written, by modality
        self._memory = 0

    def measure(self, crew: Crew[Job, _Measured], folder: Path, seed: int) -> None:
        """Prepares videos until they agree, or time is over."""
        started = time.perf_counter()
        places: dict[int, int] = {}
        jobs: list[Job] = []

        def more() -> bool:
            spent = time.perf_counter() - started
            return spent < _MEASURING_SEC and not self._suffice(spent)

        for job, outcome, seconds in _through(crew, self._jobs(folder, seed, places), more, _LATEST_SEC):
            if outcome.result.failure:
                raise OSError(outcome.result.failure)
            place = places[id(job)]
            jobs.append(job)  # kept: its id must stay its own
            self._memory = max(self._memory, outcome.memory_bytes)
            self._sizes |= {key: max(size, self._sizes.get(key, 0)) for key, size in outcome.sizes.items()}
            self._found[place] = _whole(self.videos[place], outcome, seconds)

    def _jobs(self, folder: Path, seed: int, places: dict[int, int]) -> Iterator[Job]:
        """Videos not yet drawn, long ones cut; their places are noted by the identity of the job."""
        draws = spread([video.weight * video.guess for video in self.videos], seed)
        known: set[int] = set()
        for _ in range(50 * len(self.videos)):
            place = next(draws)
            self._drawn.append(place)
            if place in known:
                continue
            known.add(place)
            video = self.videos[place]
            parts = {modality: folder / f"{place}-{modality}.h5" for modality in video.job.parts}
            job = replace(video.job, parts=parts, beside=None, cut=_CUT if video.frames else None)
            places[id(job)] = place
            yield job

    def _suffice(self, spent_sec: float) -> bool:
        if len(self._found) < _ENOUGH:
            return False
        (seconds, about), (size, nearly) = self._total("seconds"), self._total("size")
        close = about <= _CLOSE * seconds and nearly <= _CLOSE * size
        return close or spent_sec > _SHARE * seconds / self._workers

    def _total(self, quantity: str, modality: str = "") -> tuple[float, float]:
        """Of all videos, and half the width of an 80 % interval."""
        found = self._found
        values = {place: whole.value(quantity, modality) for place, whole in found.items()}
        whole = sum(not video.cut for video in found.values())
        if whole == self._count:
            return sum(values.values()), 0.0
        draws = [place for place in self._drawn if place in found]
        ratios = np.array([values[place] / self.videos[place].guess for place in draws])  # (draws,)
        total = self._guess * float(ratios.mean())
        if len(found) == 1:
            return total, total / 2
        student = 1.28 + 1 / (len(found) - 1)
        error = float(ratios.std(ddof=1)) * math.sqrt((1 - whole / self._count) / len(found))
        return total, student * self._guess * error

    def forecast(self) -> Forecast:
        """The estimates."""
        workers, said = self._workers, sum(video.weight * video.frames for video in self.videos)
        if not self._found:
            return Forecast(self._count, round(said), workers=workers, opened_videos=len(self.videos))
        seconds, about = self._total("seconds")
        size, nearly = self._total("size")
        longest = max(video.guess for video in self.videos) / self._guess  # share of the whole
        wall = max(seconds / workers, longest * seconds) + self._start_sec + self._total("index_sec")[0]
        waited = 1 - float(np.mean([whole.cpu_share for whole in self._found.values()]))
        about = math.hypot(about / workers, (_UNSTEADY + _BUSY * waited) * wall)
        sizes = {modality: self._total("size", modality)[0] for modality in self.videos[0].job.parts}
        return Forecast(
            videos=self._count,
            frames=round(self._frames(said)),
            seconds=wall,
            seconds_low=wall - about,
            seconds_high=wall + about,
            core_seconds=seconds,
            bytes=round(size),
            bytes_low=round(size - nearly),
            bytes_high=round(size + nearly),
            bytes_by_modality={modality: round(total) for modality, total in sizes.items()},
            memory_bytes=workers * (self._memory + self._held(sizes, longest)) + peak_memory(),
            workers=workers,
            sampled_videos=len(self._found),
            opened_videos=len(self.videos),
        )

    def _frames(self, said: float) -> float:
        """What the containers say, corrected by how far they are from the truth."""
        pairs = [(whole.frames, self.videos[place].frames) for place, whole in self._found.items()]
        if not all(stated for _, stated in pairs):
            return self._total("frames")[0]
        return said * sum(frames for frames, _ in pairs) / sum(stated for _, stated in pairs)

    def _held(self, sizes: Mapping[str, float], longest: float) -> int:
        """What a worker holds of the longest video, beyond what it held of those prepared here."""
        if self.videos[0].job.data.storage == "raw":
            return 0
        more = 0.0
        for modality, total in sizes.items():
            streams = len(STREAMS[modality])
            most, seen = (
                min(size / streams, _HELD_BYTES) for size in (total * longest, self._sizes.get(modality, 0))
            )
            more += streams * 2 * max(most - seen, 0)  # once as they come, once as they are written
        return round(more)


def _whole(video: _Opened, outcome: _Measured, seconds: float) -> _Whole:
    result = outcome.result
    cut = bool(video.frames) and (result.frames >= _CUT.frames or result.frame_sec >= _CUT.seconds)
    cut = cut and video.frames > result.frames
    times = video.frames / result.frames if cut else 1.0
    return _Whole(
        seconds + result.frame_sec * (times - 1),
        {key: size + outcome.images[key] * (times - 1) for key, size in outcome.sizes.items()},
        result.frames * times,
        outcome.index_sec,
        outcome.cpu_share,
        cut,
    )
