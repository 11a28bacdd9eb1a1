"""Fake CUDA tensors: run GPU code on any machine, and record what a GPU would do.

Fake tensors have a shape, a dtype and a device, but no values. Operations on tensors of different
devices raise, as on a real GPU. :class:`Trace` counts kernels, memory traffic, host reads and
allocated memory.

Operations whose output shape depends on values (`nonzero`) also raise: on a GPU, the host would
wait for the shape.

Values that the host reads are replaced with 1 or True, unless a test sets others, so that code with
value-dependent control flow runs.

Attention uses the kernels that PyTorch would choose on a GPU, and `backward` runs in Python
(`tests/fake_backward.py`), because PyTorch's own code for both needs a CUDA driver.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.allocations import Allocations
from tests.fake_backward import backward, freeable_graph

CUDA = torch.device("cuda", 0)
# Elements. The memory-efficient kernel copies a mask unless its row length is a multiple of this.
ALIGNED = 8
EVENT = torch.cuda.Event
aten = torch.ops.aten
# Operations that return a Python number.
SCALARS = {aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default}
# Operations that are one kernel on a GPU, although torch can decompose them.
WHOLE = {
    aten.gelu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
}
# Operations that compute nothing on the device.
FREE = {
    aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default,
    aten.empty_strided.default, aten.new_empty_strided.default, aten.detach.default,
}  # fmt: skip


class Trace(TorchDispatchMode):
    """Record the operations on fake CUDA tensors.

    Attributes:
        kernels: operation -> number of calls; views and allocations are not counted.
        dtypes: operation -> dtypes of its first tensors.
        traffic: bytes read and written by the counted kernels.
        reads: host reads of device values: ``.item()``, ``.tolist()``, blocking copies to the CPU.
        copies: non-blocking copies to the CPU.
        memory: bytes in use on the device.
        number, truth: value of the integers and of the booleans that the host reads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.memory = Allocations("cuda")
        self.number, self.truth = 1, True
        self.reset()

    def reset(self) -> None:
        """Forget the operations so far; the memory is still counted."""
        self.kernels: Counter[str] = Counter()
        self.dtypes: defaultdict[str, set[torch.dtype]] = defaultdict(set)
        self.traffic = 0
        self.reads: Counter[str] = Counter()
        self.copies = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "prim":  # a property of a tensor
            return function(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(tensor.device.type == "cuda" for tensor in inputs)
        if function in SCALARS:
            if on_device:
                self.reads["item"] += 1
            return self.value(inputs[0])
        if function not in WHOLE:
            with self:  # composite operations, which reach this mode only in inference mode
                out = function.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = function(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self._copied(function, inputs, outputs, kwargs, args)
        self.memory.add(outputs)
        device = on_device or any(tensor.device.type == "cuda" for tensor in outputs)
        if device and function not in FREE and not _is_view(inputs, outputs, function):
            self.kernels[str(function)] += 1
            self.dtypes[str(function)].add((inputs + outputs)[0].dtype)
            self.traffic += sum(map(_bytes, inputs + outputs))
        return out

    def value(self, tensor: Tensor) -> Any:
        """Return the value that the host reads from a tensor of one element."""
        if tensor.dtype == torch.bool:
            return self.truth
        return 1.0 if tensor.dtype.is_floating_point else self.number

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


def _bytes(tensor: Tensor) -> int:
    """Count the bytes of a tensor; repeated elements of an expanded tensor count once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


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


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute attention with the kernel that PyTorch chooses on a GPU of compute capability 8.0.

    This is FlashAttention for 16-bit inputs without a mask, and otherwise the memory-efficient
    kernel.
    """
    assert not enable_gqa
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
    if attn_mask is None and q.dtype != torch.float32:
        found = aten._scaled_dot_product_flash_attention(
            q, k, v, dropout_p, is_causal, False, scale=scale
        )
        return found[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            blocked = attn_mask.logical_not()
            attn_mask = torch.zeros_like(blocked, dtype=q.dtype).masked_fill_(blocked, -torch.inf)
        columns = attn_mask.shape[-1]
        if columns % ALIGNED:
            attn_mask = nn.functional.pad(attn_mask, (0, -columns % ALIGNED))[..., :columns]
        attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return aten._scaled_dot_product_efficient_attention(
        q, k, v, attn_mask, trained, dropout_p, is_causal, scale=scale
    )[0]


class Event:
    """CUDA event that is always complete."""

    def __init__(self, **_: bool) -> None: ...

    def record(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...


@contextmanager
def fake_cuda(patch: pytest.MonkeyPatch) -> Iterator[Trace]:
    """Run the block with fake tensors; ``device="cuda"`` and CUDA's autocast work without a GPU.

    Tensors made in the block are fake, on any device. Yields the trace of the block.
    """
    patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    # The original draws until all values are in range, which fake tensors never report.
    patch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, *args, **kwargs: tensor)
    patch.setattr(nn.Module, "_apply", _apply)
    # torch clips plain tensors in grouped kernels, but not fake ones; treat these as plain.
    patch.setattr(torch.nn.utils.clip_grad, "_has_foreach_support", lambda *args: True)
    patch.setattr(nn.functional, "scaled_dot_product_attention", _attention)
    patch.setattr(torch.cuda, "get_rng_state", lambda device=None: torch.empty(16))
    patch.setattr(torch.cuda, "set_rng_state", lambda state, device=None: None)
    if torch.cuda.Event is EVENT:  # otherwise, the test has replaced it
        patch.setattr(torch.cuda, "Event", Event)
    with FakeTensorMode() as mode, freeable_graph() as read, Trace() as trace:

        def tolist(self: Tensor) -> Any:
            if self.device.type == "cuda":
                trace.reads["tolist"] += 1
            if self.dim() == 0:
                return trace.value(self)
            return [tolist(row) for row in torch.unbind(self.to("meta"))]

        def run_backward(self: Tensor, gradient: Tensor | None = None) -> None:
            backward(self, gradient, read)

        from_buffer = torch.frombuffer

        def fake_from_buffer(*args: Any, **kwargs: Any) -> Tensor:
            return mode.from_tensor(from_buffer(*args, **kwargs))

        patch.setattr(torch, "frombuffer", fake_from_buffer)
        patch.setattr(FakeTensor, "tolist", tolist)
        patch.setattr(Tensor, "backward", run_backward)
        yield trace
