"""Work beside the main thread: a thread that follows behind, and one that reads ahead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

Item = TypeVar("Item")
Read = TypeVar("Read", covariant=True)


class Readable(Protocol[Read]):
    """Items by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Read: ...


class Behind(Generic[Item]):
    """Calls `work(item)` in a thread of its own for each item that is put, in order, `ahead` waiting at most.

    Leaving the context waits for the last item. What `work` raises is raised by the next `put`, by `drain` or on
    leaving; items after it are dropped. When the context is left with an exception, items that still wait are dropped.
    """

    def __init__(self, work: Callable[[Item], None], ahead: int) -> None:
        self._work = work
        self._items: queue.Queue[Item | None] = queue.Queue(ahead)
        self._error: BaseException | None = None
        self._dropping = False
        self._thread = threading.Thread(target=self._run, name="streamprune-behind", daemon=True)

    def put(self, item: Item) -> None:
        """Hands one item on; waits while the queue is full."""
        self._raise()
        self._items.put(item)

    def drain(self) -> None:
        """Waits until all that was put is done."""
        self._items.join()
        self._raise()

    def drop(self) -> None:
        """Drops what still waits; the item at hand is finished."""
        self._dropping = True

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            item = self._items.get()
            try:
                if item is None:
                    return
                if not self._dropping and self._error is None:
                    self._work(item)
            except BaseException as e:  # noqa: BLE001 - handed to the thread that puts
                self._error = e
            finally:
                self._items.task_done()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.drop()
        interrupted: BaseException | None = None
        while self._thread.is_alive():  # whatever interrupts the waiting, the item at hand is finished first
            try:
                self._items.put(None)
                self._thread.join()
            except KeyboardInterrupt as e:
                self.drop()
                interrupted = e
        failure = self._error or interrupted
        if kind is None and failure is not None:
            raise failure


def read_ahead(items: Readable[Item]) -> Iterator[Item]:
    """The items in order, the next one always being fetched in a thread of its own while one is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="streamprune-read") as pool:
        coming = pool.submit(items.__getitem__, 0) if len(items) else None
        for following in range(1, len(items) + 1):
            assert coming is not None
            item = coming.result()
            coming = pool.submit(items.__getitem__, following) if following < len(items) else None
            yield item
            del item
