"""Work beside the main thread: a thread that follows behind, and one that reads ahead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

Item = TypeVar("Item")
Read = TypeVar("Read", covariant=True)


class Readable(Protocol[Read]):
    """Items by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Read: ...


class _Mark:
    """Put among the items; answered when all before it are done."""

    def __init__(self) -> None:
        self.reached: queue.SimpleQueue[None] = queue.SimpleQueue()


class BackgroundWorker(Generic[Item]):
    """Calls `work(item)` in a thread of its own for each item that is put, in order, `ahead` waiting at most.

    Leaving the context waits for the last item. What `work` raises is raised by the next `put`, by `drain` or on
    leaving; items after it are dropped. When the context is left with an exception, items that still wait are dropped.

    Built on SimpleQueue alone: a signal handler that raises (Ctrl-C, SIGTERM) within queue.Queue, Condition or
    Thread.join can lose a wake-up, leave a lock held, or mark a thread that runs as ended (bpo-46726, gh-92530).
    """

    def __init__(self, work: Callable[[Item], None], ahead: int | None = None) -> None:
        self._work = work
        self._items: queue.SimpleQueue[Item | _Mark | None] = queue.SimpleQueue()
        self._room: queue.SimpleQueue[None] | None = None if ahead is None else queue.SimpleQueue()
        for _ in range(ahead or 0):
            self._put_room()
        self._ended, self._told = False, queue.SimpleQueue[None]()
        self._error: BaseException | None = None
        self._dropping = False
        self._thread = threading.Thread(target=self._run, name="streamprune-behind", daemon=True)

    def put(self, item: Item) -> None:
        """Hands one item on; waits while `ahead` items wait."""
        self._raise()
        if self._room is not None:
            self._room.get()
        self._items.put(item)

    def drain(self) -> None:
        """Waits until all that was put is done."""
        mark = _Mark()
        self._items.put(mark)
        mark.reached.get()
        self._raise()

    def drop(self) -> None:
        """Drops what still waits; the item at hand is finished."""
        self._dropping = True

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _put_room(self) -> None:
        if self._room is not None:
            self._room.put(None)

    def _run(self) -> None:
        try:
            while (item := self._items.get()) is not None:
                if isinstance(item, _Mark):
                    item.reached.put(None)
                else:
                    self._put_room()
                    self._do(item)
                del item  # not held while there is nothing to do
        finally:
            self._ended = True
            self._told.put(None)

    def _do(self, item: Item) -> None:
        try:
            if not self._dropping and self._error is None:
                self._work(item)
        except BaseException as e:  # noqa: BLE001 - handed to the thread that puts
            self._error = e

    def __enter__(self) -> Self:
        try:
            self._thread.start()
        except BaseException:
            self._items.put(None)  # interrupted, it may have started all the same
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.drop()
        interrupted: BaseException | None = None
        while not self._ended:  # whatever interrupts the waiting, the item at hand is finished first
            try:
                self._items.put(None)
                self._told.get()
            except BaseException as e:  # noqa: BLE001 - raised below
                self._dropping = True
                interrupted = e
        self._thread.join()
        failure = self._error or interrupted
        if kind is None and failure is not None:
            raise failure


def read_ahead(items: Readable[Item]) -> Iterator[Item]:
    """The items in order, the next one always being fetched in a thread of its own while one is used."""
    ready: queue.SimpleQueue[tuple[Item, None] | tuple[None, BaseException]] = queue.SimpleQueue()

    def fetch(number: int) -> None:
        try:
            ready.put((items[number], None))
        except BaseException as e:  # noqa: BLE001 - raised by whoever takes the item
            ready.put((None, e))

    with BackgroundWorker(fetch) as behind:
        if len(items):
            behind.put(0)
        for following in range(1, len(items) + 1):
            item, error = ready.get()
            if error is not None:
                raise error
            if following < len(items):
                behind.put(following)
            yield item  # type: ignore[misc]
            del item
