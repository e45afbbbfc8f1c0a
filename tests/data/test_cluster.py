"""data.cluster: real Ray nodes prepare a store; whatever happens to them, it comes out equal."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gkdcli.data.cluster import Cluster, _absolute, _Done, _examiner, _Task
from gkdcli.data.jobs import Job, Result
from gkdcli.data.sources import Source
from gkdcli.data.workers import Crashed
from gkdcli.errors import ExitCode, GkdError
from gkdcli.runs import version
from gkdcli.settings import DataSettings
from tests.conftest import Outcome
from tests.data.test_extract import _content, _videos

HERE = Path(__file__).parents[2]


class Nodes:
    """A cluster in a process of its own, and the surroundings in which `gkd` finds it."""

    def __init__(self) -> None:
        self.env = os.environ | {
            "PYTHONPATH": str(HERE),
            "RAY_AUTH_MODE": "token",  # it listens on all addresses of this machine
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", "tests.data.ray_nodes"]
        self.process = subprocess.Popen(command, env=self.env, cwd=HERE, stdin=pipe, stdout=pipe, text=True)
        assert self.process.stdout
        self.env["RAY_ADDRESS"] = self.process.stdout.readline().strip()
        assert self.env["RAY_ADDRESS"], "the cluster has not started"

    def tell(self, line: str) -> None:
        """See ray_nodes."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def end(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """Two nodes of one CPU, and a head without any; the tests that follow change who is there."""
    cluster = Nodes()
    try:
        cluster.tell("add 1")
        cluster.tell("add 1")
        yield cluster
    finally:
        cluster.end()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Videos that take a while, and the content of the store that processes of this machine make of them."""
    root = tmp_path_factory.mktemp("local")
    _videos(root / "videos", ("jump",), 10, frames=160)
    _end(_start(root, dict(os.environ), "local")).must()
    return root / "videos", _content(root / "stores" / "mine")


def _start(root: Path, env: dict[str, str], executor: str, *words: str) -> subprocess.Popen[str]:
    call = ["prepare", "folder", str(root / "videos"), "--name", "mine", "--root", str(root), "--json"]
    call += ["--set", "data.short_side=32", "--executor", executor, *words]
    env = env | {"PYTHONPATH": str(HERE)}
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "gkdcli", *call]
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)


def _end(process: subprocess.Popen[str]) -> Outcome:
    out, err = process.communicate(timeout=300)
    return Outcome(process.returncode, out, err)


def _wait_for_parts(store: Path, count: int, process: subprocess.Popen[str]) -> None:
    while len(list(store.glob("rgb/*/*.h5"))) < count and process.poll() is None:
        time.sleep(0.02)


@pytest.mark.slow
def test_a_node_that_dies_in_the_middle_costs_nothing(
    tmp_path: Path, nodes: Nodes, local: tuple[Path, dict[str, Any]]
) -> None:
    (tmp_path / "videos").symlink_to(local[0])
    store = tmp_path / "stores" / "mine"
    run = _start(tmp_path, nodes.env, "ray", "-v")
    _wait_for_parts(store, 2, run)
    nodes.tell("kill 0")
    outcome = _end(run).must()
    result = outcome.json["result"]
    assert (result["prepared"], result["rejected"]) == (10, 0)
    assert 1 <= len(result["nodes"]) <= 2
    assert sum(result["nodes"].values()) == 10
    assert "Ray: 2 nodes, 2 CPUs" in outcome.err
    assert _content(store) == local[1]
    assert list(tmp_path.rglob(".*.tmp")) == []


@pytest.mark.slow
def test_flow_that_wants_a_gpu_is_refused_where_there_is_none(
    tmp_path: Path, nodes: Nodes, local: tuple[Path, dict[str, Any]]
) -> None:
    """Its tasks would wait for ever."""
    (tmp_path / "videos").symlink_to(local[0])
    words = ("--modality", "flow", "--flow", "dis", "--set", "data.gpu_share=0.5")
    outcome = _end(_start(tmp_path, nodes.env, "ray", *words))
    assert outcome.code == ExitCode.FAILED
    assert "no node of the cluster has a GPU" in outcome.json["error"]["what"]
    assert list((tmp_path / "stores" / "mine").rglob("*.h5")) == []


@pytest.mark.slow
def test_a_node_with_another_gkd_is_refused_by_name(
    tmp_path: Path, nodes: Nodes, local: tuple[Path, dict[str, Any]]
) -> None:
    (tmp_path / "videos").symlink_to(local[0])
    other = tmp_path / "other" / "gkdcli-99.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: gkdcli\nVersion: 99.1\n")
    nodes.tell(f"add 1 PYTHONPATH={other.parent}:{HERE}")
    nodes.tell("kill 1")
    outcome = _end(_start(tmp_path, nodes.env, "ray"))
    assert outcome.code == ExitCode.FAILED
    error = outcome.json["error"]
    assert error["what"] == f"a node of the cluster has gkd 99.1, and this is gkd {version()}"
    assert error["where"].startswith(f"node {os.uname().nodename}/")
    assert not list((tmp_path / "stores" / "mine").glob("*.tsv"))


# what a node sees, without a node


def _ground(folder: Path) -> tuple[str, str, str, str]:
    (folder / "probe").write_text("token")
    (folder / "a.mp4").touch()
    return version(), str(folder / "probe"), "token", str(folder / "a.mp4")


def test_a_node_that_sees_everything_takes_part(tmp_path: Path) -> None:
    assert _examiner()(_ground(tmp_path)) == ""


@pytest.mark.parametrize(
    ("place", "other", "trouble"),
    [
        (0, "99.1", "has gkd "),
        (1, "/nowhere/probe", "does not see the folder of the store, /nowhere"),
        (2, "of another store", "does not see the folder of the store"),
        (3, "/nowhere/a.mp4", "does not see the videos, for one /nowhere/a.mp4"),
    ],
)
def test_what_a_node_lacks_is_said(tmp_path: Path, place: int, other: str, trouble: str) -> None:
    ground = list(_ground(tmp_path))
    ground[place] = other
    assert _examiner()(tuple(ground)).startswith(trouble)  # type: ignore[arg-type]


def test_jobs_travel_with_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = Source(Path("v/a.npy"), "jump", "a", {}, flow=Path("f/a.npy"))
    job = Job(source, {"rgb": Path("s/rgb/a.h5")}, DataSettings(), 1, beside=Path("s/flow/a.h5"))
    moved = _absolute(job)
    assert (moved.source.path, moved.source.flow) == (tmp_path / "v/a.npy", tmp_path / "f/a.npy")
    assert (moved.parts["rgb"], moved.beside) == (tmp_path / "s/rgb/a.h5", tmp_path / "s/flow/a.h5")


def test_without_ray_one_is_told_what_to_install(
    tmp_path: Path, gkd: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    _videos(tmp_path / "videos", ("jump",), 2, frames=4)
    monkeypatch.setitem(sys.modules, "ray", None)
    outcome = gkd(
        "prepare", "folder", tmp_path / "videos", "--name", "mine", "--root", tmp_path, "--executor", "ray"
    )
    assert outcome.code == ExitCode.FAILED
    assert "`--executor ray` needs Ray" in outcome.err
    assert "pip install 'gkdcli[cluster]'" in outcome.err


# what becomes of tasks that fail, by Ray's own exceptions but without a cluster


class Given:
    """Stands for Ray: the answers of its tasks are given beforehand, an exception is raised."""

    def __init__(self, answers: list[Any]) -> None:
        import ray.exceptions

        self.exceptions = ray.exceptions
        self.answers = answers

    def get(self, reference: Any) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def _fate(monkeypatch: pytest.MonkeyPatch, answers: list[Any]) -> tuple[Any, Cluster]:
    """What a job comes to whose tasks have these answers, one after the other; all are used up."""
    cluster = Cluster(lambda text: None)
    monkeypatch.setattr(cluster, "_submit", lambda task: cluster._tasks.update({len(answers): task}))
    ray = Given(answers)
    cluster._submit(_Task(Job(Source(Path("a.mp4"), "jump", "a", {}), {}, DataSettings(), 1)))
    outcome = None
    while cluster.busy:
        outcome = cluster._outcome(ray, next(iter(cluster._tasks)))
    assert answers == []
    return outcome, cluster


GOOD = _Done("0123456789", Result(frames=3))


def test_a_video_whose_node_died_is_tried_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.exceptions import NodeDiedError

    outcome, cluster = _fate(monkeypatch, [NodeDiedError("gone")] * 3 + [GOOD])
    assert outcome == GOOD.outcome
    assert cluster.videos == {"01234567": 1}


def test_a_video_that_ends_node_after_node_is_given_up_and_tried_again_next_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.exceptions import NodeDiedError

    outcome, _ = _fate(monkeypatch, [NodeDiedError("gone")] * 4)
    assert (outcome.reason, outcome.again) == ("4 nodes died while they worked on it", True)


def test_a_crash_is_tried_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.exceptions import OutOfMemoryError, WorkerCrashedError

    crash = _Done("0123456789", Crashed(signal.SIGSEGV))
    assert _fate(monkeypatch, [crash, GOOD])[0] == GOOD.outcome
    assert _fate(monkeypatch, [crash, crash])[0] == Crashed(signal.SIGSEGV)
    assert _fate(monkeypatch, [WorkerCrashedError(), GOOD])[0] == GOOD.outcome
    killed = _fate(monkeypatch, [WorkerCrashedError(), OutOfMemoryError("too much")])[0]
    assert killed.killed  # so its reject does not stand


def test_what_a_node_complains_of_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GkdError, match="has gkd 99"):
        _fate(monkeypatch, [_Done("0123456789", GkdError("a node of the cluster has gkd 99"))])


# long ones: a node takes about four seconds to start, on a busy machine much longer


@pytest.mark.slow
def test_a_cluster_that_does_not_answer_is_named(tmp_path: Path) -> None:
    _videos(tmp_path / "videos", ("jump",), 2, frames=4)
    outcome = _end(_start(tmp_path, os.environ | {"RAY_ADDRESS": "127.0.0.1:1"}, "ray"))
    assert outcome.code == ExitCode.FAILED
    assert "RAY_ADDRESS=127.0.0.1:1" in outcome.json["error"]["where"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_is_continued_on_a_ray_of_its_own(
    tmp_path: Path, local: tuple[Path, dict[str, Any]], number: signal.Signals
) -> None:
    """Nothing of it is left: no process, no temporary folder, nothing in the home folder."""
    (tmp_path / "videos").symlink_to(local[0])
    home, scratch = tmp_path / "home", Path(f"/tmp/t{secrets.token_hex(3)}")
    home.mkdir()
    scratch.mkdir()
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env |= {"HOME": str(home), "TMPDIR": str(scratch)}
    store = tmp_path / "stores" / "mine"
    run = _start(tmp_path, env, "ray", "--workers", "1")
    _wait_for_parts(store, 1, run)
    run.send_signal(number)
    outcome = _end(run)
    assert outcome.code == ExitCode.INTERRUPTED, outcome.err
    assert "the same command continues" in outcome.err
    done = len(list(store.glob("rgb/*/*.h5")))
    assert 0 < done < 10
    again = _end(_start(tmp_path, env, "ray", "--workers", "2")).must().json["result"]
    assert (again["kept"], again["prepared"]) == (done, 10 - done)
    assert _content(store) == local[1]
    assert list(home.rglob("auth_token")) == []
    assert list(scratch.glob("gkd-*")) == []
    subprocess.run(["rm", "-r", str(scratch)], check=True)


def act(job: Job) -> Result:
    """What its name says."""
    match job.source.name.split("-"):
        case ["crash"]:
            os.kill(os.getpid(), signal.SIGSEGV)
        case ["once"]:
            marker = job.source.path.with_name("been here")
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGSEGV)
        case ["parent"]:  # Ray's worker itself
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(30)
        case ["raise"]:
            raise KeyError("ours")
        case ["gpu"]:
            return Result(reason=os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
    return Result(frames=1)


@pytest.mark.slow
def test_what_a_video_does_to_its_process_is_told_as_on_one_machine(tmp_path: Path) -> None:
    script = "import sys; from tests.data.test_cluster import crashes; crashes(sys.argv[1])"
    env = os.environ | {"PYTHONPATH": str(HERE)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["good"] == found["once"] == "1 frames"
    assert found["crash"] == "crashed by 11"
    assert found["parent"] == "crashed by 9"
    assert "KeyError: 'ours'" in found["raise"]


def crashes(folder: str) -> None:
    """Prints as JSON what became of a job of each kind, in a process with a Ray of its own."""
    video = Path(folder) / "a.mp4"
    video.touch()

    def job(name: str) -> Job:
        return Job(Source(video, "jump", name, {}), {}, DataSettings(), 1)

    found = {}
    jobs = [job(name) for name in ("crash", "good", "once", "parent")]
    cluster = Cluster(lambda text: None)
    with cluster.open(act, Path(folder) / "store", jobs, 2):
        waiting = list(jobs)
        while waiting or cluster.busy:
            while waiting and cluster.give(waiting[-1]):
                waiting.pop()
            for done, outcome in cluster.collect(0.2):
                crashed = isinstance(outcome, Crashed)
                found[done.source.name] = (
                    f"crashed by {int(outcome.signal_number)}" if crashed else f"{outcome.frames} frames"
                )
        cluster.give(job("raise"))
        try:
            while True:
                cluster.collect(0.2)
        except (RuntimeError, GkdError) as error:
            found["raise"] = str(error)
    sys.stdout.write(json.dumps(found))
