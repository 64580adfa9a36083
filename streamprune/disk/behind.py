"""Work that follows behind: a thread that takes items from a short queue, in order."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Behind(Generic[Item]):
    """Calls `work(item)` in a thread of its own for each item that is put, in order, `ahead` waiting at most.

    Leaving the context waits for the last item. What `work` raises is raised by the next `put` or on leaving; items
    after it are dropped. When the context is left with an exception, items that still wait are dropped.
    """

    def __init__(self, work: Callable[[Item], None], ahead: int) -> None:
        self._work = work
        self._items: queue.Queue[Item | None] = queue.Queue(ahead)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def put(self, item: Item) -> None:
        """Hands one item on; waits while the queue is full."""
        if self._error is not None:
            raise self._error
        self._items.put(item)

    def _run(self) -> None:
        while (item := self._items.get()) is not None:
            if self._error is None:
                try:
                    self._work(item)
                except BaseException as e:  # noqa: BLE001 - handed to the thread that puts
                    self._error = e

    def __enter__(self) -> Behind[Item]:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self._error is None:
            self._error = error
        while self._thread.is_alive():  # whatever interrupts the waiting, the item at hand is finished first
            try:
                self._items.put(None)
                self._thread.join()
            except KeyboardInterrupt as e:
                self._error = self._error or e
        if kind is None and self._error is not None:
            raise self._error
