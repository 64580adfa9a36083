"""Threads beside the main one: a worker that takes items off its hands, and reading one item ahead.

Built on SimpleQueue alone: a signal handler that raises (Ctrl-C, SIGTERM) within threading.Event, Condition,
queue.Queue or Thread.join can lose a wake-up, leave a lock held, or mark a running thread as ended (bpo-46726,
gh-92530).
"""

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


class Latch:
    """Closed until `open` is called, then open for good; any number of threads may wait for that.

    In place of threading.Event: each waiting thread has a queue of its own, so one that is interrupted takes nothing
    from the others.
    """

    def __init__(self) -> None:
        self.is_open = False
        self._waiting: list[queue.SimpleQueue[None]] = []

    def open(self) -> None:
        """Wakes all threads that wait, and lets later ones pass."""
        self.is_open = True
        for waiting in self._waiting:
            waiting.put(None)

    def wait(self) -> None:
        """Returns once the latch is open."""
        mine: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._waiting.append(mine)  # before looking: `open` sets the flag before it reads the list
        if not self.is_open:
            mine.get()


class BackgroundWorker(Generic[Item]):
    """Calls `work(item)` in a thread of its own for each item that is put, in order; at most `ahead` items wait.

    Leaving the context waits for the last item. What `work` raises is raised by the next `put`, by `drain` or on
    leaving, and later items are dropped. When the context is left with an exception, waiting items are dropped.
    """

    def __init__(self, work: Callable[[Item], None], ahead: int | None = None) -> None:
        self._work = work
        self._items: queue.SimpleQueue[Item | Latch | None] = queue.SimpleQueue()
        """None ends the thread; a latch is opened when all items before it are done."""
        self._free_slots: queue.SimpleQueue[None] | None = None if ahead is None else queue.SimpleQueue()
        for _ in range(ahead or 0):
            self._free_slot()
        self._ended = Latch()
        self._error: BaseException | None = None
        self._dropping = False
        self._thread = threading.Thread(target=self._run, name="streamprune-worker", daemon=True)

    def put(self, item: Item) -> None:
        """Queues an item; blocks while `ahead` items wait already."""
        self._raise()
        if self._free_slots is not None:
            self._free_slots.get()
        self._items.put(item)

    def drain(self) -> None:
        """Waits until all items put so far are done."""
        reached = Latch()
        self._items.put(reached)
        reached.wait()
        self._raise()

    def drop(self) -> None:
        """Drops the items that still wait; the current one is finished."""
        self._dropping = True

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _free_slot(self) -> None:
        if self._free_slots is not None:
            self._free_slots.put(None)

    def _run(self) -> None:
        try:
            while (item := self._items.get()) is not None:
                if isinstance(item, Latch):
                    item.open()
                else:
                    self._free_slot()
                    self._do(item)
                del item  # or it would stay alive while the thread waits for the next one
        finally:
            self._ended.open()

    def _do(self, item: Item) -> None:
        try:
            if not self._dropping and self._error is None:
                self._work(item)
        except BaseException as e:  # noqa: BLE001 - raised in the thread that puts
            self._error = e

    def __enter__(self) -> Self:
        try:
            self._thread.start()
        except BaseException:
            self._items.put(None)  # when interrupted, the thread may have started nevertheless
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.drop()
        interrupted: BaseException | None = None
        while not self._ended.is_open:  # even when interrupted here: the current item is always finished
            try:
                self._items.put(None)
                self._ended.wait()
            except BaseException as e:  # noqa: BLE001 - raised below
                self._dropping = True
                interrupted = e
        self._thread.join()
        failure = self._error or interrupted
        if kind is None and failure is not None:
            raise failure


def read_ahead(items: Readable[Item]) -> Iterator[Item]:
    """The items in order; while one is used, a background thread fetches the next."""
    ready: queue.SimpleQueue[tuple[Item, None] | tuple[None, BaseException]] = queue.SimpleQueue()

    def fetch(number: int) -> None:
        try:
            ready.put((items[number], None))
        except BaseException as e:  # noqa: BLE001 - raised below, in the consumer's thread
            ready.put((None, e))

    with BackgroundWorker(fetch) as fetcher:
        if len(items):
            fetcher.put(0)
        for following in range(1, len(items) + 1):
            item, error = ready.get()
            if error is not None:
                raise error
            if following < len(items):
                fetcher.put(following)
            yield item  # type: ignore[misc]
            del item
