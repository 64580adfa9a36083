"""Jobs of several ranks for tests: what they are given, how they are started (ranked.py), and what they left."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from crashing import tree_of

from streamprune.disk.report import REPORT

GIVEN: dict[str, Any] = {"samples": 22, "seqlen": 16, "device": "cpu"}
REFITTED: dict[str, Any] = {"sparsity": 0.6, "method": "obs-admm"}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


class Job(dict[str, Any]):
    """A job for ranked.py."""

    def __init__(self, verb: str, *args: object, given: dict[str, Any], **more: Any) -> None:
        super().__init__(verb=verb, args=list(map(str, args)), given=given, **more)


class Run(dict[str, Any]):
    """A run of `size` ranks for ranked.py, after folders have been copied; what they tell is in files with its name."""

    def __init__(
        self, name: str, size: int, jobs: list[Job], copies: dict[Path, Path] | None = None, **more: Any
    ) -> None:
        copied = [[str(a), str(b)] for a, b in (copies or {}).items()]
        super().__init__(name=name, size=size, jobs=jobs, copies=copied, **more)


def do(folder: Path, runs: list[Run], timeout: float = 900) -> None:
    """Does the jobs of all runs, one run after the other."""
    (folder / "runs.json").write_text(json.dumps(runs))
    command = [sys.executable, str(Path(__file__).parent / "ranked.py"), str(folder)]
    done = subprocess.run(command, env=environment(), stderr=subprocess.PIPE, text=True, check=False, timeout=timeout)
    assert done.returncode == 0, done.stderr


def environment() -> dict[str, str]:
    """That of a rank: one thread, and this code."""
    tests = Path(__file__).parent
    path = os.pathsep.join((str(tests.parent), str(tests)))
    return os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "PYTHONPATH": path}


def told(folder: Path, run: str, out: str) -> list[dict[str, Any]]:
    """What each rank of a run told of the job that makes `out`."""
    (found,) = (each for each in json.loads((folder / "runs.json").read_text()) if each["name"] == run)
    at = next(i for i, job in enumerate(found["jobs"]) if Path(job["args"][1]).name == out)
    lines = [(folder / f"{run}-{rank}").read_text().splitlines() for rank in range(found["size"])]
    return [json.loads(of_rank[at]) for of_rank in lines if at < len(of_rank)]


def files(out: Path) -> dict[str, bytes | None]:
    """An output without its report, which has times."""
    return {name: content for name, content in tree_of(out).items() if name != REPORT}


def digest(out: Path) -> str:
    """Of an output without its report; empty if there is none."""
    found = files(out) if out.exists() else {}
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest() if found else ""


def report(out: Path) -> dict[str, Any]:
    """The report of an output."""
    found: dict[str, Any] = json.loads((out / REPORT).read_text())
    return found
