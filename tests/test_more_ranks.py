"""Three ranks, ranks that are killed at any moment, and torchrun itself: minutes of work."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rank_jobs import GIVEN, Job, Run, do, environment, files, free_port, report, told

Models = Callable[..., Path]

PRUNED: dict[str, dict[str, Any]] = {
    "masks": {"pattern": "2:4"},
    "saved": {"sparsity": 0.5, "propagate": "pruned"},
    "refitted": {"sparsity": 0.6, "method": "obs-admm"},
    "tuned": {"pattern": "2:4", "method": "swiftprune-tuned", "tune_epochs": 2, "quantize": "fp8"},
    "tuned dense": {"sparsity": 0.5, "method": "obs-admm", "tune": "block", "tune_epochs": 1, "propagate": "dense"},
    "shared weights": {"pattern": "2:4", "method": "obs-admm"},
    "dense": {"pattern": "2:4", "method": "gradual-cg", "propagate": "dense", "quantize": "fp8"},
    "experts": {"sparsity": 0.5, "method": "obs-admm", "expert_tokens": 16},
    "allocated": {"sparsity": 0.5, "allocate": "error"},
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(models: Models, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs NAME-N of N ranks, and what each rank told of its jobs."""
    root, model = tmp_path_factory.mktemp("ranks"), models("llama", 2)
    of = dict.fromkeys(PRUNED, model) | {"experts": models("mixtral", 2), "shared weights": models("zamba2", 2)}
    given = GIVEN | {"calib": str(text)}

    def jobs(size: int) -> list[Job]:
        found = [Job("calibrate", model, root / f"statistics-{size}", given=given)]
        for name, amount in PRUNED.items():
            more = {"save_stats": str(root / f"saved.statistics-{size}")} if name == "saved" else {}
            found.append(Job("prune", of[name], root / f"{name}-{size}", given=given | amount | more))
        against = {"reference": str(model), "seqlen": 16, "device": "cpu", "windows": 22}
        return [*found, Job("evaluate", root / "masks-1", text, given=against)]

    do(root, [Run(str(size), size, jobs(size)) for size in (1, 2, 3)])
    return root


@pytest.mark.parametrize("size", [2, 3])
def test_the_same_statistics(folder: Path, size: int) -> None:
    for name in ("statistics", "saved.statistics"):
        assert (folder / f"{name}-{size}").read_bytes() == (folder / f"{name}-1").read_bytes()


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", PRUNED)
def test_the_same_checkpoint(folder: Path, name: str, size: int) -> None:
    """And the same figures about its linears, on all ranks."""
    assert files(folder / f"{name}-{size}") == files(folder / f"{name}-1")
    one = report(folder / f"{name}-1")
    for found in told(folder, str(size), f"{name}-{size}"):
        assert found["report"]["linears"] == one["linears"] and found["report"]["resolved"] == one["resolved"]


@pytest.mark.parametrize("size", [2, 3])
def test_the_same_evaluation(folder: Path, text: Path, size: int) -> None:
    (one,) = told(folder, "1", text.name)
    for found in told(folder, str(size), text.name):
        for name in ("perplexity", "kl", "kl_stderr", "top1_agreement", "window_nll"):
            assert found["report"][name] == one["report"][name]


def _torchrun(size: int, *words: object) -> subprocess.Popen[str]:
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(size), "--master-port", str(free_port())]
    return subprocess.Popen(
        [sys.executable, *command, "-m", "streamprune", *map(str, words)], env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def test_by_torchrun_with_ranks_that_are_killed(models: Models, text: Path, tmp_path: Path) -> None:
    """Ranks are killed at random moments until the job is done; it is printed once, and is that of one process."""
    words = ["prune", models("llama", 8), tmp_path / "out", "--sparsity", "0.6", "--method", "obs-admm",
             "--calib", text, "--samples", "96", "--seqlen", "64", "--json"]  # fmt: skip
    chance = random.Random(5)
    for attempt in range(12):
        run = _torchrun(2, *words)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
        wait = chance.uniform(6, 20) if attempt < 11 else 300
        try:
            output, errors = run.communicate(timeout=wait)
            break
        except subprocess.TimeoutExpired:
            os.kill(int(chance.choice(children.read_text().split())), signal.SIGKILL)
        output, errors = run.communicate(timeout=240)
        assert run.returncode == 1 and output == "" and not (tmp_path / "out").exists()
        assert errors.count("streamprune: error: ") <= 1, "none if the agent was faster"
    assert run.returncode == 0 and json.loads(output)["status"] == "done", errors
    words[2] = tmp_path / "one"
    alone = subprocess.run(
        [sys.executable, "-m", "streamprune", *map(str, words)], env=environment(), capture_output=True, check=True
    )
    assert json.loads(alone.stdout)["status"] == "done"
    assert files(tmp_path / "out") == files(tmp_path / "one")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank(models: Models, text: Path, tmp_path: Path, rank: int) -> None:
    """It says so, once, also if it is not rank 0; and torchrun is told that it was interrupted."""
    words = ["prune", models("llama", 8), tmp_path / "out", "--sparsity", "0.6", "--method", "obs-admm",
             "--calib", text, "--samples", "96", "--seqlen", "64", "--json"]  # fmt: skip
    run = _torchrun(2, *words)
    journal, until = tmp_path / "out.partial" / ".streamprune" / "journal", time.monotonic() + 240
    while not journal.exists():
        assert run.poll() is None and time.monotonic() < until
        time.sleep(0.2)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[rank]), signal.SIGTERM)
    output, errors = run.communicate(timeout=240)
    said = [line for line in errors.splitlines() if line.startswith("streamprune: error: ")]
    assert said == ["streamprune: error: interrupted; run the same command again to resume"], errors
    assert run.returncode == 1 and output == "" and "exitcode  : 130" in errors


@pytest.mark.parametrize(
    "words", [["inspect", "MODEL"], ["eval", "MODEL", "--tasks", "x"], ["prune", "MODEL", "OUT", "--pattern", "4:2"]]
)
def test_what_torchrun_cannot_do(models: Models, tmp_path: Path, words: list[str]) -> None:
    """One line, from rank 0."""
    run = _torchrun(2, *({"MODEL": models(), "OUT": tmp_path / "out"}.get(word, word) for word in words))
    output, errors = run.communicate(timeout=300)
    said = [line for line in errors.splitlines() if line.startswith("streamprune: error: ")]
    assert run.returncode == 1 and output == "" and len(said) == 1
    assert "exitcode  : 2" in errors
