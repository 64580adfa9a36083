"""A program for tests of several ranks: runs of some ranks each, which do one job after the other.

    python ranked.py FOLDER

FOLDER/runs.json lists the runs, and the jobs of each: a verb, its arguments, and what goes wrong with it on which rank
(rank_jobs.py). What becomes of a job on a rank is a line of JSON in FOLDER/RUN-RANK. A run that `dies` counts what it
changes on the disk, and a rank is killed right before one of these operations; what then is to be seen of its output is
in FOLDER/RUN-seen.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import calls
import torch
import torch.distributed as dist
from crashing import OPERATIONS, NoSync
from rank_jobs import digest, free_port

from streamprune.calibration.collector import Collector
from streamprune.disk import durable, lock
from streamprune.disk.durable import FilePart
from streamprune.disk.os_errors import disk_errors
from streamprune.errors import ResourceError
from streamprune.model import budget
from streamprune.process import ranks
from streamprune.pruning.allocate import _Allocation
from streamprune.pruning.paired import PairedPass

SMALL = {"BATCH_TOKENS": 64, "EXPERT_TOKENS": 64}
"""Of model/budget.py: many batches, and many groups of them, of a short text."""


class Dying(NoSync):
    """`os`, which kills this process before the operation `at` that changes the disk, and counts them."""

    def __init__(self, at: int) -> None:
        self.at, self.counted = at, 0

    def __getattr__(self, name: str) -> Any:
        real = super().__getattr__(name)
        if name not in OPERATIONS - {"fsync"}:
            return real

        def counted(*args: Any, **kwargs: Any) -> Any:
            if name != "open" or args[1] & (os.O_WRONLY | os.O_RDWR):
                self.step()
            return real(*args, **kwargs)

        return counted

    def unlink(self, path: Path, missing_ok: bool = False) -> None:
        """Of Path."""
        if path.exists() or not missing_ok:
            self.step()
            os.unlink(path)  # noqa: PTH108

    def step(self) -> None:
        """One operation."""
        if self.counted == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.counted += 1


class _Stop(Exception):  # noqa: N818 - not an error
    pass


@contextmanager
def going_wrong(how: str | None) -> Iterator[None]:
    """Within it, this rank dies or stops at the second layer, or sleeps or fails at the first; or it lacks memory once;
    or it ponders over how to share a sparsity out; or while it sends a part of a Gram it lacks memory or is
    interrupted; or its disk is full when it is sent a layer."""
    real, weights, flow, lacking = PairedPass.layer, _Allocation._weights, Collector.flow, [how == "memory"]
    send, write = dist.isend, FilePart.write

    def layer(self: Any, stage: Any, *args: Any, **more: Any) -> Any:
        if stage.index == 1 and how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if stage.index == 1 and how == "stop":
            raise _Stop
        if stage.index == 0 and how == "sleep":
            time.sleep(8)
        if stage.index == 0 and how == "full":
            raise ResourceError("no space left")
        return real(self, stage, *args, **more)

    def pondering(self: Any, linears: Any) -> int:
        time.sleep(3 if how == "ponder" else 0)
        return weights(self, linears)

    def flowing(self: Any, before: Any, after: Any) -> None:
        if lacking and lacking.pop():
            raise RuntimeError("DefaultCPUAllocator: not enough memory")
        flow(self, before, after)

    def sending(*args: Any, **more: Any) -> Any:
        if how == "exchange":
            raise RuntimeError("DefaultCPUAllocator: not enough memory")
        if how == "interrupt":
            raise KeyboardInterrupt
        return send(*args, **more)

    def writing(self: Any, data: Any) -> None:
        if how == "disk":
            with disk_errors(self.path):
                raise OSError(errno.ENOSPC, "full")
        write(self, data)

    PairedPass.layer, _Allocation._weights = layer, pondering  # type: ignore[method-assign]
    Collector.flow, FilePart.write = flowing, writing  # type: ignore[method-assign]
    dist.isend = sending
    try:
        yield
    finally:
        PairedPass.layer, _Allocation._weights, Collector.flow = real, weights, flow  # type: ignore[method-assign]
        FilePart.write, dist.isend = write, send  # type: ignore[method-assign]


def work(folder: Path, run: dict[str, Any], rank: int) -> None:
    """The jobs of one rank."""
    dying = Dying(run["dies"].get(str(rank), -1)) if "dies" in run else None
    if dying is not None:
        ranks._NEWS_SECONDS = 0.3
        durable.os = lock.os = dying  # type: ignore[attr-defined]
        Path.unlink = dying_unlink(dying)  # type: ignore[method-assign]
    with (folder / f"{run['name']}-{rank}").open("w", buffering=1) as told:
        for job in run["jobs"]:
            os.environ["MASTER_PORT"] = str(job.get("port"))
            os.environ["STREAMPRUNE_RANK_TIMEOUT"] = str(job.get("timeout", 60))
            given = job["given"] | job.get("other", {}).get(str(rank), {})
            args = job.get("places", {}).get(str(rank), job["args"])
            try:
                with going_wrong(job.get("wrong", {}).get(str(rank))):
                    made = getattr(calls, job["verb"])(*args, **given)
                found = {"report": getattr(made, "report", None) or vars(made)}
            except (Exception, KeyboardInterrupt) as e:  # noqa: BLE001 - it is told
                found = {"error": type(e).__name__, "message": str(e), "code": getattr(e, "exit_code", 1)}
            if dying is not None:
                found["operations"] = dying.counted
            told.write(json.dumps(found, default=str) + "\n")


def dying_unlink(dying: Dying) -> Any:
    """In place of Path.unlink."""
    return lambda path, missing_ok=False: dying.unlink(path, missing_ok)


def main(folder: Path) -> None:
    """Does one run after the other. Ranks are forked: each would take seconds to import torch and load kernels."""
    torch.set_num_threads(1)
    durable.os = NoSync()  # type: ignore[attr-defined]
    for name, value in SMALL.items():
        setattr(budget, name, value)
    for run in json.loads((folder / "runs.json").read_text()):
        for source, target in run["copies"]:
            shutil.copytree(source, target)
        if run["size"] == 1:
            work(folder, run, 0)
            continue
        for job in run["jobs"]:
            job["port"] = free_port()
        children = []
        for rank in range(run["size"]):
            if not (child := os.fork()):
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(run["size"]), "MASTER_ADDR": "127.0.0.1"}
                work(folder, run, rank)
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        if "dies" in run:
            outs = [Path(job["args"][1]) for job in run["jobs"]]
            (folder / f"{run['name']}-seen").write_text(json.dumps([digest(out) for out in outs]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
