"""A program for test_interrupts.py: starts `streamprune ARGS`, and at many moments forks a child that gets a signal.

Moments are counted in function calls, Python's and C's, of libraries and of their callbacks too: the N-th of every
STEP seconds. Each child goes on as the program itself would, and what it printed and how it ended is one line of JSON.

    python interrupted.py FOLDER STEP MOST SIGNAL ARGS...
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
from pathlib import Path

FOLDER, STEP, MOST, SIGNAL, ARGS = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:]
PATIENCE = 8.0

state = {"at": 0.0, "count": 0}


def tried(number: int) -> None:
    """In the parent: forks, waits, notes. In the child: hears the signal, and goes on."""
    name = f"{FOLDER}/{number}"
    where = " < ".join(f"{Path(f.f_code.co_filename).name}:{f.f_code.co_name}" for f in frames(sys._getframe(2)))
    child = os.fork()
    if not child:
        sys.setprofile(None)
        for fd, kind in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{name}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), fd)
        faulthandler.dump_traceback_later(PATIENCE / 2)
        os.kill(os.getpid(), SIGNAL)
        return
    until = time.monotonic() + PATIENCE
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < until:
        time.sleep(0.002)
    if done == (0, 0):
        os.kill(child, 9)
        done = os.waitpid(child, 0)
    Path(f"{name}.json").write_text(json.dumps({"status": done[1], "where": where}))


def frames(frame):
    """The innermost four."""
    for _ in range(4):
        if frame is not None:
            yield frame
            frame = frame.f_back


def watch(frame, event, arg) -> None:
    """Called by the interpreter for every call and return."""
    if time.perf_counter() - state["at"] < STEP:
        return
    state["count"] += 1
    if state["count"] > MOST:
        os._exit(0)
    tried(state["count"])
    state["at"] = time.perf_counter()


sys.argv[1:] = ARGS
from streamprune.__main__ import run  # noqa: E402
from streamprune.process import interrupts  # noqa: E402

interrupts.listen(interrupts.leave)  # as the first thing that `run` does
state["at"] = time.perf_counter()
sys.setprofile(watch)
run()
