"""pack and unpack are stopped before, after and within every operation on the disk, and done again (see test_crash)."""

from __future__ import annotations

import errno
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from crashing import CrashDisk, FaultyOs, NoSync, Tree, recorded, replace_os, restore, tree_of
from test_packed import sparse
from test_packing import LEGACY, half, layer, save

from streamprune.errors import ResourceError
from streamprune.packing.job import PackResult, pack, unpack

Job = Callable[..., PackResult]
JOBS = ["pack", "unpack", "unpack with a report", "unpack another program's"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


def make_job(name: str, root: Path, places: Path) -> Job:
    """A job that writes `out` in `root`; what it reads lies in `places`."""
    if name == "unpack another program's":
        return lambda **options: unpack(LEGACY / "two-four", root / "out", **options)
    tensors = {"model.embed_tokens.weight": ("BF16", sparse(3, 8, np.uint16, 1)), **layer(0, half, "BF16", (8, 40))}
    model = save(places / "model", tensors, layer(1, half, "BF16", (8, 40)))
    if name == "pack":
        return lambda **options: pack(model, root / "out", **options)
    if name == "unpack with a report":
        (model / "streamprune.json").write_text('{"format": "streamprune-report", "version": 1}')
    pack(model, places / "packed")
    return lambda **options: unpack(places / "packed", root / "out", **options)


def comparable(tree: Tree) -> Tree:
    """A tree without what differs from run to run: time and memory in the report."""
    result = dict(tree)
    name = "out/streamprune.json"
    try:
        report = json.loads(result[name] or b"")
    except (KeyError, ValueError):
        return result
    result[name] = json.dumps({k: v for k, v in report.items() if k not in ("seconds", "peak_rss_bytes")}).encode()
    return result


def difference(found: Tree, wanted: Tree) -> str:
    """Names what is missing, too much, or another; empty when nothing is."""
    return ", ".join(sorted(n for n in found.keys() | wanted.keys() if found.get(n, 0) != wanted.get(n, 0)))


def attempt(root: Path, job: Job, whole: Tree) -> str:
    """Runs the job; says what is wrong with the result."""
    with pytest.MonkeyPatch.context() as patch:
        replace_os(patch, NoSync())
        try:
            job()
        except Exception as e:  # noqa: BLE001 - reported with its state
            return f"{type(e).__name__}: {e}"
    return difference(comparable(tree_of(root)), whole)


def run_recorded(root: Path, job: Job) -> tuple[CrashDisk, Tree]:
    """Runs a job; returns all states of the disk meanwhile, and the last one."""
    with recorded(root) as disk:
        assert job().status == "done"
    return disk, comparable(tree_of(root))


def half_visible(tree: Tree, whole: Tree) -> str:
    there = {n: c for n, c in comparable(tree).items() if f"{n}/".startswith("out/")}
    return f"half visible: {difference(there, whole)}" if there and difference(there, whole) else ""


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("share", [0.35, pytest.param(1, marks=pytest.mark.slow)])
def test_moments_of_a_job(root: Path, tmp_path: Path, name: str, share: float) -> None:
    job = make_job(name, root, tmp_path)
    disk, whole = run_recorded(root, job)
    assert len(disk.states["killed"]) > 40 and len(disk.states["lost"]) > 10
    failures = []
    chance = random.Random(name)
    for kind, states in disk.states.items():
        for label, tree in states.items():
            if chance.random() >= share:
                continue
            wrong = half_visible(tree, whole)
            restore(root, tree)
            if wrong := wrong or attempt(root, job, whole):
                failures.append(f"{kind} {label}: {wrong}")
    assert not failures, f"{len(failures)} states cannot be resumed:\n" + "\n".join(failures[:12])


@pytest.mark.parametrize("name", JOBS)
def test_restart_at_any_moment(root: Path, tmp_path: Path, name: str) -> None:
    job = make_job(name, root, tmp_path)
    disk, whole = run_recorded(root, job)
    chance = random.Random(name)
    failures = []
    for label, tree in disk.states["killed"].items():
        if chance.random() < 0.1:
            restore(root, tree)
            if wrong := attempt(root, lambda: job(restart=True), whole):
                failures.append(f"{label}: {wrong}")
    assert not failures, "\n".join(failures[:12])


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_error_at_any_operation(root: Path, tmp_path: Path, name: str, error: BaseException) -> None:
    """A full disk and an interrupt end the run, as what they are; the same process can go on."""
    job = make_job(name, root, tmp_path)
    _, whole = run_recorded(root, job)
    restore(root, {})
    with pytest.MonkeyPatch.context() as patch:
        counting = FaultyOs(-1, error)
        replace_os(patch, counting)
        job()
    chosen = {1, 2, counting.counted - 1, *random.Random(name).sample(range(counting.counted), 5)}
    for number in sorted(chosen):
        restore(root, {})
        with pytest.MonkeyPatch.context() as patch:
            replace_os(patch, FaultyOs(number, error))
            with pytest.raises((ResourceError, KeyboardInterrupt)) as caught:
                job()
        assert isinstance(error, OSError) == isinstance(caught.value, ResourceError)
        wrong = half_visible(tree_of(root), whole) or attempt(root, job, whole)
        assert not wrong, f"operation {number} of {counting.counted}: {wrong}"
