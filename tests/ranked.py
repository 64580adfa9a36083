"""A program for test_ranks.py: several ranks, which do one job after the other.

    python ranked.py FOLDER

FOLDER/runs.json lists runs of so many ranks, and the jobs of each: a verb, its arguments, a port, and what goes wrong
with it on which rank. What becomes of a job is a line of JSON in FOLDER/RANK-of-SIZE.
"""

from __future__ import annotations

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

from streamprune.errors import ResourceError
from streamprune.model import budget
from streamprune.pruning.paired import PairedPass

SMALL = {"BATCH_TOKENS": 64, "EXPERT_TOKENS": 64}
"""Of model/budget.py: many batches, and many groups of them, of a short text."""


@contextmanager
def going_wrong(how: str | None) -> Iterator[None]:
    """Within it, this rank dies, sleeps or fails at the second layer."""
    real = PairedPass.layer

    def layer(self: Any, stage: Any, *args: Any) -> Any:
        if stage.index == 1 and how is not None:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "sleep":
                time.sleep(8)
            if how == "full":
                raise ResourceError("no space left")
        return real(self, stage, *args)

    PairedPass.layer = layer  # type: ignore[method-assign]
    try:
        yield
    finally:
        PairedPass.layer = real  # type: ignore[method-assign]


def work(folder: Path, jobs: list[dict[str, Any]]) -> None:
    """One rank."""
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    torch.set_num_threads(1)
    for name, value in SMALL.items():
        setattr(budget, name, value)
    with (folder / f"{rank}-of-{size}").open("w", buffering=1) as told:
        for job in jobs:
            os.environ["MASTER_PORT"] = str(job["port"])
            os.environ["STREAMPRUNE_RANK_TIMEOUT"] = str(job.get("timeout", 60))
            given = job["given"] | job.get("other", {}).get(rank, {})
            args = job.get("places", {}).get(rank, job["args"])
            try:
                with going_wrong(job.get("wrong", {}).get(rank)):
                    made = getattr(calls, job["verb"])(*args, **given)
                found = {"report": getattr(made, "report", None) or vars(made)}
            except Exception as e:  # noqa: BLE001 - it is told
                found = {"error": type(e).__name__, "message": str(e), "code": getattr(e, "exit_code", 1)}
            told.write(json.dumps(found, default=str) + "\n")


def main(folder: Path) -> None:
    """Forks the ranks of one run after the other: each would take seconds to import torch."""
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    for run in json.loads((folder / "runs.json").read_text()):
        for source, target in run["copies"]:
            shutil.copytree(source, target)
        os.environ["WORLD_SIZE"] = str(run["size"])
        children = []
        for rank in range(run["size"]):
            if not (child := os.fork()):
                os.environ["RANK"] = str(rank)
                work(folder, run["jobs"])
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
