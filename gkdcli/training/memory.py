"""Memory of training: what it will take, what a process holds, and the most it has held."""

from __future__ import annotations

import os
import re
import resource
import sys
from pathlib import Path

import torch

from gkdcli.models.cost import Cost
from gkdcli.settings import Settings
from gkdcli.training.steps import has_spliced

MARGIN = 1.1  # what allocators lose between tensors: seen at full size on the CPU
WORKSPACE = 64 << 20  # of a GPU's libraries, whatever they work at
IN_16_BITS = 0.7  # of what is kept in float32, seen on an H100: places of maxima stay what they are
KERNELS = 3  # tensors like the largest one that an operation and its gradient hold for a moment


def resident_bytes() -> int:
    """Of this process now; the most so far where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return peak_resident_bytes()
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_resident_bytes() -> int:
    """The most that this process has held."""
    try:
        # the other count below begins with that of the process that started this one
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
        if found:
            return int(found[1]) * 1024
    except OSError:
        pass
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def state_bytes(settings: Settings, trained: int, generators: int) -> int:
    """What a run goes on with, in memory as in a checkpoint: weights, their mean, moments of the optimisers.

    Args:
        settings: the page.
        trained: parameters of the network that is trained.
        generators: parameters of its CVAEs.
    """
    moments = 1 if settings.optim.algorithm == "sgd" else 2
    return 4 * ((1 + moments + bool(settings.optim.ema)) * trained + 3 * generators)


def expected_bytes(settings: Settings, network: Cost, generators: int, teacher: int, clip_values: int) -> int:
    """What the tensors of a training step come to at most: weights, optimisers, what is kept.

    Of the two stages the one that takes more counts.

    Args:
        settings: the page.
        network: cost of the one that is trained, by clip.
        generators: parameters of its CVAEs.
        teacher: parameters of teacher and its CVAEs.
        clip_values: numbers in a clip.
    """
    trained, batch = network.parameters, settings.optim.batch_size
    steady = state_bytes(settings, trained, generators) + 4 * teacher
    # in the worst batch all clips have a spliced version
    passed = 2 * batch if has_spliced(settings) else batch
    steady += (5 * passed + batch) * clip_values  # as bytes, the next batch too, and as floats
    share = 1.0 if settings.train.precision == "32" else IN_16_BITS
    kept = round(share * passed * network.kept_bytes)
    moment = round(share * KERNELS * passed * network.largest_bytes)
    network_stage = kept + max(moment, 4 * trained - kept)  # gradients come as what is kept goes
    shared = settings.train.schedule == "step"
    generator_stage = 4 * generators + (kept if shared else moment)
    return round(MARGIN * (steady + max(network_stage, generator_stage)))


def peak_bytes(device: torch.device) -> int:
    """The most so far: of a GPU what PyTorch had allocated on it, of the CPU what the process held."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return peak_resident_bytes()
