"""A small cache of what was used last, bounded by its total size."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any


class LruCache:
    """The values used last, by key: `capacity` of them, or so much in all by `size` of each value."""

    def __init__(self, capacity: int, size: Callable[[Any], int] = lambda value: 1) -> None:
        self._capacity = capacity
        self._size = size
        self._used = 0
        self._values: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, name: Hashable, make: Callable[[], Any]) -> Any:
        """The value called `name`, made by `make` if it is not kept."""
        if name not in self._values:
            while self._used >= self._capacity:  # before making, so that memory never holds one more
                self._used -= self._size(self._values.popitem(last=False)[1])
            self._values[name] = make()
            self._used += self._size(self._values[name])
        self._values.move_to_end(name)
        return self._values[name]
