"""What all tests share: a prepared `demo-tiny`, and two ways of typing `gkd`."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# two workers on two cores: more threads would only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")


@dataclass(frozen=True)
class Outcome:
    """What a command line came to."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one document on stdout; fails if there is none, or more."""
        return json.loads(self.out)

    def must(self) -> Outcome:
        """The outcome of a command that has to work."""
        assert self.code == 0, f"exit code {self.code}\n{self.out}\n{self.err}"
        return self


@pytest.fixture(autouse=True)
def _plain_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's own settings and terminal have no part in a test."""
    for name in [*os.environ]:
        if name.startswith(("GKD_", "TORCHELASTIC_")) or name in ("FORCE_COLOR", "NO_COLOR", "RANK"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "dumb")
    threads, torch = os.environ.get("OMP_NUM_THREADS"), sys.modules.get("torch")
    if threads and torch:
        # a run within this process sets them; two, beside another busy process, are tens of times slower
        torch.set_num_threads(int(threads))


@pytest.fixture
def gkd(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`gkd("evaluate", "demo-tiny", "--root", root)` within this process: quick, and patches reach it."""
    from gkdcli.cli import run

    def call(*words: object) -> Outcome:
        capsys.readouterr()
        code = run([str(word) for word in words])
        out, err = capsys.readouterr()
        return Outcome(int(code), out, err)

    return call


@pytest.fixture
def gkd_process() -> Callable[..., Outcome]:
    """The same as a process of its own; `env` is added to the environment, `cwd` is where it runs."""
    return run_gkd


def run_gkd(
    *words: object, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 120
) -> Outcome:
    """Runs `python -m gkdcli ...` and waits for it."""
    command = [sys.executable, "-m", "gkdcli", *map(str, words)]
    surroundings = os.environ | (env or {})
    done = subprocess.run(
        command, cwd=cwd, env=surroundings, capture_output=True, text=True, timeout=timeout, check=False
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with `datasets/demo-tiny` and its store; for reading only, `workspace` is for writing."""
    return _once(tmp_path_factory, "tiny", lambda root: prepare_tiny(root))


def prepare_tiny(root: Path) -> None:
    """`gkd prepare demo-tiny --modality both`, as a user types it."""
    run_gkd("prepare", "demo-tiny", "--modality", "both", "--root", root).must()


@pytest.fixture(scope="session")
def tiny_trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with store, one teacher and one distilled student of `demo-tiny`, both complete; read only."""

    def train(root: Path) -> None:
        borrow(tiny, root)
        run_gkd("pretrain-attention", "demo-tiny", "--root", root).must()
        run_gkd("distill", "demo-tiny", "--root", root).must()

    return _once(tmp_path_factory, "tiny-trained", train)


@pytest.fixture(scope="session")
def tiny_streams(tiny_trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a teacher and a student of the flow stream beside them; read only."""

    def train(root: Path) -> None:
        borrow(tiny_trained, root)
        shutil.copytree(tiny_trained / "runs", root / "runs")
        for command in ("pretrain-attention", "distill"):
            run_gkd(command, "demo-tiny", "--modality", "flow", "--root", root).must()

    return _once(tmp_path_factory, "tiny-streams", train)


@pytest.fixture(scope="session")
def tiny_detection_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with `datasets/demo-detection-tiny` and its stores of both modalities; for reading only."""

    def prepare(root: Path) -> None:
        run_gkd("prepare", "demo-detection-tiny", "--modality", "both", "--root", root).must()

    return _once(tmp_path_factory, "tiny-detection-store", prepare)


@pytest.fixture(scope="session")
def tiny_detection(tiny_detection_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a teacher and a distilled student of each stream, all complete; read only."""

    def train(root: Path) -> None:
        borrow(tiny_detection_store, root)
        for modality in ("rgb", "flow"):
            for command in ("pretrain-attention", "distill"):
                run_gkd(command, "demo-detection-tiny", "--modality", modality, "--root", root).must()

    return _once(tmp_path_factory, "tiny-detection", train)


@pytest.fixture
def workspace(tiny: Path, tmp_path: Path) -> Path:
    """A root of the test's own, with the prepared store of `tiny` in it (shared, not to be written to)."""
    return borrow(tiny, tmp_path / "workspace")


def borrow(source: Path, root: Path) -> Path:
    """Makes a root that sees the videos and stores of another."""
    root.mkdir(parents=True, exist_ok=True)
    for name in ("datasets", "stores"):
        (root / name).symlink_to(source / name)
    return root


def _once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], None]) -> Path:
    """A folder built by the first of the test processes that needs it; the others wait for it."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, done = base / name, base / f"{name}.done"
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            folder.mkdir()
            build(folder)
            done.touch()
    return folder
