"""One call of the model after another, in the order of coming."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE = 0.1  # seconds after which a waiting one is told again where it stands


class Turns:
    """A queue of threads, of which the first one has its turn.

    Args:
        most_waiting: how many may wait; ``None`` for any number.
    """

    def __init__(self, most_waiting: int | None = None) -> None:
        self.most_waiting = most_waiting
        self._changed = threading.Condition()
        self._queue: list[object] = []  # the first one has its turn

    @contextmanager
    def turn(self, waiting: Callable[[int], None]) -> Iterator[None]:
        """Wait for the turn, and have it for the length of the block.

        Args:
            waiting: told how many are before this one, again and again; what it raises ends the waiting.

        Raises:
            ValueError: too many wait already.
        """
        me = object()
        with self._changed:
            if self.most_waiting is not None and len(self._queue) > self.most_waiting:
                raise ValueError(f"{self.most_waiting} others are waiting for the model: ask again later")
            self._queue.append(me)
        try:
            with self._changed:
                while self._queue[0] is not me:
                    waiting(self._queue.index(me))
                    self._changed.wait(PATIENCE)
            yield
        finally:
            with self._changed:
                self._queue.remove(me)
                self._changed.notify_all()
