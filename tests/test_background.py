"""The background worker: order, errors from either side, and that nothing is left running."""

from __future__ import annotations

import ast
import signal
import threading
import time
from pathlib import Path

import pytest

import streamprune
from streamprune.process.background import BackgroundWorker, Latch


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


@pytest.mark.parametrize("late", [False, True])
def test_a_latch_lets_every_waiting_thread_pass(late: bool) -> None:
    """Those that came before it was opened, and those that come later."""
    latch, passed = Latch(), list[int]()

    def wait(number: int) -> None:
        latch.wait()
        passed.append(number)

    threads = [threading.Thread(target=wait, args=(i,)) for i in range(3)]
    if late:
        latch.open()
    for thread in threads:
        thread.start()
    time.sleep(0 if late else 0.02)
    assert late or not passed
    latch.open()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(passed) == [0, 1, 2]


def test_an_interrupted_wait_takes_nothing_from_the_others() -> None:
    """Ctrl-C in the main thread while a second thread waits on the same latch."""
    latch, passed = Latch(), list[bool]()
    other = threading.Thread(target=lambda: (latch.wait(), passed.append(True)))
    other.start()

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            latch.wait()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    latch.open()
    other.join(timeout=30)
    assert passed == [True]


def test_the_program_waits_on_simple_queues_only() -> None:
    """A signal handler that raises within the others' Python code can lose a wake-up: see process/background.py."""
    harmless = {"threading.Thread", "threading.Lock", "queue.SimpleQueue"}
    for path in sorted(Path(streamprune.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module not in ("threading", "queue"), f"{path.name} hides where {node.names} come from"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                used = f"{node.value.id}.{node.attr}"
                assert node.value.id not in ("threading", "queue") or used in harmless, f"{path.name} uses {used}"
