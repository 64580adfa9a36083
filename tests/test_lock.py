"""At most one process at a time: by processes, threads, and a file that vanishes at the worst moment."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from crashing import FaultyOs
from test_durable import names, open_files

from streamprune.disk import lock
from streamprune.disk.lock import Lock
from streamprune.errors import LockedError, ResourceError, StateError

HOLD = """
import sys
from pathlib import Path
from streamprune.disk.lock import Lock
with Lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / ".out.lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout and holder.stdin
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(LockedError, match=rf"process {holder.pid}\).*{path.name}"), Lock(path):
            pass
        assert path.exists(), "who did not get it does not remove it"
        holder.kill()
    with Lock(path):
        assert path.read_text() == f"{os.getpid()}\n"
    assert not names(tmp_path)


def test_a_lock_in_the_same_process(tmp_path: Path) -> None:
    before = open_files()
    with Lock(tmp_path / "l"), pytest.raises(LockedError, match=str(os.getpid())), Lock(tmp_path / "l"):
        pass
    assert not names(tmp_path)
    assert open_files() == before


def test_the_holder_removes_the_file_while_another_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened before the removal, locked after it: the lock would be on a file that has no name."""
    path = tmp_path / "l"
    real, calls = fcntl.flock, 0

    def flock(fd: int, operation: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            path.unlink()  # the holder's last act, between our open and our flock
        real(fd, operation)

    before = open_files()
    monkeypatch.setattr(fcntl, "flock", flock)
    with Lock(path):
        assert calls == 2
        fd = os.open(path, os.O_RDWR)
        with pytest.raises(BlockingIOError):
            real(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(fd)
    assert open_files() == before


def test_many_threads_and_one_lock(tmp_path: Path) -> None:
    inside, most, got = 0, 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most, got
        for _ in range(60):
            try:
                with Lock(tmp_path / "l"):
                    with guard:
                        inside += 1
                        got += 1
                        most = max(most, inside)
                    time.sleep(0.0001)
                    with guard:
                        inside -= 1
            except LockedError:
                pass

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and got > 1
    assert not names(tmp_path)


@pytest.mark.parametrize("operation", ["write", "ftruncate"])
def test_a_lock_on_a_full_disk_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    before = open_files()
    with monkeypatch.context() as patch:
        patch.setattr(lock, "os", FaultyOs(0, OSError(errno.ENOSPC, "No space left on device"), {operation}))
        with pytest.raises(ResourceError), Lock(tmp_path / "l"):
            pass
    assert open_files() == before
    with Lock(tmp_path / "l"):
        pass


def test_a_lock_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "l").symlink_to("victim")
    with pytest.raises((StateError, ResourceError)), Lock(tmp_path / "l"):
        pass
    assert (tmp_path / "victim").read_bytes() == b"precious"
