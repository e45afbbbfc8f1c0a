"""data.forecast: what a run will take, from a few videos prepared elsewhere; nothing is left of them."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gkdcli.data import forecast as module
from gkdcli.data.annotations import scan_folder
from gkdcli.data.extract import plan_run, prepare_parts
from gkdcli.data.forecast import Forecast, forecast, spread
from gkdcli.data.jobs import Cut
from gkdcli.pipeline import prepare as pipeline
from gkdcli.settings import MODALITIES, DataSettings
from tests.videos import draw, write_video

DATA = DataSettings(short_side=0, flow="farneback")
COUNT = 40


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's temporary folder, as far as this process knows."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is, samples are of the same size: no more than the sixteen that are needed."""
    for name in ("_OPENING_SEC", "_MEASURING_SEC", "_LATEST_SEC"):
        monkeypatch.setattr(module, name, 500.0)
    monkeypatch.setattr(module, "_SHARE", 0.0)
    monkeypatch.setattr(module, "_CUT", Cut(300, 500.0))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of 6 to 60 frames, plain and noisy ones, in two sizes and two codecs."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        frames = draw(int(rng.integers(6, 61)), *((64, 48), (96, 80))[number % 2], seed=number)
        noise = rng.integers(-30, 31, frames.shape) * (number % 5) // 4
        frames = np.clip(frames + noise, 0, 255).astype(np.uint8)
        kind = (("mp4", "libx264"), ("avi", "mpeg4"))[number // 2 % 2]
        write_video(folder / f"class{number % 4}" / f"v{number}.{kind[0]}", frames, codec=kind[1])
    return folder


def _told(videos: Path, store: Path, modalities: tuple[str, ...] = ("rgb",), workers: int = 2) -> Forecast:
    return forecast(plan_run(scan_folder(videos, 0.2), store, modalities, DATA).jobs, workers)


def _tree(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_disk_and_frames_are_foretold_from_less_than_half_of_the_videos(
    videos: Path, tmp_path: Path, temporary: Path
) -> None:
    before, listing = _tree(videos), scan_folder(videos, 0.2)
    told = _told(videos, tmp_path / "mine", ("rgb", "flow"))
    assert not any(temporary.iterdir()), "the parts that were made for this are gone"
    assert not (tmp_path / "mine").exists()
    assert _tree(videos) == before
    assert 16 <= told.sampled_videos < COUNT / 2
    assert (told.videos, told.opened_videos, told.workers) == (COUNT, COUNT, 2)
    report = prepare_parts(listing, tmp_path / "mine", "mine", ("rgb", "flow"), DATA, workers=2)
    assert told.frames == pytest.approx(report.frames, rel=0.02)
    assert told.bytes == pytest.approx(report.bytes_written, rel=0.12)
    assert told.bytes_low <= told.bytes <= told.bytes_high
    for modality, size in told.bytes_by_modality.items():
        real = sum(path.stat().st_size for path in (tmp_path / "mine" / modality).rglob("*.h5"))
        assert size == pytest.approx(real, rel=0.12), modality
    assert sum(told.bytes_by_modality.values()) == pytest.approx(told.bytes, abs=2)
    assert 0 < told.seconds_low < told.seconds < told.seconds_high
    assert told.core_seconds > 0
    assert told.memory_bytes > 3 * 20e6


def test_what_is_there_already_is_not_counted(videos: Path, tmp_path: Path) -> None:
    listing = scan_folder(videos, 0.2)
    half = [source for source in listing.sources if source.class_name in ("class0", "class2")]
    prepare_parts(replace(listing, sources=half), tmp_path / "mine", "mine", ("rgb",), DATA, workers=1)
    before = _tree(tmp_path / "mine")
    told = _told(videos, tmp_path / "mine", workers=1)
    assert told.videos == COUNT - len(half)
    assert _tree(tmp_path / "mine") == before
    report = prepare_parts(listing, tmp_path / "mine", "mine", ("rgb",), DATA, workers=1)
    assert report.skipped == len(half)
    assert told.frames == pytest.approx(report.frames, rel=0.02)
    assert told.bytes == pytest.approx(report.bytes_written, rel=0.12)
    nothing = _told(videos, tmp_path / "mine")
    assert (nothing.videos, nothing.frames, nothing.seconds, nothing.bytes) == (0, 0, 0.0, 0)


def test_long_videos_are_cut_and_counted_whole(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one modality alone is missing: the cut part is not as long as the one that is there."""
    for number in range(3):
        frames = np.concatenate([draw(20, seed=number)] * 10 + [draw(number, seed=9)])
        write_video(tmp_path / "videos" / "a" / f"v{number}.mp4", frames)
    listing = scan_folder(tmp_path / "videos", 0.2)
    monkeypatch.setattr(module, "_CUT", Cut(20, 60.0))
    for modality in MODALITIES:
        told = _told(tmp_path / "videos", tmp_path / "mine", (modality,), workers=1)
        report = prepare_parts(listing, tmp_path / "mine", "mine", (modality,), DATA, workers=1)
        assert told.sampled_videos == 3
        assert told.frames == report.frames == 603
        assert told.bytes == pytest.approx(report.bytes_written, rel=0.2)
        assert told.bytes_low < told.bytes < told.bytes_high, "a part of each is a guess"
    assert not any(temporary.iterdir())


def test_videos_that_will_be_rejects_take_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "videos" / "a"
    for number in range(6):
        write_video(folder / f"v{number}.avi", draw(20, seed=number), codec="mpeg4")
    (folder / "none.avi").write_bytes(b"no video" * 500)
    (folder / "empty.avi").write_bytes(b"")
    told = _told(tmp_path / "videos", tmp_path / "mine")
    assert (told.videos, told.opened_videos, told.frames) == (8, 6, 120)
    report = prepare_parts(scan_folder(tmp_path / "videos", 0.2), tmp_path / "mine", "mine", ("rgb",), DATA)
    assert told.bytes == pytest.approx(report.bytes_written, rel=0.01)


def test_a_dry_run_tells_the_cost_and_whether_the_disk_is_large_enough(
    gkd: Callable[..., Any], videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    words = ("prepare", "folder", videos, "--name", "mine", "--root", root, "--dry-run", "--workers", 1)
    plan = gkd(*words, "--json").must().json["result"]
    keys = "seconds seconds_low seconds_high bytes bytes_low bytes_high rgb_bytes memory_bytes"
    assert {*keys.split(), "frames", "sampled_videos", "workers"} <= plan["forecast"].keys()
    assert plan["forecast"]["frames"] > 0
    assert plan["kept"] == 0
    assert not any(root.iterdir()), "a dry run writes nothing"
    table = gkd(*words).must()
    (line,) = (line for line in table.out.splitlines() if line.startswith("rgb bytes "))
    assert line.split()[-1] in ("KB", "MB")
    assert f"preparing a few of {COUNT} videos in a temporary folder" in table.err
    monkeypatch.setattr(pipeline, "free_bytes", lambda folder: 1000)
    refused = gkd(*words, "--json")
    assert refused.code == 1
    assert refused.json["error"]["what"].startswith("the disk is too small: about ")
    assert refused.json["result"]["forecast"]["bytes"] > 1000


def test_a_temporary_folder_that_cannot_be_used_costs_the_forecast_alone(
    gkd: Callable[..., Any], videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    words = ("prepare", "folder", videos, "--name", "mine", "--root", tmp_path, "--dry-run")
    plan = gkd(*words, "--json").must()
    assert plan.json["result"]["forecast"] is None
    assert plan.json["result"]["usable"] == COUNT
    assert "TMPDIR" in plan.err


@pytest.mark.parametrize("count", [7, 50, 1000])
def test_draws_are_spread_over_the_row_in_proportion_to_weights(count: int) -> None:
    weights = [1.0, 0.0, 5.0, 2.0, 2.0]
    for seed in range(3):
        drawn = Counter(itertools.islice(spread(weights, seed), count))
        for place, weight in enumerate(weights):
            assert abs(drawn[place] - count * weight / 10) <= 2.5
    assert len({next(spread([1.0] * 1000, seed)) for seed in range(20)}) > 15, "the seed moves the start"


def test_memory_is_of_this_program_not_of_what_started_it() -> None:
    assert 1e6 < module.peak_memory() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
