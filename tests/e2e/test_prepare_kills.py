"""`gkd prepare` is killed at any moment of its life; the same command goes on, and the store comes out equal.

    python -m tests.e2e.test_prepare_kills [KILLS [SEED [MINUTES]]]

Real kills of real processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import pytest

from gkdcli.data.store import Store
from gkdcli.errors import ExitCode, GkdError
from tests.conftest import run_gkd
from tests.data.test_faults import content, write_videos
from tests.e2e.driver import Driver, lives, sleep

MODALITIES = {"rgb": ("rgb",), "flow": ("flow",), "both": ("rgb", "flow")}


class Commands:
    """One driver, one store at a time."""

    def __init__(self, folder: Path, videos: Path) -> None:
        self.log, self.root, self.videos = folder / "log", folder / "root", videos
        self._driver = Driver(self.log, "gkdcli.data.extract", "gkdcli.pipeline.prepare")

    @property
    def store(self) -> Path:
        return self.root / "stores" / "mine"

    def words(self, modality: str, root: Path | None = None) -> list[str]:
        words = ["prepare", "folder", self.videos, "--name", "mine", "--root", root or self.root]
        words += ["--modality", modality, "--workers", 1, "-q"]
        sets = ("data.flow=farneback", "data.short_side=0", "data.timeout=0")
        return [str(word) for word in words] + [word for one in sets for word in ("--set", one)]

    def start(self, modality: str) -> int:
        """The process id."""
        return self._driver.start(self.words(modality))

    def end(self, pid: int) -> int:
        """Waits for the exit code, and for all processes that belonged to the command."""
        code = self._driver.end()
        deadline = time.monotonic() + 120
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.killpg(pid, 0)
                assert time.monotonic() < deadline, "processes outlive the command"
                time.sleep(0.02)
        return code

    def close(self) -> None:
        self._driver.close()


def _session(session: int) -> list[int]:
    """Live processes of it."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):
                state, _, _, of = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(of) == session and state != "Z":
                    found.append(int(folder.name))
    return found


def _workers(session: int) -> list[int]:
    found = []
    for pid in _session(session):
        with contextlib.suppress(OSError):
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def _finished(store: Path, modalities: tuple[str, ...]) -> dict[Path, tuple[int, int]]:
    """Parts that have their names: where they lie on the disk, and since when."""
    parts = [part for modality in modalities for part in (store / modality).glob("*/*.h5")]
    stats = {part: part.stat() for part in parts if not part.name.startswith(".")}
    return {part: (found.st_ino, found.st_mtime_ns) for part, found in stats.items()}


class Study:
    """Kills, and checks after each."""

    def __init__(self, folder: Path, modality: str, seed: int, videos: int = 4) -> None:
        self.modality, self.modalities = modality, MODALITIES[modality]
        self.rng = random.Random(f"{modality} {seed}")
        self.commands = Commands(folder, write_videos(folder, videos) / "videos")
        started = time.monotonic()
        assert self.commands.end(self.commands.start(modality)) == 0, self.commands.log.read_text()
        self.usual_sec = time.monotonic() - started
        self.whole = content(self.commands.store, self.modalities)
        self.parts = len(_finished(self.commands.store, self.modalities))
        self.seen: Counter[str] = Counter()
        self._anew()

    def _anew(self) -> None:
        shutil.rmtree(self.commands.store)
        self.finished: dict[Path, tuple[int, int]] = {}

    def _await(self, pid: int, moment: str) -> None:
        """Waits for some moment of the command's life."""
        store = self.commands.store
        if moment == "any time":
            sleep(pid, self.rng.uniform(0, self.usual_sec))
            return
        next_part = min(len(self.finished) + 1, self.parts)
        wanted = self.parts if moment == "towards the end" else self.rng.randint(next_part, self.parts)
        while os.path.exists(f"/proc/{pid}/status") and lives(pid):
            if len(_finished(store, self.modalities)) >= wanted:
                break
            time.sleep(0.003)
        sleep(pid, self.rng.uniform(0, 0.15 if moment == "towards the end" else 0.03))

    def kill(self) -> bool:
        """Starts the command and kills it, or a worker of it; False where it had ended before."""
        moment = self.rng.choice(["any time", "after a part", "after a part", "towards the end"])
        worker = self.rng.random() < 0.2
        started = time.monotonic()
        pid = self.commands.start(self.modality)
        self._await(pid, moment)
        victims = _workers(pid) if worker else [pid]
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        code = self.commands.end(pid)
        killed = bool(victims) if worker else code == -signal.SIGKILL
        what = f"{'worker' if worker and killed else 'command'}, {moment}: {self._state()}"
        self.seen[what if killed else "ended before the kill"] += 1
        if worker:
            assert code in (0, ExitCode.REJECTS), self.commands.log.read_text()
        elif not killed:
            assert code == 0, self.commands.log.read_text()
        self.check(complete=code == 0)
        if code == 0:  # the machine may be busier than it was, or less
            self.usual_sec += (time.monotonic() - started - self.usual_sec) / 4
            self._anew()
        return killed

    def _state(self) -> str:
        """What the kill met."""
        store = self.commands.store
        left = sorted(path.name for path in store.rglob(".*.tmp")) if store.exists() else []
        if left:
            return (
                "a part in work"
                if ".h5." in left[0] and left[0].count("v")
                else f"{left[0].split('.')[1]} in work"
            )
        done = len(_finished(store, self.modalities))
        return f"{'none' if not done else 'some' if done < self.parts else 'all'} of the parts"

    def check(self, complete: bool) -> None:
        """Nothing that was finished is touched or lost; what there is equals what there would have been."""
        store = self.commands.store
        now = _finished(store, self.modalities)
        assert {part: now.get(part) for part in self.finished} == self.finished
        there = content(store, self.modalities) if store.exists() else {}
        differing = [
            name
            for name, data in there.items()
            if name.count("/") == 2 and _part(name) and data != self.whole[name]
        ]
        assert differing == []
        self.finished = now
        if complete:
            assert there == self.whole  # indexes too, and no temporary files
            assert list(store.rglob(".*.tmp")) == []
            return
        for modality in self.modalities:
            index = store / f"{modality}.h5"
            if index.exists() and there[index.name] != self.whole[index.name]:
                _opens_or_says_why(index, self.finished)

    def end(self) -> None:
        """The same command once more, undisturbed."""
        assert self.commands.end(self.commands.start(self.modality)) == 0, self.commands.log.read_text()
        self.check(complete=True)
        self.commands.close()


def _part(name: str) -> bool:
    return not name.rpartition("/")[2].startswith(".")


def _opens_or_says_why(index: Path, finished: dict[Path, Any]) -> None:
    """An index is of the store before or after, or says that the store is unfinished."""
    with h5py.File(index) as file:
        complete = file.attrs["complete"]
    if complete:  # a worker was killed, so that a video is missing
        assert 0 < len(Store.open(index).videos) <= len(finished)
    else:
        with pytest.raises(GkdError, match="is unfinished"):
            Store.open(index)


def kill_often(
    folder: Path, modality: str, kills: int, seed: int, until: float = float("inf")
) -> Counter[str]:
    """So many kills, or as many as there is time for, then an undisturbed end; what they met."""
    study = Study(folder, modality, seed)
    done = 0
    while done < kills and time.monotonic() < until:
        done += study.kill()
        if done % 10 == 0:
            print(f"{modality}: {done} kills, {study.seen.total()} starts", file=sys.stderr, flush=True)
    study.end()
    return study.seen


def test_five_kills_cost_nothing_that_was_finished(tmp_path: Path) -> None:
    """At any moment of its life, of the command or of its worker; both streams."""
    seen = kill_often(tmp_path, "both", 5, seed=1)
    assert sum(count for what, count in seen.items() if what != "ended before the kill") == 5


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["rgb", "flow"])
def test_five_hundred_kills(tmp_path: Path, modality: str, capsys: pytest.CaptureFixture[str]) -> None:
    seen = kill_often(tmp_path, modality, 250, seed=2)
    with capsys.disabled():
        print(f"\n{modality}: {json.dumps(seen, indent=1)}")


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[Commands, int]]:
    """A command in the middle of its work; it stands still until the test lets it go on."""
    commands = Commands(tmp_path, write_videos(tmp_path) / "videos")
    pid = commands.start("both")
    while not list(commands.store.glob("rgb/*/*.h5")) and lives(pid):
        time.sleep(0.005)
    for process in _session(pid):
        os.kill(process, signal.SIGSTOP)
    yield commands, pid
    commands.close()


def test_a_second_command_is_refused_and_the_first_is_undisturbed(
    running: tuple[Commands, int], tmp_path: Path
) -> None:
    commands, pid = running
    second = run_gkd(*commands.words("rgb"), "--json")
    for process in _session(pid):
        os.kill(process, signal.SIGCONT)
    assert commands.end(pid) == 0, commands.log.read_text()
    assert second.code == 1
    error = second.json["error"]
    assert error["what"] == "another command is using the store of mine"
    assert f"process {pid} on " in error["where"]
    alone = tmp_path / "alone"
    run_gkd(*commands.words("both", alone)).must()
    assert content(commands.store) == content(alone / "stores" / "mine")


def main() -> None:
    """Half of the kills on each stream; prints what they met."""
    given = [int(word) for word in sys.argv[1:]]
    kills, seed, minutes = [*given, *(500, 2, 600)[len(given) :]]
    for stream in ("rgb", "flow"):
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as name:
            found = kill_often(Path(name), stream, kills // 2, seed, began + minutes * 30)
        took = time.monotonic() - began
        print(f"{stream}, {took:.0f} s: {json.dumps(found, indent=1, sort_keys=True)}", flush=True)


if __name__ == "__main__":
    main()
