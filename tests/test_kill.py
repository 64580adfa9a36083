"""Real processes: killed, interrupted, and two at a time."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import VOCAB, save_model
from crashing import Tree, tree_of

from streamprune.disk.lock import Lock
from streamprune.disk.report import REPORT
from streamprune.disk.state import lock_of, partial_of

SAMPLES = 512


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], list[str]]:
    """The command line of a job that takes its time: eight layers."""
    folder = tmp_path_factory.mktemp("given")
    model = save_model(folder / "model", "llama", 8)
    np.save(folder / "tokens.npy", np.random.default_rng(3).integers(0, VOCAB, 3000))
    job = ["--pattern", "2:4", "--calib", str(folder / "tokens.npy"), "--samples", str(SAMPLES), "--seqlen", "64"]
    return lambda out: [sys.executable, "-m", "streamprune", "prune", str(model), str(out), *job]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def whole(
    command: Callable[[Path], list[str]], environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Tree, float]]:
    """The uninterrupted output, and how long it took from the first stage to the last."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with start(command(out), environment) as run:
        wait_for(run, 1)
        begun = time.perf_counter()
        _, errors = run.communicate(timeout=120)
        took = time.perf_counter() - begun
    assert run.returncode == 0, errors
    yield weights(out), took


def weights(out: Path) -> Tree:
    return {name: content for name, content in tree_of(out).items() if name != REPORT}


def start(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for(run: subprocess.Popen[str], stages: int) -> list[str]:
    """Reads progress until so many stages are finished."""
    assert run.stderr
    lines: list[str] = []
    for line in run.stderr:
        lines.append(line)
        if sum(re.match(r"\w+: \d+/\d+ ", text) is not None for text in lines) >= stages:
            return lines
    raise AssertionError(f"ended before stage {stages}: {''.join(lines)}")


def _run(command: list[str], environment: dict[str, str], *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, *more], env=environment, capture_output=True, text=True, timeout=240, check=False)


def finish(command: list[str], environment: dict[str, str], out: Path, wanted: Tree) -> None:
    """The same command finishes the job, and then finds it finished."""
    done = _run(command, environment, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "done"
    assert weights(out) == wanted
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    again = _run(command, environment, "--json")
    assert (again.returncode, again.stderr) == (0, "")
    assert json.loads(again.stdout)["status"] == "up-to-date"
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def kill_until_done(
    command: list[str], environment: dict[str, str], out: Path, chance: random.Random, took: float, kills: int
) -> int:
    """Kills the job at random moments, again and again; returns how many of the kills hit a living job."""
    hits = 0
    for _ in range(kills):
        with start(command, environment) as run:
            if chance.random() < 0.8:
                try:
                    wait_for(run, 1)
                except AssertionError:  # done already
                    run.wait(60)
                    return hits
                time.sleep(chance.random() * took)
            else:
                time.sleep(chance.random() * 3)
            alive = run.poll() is None
            visible = out.exists()
            run.kill()
            run.wait(60)
        if alive:
            hits += 1
            if not visible and out.exists():
                assert (out / REPORT).is_file(), "published in the last moment, then whole"
            elif visible:
                assert not partial_of(out).exists()
    return hits


def test_killed_at_random(
    tmp_path: Path, command: Callable[[Path], list[str]], environment: dict[str, str], whole: tuple[Tree, float]
) -> None:
    out = tmp_path / "out"
    kill_until_done(command(out), environment, out, random.Random(1), whole[1], 2)
    if not out.exists():
        finish(command(out), environment, out, whole[0])
    assert weights(out) == whole[0]


@pytest.mark.slow
def test_killed_many_times(
    tmp_path: Path, command: Callable[[Path], list[str]], environment: dict[str, str], whole: tuple[Tree, float]
) -> None:
    hits = 0
    for seed in range(25):
        out = tmp_path / str(seed) / "out"
        hits += kill_until_done(command(out), environment, out, random.Random(f"many {seed}"), whole[1], 4)
        if not out.exists():
            finish(command(out), environment, out, whole[0])
        assert weights(out) == whole[0]
    assert hits > 25


def test_interrupted(
    tmp_path: Path, command: Callable[[Path], list[str]], environment: dict[str, str], whole: tuple[Tree, float]
) -> None:
    """By Ctrl-C, then by SIGTERM, then not."""
    out = tmp_path / "out"
    for number in (signal.SIGINT, signal.SIGTERM):
        with start(command(out), environment) as run:
            wait_for(run, 1)
            run.send_signal(number)
            output, errors = run.communicate(timeout=60)
        lines = [line for line in errors.splitlines() if not line.startswith("prune: ")]
        assert (run.returncode, output) == (130, "")
        assert lines == ["streamprune: error: interrupted; run the same command again to resume"]
        assert not out.exists()
        assert not lock_of(out).exists()
        assert not list(partial_of(out).rglob("*.tmp"))
    done = _run(command(out), environment)
    assert (done.returncode, weights(out)) == (0, whole[0])
    first = next(line for line in done.stderr.splitlines() if re.match(r"prune: \d+/", line))
    assert int(first.split()[1].split("/")[0]) > 2, "finished stages are not repeated"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_second_process(tmp_path: Path, command: Callable[[Path], list[str]], environment: dict[str, str]) -> None:
    out = tmp_path / "out"
    with Lock(lock_of(out)):
        begun = time.perf_counter()
        second = _run(command(out), environment)
        took = time.perf_counter() - begun
        assert lock_of(out).read_text() == f"{os.getpid()}\n"
    assert (second.returncode, second.stdout) == (75, "")
    assert second.stderr.startswith(f"streamprune: error: another run (process {os.getpid()}) holds ")
    assert len(second.stderr.splitlines()) == 1
    assert took < 20, "it says so at once"
    assert not list(tmp_path.iterdir())


def test_a_full_disk(tmp_path: Path, command: Callable[[Path], list[str]], environment: dict[str, str]) -> None:
    """No file may grow beyond 20 kB."""
    out = tmp_path / "out"
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY)); "
        "from streamprune.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    full = _run([sys.executable, "-c", limited, *command(out)[3:]], environment)
    assert (full.returncode, full.stdout) == (5, ""), full.stderr
    lines = [line for line in full.stderr.splitlines() if not line.startswith("prune: ")]
    assert len(lines) == 1 and "no space left" in lines[0] and "same command again" in lines[0]
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"], "the work is kept, the lock is not"
    assert not list(partial_of(out).rglob("*.tmp"))
