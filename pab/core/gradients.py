"""Average gradients over processes in buckets, while the backward pass still runs.

DistributedDataParallel is not used: it averages only gradients of its own forward pass. With
gradient chunks, the logit scale gets its gradient in an earlier backward pass, and would not be
averaged.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from pab.core import processes

BUCKET_ELEMENTS = 8 * 1024 * 1024  # gradients per exchange: 32 MiB in float32


class GradientAverage:
    """Replace every gradient by its mean over processes, in place; do nothing in one process.

    Buckets contain the parameters in reverse order, because the backward pass reaches the last ones
    first. All processes exchange the buckets in this order. The exchange of a bucket starts once
    all its gradients exist and the exchanges of all earlier buckets have started. :meth:`finish`
    exchanges the rest, so a trainable parameter without a gradient delays its bucket and all later
    ones.

    Exchanges also wait for the backward passes of :func:`pab.core.processes.all_gather_with_grad`.
    Otherwise, if different parameters have a gradient in different processes, the two kinds of
    exchange could start in different orders. Other exchanges in a backward pass (synchronized batch
    norm) need the same graph in all processes.

    Args:
        parameters: parameters of the model, in the same order in all processes.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        shared = processes.world_size() > 1
        self.parameters = [p for p in parameters if p.requires_grad] if shared else []
        self._buckets = list(_buckets(self.parameters[::-1]))
        self._bucket_of = {id(p): i for i, bucket in enumerate(self._buckets) for p in bucket}
        self._overlaps = False
        self._restart()
        # A weak reference: a cycle through the hooks would keep the group alive after an error.
        ready = partial(_call, weakref.WeakMethod(self._ready))
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(ready)

    def _restart(self) -> None:
        self._missing = [len(bucket) for bucket in self._buckets]  # gradients not yet computed
        self._started: list[tuple[dist.Work, Tensor]] = []  # one exchange per bucket
        self._own: set[int] = set()  # ids of parameters with a gradient in this process

    @contextmanager
    def last_backward(self) -> Iterator[None]:
        """Start exchanges in the block, which contains the last backward pass before the update."""
        self._overlaps = True
        try:
            yield
        finally:
            self._overlaps = False

    def _ready(self, parameter: Tensor) -> None:
        """Record the gradient of one parameter, and start the exchanges that are now possible."""
        if not self._overlaps:
            return
        bucket = self._bucket_of[id(parameter)]
        if bucket < len(self._started):
            raise RuntimeError("a gradient changed after its exchange: two backward passes ran")
        self._missing[bucket] -= 1
        while (
            not processes.pending_gathers
            and len(self._started) < len(self._buckets)
            and not self._missing[len(self._started)]
        ):
            self._start_next()

    def _start_next(self) -> None:
        """Move the gradients of the next bucket into one tensor, and start its exchange."""
        bucket = self._buckets[len(self._started)]
        flat = bucket[0].new_zeros(sum(parameter.numel() for parameter in bucket))
        offset = 0
        for parameter in bucket:
            mean = flat.as_strided(parameter.shape, parameter.stride(), offset)
            offset += parameter.numel()
            if parameter.grad is not None:
                mean.copy_(parameter.grad)
                self._own.add(id(parameter))
            parameter.grad = mean
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None
        self._started.append((work, flat))

    @torch.no_grad()
    def finish(self, figures: Tensor) -> Tensor:
        """Wait for the mean gradients, and average figures such as losses.

        A missing gradient counts as zero.

        Args:
            figures: [F], values of this process.

        Returns:
            [F + P]: mean figures, then the fraction of processes with a gradient for each of P
            parameters, for :meth:`without_fractions`. In a single process, P is 0.
        """
        if not self.parameters:
            return figures
        while len(self._started) < len(self._buckets):
            self._start_next()
        for work, flat in self._started:
            work.wait()
            flat /= processes.world_size()
        own = torch.tensor([float(id(p) in self._own) for p in self.parameters])
        self._restart()
        # A gather without a backward pass would delay the exchanges of all later steps.
        processes.pending_gathers = 0
        return processes.reduce_mean(
            torch.cat([figures, own.to(figures.device, figures.dtype, non_blocking=True)])
        )

    def without_fractions(self, values: Sequence[float]) -> list[float]:
        """Return only the figures from the values of :meth:`finish`, and remove unused gradients.

        After :meth:`finish`, a parameter without a gradient in any process has a zero gradient.
        This method sets it to None; otherwise, an optimizer would decay the parameter.
        """
        count = len(values) - len(self.parameters)
        for parameter, fraction in zip(self.parameters, values[count:], strict=True):
            if not fraction:
                parameter.grad = None
        return list(values[:count])


def _call(method: weakref.WeakMethod, parameter: Tensor) -> None:  # type: ignore[type-arg]
    found = method()
    if found is not None:
        found(parameter)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Group consecutive tensors of one dtype: ``BUCKET_ELEMENTS`` at most, or one larger tensor."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(item.numel() for item in bucket) + tensor.numel() > BUCKET_ELEMENTS
        if bucket and (full or bucket[0].dtype != tensor.dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
