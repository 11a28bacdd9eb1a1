"""Fake CUDA tensors: run GPU code on any machine, and record what a GPU would do.

Fake tensors have a shape, a dtype and a device, but no values. Operations on tensors of different
devices raise, as on a real GPU. :class:`Trace` counts kernels, memory traffic and host reads.

Values that the host reads are replaced with ones, so code with value-dependent control flow runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
# Operations whose output shape depends on values: the host waits for the result.
SHAPED_BY_VALUES = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default}
# Operations that return a Python number.
SCALARS = {aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default}
# Operations that are one kernel on a GPU, although torch can decompose them.
WHOLE = {aten.scaled_dot_product_attention.default, aten.gelu.default}
# Operations that compute nothing on the device.
FREE = {
    aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default,
    aten.empty_strided.default, aten.new_empty_strided.default, aten.detach.default,
}  # fmt: skip


class Trace(TorchDispatchMode):
    """Record the operations on fake CUDA tensors.

    Attributes:
        kernels: operation -> number of calls; views and allocations are not counted.
        traffic: bytes read and written by these operations.
        reads: host reads of device values: ``.item()``, ``.tolist()``, blocking copies to the CPU.
        copies: non-blocking copies to the CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.traffic = 0
        self.reads: Counter[str] = Counter()
        self.copies = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(tensor.device.type == "cuda" for tensor in inputs)
        if function in SCALARS:
            self.reads["item"] += on_device
            return _one(inputs[0])
        if function.namespace == "prim":  # a property of a tensor
            return function(*args, **kwargs)
        if function not in WHOLE:
            with self:  # composite operations, which reach this mode only in inference mode
                out = function.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if function in SHAPED_BY_VALUES and on_device:
            self.reads[str(function)] += 1
        out = function(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self._copied(function, inputs, outputs, kwargs, args)
        device = on_device or any(tensor.device.type == "cuda" for tensor in outputs)
        if device and function not in FREE and not _is_view(inputs, outputs, function):
            self.kernels[str(function)] += 1
            self.traffic += sum(t.numel() * t.element_size() for t in inputs + outputs)
        return out

    def _copied(
        self, function: Any, inputs: list[Tensor], outputs: list[Tensor], kwargs: Any, args: Any
    ) -> None:
        if function is aten._to_copy.default:
            source, target = inputs[0], outputs[0]
            waits = not kwargs.get("non_blocking", False)
        elif function is aten.copy_.default:
            target, source = inputs[0], inputs[1]
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        else:
            return
        if source.device.type == "cuda" and target.device.type == "cpu":
            if waits:
                self.reads["copy to the CPU"] += 1
            else:
                self.copies += 1

    @property
    def launches(self) -> int:
        """Number of kernels."""
        return sum(self.kernels.values())

    @property
    def host_reads(self) -> int:
        """Number of host reads."""
        return sum(self.reads.values())


def _one(tensor: Tensor) -> Any:
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.dtype.is_floating_point else 1


def _is_view(inputs: list[Tensor], outputs: list[Tensor], function: Any) -> bool:
    storages = {tensor.untyped_storage()._cdata for tensor in inputs}
    shared = all(tensor.untyped_storage()._cdata in storages for tensor in outputs)
    return shared and not function._schema.is_mutable


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor]) -> nn.Module:
    """Convert a module's tensors; torch would swap fake tensors in place, which fails."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                new = nn.Parameter(function(parameter.detach()), parameter.requires_grad)
                part._parameters[name] = new
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = function(buffer)
    return module


@contextmanager
def fake_cuda(patch: pytest.MonkeyPatch) -> Iterator[Trace]:
    """Run the block with fake tensors; ``device="cuda"`` works, and CUDA's autocast is on.

    Tensors made in the block are fake, on any device. Yields the trace of the block.
    """
    patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    # It draws until all values are in range, which fake tensors never report.
    patch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, *args, **kwargs: tensor)
    patch.setattr(nn.Module, "_apply", _apply)
    with FakeTensorMode(), Trace() as trace:

        def tolist(self: Tensor) -> Any:
            if self.device.type == "cuda":
                trace.reads["tolist"] += 1
            if self.dim() == 0:
                return _one(self)
            return [tolist(row) for row in torch.unbind(self.to("meta"))]

        patch.setattr(FakeTensor, "tolist", tolist)
        yield trace
