"""data.shards: many runs prepare one store together, and it comes out as if one run had made it alone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import pytest

from gkdcli.data.annotations import scan_folder
from gkdcli.data.extract import prepare_parts
from gkdcli.data.shards import Shard, store_locked
from gkdcli.data.sources import Listing, Source
from gkdcli.data.store import Store
from gkdcli.errors import ExitCode, GkdError
from gkdcli.settings import DataSettings
from tests.conftest import Outcome
from tests.data.test_extract import _content, _videos
from tests.videos import draw, write_video

DATA = DataSettings(short_side=32)
HERE = Path(__file__).parents[2]


def _words(root: Path, *words: object) -> list[str]:
    call = ("prepare", "folder", root / "videos", "--name", "mine", "--root", root, "--workers", 1, "--json")
    return [str(word) for word in (*call, "--set", "data.short_side=32", *words)]


def _start(root: Path, *words: object) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": str(HERE)}
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "gkdcli", *_words(root, *words)]
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)


def _end(process: subprocess.Popen[str]) -> Outcome:
    out, err = process.communicate(timeout=600)
    return Outcome(process.returncode, out, err)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Nine videos, one of them bad, and the content of their store when one run makes it undisturbed."""
    root = tmp_path_factory.mktemp("alone")
    _videos(root / "videos", ("jump", "walk"), 4, frames=40)
    (root / "videos" / "walk" / "bad.mp4").write_bytes(b"no video" * 100)
    outcome = _end(_start(root))
    assert outcome.code == ExitCode.REJECTS, outcome.err
    return root / "videos", _content(root / "stores" / "mine")


@pytest.fixture
def root(tmp_path: Path, alone: tuple[Path, dict[str, Any]]) -> Path:
    (tmp_path / "videos").symlink_to(alone[0])
    return tmp_path


@pytest.mark.parametrize(
    "text", ["0/3", "4/3", "1/0", "1", "1/2/3", "-1/3", "a/b", " 1/3", "1/3 ", "¹/3", ""]
)
def test_what_is_no_share_is_a_wrong_flag(text: str, gkd: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = gkd("prepare", "demo-tiny", "--root", tmp_path, "--shard", text)
    assert outcome.code == ExitCode.USAGE
    assert "--shard" in outcome.err
    assert list(tmp_path.iterdir()) == []


def _listing(folder: Path, sizes: list[int]) -> Listing:
    sources = []
    for number, size in enumerate(sizes):
        path = folder / f"{number}.mp4"
        path.write_bytes(b"")
        os.truncate(path, size)
        sources.append(Source(path, "jump", path.stem, {1: "train"}))
    return Listing(["jump"], sources, [(f"{number}.gone", "is not there") for number in range(5)])


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_each_video_is_in_one_share_in_whatever_order_they_were_found(tmp_path: Path, count: int) -> None:
    dice = random.Random(count)
    listing = _listing(tmp_path, [dice.randrange(10**6) for _ in range(30)])
    shuffled = replace(
        listing,
        sources=dice.sample(listing.sources, 30),
        rejects=dice.sample(listing.rejects, 5),
    )
    shares = [Shard(number, count).share(listing, ("rgb",)) for number in range(1, count + 1)]
    again = [Shard(number, count).share(shuffled, ("rgb",)) for number in range(1, count + 1)]
    assert sorted(source.name for share in shares for source in share.sources) == sorted(
        source.name for source in listing.sources
    )
    assert sorted(row for share in shares for row in share.rejects) == sorted(listing.rejects)
    for one, other in zip(shares, again, strict=True):
        assert {source.name for source in one.sources} == {source.name for source in other.sources}
        assert one.rejects == other.rejects


def test_shares_are_equal_in_bytes_to_within_a_video(tmp_path: Path) -> None:
    sizes = [10**6] * 4 + [10**5] * 40 + [0] * 3
    listing = _listing(tmp_path, sizes)
    for number in range(1, 5):
        share = Shard(number, 4).share(listing, ("rgb",))
        total = sum(source.path.stat().st_size for source in share.sources)
        assert abs(total - sum(sizes) / 4) <= 10**6


def test_a_changed_file_moves_few_videos(tmp_path: Path) -> None:
    """Shards that see a file at two sizes must not disagree about all the others."""
    listing = _listing(tmp_path, [1000 + number for number in range(60)])
    before = [Shard(number, 3).share(listing, ("rgb",)).sources for number in (1, 2, 3)]
    os.truncate(listing.sources[7].path, 3000)
    after = [Shard(number, 3).share(listing, ("rgb",)).sources for number in (1, 2, 3)]
    moved = {source.name for one, other in zip(before, after, strict=True) for source in one} - {
        source.name for one, other in zip(before, after, strict=True) for source in one if source in other
    }
    assert len(moved) <= 4


def test_three_at_once_and_a_merge_equal_one_run(
    root: Path, alone: tuple[Path, dict[str, Any]], gkd: Callable[..., Outcome]
) -> None:
    store = root / "stores" / "mine"
    runs = [_start(root, "--shard", f"{number}/3", "--retry") for number in (1, 2, 3)]
    outcomes = [_end(run) for run in runs]
    codes = sorted(outcome.code for outcome in outcomes)
    assert codes == [0, 0, ExitCode.REJECTS], [outcome.err for outcome in outcomes]
    results = [outcome.json["result"] for outcome in outcomes]
    assert [result["shard"] for result in results] == ["1/3", "2/3", "3/3"]
    assert sum(result["prepared"] for result in results) == 8
    assert sum(result["rejected"] for result in results) == 1
    tables = list(store.glob("rgb.rejected*"))
    assert [table.name for table in tables] == [f"rgb.rejected.{1 + which_rejects(outcomes)}-of-3.tsv"]
    with pytest.raises(GkdError, match="unfinished: 8 of 9"):
        Store.open(store / "rgb.h5")
    next_line = next(line for line in outcomes[0].err.splitlines() if line.startswith("next: "))
    command = " ".join(_words(root))
    assert f"`gkd {command}`" in next_line
    assert "all 3 shards have ended" in next_line
    merged = gkd(*_words(root))
    assert merged.code == ExitCode.REJECTS
    assert (merged.json["result"]["prepared"], merged.json["result"]["kept"]) == (0, 8)
    assert _content(store) == alone[1]
    assert [table.name for table in store.glob("rgb.rejected*")] == ["rgb.rejected.tsv"]
    assert "bad.mp4" in (store / "rgb.rejected.tsv").read_text()
    assert list(store.glob(".lock.*")) == []


def which_rejects(outcomes: list[Outcome]) -> int:
    """Which of them had the reject."""
    return [outcome.code for outcome in outcomes].index(ExitCode.REJECTS)


def test_each_shard_runs_once_and_no_whole_run_beside_them(root: Path, gkd: Callable[..., Outcome]) -> None:
    """The message names the process that is in the way."""
    store = root / "stores" / "mine"
    with store_locked(store, "mine", Shard(2, 3)), store_locked(store, "mine", Shard(3, 3)):
        refused = {
            words: gkd(*_words(root, *words)) for words in [("--shard", "2/3"), (), ("--shard", "1/4")]
        }
        fits = gkd(*_words(root, "--shard", "1/3"))
    for words, outcome in refused.items():
        assert outcome.code == ExitCode.FAILED, words
        assert f"process {os.getpid()} on " in outcome.err
    assert "as shard 2/3" in refused["--shard", "2/3"].err
    assert "another number of shards" in refused["--shard", "1/4"].err
    assert fits.code in (0, ExitCode.REJECTS), fits.err
    with store_locked(store, "mine", None):
        outcome = gkd(*_words(root, "--shard", "1/3"))
    assert outcome.code == ExitCode.FAILED
    assert f"{store / '.lock'}, held by process {os.getpid()} on " in outcome.err


def test_a_killed_shard_is_repeated_in_another_number_and_others_work_is_left_alone(
    root: Path, alone: tuple[Path, dict[str, Any]], gkd: Callable[..., Outcome]
) -> None:
    """The temporaries of the shards that go on are not swept, those of its own are."""
    store = root / "stores" / "mine"
    listing = scan_folder(root / "videos", 0.2)
    mine, others = (Shard(number, 2).share(listing, ("rgb",)).sources[-1] for number in (1, 2))
    left = [store / "rgb" / source.class_name / f".{source.name}.h5.1.tmp" for source in (mine, others)]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    with _start(root, "--shard", "1/2") as run:
        while not list(store.glob("rgb/*/*.h5")) and run.poll() is None:
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL
    assert not left[0].exists()
    assert left[1].exists()
    time.sleep(0.3)  # its worker notices
    done = len(list(store.glob("rgb/*/*.h5")))
    assert 0 < done < 8
    outcomes = [gkd(*_words(root, "--shard", f"{number}/3")) for number in (1, 2, 3)]
    assert sum(outcome.json["result"]["kept"] for outcome in outcomes) == done
    assert sum(outcome.json["result"]["prepared"] for outcome in outcomes) == 8 - done
    assert gkd(*_words(root)).code == ExitCode.REJECTS
    assert _content(store) == alone[1]
    assert list(store.rglob(".*.tmp")) == []


def test_a_merge_makes_up_for_a_shard_that_never_ran(
    root: Path, alone: tuple[Path, dict[str, Any]], gkd: Callable[..., Outcome]
) -> None:
    done = gkd(*_words(root, "--shard", "1/2")).json["result"]["prepared"]
    merged = gkd(*_words(root)).json["result"]
    assert (merged["kept"], merged["prepared"]) == (done, 8 - done)
    assert _content(root / "stores" / "mine") == alone[1]


def test_a_reject_of_a_shard_is_tried_again_only_when_its_file_changes(tmp_path: Path) -> None:
    _videos(tmp_path / "videos", ("jump",), 2)
    bad = tmp_path / "videos" / "jump" / "bad.mp4"
    bad.write_bytes(b"no video")
    calls: list[str] = []

    def run(shard: Shard | None) -> list[tuple[str, str]]:
        listing = scan_folder(tmp_path / "videos", 0.5)
        calls.clear()
        report = prepare_parts(
            listing,
            tmp_path / "mine",
            "mine",
            ("rgb",),
            DATA,
            workers=1,
            shard=shard,
            progress=lambda done, total, name, frames: calls.append(name),
        )
        return report.rejected

    assert len(run(Shard(1, 1))) == 1
    assert sorted(calls) == ["bad", "jump_0", "jump_1"]
    assert [len(run(Shard(number, 2))) for number in (1, 2)].count(1) == 1  # known from the other division
    assert calls == []
    write_video(bad, draw(5))
    assert run(None) == []
    assert calls == ["bad"]
    assert list((tmp_path / "mine").glob("rgb.rejected*")) == []


def test_shards_with_other_settings_are_refused(root: Path) -> None:
    """Also where both start at once: whoever marks the store first decides."""
    runs = [
        _start(root, "--shard", f"{number}/2", "--set", f"data.jpeg_quality={70 + number}")
        for number in (1, 2)
    ]
    outcomes = [_end(run) for run in runs]
    failed = [outcome for outcome in outcomes if outcome.code == ExitCode.FAILED]
    assert len(failed) == 1, [outcome.err for outcome in outcomes]
    assert "written under other settings: data.jpeg_quality" in failed[0].err
    qualities = set()
    for part in (root / "stores" / "mine").glob("rgb/*/*.h5"):
        with h5py.File(part) as file:
            qualities.add(json.loads(file.attrs["settings"])["jpeg_quality"])
    assert len(qualities) == 1


@pytest.mark.slow
def test_shards_draw_a_drawn_set_once(tmp_path: Path) -> None:
    """The first draws, the other waits for it."""
    words = ["prepare", "demo-tiny", "--root", str(tmp_path), "--workers", "1", "--json"]
    words += ["--set", "data.draw_train=2", "--set", "data.draw_test=1"]
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "gkdcli", *words, "--shard", f"{number}/2"],
            env=os.environ | {"PYTHONPATH": str(HERE)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (1, 2)
    ]
    results = [_end(run).must().json["result"] for run in runs]
    assert sum(result["prepared"] for result in results) == 36
    assert len(list((tmp_path / "datasets").rglob("*.mp4"))) == 36


def test_a_dry_run_of_a_shard_plans_its_share(root: Path, gkd: Callable[..., Outcome]) -> None:
    plans = [gkd(*_words(root, "--shard", f"{number}/2", "--dry-run")).json["result"] for number in (1, 2)]
    assert sum(plan["usable"] for plan in plans) == 9
    assert all(plan["usable"] for plan in plans)
    assert not (root / "stores").exists()
