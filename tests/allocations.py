"""Count the memory of real or fake tensors by the lifetime of their storages."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BLOCK = 512  # bytes; PyTorch's CUDA allocator rounds sizes up to a multiple of this


class Allocations:
    """Memory of the tensors on one kind of device.

    Memory that the allocator or kernels use internally is not counted.

    Attributes:
        live, peak: bytes in use, and the largest number of bytes in use so far.
    """

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type
        self.live = self.peak = 0
        self._known: set[int] = set()

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of new tensors until the last tensor that uses them is deleted."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if tensor.device.type == self.device_type and key not in self._known:
                size = -(-storage.nbytes() // BLOCK) * BLOCK
                self._known.add(key)
                self.live += size
                weakref.finalize(storage, self._remove, key, size)
        self.peak = max(self.peak, self.live)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class RecordAllocations(TorchDispatchMode):
    """Count the memory of the outputs of all operations in the block."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.memory = Allocations(device_type)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        self.memory.add(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out
