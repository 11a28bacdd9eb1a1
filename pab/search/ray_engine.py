"""Encode an index on many processes or machines with Ray Data.

Each worker is a Ray actor with the models in memory. By default, there is one per GPU, or one per
core without GPUs, but at most one per part. A worker itself reads images and writes vectors, so the
images and the index must be on a file system that all machines share, at the same paths. Ray
restarts a lost worker and repeats the parts that it was encoding.

Ray's documentation: https://docs.ray.io/en/latest/data/batch_inference.html
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pab import __version__
from pab.core.commands import names_flag
from pab.core.errors import InputError, first_line
from pab.search.index import Index
from pab.search.jobs import Job, Part, Task
from pab.search.libraries import library
from pab.search.members import MemberChoice, Opened, check_same_model
from pab.search.previous import Previous
from pab.search.worker import encode_part

PROG = "python -m pab.search index"
LOCAL = "local"  # Ray's name for a new cluster on this machine
CONNECT_SECONDS = 10.0
QUEUED = 2  # parts per worker: one that it encodes, and one that waits


@dataclass(frozen=True)
class RayEngine:
    """Engine of :func:`pab.search.build.build_index` that encodes with Ray Data.

    Attributes:
        address: address of a running cluster; None starts one on this machine for the run.
        workers: number of workers; None starts one per GPU, or per core without GPUs.
    """

    address: str | None = None
    workers: int | None = None

    def __call__(self, job: Job, tasks: Sequence[Task]) -> Iterator[Part]:
        """Yield the parts as they are finished.

        Raises:
            InputError: Ray is not installed or not reachable, the number of workers is invalid, or
                a worker finds invalid models or files, or runs another version of this project.
        """
        with connected(self.address) as ray:
            share = share_of(ray.cluster_resources(), self.workers, len(tasks))
            data = ray_library("ray.data")
            logging.getLogger("ray.data").setLevel(logging.ERROR)
            settings = data.DataContext.get_current()
            settings.enable_progress_bars = settings.print_on_execution_start = False
            rows = [{"number": n, "task": pickle.dumps(task)} for n, task in enumerate(tasks)]
            parts = data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                Worker, batch_size=1, batch_format="numpy", num_cpus=share.cores,
                fn_constructor_args=(job, Path.cwd(), __version__, share.cores),
                num_gpus=share.gpus,
                compute=data.ActorPoolStrategy(
                    size=share.workers, max_tasks_in_flight_per_actor=QUEUED
                ),
            )  # fmt: skip
            for row in parts.iter_rows():
                found = pickle.loads(row["part"])  # noqa: S301 - made by our own worker
                if isinstance(found, InputError):
                    raise found
                yield found


def ray_library(name: str) -> Any:
    """Import Ray or a module of it, with its usage reports disabled.

    Raises:
        InputError: it is not installed.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    return library(name, "runs with --engine ray", "ray")


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Connect to Ray, or start it on this machine without a dashboard; yield the module ``ray``.

    The connection of a program that has already called ``ray.init`` is used, and stays open.

    Raises:
        InputError: Ray is not installed or cannot start, or there is no cluster at the address.
    """
    ray = ray_library("ray")
    if ray.is_initialized():  # by a program that uses this module
        yield ray
        return
    more = {"include_dashboard": False} if address is None else {}
    try:
        if address is not None:
            check_reachable(address)
        ray.init(address or LOCAL, logging_level="ERROR", **more)
    except (OSError, ValueError, RuntimeError) as error:  # a ConnectionError is an OSError
        if address is None:
            raise InputError(
                "--engine ray", f"Ray cannot start on this machine: {first_line(error)}",
                todo="start a cluster with `ray start --head`, and pass --ray_address auto",
            ) from error  # fmt: skip
        raise InputError(
            "--ray_address", f"no Ray cluster at {address}: {first_line(error)}",
            todo="start one with `ray start --head`, and set RAY_AUTH_MODE=token if it uses tokens",
        ) from error  # fmt: skip
    try:
        yield ray
    finally:
        ray.shutdown()


def check_reachable(address: str) -> None:
    """Try to connect to HOST:PORT once, because Ray itself would try for minutes.

    Addresses of other forms, such as ``auto``, are not checked.

    Raises:
        OSError: the connection fails.
    """
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()


class Share(NamedTuple):
    """Number of workers, and the cores and GPUs of each."""

    workers: int
    cores: int
    gpus: int


def share_of(resources: dict[str, float], workers: int | None, tasks: int) -> Share:
    """Divide a cluster's cores and GPUs among workers.

    Args:
        resources: Ray's ``cluster_resources()``.
        workers: number of workers; None for one per GPU, or per core without GPUs.
        tasks: number of tasks; at most as many workers are started.

    Raises:
        InputError: ``workers`` is below 1, or above the number of GPUs (or cores without GPUs), or
            the cluster has neither.
    """
    cores, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    most = gpus or cores
    number = most if workers is None else workers
    if not 1 <= number <= most:
        unit = "GPUs" if gpus else "cores"
        raise InputError(
            "--ray_workers",
            f"expected 1 to {most} (the cluster has {most} {unit}), found {number}",
        )
    return Share(min(number, tasks), max(1, cores // number), 1 if gpus else 0)


class Worker:
    """Actor that encodes parts.

    Args:
        job: the run.
        folder: working directory of the command, which relative paths in flags refer to.
        version: version of this project that the command runs.
        cores: cores of this worker.
    """

    def __init__(self, job: Job, folder: Path, version: str, cores: int) -> None:
        self.job, self.folder, self.version, self.cores = job, folder, version, cores
        self._members: list[Opened] | None = None
        self._old: Previous | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[bytes]]:
        """Encode one part; return an :class:`InputError`, because Ray would wrap a raised one."""
        found: Part | InputError
        try:
            if self._members is None:
                self._members = self._open()
            task = pickle.loads(batch["task"][0])  # noqa: S301 - made by our own command
            found = encode_part(self.job, int(batch["number"][0]), task, self._members, self._old)
        except InputError as error:
            found = error
        return {"part": [pickle.dumps(found)]}

    def _open(self) -> list[Opened]:
        if self.version != __version__:
            raise InputError(
                "--ray_address", f"expected version {self.version} on every machine, found "
                f"{__version__} on {os.uname().nodename}", todo="install the same version",
            )  # fmt: skip
        try:
            os.chdir(self.folder)
        except OSError as error:
            problem = f"has no folder {self.folder}: {error.strerror or error}"
            todo = "start the command in a folder that all machines share"
            raise InputError(os.uname().nodename, problem, todo=todo) from error
        job = self.job
        members = [Opened(one, self._config(one).open()) for one in job.choices]
        if job.manifest is not None:
            for member, one in zip(job.manifest.members, members, strict=True):
                check_same_model(job.index, member, one.encoder)
            self._old = Previous(Index(job.index, job.manifest))
        return members

    def _config(self, choice: MemberChoice) -> Any:
        """Parse a member's flags; by default, a worker loads images on its own cores only."""
        loaders = ("--num_workers", str(self.cores - 1))
        return choice.config(PROG, () if names_flag(choice.arguments, loaders[0]) else loaders)
