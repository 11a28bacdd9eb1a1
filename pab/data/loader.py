"""Data loader with any number of worker processes; only the main process handles Ctrl-C."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import DataLoader

from pab.core.devices import local_processes

MOST_WORKERS = 16  # limit of `auto`; every worker holds two batches in shared memory
CONTROL_GROUPS = Path("/sys/fs/cgroup")  # Linux: limits set by containers and Slurm
OWN_GROUPS = Path("/proc/self/cgroup")  # one line per hierarchy, "NUMBER:CONTROLLERS:PATH"


def resolve_workers(setting: int | Literal["auto"]) -> int:
    """Return the number of loader processes that ``--num_workers`` selects.

    ``auto`` divides the cores that this process may use by the number of processes that torchrun
    has started on this machine (``LOCAL_WORLD_SIZE``). The process's affinity, and the CPU
    quota of its container or Slurm job, limit the cores. The result is 1 to :data:`MOST_WORKERS`.

    Raises:
        InputError: the setting is ``auto``, and ``LOCAL_WORLD_SIZE`` is not a positive integer.
    """
    if setting != "auto":
        return setting
    return min(max(available_cores() // local_processes(), 1), MOST_WORKERS)


def available_cores() -> int:
    """Return the number of cores that this process may use; a fraction of a core counts as one."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return math.ceil(min(cores, cpu_quota()))


def cpu_quota(groups: Path = CONTROL_GROUPS, own: Path = OWN_GROUPS) -> float:
    """Read the CPU quota of this process's control groups (versions 1 and 2), in cores.

    The quotas of all enclosing groups apply. A container sees its own group as the root.

    Args:
        groups: folder of the control groups.
        own: file with the paths of this process's groups.

    Returns:
        The smallest quota; infinity if there is none.
    """
    quotas = [math.inf]
    for line in _read(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = groups / ("cpu" if controllers else "")  # version 2 has no list of controllers
        folder = root / path.lstrip("/")
        quotas += [_quota(one) for one in (folder, *folder.parents) if one.is_relative_to(root)]
    return min(quotas)


def _quota(group: Path) -> float:
    version_1 = (_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us"))
    words = (_read(group / "cpu.max") or " ".join(version_1)).split()
    if len(words) != 2 or words[0] in ("max", "-1"):  # both words mean no limit
        return math.inf
    return int(words[0]) / int(words[1])  # microseconds of processor time per period


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:  # no such control group, or not Linux
        return ""


def needed_workers(workers: int, batches: int) -> int:
    """Limit workers to the number of batches; a single batch is loaded in the main process."""
    return min(workers, batches) if batches > 1 else 0


class Loader(DataLoader[Any]):
    """PyTorch's DataLoader without the warning about more worker processes than cores.

    Results do not depend on the number of workers. More workers than cores can help if reading
    waits for a disk or network.
    """

    def __iter__(self) -> Any:
        """Start the workers with SIGINT blocked; they inherit the signal mask.

        The main process handles Ctrl-C and ends its workers. A signal that arrives during the start
        is delivered afterwards, because Python would ignore an exception raised during a fork.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def check_worker_number_rationality(self) -> None:
        """Accept any number of worker processes."""
