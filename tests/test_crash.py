"""A job is stopped before, after and within every single operation on the disk, and then resumed.

What the job does to the disk is recorded once (crashing.py); each state that a crash could have left is put
back, the same command runs again, and the result must be the uninterrupted one, byte for byte, with nothing
left over. In none of the states may OUT be there without being whole.
"""

from __future__ import annotations

import errno
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calls import calibrate, prune
from conftest import VOCAB
from crashing import CrashDisk, FaultyOs, NoSync, Tree, recorded, replace_os, restore, tree_of

from streamprune.disk import durable
from streamprune.errors import ResourceError
from streamprune.pruning.job import JobResult

Job = Callable[[], JobResult]

OUTPUTS = ("out", "stats.safetensors")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def given(models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The inputs of all jobs: a model of two layers, and 64 tokens."""
    tokens = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(tokens, np.random.default_rng(3).integers(0, VOCAB, 500))
    return {"model": models("llama", 2), "calib": tokens, "samples": 4, "seqlen": 16}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


def make_job(name: str, root: Path, given: dict[str, Any]) -> Job:
    out = root / "out"
    more: dict[str, dict[str, Any]] = {
        "plain": {"sparsity": 0.5},
        "no calibration": {"sparsity": 0.5, "method": "magnitude"},
        "pruned": {"pattern": "2:4", "propagate": "pruned"},
        "save": {"sparsity": 0.5, "save_stats": root / "stats.safetensors"},
        "work": {"sparsity": 0.5, "work": root / "work"},
        "allocate": {"sparsity": 0.5, "allocate": "error"},
        "shards": {"pattern": "2:4", "propagate": "pruned", "shard_size": 40_000},
        "all": {
            "sparsity": 0.5,
            "propagate": "pruned",
            "work": root / "work",
            "save_stats": root / "stats.safetensors",
        },
    }
    if name == "calibrate":
        return lambda: calibrate(out=root / "stats.safetensors", **given)
    return lambda: prune(out=out, **given, **more[name])


def comparable(tree: Tree) -> Tree:
    """A tree without the report's times and memory, which differ from run to run."""
    result = dict(tree)
    name = "out/streamprune.json"
    if name in result:
        try:
            report = json.loads(result[name] or b"")
        except ValueError:
            return result
        for part in (report, *report["stages"]):
            for key in [k for k in part if "seconds" in k or k == "peak_rss_bytes"]:
                del part[key]
        result[name] = json.dumps(report).encode()
    return result


def difference(found: Tree, wanted: Tree) -> str:
    """Names files that are missing, unexpected or different; empty if there are none."""
    names = sorted(n for n in found.keys() | wanted.keys() if found.get(n, 0) != wanted.get(n, 0))
    return ", ".join(
        f"{n} {'left over' if n not in wanted else 'missing' if n not in found else 'differs'}" for n in names[:6]
    )


def half_visible(tree: Tree, whole: Tree, outputs: tuple[str, ...]) -> str:
    """Describes faults of the outputs after a crash; empty if each output is absent or complete."""
    wrong = []
    for output in outputs:
        there, wanted = ({n: c for n, c in t.items() if f"{n}/".startswith(f"{output}/")} for t in (tree, whole))
        if there:
            wrong.append(difference(comparable(there), wanted))
    return "; ".join(f"half visible: {w}" for w in wrong if w)


class Crasher:
    """Records one run of a job, then resumes it from every state that a crash could have left."""

    def __init__(self, root: Path, job: Job, outputs: tuple[str, ...]) -> None:
        self.root, self.job, self.outputs = root, job, outputs
        with recorded(root) as disk:
            assert job().status == "done"
        self.disk: CrashDisk = disk
        self.whole = comparable(tree_of(root))

    def failures(self, kind: str, share: float = 1.0, twice: float = 0.0) -> list[str]:
        """Failures when resuming from states of one kind: a `share` are tried; of these, `twice` crash again."""
        chance = random.Random(f"{kind} {share}")
        found = []
        for label, tree in self.disk.states[kind].items():
            if chance.random() >= share:
                continue
            wrong = half_visible(tree, self.whole, self.outputs)
            restore(self.root, tree)
            if not wrong and chance.random() < twice:
                with recorded(self.root) as again:
                    wrong = self.attempt()
                if again.states["killed"]:
                    label, tree = chance.choice(list(again.states["killed"].items()))
                    label = f"{label} of the second run"
                    wrong = wrong or half_visible(tree, self.whole, self.outputs)
                    restore(self.root, tree)
            wrong = wrong or self.attempt()
            if wrong:
                found.append(f"{kind} {label}: {wrong}")
        return found

    def attempt(self) -> str:
        """Runs the job; describes what is wrong with the result."""
        with pytest.MonkeyPatch.context() as patch:
            if durable.os is os:
                replace_os(patch, NoSync())
            try:
                self.job()
            except Exception as e:  # noqa: BLE001 - reported with its state
                return f"{type(e).__name__}: {e}"
        return difference(comparable(tree_of(self.root)), self.whole)


def show(failures: list[str]) -> str:
    return f"{len(failures)} states cannot be resumed:\n" + "\n".join(failures[:12])


def test_every_moment_of_a_job(root: Path, given: dict[str, Any]) -> None:
    crasher = Crasher(root, make_job("plain", root, given), OUTPUTS)
    kinds = {o.split()[1] for o in crasher.disk.operations}
    assert kinds >= {"open", "write", "fsync", "replace", "rename", "mkdir", "rmdir", "unlink", "ftruncate"}
    assert len(crasher.disk.states["killed"]) > 150
    failures = crasher.failures("killed")
    assert not failures, show(failures)


@pytest.mark.parametrize("kind", ["lost", "emptied"])
def test_power_failure_at_every_moment(root: Path, given: dict[str, Any], kind: str) -> None:
    crasher = Crasher(root, make_job("plain", root, given), OUTPUTS)
    assert len(crasher.disk.states[kind]) > 20
    failures = crasher.failures(kind, 1.0 if kind == "lost" else 0.5)
    assert not failures, show(failures)


VARIANTS = ["no calibration", "pruned", "save", "work", "all", "calibrate", "allocate", "shards"]


@pytest.mark.parametrize("name", VARIANTS)
def test_some_moments_of_other_jobs(root: Path, given: dict[str, Any], name: str) -> None:
    crasher = Crasher(root, make_job(name, root, given), OUTPUTS)
    failures = crasher.failures("killed", 0.07) + crasher.failures("lost", 0.2)
    assert not failures, show(failures)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_moment_of_other_jobs(root: Path, given: dict[str, Any], name: str) -> None:
    crasher = Crasher(root, make_job(name, root, given), OUTPUTS)
    failures = [f for kind in ("killed", "lost", "emptied") for f in crasher.failures(kind)]
    assert not failures, show(failures)


def test_two_crashes_in_a_row(root: Path, given: dict[str, Any]) -> None:
    crasher = Crasher(root, make_job("all", root, given), OUTPUTS)
    failures = crasher.failures("killed", 0.04, twice=1.0)
    assert not failures, show(failures)


@pytest.mark.parametrize("complete", [False, True])
def test_crash_while_work_is_thrown_away(root: Path, given: dict[str, Any], complete: bool) -> None:
    """--restart is stopped while it removes files; the job is then run again, with and without --restart."""
    job = make_job("work", root, given)
    first = Crasher(root, job, OUTPUTS)
    begun = [tree for tree in first.disk.states["killed"].values() if "out" not in tree and "out.partial" in tree]
    whole = [tree for tree in begun if "out.partial/streamprune.json" in tree and "work" in tree]
    restore(root, whole[0] if complete else begun[len(begun) // 2])
    again = make_job("work", root, given | {"restart": True})
    with recorded(root) as disk:
        again()
    removing = next(i for i, o in enumerate(disk.operations) if o.split()[1] == "mkdir")
    failures = []
    for label, tree in disk.states["killed"].items():
        if int(label.split()[1]) <= removing:
            for command, run in (("without", job), ("with", again)):
                restore(root, tree)
                first.job = run
                if wrong := first.attempt():
                    failures.append(f"{label}, then {command} --restart: {wrong}")
    assert not failures, show(failures)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "I/O error"), KeyboardInterrupt()]
)
def test_an_error_at_any_operation(root: Path, given: dict[str, Any], error: BaseException) -> None:
    """A full disk, a failing disk and an interrupt each raise their error; the same process can then resume."""
    job = make_job("save", root, given)
    crasher = Crasher(root, job, OUTPUTS)
    restore(root, {})
    with pytest.MonkeyPatch.context() as patch:
        counting = FaultyOs(-1, error)
        replace_os(patch, counting)
        job()
    total = counting.counted
    chosen = sorted({1, 2, 4, total - 1, *random.Random(repr(error)).sample(range(total), 8)})
    failures = []
    for number in chosen:
        restore(root, {})
        with pytest.MonkeyPatch.context() as patch:
            replace_os(patch, FaultyOs(number, error))
            with pytest.raises((ResourceError, KeyboardInterrupt)) as caught:
                job()
        wrong = half_visible(tree_of(root), crasher.whole, OUTPUTS) or crasher.attempt()
        if isinstance(error, OSError) != isinstance(caught.value, ResourceError):
            wrong = f"{caught.value!r}; {wrong}"
        if wrong:
            failures.append(f"operation {number} of {total}: {wrong}")
    assert not failures, show(failures)
