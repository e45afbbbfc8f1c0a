"""Training in several processes, as torchrun starts them: one trains on its part of each batch of all.

Modules are not wrapped: two optimisers, two stages and sub-modules that are called directly fit no wrapper.
Gradients are added up where a group of batches closes, flattened and in buckets. With one process nothing of
this happens.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment
from lightning_fabric.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from gkdcli import launch as launching
from gkdcli.errors import ExitCode, GkdError, usage_error
from gkdcli.launch import Launch
from gkdcli.losses.segments import at_least_one
from gkdcli.runs import Place, Run, all_runs

T = TypeVar("T")
LONGEST = timedelta(days=1)  # the first process validates, or writes to a slow disk, while the others wait
ANSWER = 60.0  # s within which torchrun's store is to answer
MEETING = 600.0  # s until all processes have imported what they need
BUCKET = 25 * 2**20  # bytes of gradients that are sent at once


class Group:
    """The processes of a run; every method is called by all of them, in the same order.

    Args:
        launch: which of them this is.
        store: of torchrun, through which they talk before they can do better, and when one fails.
        resume: said to users whose run has lost a process.
    """

    def __init__(self, launch: Launch | None = None, store: Any = None, resume: str = "") -> None:
        self.launch = launch or Launch()
        self.rank, self.size = self.launch.rank, self.launch.size
        self.first = self.rank == 0
        self.agents = [launching.agent()] if self.launch.id else []
        self.resume = resume
        self._store = store
        self._control: Any = None  # a process group of the CPU, for everything but tensors of the device

    # ---- coming together and parting ----

    @classmethod
    def join(cls, launch: Launch) -> Group:
        """Meets the other processes, so that whatever happens to one of them can be told.

        Raises:
            GkdError: they do not come, or one of them has failed.
        """
        if launch.size == 1:
            return cls(launch)
        group = cls(launch, _agents_store(launch))
        launching.enter(group)
        group._store.set(f"agent{group.rank}", group.agents[0])
        group._meet("joined")
        everyone = [group._store.get(f"agent{rank}").decode() for rank in range(group.size)]
        group.agents = sorted(set(everyone))
        return group

    def start(self, device: torch.device) -> Fabric:
        """Devices and process groups: gloo on the CPU, NCCL on GPUs, one GPU for each process of a machine.

        Raises:
            GkdError: more processes than GPUs, or one of the others has failed.
        """
        for name in ("lightning_fabric", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
        if self.size == 1:  # leftovers of a cluster's environment have no say
            return Fabric(accelerator=device.type, devices=1, plugins=LightningEnvironment())
        here = self.launch.local_size
        if device.type == "cuda" and here > torch.cuda.device_count():
            raise GkdError(
                f"{here} processes on a machine with {torch.cuda.device_count()} GPUs",
                "torchrun --nproc-per-node",
                f"`--nproc-per-node {torch.cuda.device_count()}`",
            )
        self._meet("started")  # or else the one that fails before this leaves the others in the next lines
        fabric = Fabric(
            accelerator=device.type,
            devices=here,
            num_nodes=self.size // here,
            strategy=DDPStrategy(),
        )
        # names of this start: under those of the one before, Gloo finds addresses where nobody is any more
        dist.init_process_group(
            "gloo" if device.type == "cpu" else "nccl",
            store=PrefixStore("torch/", self._store),
            rank=self.rank,
            world_size=self.size,
            timeout=LONGEST,
        )
        fabric.launch()
        with self._together():
            self._control = dist.new_group(backend="gloo", timeout=LONGEST) if device.type != "cpu" else None
        return fabric

    def leave(self, failed: bool = False) -> None:
        """Ends the connections: who waits for this process learns that it will not come."""
        launching.enter(None)
        if not dist.is_initialized() or self.size == 1:
            return
        if self._control is not None:
            dist.destroy_process_group(self._control)
        if not failed or self._control is None:  # NCCL's own end would wait for those who do not come
            dist.destroy_process_group()

    def speaks(self, error: GkdError) -> bool:
        """Whether this process tells the error; the others know of it afterwards.

        The first one does, of whichever process it is; where it cannot within `PATIENCE`, whoever asks next.
        """
        try:
            if not isinstance(error, _Heard) and not self.first:
                self._post(error)
            self.leave(failed=True)
            deadline = time.monotonic() + launching.PATIENCE
            while not self.first and self._store.add("told", 0) == 0 and time.monotonic() < deadline:
                time.sleep(0.02)
            return bool(self._store.add("told", 1) == 1)
        except RuntimeError:  # the machine that held the store is gone, and the first process with it
            return os.environ.get("LOCAL_RANK") == "0"

    def _post(self, error: GkdError) -> None:
        told = [error.what, error.where, error.hint, int(error.code), self.rank]
        self._store.set("error", json.dumps(told))
        self._store.check(["error"])  # an answer: it has arrived, before any connection ends

    def _posted(self) -> GkdError | None:
        try:
            if not self._store.check(["error"]):
                return None
            what, where, hint, code, rank = json.loads(self._store.get("error").decode())
        except RuntimeError:
            return None
        told = f"process {rank} of {self.size}, counted from 0"
        return _Heard(what, f"{where}; {told}" if where else told, hint, ExitCode(code))

    def lost(self) -> GkdError:
        """Why the others do not answer: what one of them has said, or that it has died without a word."""
        return self._posted() or _Heard(
            "another process of this run has died",
            f"one of {self.size}; torchrun says below which one and how",
            self.resume or "torchrun's output may say why; run the same command again",
        )

    def _meet(self, name: str) -> None:
        """Waits for all, through the store."""
        deadline = time.monotonic() + MEETING
        with self._together():
            self._store.add(name, 1)
            while (come := self._store.add(name, 0)) < self.size:
                if error := self._posted():
                    raise error
                if time.monotonic() > deadline:
                    raise GkdError(
                        f"only {come} of {self.size} processes have come",
                        "waited for ten minutes",
                        "torchrun starts them together; see what the others say",
                    )
                time.sleep(0.02)

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """What is done in here fails where another process has."""
        try:
            yield
        except RuntimeError:
            raise self.lost() from None

    # ---- small things ----

    def gather(self, item: T) -> list[T]:
        """Everyone's item, in the order of the processes."""
        if self.size == 1:
            return [item]
        found: list[Any] = [None] * self.size
        with self._together():
            dist.all_gather_object(found, item, group=self._control)
        return found

    def share(self, make: Callable[[], T]) -> T:
        """What the first process makes; the others get a copy."""
        if self.size == 1:
            return make()
        found: list[Any] = [make() if self.first else None]
        with self._together():
            dist.broadcast_object_list(found, src=0, group=self._control)
        made: T = found[0]
        return made

    def agree(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag as it is where any process has raised it."""
        return tuple(map(any, zip(*self.gather(flags), strict=True)))

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process goes first: what it writes in here, the others find."""
        if not self.first:
            self.gather(None)
        yield
        if self.first:
            self.gather(None)

    # ---- tensors ----

    def divisors(self, counts: Tensor) -> Tensor:
        """What sums over this process's clips are divided by, of what they count (METHOD.md 5).

        The counts of all, at least 1; and as the processes' losses are averaged, divided by their number.
        """
        return at_least_one(self._total(counts)) / self.size if self.size > 1 else at_least_one(counts)

    def part(self, count: int, device: torch.device) -> Tensor | float:
        """What turns a mean over `count` things of this process into its part of the mean over everyone's."""
        if self.size == 1:
            return 1.0
        return count / self.divisors(torch.tensor(count, device=device))

    def _total(self, counts: Tensor) -> Tensor:
        total = counts.clone()
        with self._together():
            dist.all_reduce(total)
        return total

    def sum_gradients(self, parameters: Sequence[nn.Parameter], needed: Iterable[int]) -> None:
        """Adds up the gradients of all processes.

        Args:
            parameters: the same ones everywhere.
            needed: numbers of those that have a gradient anywhere; the others are left alone.
        """
        if self.size == 1:
            return
        gradients = []
        for parameter in (parameters[number] for number in needed):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        self._in_buckets(gradients, dist.all_reduce)

    def spread(self, *modules: nn.Module | None) -> None:
        """Gives everyone the first process's weights and running statistics."""
        if self.size == 1:
            return
        tensors = [value for module in modules if module is not None for value in _tensors(module)]
        with torch.no_grad():
            self._in_buckets(tensors, lambda flat: dist.broadcast(flat, src=0))

    def _in_buckets(self, tensors: Sequence[Tensor], exchange: Callable[[Tensor], Any]) -> None:
        """Does something to many tensors at once, which may lie in memory in any order."""
        for bucket in _buckets(tensors):
            flat = torch.cat([value.reshape(-1) for value in bucket])
            with self._together():
                exchange(flat)
            start = 0
            for value in bucket:
                value.copy_(flat[start : start + value.numel()].view(value.shape))
                start += value.numel()


def begun_run(place: Place, stage: str, launch: Launch, agents: Sequence[str]) -> Run | None:
    """The run that a torchrun had begun which has now started its processes again; None if it had not yet.

    Args:
        place: where.
        stage: `pretrain` or `distill`.
        launch: of this process.
        agents: see `launch.agent`, of all machines: another job may have had the same id.
    """
    for run in reversed(all_runs(place, stage) if launch.restarts else []):
        made = run.record.get("launch", {})
        if made.get("id") == launch.id and set(made["agents"]) & set(agents):
            return run
    return None


def require_processes(run: Run, launch: Launch, command: str) -> None:
    """A run goes on in as many processes as it began in: they divide its batches.

    Args:
        run: to be continued.
        launch: of this process.
        command: what continues it.

    Raises:
        GkdError: with both numbers (exit code 2).
    """
    before = run.record.get("processes", 1)
    if before != launch.size:
        typed = replace(launch, size=before, local_size=before).typed(command)
        raise usage_error(
            f"the number of processes has changed since this run began: {before} -> {launch.size}",
            str(run.folder / "run.json"),
            f"`{typed}`" + (", over as many machines as you like" if before > 1 else ""),
        )


class _Heard(GkdError):
    """Another process has failed; this one only passes it on."""


def _agents_store(launch: Launch) -> Any:
    """The store that torchrun keeps as long as it lives; each start of the processes has its own names in it.

    Raises:
        GkdError: nobody is there.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=ANSWER))
    except (RuntimeError, ValueError) as error:
        raise GkdError(
            f"nobody answers at {host}:{port}, where torchrun should be",
            str(error).splitlines()[0],
            "`unset RANK WORLD_SIZE` where they are left over from another program;"
            " `torchrun --nproc-per-node N -m gkdcli ...` starts several processes",
        ) from None
    return PrefixStore(f"gkd/{launch.id}/{launch.restarts}/", store)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from (parameter.data for parameter in module.parameters())
    yield from module.buffers()


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type each, in their order, of about `BUCKET` bytes."""
    for dtype in dict.fromkeys(value.dtype for value in tensors):
        bucket: list[Tensor] = []
        size = 0
        for value in (value for value in tensors if value.dtype == dtype):
            if bucket and size + value.nbytes > BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(value)
            size += value.nbytes
        if bucket:
            yield bucket
