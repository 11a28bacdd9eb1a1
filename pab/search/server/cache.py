"""Cache bounded by the size of its values."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class BoundedCache(Generic[V]):
    """Keep the most recently used values; threads may share the cache.

    Args:
        most_bytes: limit for the sum of the sizes of all values. A single value above this limit is
            not kept.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most, self.bytes = most_bytes, 0
        self._values: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> V | None:
        """Return a value, or None if it is not kept."""
        with self._lock:
            found = self._values.get(key)
            if found is None:
                return None
            self._values.move_to_end(key)
            return found[0]

    def put(self, key: Hashable, value: V, size: int) -> None:
        """Keep a value of ``size`` bytes; drop the least recently used values above the limit."""
        with self._lock:
            before = self._values.pop(key, None)
            self.bytes -= before[1] if before is not None else 0
            if size > self._most:
                return
            self._values[key] = value, size
            self.bytes += size
            while self.bytes > self._most:
                _, (_, freed) = self._values.popitem(last=False)
                self.bytes -= freed
