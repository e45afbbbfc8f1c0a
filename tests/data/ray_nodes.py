"""A Ray cluster of several nodes on this machine, for test_cluster: obeys the lines it reads, answers each.

`add CPUS [NAME=VALUE ...]` starts a node with these variables; `kill N` kills the N-th added without a word.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import tempfile
from typing import Any

from ray.cluster_utils import Cluster

AGENTS = (
    "metrics_agent_port",
    "runtime_env_agent_port",
    "dashboard_agent_listen_port",
    "metrics_export_port",
)


def small() -> dict[str, Any]:
    """Of a node: little shared memory, and ports that are known, so that none is waited for."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in AGENTS]
        for one in sockets:
            one.bind(("", 0))
        ports = [one.getsockname()[1] for one in sockets]
    given = {"object_store_memory": 80 << 20, "include_dashboard": False, "num_gpus": 0}
    return given | dict(zip(AGENTS, ports, strict=True))


def main() -> None:
    """Until the end of the input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever Ray prints
    with tempfile.TemporaryDirectory(prefix="gr-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(True, head_node_args={**small(), "num_cpus": 0, "temp_dir": folder})
        nodes = []
        print(cluster.address, file=answers, flush=True)
        try:
            for line in sys.stdin:
                match line.split():
                    case ["add", cpus, *variables]:
                        surroundings = dict(text.split("=", 1) for text in variables)
                        nodes.append(cluster.add_node(**small(), num_cpus=int(cpus), env_vars=surroundings))
                    case ["kill", number]:
                        cluster.remove_node(nodes[int(number)], allow_graceful=False)
                print("done", file=answers, flush=True)
        finally:
            with contextlib.suppress(Exception):
                cluster.shutdown()


if __name__ == "__main__":
    main()
