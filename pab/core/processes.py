"""Distributed helpers for processes started by torchrun, or for a single process.

A single process exchanges nothing. Otherwise, gloo exchanges CPU tensors, and NCCL exchanges CUDA
tensors.

The backward pass of :func:`all_gather_with_grad` sums gradients over processes, and
:class:`pab.core.gradients.GradientAverage` averages them (as DistributedDataParallel does). If each
of the ``W`` processes computes the loss of its own rows against all rows, the averaged gradient
equals that of a single process on the whole batch.

Legend: ``B`` rows per process, ``W`` processes, ``D`` width.
"""

from __future__ import annotations

import os
import re
import socket
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

# torch.distributed.nn has the group as a default argument. If torch imports it after the group is
# joined (with torch._dynamo), the group and gloo's threads outlive `close`. A thread that drops a
# tensor during interpreter exit then aborts: "terminate called without an active exception".
import torch.distributed.nn.functional
from torch import Tensor, nn

from pab.core.devices import local_rank_of_torchrun
from pab.core.errors import InputError, LostProcessError

T = TypeVar("T")

# Messages by which gloo reports a lost process; it has no error class for this case.
_LOST = re.compile(r"Connection (closed|reset) by peer|Broken pipe")

_START = "start several processes with torchrun, or unset RANK and WORLD_SIZE"

# Longest wait for another process in an exchange. The longest waits are those for the process that
# checks and indexes the data, and for validation. NCCL's default is 10 minutes.
TIMEOUT = timedelta(hours=1)
# Longest wait until all processes have joined. torchrun has already waited for the machines, but
# does not report that a machine has failed since.
JOIN_TIMEOUT = timedelta(minutes=10)

pending_gathers = 0  # calls of all_gather_with_grad whose backward pass has not run


def init_processes(device: torch.device) -> None:
    """Join torchrun's group (``RANK``, ``WORLD_SIZE``) if there is one and it is not joined yet.

    Raises:
        InputError: a variable of torchrun is missing or invalid, or the group cannot be joined.
    """
    started = "RANK" in os.environ or "WORLD_SIZE" in os.environ
    if not started or dist.is_initialized():
        return
    world = number_in_environment("WORLD_SIZE", 1, todo=_START)
    number = number_in_environment("RANK", 0, world - 1, todo=_START)
    port = number_in_environment("MASTER_PORT", 1, 65_535, todo=_START)
    address = os.environ.get("MASTER_ADDR")
    if not address:
        raise InputError("MASTER_ADDR", f"expected an address, found {address!r}", todo=_START)
    try:
        store = joined_store(f"{address}:{port}", number, world)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=store, rank=number,
            world_size=world, device_id=device if device.type == "cuda" else None, timeout=TIMEOUT,
        )  # fmt: skip
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{address}:{port}", f"process {number} of {world} cannot join the others: {reason}",
            todo="torchrun --standalone chooses a free port",
        ) from error  # fmt: skip


def joined_store(address: str, number: int, world: int) -> dist.Store:
    """Connect to the store of torchrun's processes, and wait until all have done so.

    Args:
        address: address of the store, for the message.
        number: rank of this process.
        world: number of processes.

    Raises:
        InputError: a process is missing after :data:`JOIN_TIMEOUT`.
        RuntimeError: the store cannot be reached.
    """
    store, _, _ = next(dist.rendezvous("env://", number, world, timeout=JOIN_TIMEOUT))
    keys = [f"joined/{other}" for other in range(world)]
    store.set(keys[number], "")
    try:
        store.wait(keys, JOIN_TIMEOUT)
    except dist.DistStoreError as error:
        missing = [str(other) for other, key in enumerate(keys) if not store.check([key])]
        seconds = JOIN_TIMEOUT.total_seconds()
        raise InputError(
            address, f"expected {world} processes to join within {seconds:.0f} s, missing: process "
            f"{', '.join(missing)}", todo="see the messages on their machines",
        ) from error  # fmt: skip
    store.set_timeout(TIMEOUT)
    return store


def number_in_environment(
    name: str, least: int, most: int | None = None, *, default: int | None = None, todo: str
) -> int:
    """Read a number from an environment variable.

    Raises:
        InputError: it is not an integer from ``least`` to ``most``, or is missing without a
            default.
    """
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    number = int(text) if text and text.isascii() and text.isdigit() else None
    if number is None or number < least or (most is not None and number > most):
        end = "" if most is None else f" to {most}"
        raise InputError(name, f"expected a number from {least}{end}, found {text!r}", todo=todo)
    return number


def close() -> None:
    """Leave the group if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Join torchrun's group for the block, and leave it as :func:`leaving_together` does."""
    init_processes(device)
    with leaving_together():
        yield


@contextmanager
def leaving_together() -> Iterator[None]:
    """Leave the group at the end of the block.

    Processes that succeed wait for one another, so that none reports success if the writing process
    fails. A process that fails does not wait. With gloo, it closes its connections, which ends the
    other processes. NCCL's orderly shutdown would wait for all, so torchrun stops the other
    processes instead.

    Raises:
        LostProcessError: the connection to another process is lost, usually because it has exited.
    """
    try:
        yield
        barrier()
        close()
    except BaseException as error:
        number, count = rank(), world_size()
        if dist.is_initialized() and dist.get_backend() != "nccl":
            # Frames of a failed exchange also keep the group alive; see the comment on the imports.
            traceback.clear_frames(error.__traceback__)
            close()
        lost = isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError) and _LOST.search(str(error))
        )
        if count > 1 and lost:
            reason = str(error).strip().partition("\n")[0]
            raise LostProcessError(
                f"process {number} of {count} has lost the connection to another process "
                f"({reason}); the process that has ended reports the cause"
            ) from error
        raise


def rank() -> int:
    """Return the rank of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return true in rank 0, the process that writes the files."""
    return rank() == 0


def first_on_machine() -> bool:
    """Return true in one process per machine, which checks the machine's files."""
    return is_main() or local_rank_of_torchrun() == 0


def barrier() -> None:
    """Wait for every process."""
    if world_size() > 1:
        dist.barrier()


def share_of(count: int) -> range:
    """Return this process's indices below ``count``: every W-th, starting at its rank."""
    return range(rank(), count, world_size())


class _AllGather(torch.autograd.Function):
    # torch.distributed.nn.all_gather does the same but is deprecated in favour of a private module.

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.count = rows.shape[0]
        gathered = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)  # [B*W, D]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        global pending_gathers
        pending_gathers -= 1
        total = grads[0].clone(memory_format=torch.contiguous_format)  # all_reduce works in place
        dist.all_reduce(total)
        return total[rank() * ctx.count : (rank() + 1) * ctx.count]


def all_gather_with_grad(rows: Tensor) -> Tensor:
    """Concatenate the rows of all processes by rank, with gradients.

    Args:
        rows: ``[B, D]``, the same shape in all processes.

    Returns:
        ``[B*W, D]``. Backward returns the gradients of this process's rows, summed over processes.
    """
    global pending_gathers
    if world_size() == 1:
        return rows
    pending_gathers += torch.is_grad_enabled() and rows.requires_grad
    gathered: Tensor = _AllGather.apply(rows)  # type: ignore[no-untyped-call]
    return gathered


def assemble(ids: list[int], rows: Tensor | None, total: int, device: torch.device) -> Tensor:
    """Collect the rows of all processes on every process, in order of their ids.

    Args:
        ids: ids of this process's rows; over all processes, 0 to ``total`` - 1, each once.
        rows: float32 [B, D] on the CPU; None if this process has none.
        total: number of ids.
        device: device of the group, on which rows are exchanged.

    Returns:
        float32 [total, D] on the CPU.

    Raises:
        ValueError: an id is missing, out of range or occurs twice, or the number of ids differs
            from that of the rows.
    """
    if rows is not None and len(ids) != len(rows):
        raise ValueError(f"expected one id per row, found {len(ids)} for {len(rows)}")
    all_ids = gather_objects(list(ids))
    seen = Counter(one for part in all_ids for one in part)
    missing = [one for one in range(total) if one not in seen]
    odd = [one for one, count in seen.items() if count > 1 or not 0 <= one < total]
    if missing or odd:
        raise ValueError(
            f"expected the ids 0 to {total - 1}, each once; missing {missing[:5]}, "
            f"repeated or out of range {odd[:5]}"
        )
    widths = gather_objects(0 if rows is None else rows.shape[1])
    if rows is None:
        rows = torch.empty(0, max(widths))
    result = torch.empty(total, max(widths), dtype=rows.dtype)
    if world_size() == 1:
        result[ids] = rows
        return result
    padded = rows.new_zeros(max(map(len, all_ids)), max(widths))  # equal shapes in all processes
    padded[: len(rows)] = rows
    padded = padded.to(device)
    gathered = [torch.empty_like(padded) for _ in all_ids]
    dist.all_gather(gathered, padded)
    for part, found in zip(all_ids, gathered, strict=True):
        result[part] = found[: len(part)].cpu()
    return result


def gather_objects(value: T) -> list[T]:
    """Collect the values of all processes on every process, by rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: T) -> T:
    """Send the value of rank 0 to every process."""
    if world_size() == 1:
        return value
    box = [value if is_main() else None]
    dist.broadcast_object_list(box, src=0)
    received: Any = box[0]
    return received


def on_main(make: Callable[[], T]) -> T:
    """Call a function in rank 0 and return its result in every process.

    Raises:
        InputError: the function raised it in rank 0; every process raises it.
    """
    shared, error = broadcast_object(_result_or_error(make) if is_main() else (None, None))
    if error is not None:
        raise error
    return cast(T, shared)


def on_all(make: Callable[[], T]) -> T:
    """Call a function in every process, and return its own result to each process.

    The function must not exchange data with other processes.

    Raises:
        InputError: the function raised it in some process; every process raises it.
    """
    result, error = _result_or_error(make)
    for found in gather_objects(error):
        if found is not None:
            raise found
    return cast(T, result)


def _result_or_error(make: Callable[[], T]) -> tuple[T | None, InputError | None]:
    try:
        return make(), None
    except InputError as error:
        return None, error


def check_equal(values: Mapping[str, str], *, todo: str) -> None:
    """Check that all processes pass equal values.

    Args:
        values: flag or file -> short description of its value, with a hash if it is long.
        todo: the remedy.

    Raises:
        InputError: a value differs; every process raises it. The message names the flag or file,
            the values, the processes and the hosts.
    """
    found = gather_objects((dict(values), socket.gethostname()))
    for where in {name: None for described, _ in found for name in described}:
        holders: dict[str, list[str]] = {}
        for number, (described, host) in enumerate(found):
            holders.setdefault(described.get(where, "nothing"), []).append(f"{number} on {host}")
        if len(holders) > 1:
            listed = "; ".join(
                f"{value} in process {', '.join(names)}" for value, names in holders.items()
            )
            raise InputError(where, f"differs between processes: {listed}", todo=todo)


def broadcast(value: Tensor, source: int = 0) -> Tensor:
    """Send the tensor of one rank to every process; all processes pass the same shape."""
    if world_size() == 1 or value.numel() == 0:
        return value
    received = value.clone()
    dist.broadcast(received, src=source)
    return received


def share_buffers(model: nn.Module) -> None:
    """Copy rank 0's floating-point buffers (batch statistics) to every process, in place.

    Each process updates its own statistics in training; validation and checkpoints use rank 0's.
    """
    if world_size() > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                dist.broadcast(buffer, src=0)


def reduce_mean(value: Tensor) -> Tensor:
    """Average a tensor over processes, without gradient; every process gets the mean."""
    mean = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(mean)
        mean /= world_size()
    return mean
