"""A cache that is bounded by the bytes it holds: the most recently used entries stay."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class BoundedCache(Generic[Value]):
    """Values under keys, each with its size; the least recently used go first.

    Args:
        limit: bytes that it may hold; 0 keeps nothing.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.clear()

    def clear(self) -> None:
        self.size = 0
        self._entries: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Value | None:
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: Hashable, value: Value, nbytes: int) -> None:
        """Keep a value, unless it alone is larger than the limit or one is there already."""
        if nbytes > self.limit or key in self._entries:
            return
        self._entries[key] = value, nbytes
        self.size += nbytes
        while self.size > self.limit:
            self.size -= self._entries.popitem(last=False)[1][1]

    def drop(self, key: Hashable) -> None:
        if key in self._entries:
            self.size -= self._entries.pop(key)[1]
