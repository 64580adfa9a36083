"""The thread that follows behind: order, errors from either side, and that nothing is left running."""

from __future__ import annotations

import threading
import time

import pytest

from streamprune.process.background import BackgroundWorker


def test_items_are_worked_on_in_order_and_all_before_leaving() -> None:
    seen: list[int] = []

    def slow(item: int) -> None:
        time.sleep(0.001)
        seen.append(item)

    with BackgroundWorker(slow, 2) as behind:
        for i in range(50):
            behind.put(i)
    assert seen == list(range(50))


def test_no_more_than_the_allowed_items_wait() -> None:
    gate = threading.Event()
    worked: list[int] = []

    def wait(item: int) -> None:
        gate.wait()
        worked.append(item)

    def loader() -> None:
        with BackgroundWorker(wait, 2) as behind:
            for i in range(10):
                behind.put(i)
                fed.append(i)

    fed: list[int] = []
    feeder = threading.Thread(target=loader)
    feeder.start()
    for _ in range(200):
        if len(fed) >= 3:
            break
        time.sleep(0.005)
    time.sleep(0.05)
    assert len(fed) == 3, "one at work and two waiting"
    gate.set()
    feeder.join()
    assert worked == list(range(10))


def test_an_error_at_work_reaches_whoever_puts_and_ends_the_work() -> None:
    seen: list[int] = []

    def fail(item: int) -> None:
        seen.append(item)
        if item == 3:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), BackgroundWorker(fail, 1) as behind:
        for i in range(100):
            behind.put(i)
    assert seen[-1] == 3


def test_an_error_in_the_last_item_is_not_lost() -> None:
    def fail(item: int) -> None:
        raise OSError("late")

    with pytest.raises(OSError, match="late"), BackgroundWorker(fail, 1) as behind:
        behind.put(1)


def test_an_error_of_the_producer_wins_and_drops_what_waits() -> None:
    before = threading.active_count()
    seen: list[int] = []

    def slow(item: int) -> None:
        time.sleep(0.02)
        seen.append(item)

    with pytest.raises(KeyboardInterrupt), BackgroundWorker(slow, 4) as behind:
        for i in range(5):
            behind.put(i)
        raise KeyboardInterrupt
    assert len(seen) < 5
    assert threading.active_count() == before
