"""Videos prepared by the machines of a Ray cluster: `workers.Crew`, with nodes in place of processes.

A task is one video. The job of a task runs in a process beside Ray's own worker, a `Crew` of one, so what a
decoder does to its process is seen, and told, exactly as on one machine.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gkdcli.data.jobs import Job, Result
from gkdcli.data.workers import Crashed, Crew, available_cores
from gkdcli.errors import GkdError
from gkdcli.runs import version

Work = Callable[[Job], Result]
_NODE_DEATHS = 3  # so often a video is tried again elsewhere
_CRASHES = 1  # so often on any node
_LOOK_SEC = 2.0  # between two looks at who is there
_ANSWER_SEC = 120.0  # for a node to start a first worker, on a busy machine
_CANCEL_SEC = 5.0
_OBJECT_BYTES = 80 << 20  # Ray's least is 75 MB; our objects are a few hundred bytes


_Ground = tuple[str, str, str, str]  # what a node must have and see: version, probe and its text, a video


@dataclass
class _Task:
    job: Job
    node_deaths: int = 0
    crashes: int = 0


@dataclass(frozen=True)
class _Done:
    node: str
    outcome: Result | Crashed | GkdError


class Cluster:
    """The nodes of a Ray cluster, at work within `open`.

    Attributes:
        videos: how many each node has finished, by host name and the beginning of Ray's id for the node.

    Args:
        note: told what the user should know while the work goes on.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self.videos: Counter[str] = Counter()
        self._note = note
        self._tasks: dict[Any, _Task] = {}
        self._looks: dict[Any, str] = {}  # nodes that are being looked at
        self._names: dict[str, str] = {}  # of all nodes that ever were there
        self._alive: set[str] = set()
        self._cpus = 0
        self._looked = 0.0

    @contextmanager
    def open(self, function: Work, folder: Path, jobs: Sequence[Job], limit: int) -> Iterator[Cluster]:
        """Joins the cluster that RAY_ADDRESS names, or starts one on this machine for as long as this lasts.

        Args:
            function: a module-level function that does a job.
            folder: the store's, which all nodes must share.
            jobs: what is going to be given; the first one's video must be seen by all nodes.
            limit: tasks at a time; 0: one for each CPU of the cluster, however many there come to be.

        Raises:
            GkdError: Ray is not installed, no cluster answers, or a node cannot take part.
        """
        ray = _ray()
        with ExitStack() as stack:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nowhere))  # Ray prints there what it thinks of dead nodes
            with _kept_handler():
                _connect(ray, stack, limit)
            self._function, self._limit, self._gpu_share = function, limit, jobs[0].data.gpu_share
            token = secrets.token_hex(8)
            # a name that is swept away if this process is killed
            probe = folder.absolute() / f".cluster.{os.getpid()}{secrets.randbelow(10**9):09}.tmp"
            stack.callback(probe.unlink, missing_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
            probe.write_text(token)
            self._ground = (version(), str(probe), token, str(jobs[0].source.path.absolute()))
            self._examine = ray.remote(num_cpus=0, max_retries=0)(_examiner())
            self._perform = ray.remote(max_calls=0)(_perform)
            stack.callback(self._cancel, ray)
            self._look()
            self._hear(list(self._looks), _ANSWER_SEC)
            if self._looks:
                raise _misfit(self._names[next(iter(self._looks.values()))], "does not answer")
            self._check_gpus(ray, jobs)
            self._note(f"Ray: {len(self._alive)} node{'s' * (len(self._alive) != 1)}, {self._cpus} CPUs")
            yield self

    @property
    def busy(self) -> int:
        """Videos in work."""
        return len(self._tasks)

    def give(self, job: Job) -> bool:
        """Hands out a job; False where all CPUs are at work."""
        self._look()
        cpus = max(self._cpus, 1)
        if self.busy >= min(self._limit or cpus, cpus):
            return False
        self._submit(_Task(job))
        return True

    def collect(self, timeout_sec: float) -> list[tuple[Job, Result | Crashed]]:
        """Waits for finished jobs, at most so long.

        Raises:
            GkdError: a node that has come cannot take part.
            RuntimeError: `function` raised.
        """
        ray = _ray()
        self._hear(list(self._looks), 0)
        ray.wait(list(self._tasks), num_returns=1, timeout=timeout_sec)
        ready, _ = ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=0)
        finished = [(self._tasks[reference].job, self._outcome(ray, reference)) for reference in ready]
        return [(job, outcome) for job, outcome in finished if outcome is not None]

    def _submit(self, task: _Task) -> None:
        job = task.job
        gpus = self._gpu_share if "flow" in job.parts and not job.probe_only else 0
        options = {"num_cpus": 1, "num_gpus": gpus, "max_retries": 0, "name": f"gkd {job.source.name}"}
        reference = self._perform.options(**options).remote(self._function, _absolute(job), self._ground)
        self._tasks[reference] = task

    def _outcome(self, ray: Any, reference: Any) -> Result | Crashed | None:
        """What a finished task came to; None where its video is tried again."""
        task = self._tasks.pop(reference)
        try:
            done: _Done = ray.get(reference)
        except ray.exceptions.NodeDiedError:
            task.node_deaths += 1
            if task.node_deaths > _NODE_DEATHS:
                return Result(reason=f"{task.node_deaths} nodes died while they worked on it", again=True)
            self._submit(task)
            return None
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
            done = _Done("", Crashed(signal.SIGKILL))  # Ray's worker, not the decoder's process
        except ray.exceptions.RayTaskError as error:
            raise RuntimeError(f"a task failed on {task.job}:\n{error}") from None
        if isinstance(done.outcome, GkdError):
            raise done.outcome
        if isinstance(done.outcome, Crashed) and task.crashes < _CRASHES:
            task.crashes += 1
            self._submit(task)
            return None
        if done.node and not task.job.probe_only:
            self.videos[self._names.get(done.node, done.node[:8])] += 1
        return done.outcome

    def _look(self) -> None:
        """Who is there, every now and then; nodes that come are examined, those that go are told of."""
        if self._looked and time.monotonic() - self._looked < _LOOK_SEC:
            return
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = {
            node["NodeID"]: node
            for node in _ray().nodes()
            if node["Alive"] and node["Resources"].get("CPU", 0) >= 1
        }
        for gone in self._alive - set(nodes):
            self._note(f"node {self._names[gone]} has gone; what it was doing is done elsewhere")
        for new in set(nodes) - set(self._names):
            self._names[new] = f"{nodes[new]['NodeManagerHostname']}/{new[:8]}"
            here = NodeAffinitySchedulingStrategy(node_id=new, soft=False)
            self._looks[self._examine.options(scheduling_strategy=here).remote(self._ground)] = new
            if self._looked:
                self._note(f"node {self._names[new]} has come")
        self._alive, self._looked = set(nodes), time.monotonic()
        self._cpus = int(sum(node["Resources"]["CPU"] for node in nodes.values()))

    def _hear(self, looks: list[Any], timeout_sec: float) -> None:
        """Takes the answers of nodes that were looked at."""
        ray = _ray()
        ready, _ = ray.wait(looks, num_returns=len(looks), timeout=timeout_sec) if looks else ([], [])
        for reference in ready:
            name = self._names[self._looks.pop(reference)]
            try:
                trouble = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                trouble = f"cannot be examined: {str(error).strip().splitlines()[-1]}"
            except ray.exceptions.RayError:
                continue  # it has gone again
            if trouble:
                raise _misfit(name, trouble)

    def _check_gpus(self, ray: Any, jobs: Sequence[Job]) -> None:
        wanted = self._gpu_share and any("flow" in job.parts for job in jobs)
        if wanted and not ray.cluster_resources().get("GPU"):
            raise GkdError(
                "no node of the cluster has a GPU, so no flow task would ever start",
                f"data.gpu_share is {self._gpu_share:g}",
                "`--set data.gpu_share=0`, or add a node with a GPU",
            )

    def _cancel(self, ray: Any) -> None:
        """Ends what is still at work."""
        left = list(self._tasks)
        for reference in left:
            with suppress(ray.exceptions.RayError):
                ray.cancel(reference, force=True)
        if left:
            ray.wait(left, num_returns=len(left), timeout=_CANCEL_SEC)
        self._tasks.clear()


def _ray() -> Any:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # who asks for no GPU sees none
    if not _address() and "RAY_AUTH_MODE" not in os.environ:
        # read when Ray is imported; without a token of ours it would keep one in the user's home
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise GkdError(
            "`--executor ray` needs Ray, which is not installed",
            "package ray",
            "pip install 'gkdcli[cluster]', on every node",
        ) from None
    return ray


def _address() -> str:
    """Of the cluster that is there; "" for one of our own."""
    found = os.environ.get("RAY_ADDRESS", "")
    return "" if found == "local" else found


def _connect(ray: Any, stack: ExitStack, limit: int) -> None:
    """To the cluster that RAY_ADDRESS names, as Ray understands it; else to one of our own."""
    address = _address()
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if not address:
        temporary = _short_folder()
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        options |= {"address": "local", "num_cpus": limit or available_cores(), "include_dashboard": False}
        options |= {"object_store_memory": _OBJECT_BYTES, "_temp_dir": str(temporary)}
    stack.callback(ray.shutdown)
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdecimal() and "/" not in host:  # Ray itself would ask for minutes
            socket.create_connection((host.strip("[]"), int(port)), 20).close()
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        raise GkdError(
            "the Ray cluster cannot be used" if address else "Ray cannot be started on this machine",
            f"{f'RAY_ADDRESS={address}' if address else 'a cluster of one node'}:"
            f" {' '.join(str(error).split())[:300]}",
            "`ray status` says whether one is there; all nodes need the same Ray and Python, and where the"
            " cluster asks for a token, RAY_AUTH_MODE=token and that token",
        ) from None


def _short_folder() -> Path:
    """For Ray's sockets, whose paths may have 107 bytes, of which Ray takes 65."""
    usual = Path(tempfile.gettempdir())
    return Path(tempfile.mkdtemp(prefix="gkd-", dir=usual if len(os.fsencode(usual)) <= 24 else "/tmp"))


@contextmanager
def _kept_handler() -> Iterator[None]:
    """Ray takes SIGTERM for itself."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _absolute(job: Job) -> Job:
    """The same job in words that any machine understands."""
    source = job.source
    flow = source.flow.absolute() if source.flow else None
    return replace(
        job,
        source=replace(source, path=source.path.absolute(), flow=flow),
        parts={modality: part.absolute() for modality, part in job.parts.items()},
        beside=job.beside.absolute() if job.beside else None,
    )


def _misfit(node: str, trouble: str) -> GkdError:
    return GkdError(
        f"a node of the cluster {trouble}",
        f"node {node}",
        "mend it or take it out of the cluster, and run the same command again; it continues",
    )


def _examiner() -> Callable[[_Ground], str]:
    """A function that travels as code, not by name: it runs where there is no gkd, or another one."""

    def examine(ground: tuple[str, str, str, str]) -> str:
        """What is wrong with the node this runs on; "" where it can take part."""
        import importlib.metadata
        import os

        wanted, probe, token, video = ground
        folder = os.path.dirname(probe)
        try:
            found = importlib.metadata.version("gkdcli")
        except importlib.metadata.PackageNotFoundError:
            found = "0+unknown"
        if found != wanted:
            return f"has gkd {found}, and this is gkd {wanted}"
        try:
            with open(probe, encoding="ascii") as file:
                same = file.read() == token
        except OSError:
            same = False
        if not same:
            return f"does not see the folder of the store, {folder}"
        if not os.access(folder, os.W_OK):
            return f"cannot write to the folder of the store, {folder}"
        return "" if os.path.exists(video) else f"does not see the videos, for one {video}"

    return examine


_crews: dict[tuple[Work, str], Crew[Job, Result]] = {}  # of this worker process: none or one


def _perform(function: Work, job: Job, ground: _Ground) -> _Done:
    """A task: does one job in the process beside this one."""
    import ray

    context = ray.get_runtime_context()
    node = context.get_node_id()
    trouble = _examiner()(ground)
    if trouble:
        return _Done(node, _misfit(f"{os.uname().nodename}/{node[:8]}", trouble))
    crew = _crew(function, os.environ.get("CUDA_VISIBLE_DEVICES", ""), job.data.timeout)
    try:
        crew.give(job)  # it has room for one
        while not (finished := crew.collect(60.0)):
            pass
    except GkdError as error:
        return _Done(node, error)
    return _Done(node, finished[0][1])


def _crew(function: Work, gpus: str, timeout_sec: float) -> Crew[Job, Result]:
    """Kept from task to task, until another GPU is given: a process stays on the first it sees."""
    if (function, gpus) not in _crews:
        for old in _crews.values():
            old.__exit__(None, None, None)
        _crews.clear()
        _crews[function, gpus] = Crew(function, 1, timeout_sec)
    return _crews[function, gpus]
