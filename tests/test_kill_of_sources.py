"""As test_kill.py, of families that hand on more than hidden states, of quantised sources and of tuned experts."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import VOCAB
from families import save_model
from mixtures import save_mixture
from test_crash_of_sources import JOBS
from test_kill import finish, kill_until_done, start, wait_for, weights

KINDS: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "streams, experts by tokens": (JOBS["streams, experts by tokens"][0], ["--pattern=2:4", "--samples=48"]),
    "keys, lookups, streams": (
        lambda folder: save_model(folder / "source", "gemma3n_text", 4),
        ["--pattern=2:4", "--samples=48", "--propagate=pruned"],
    ),
    "recurrent": (lambda folder: save_model(folder / "source", "mamba2", 4), ["--sparsity=0.5", "--samples=48"]),
    "recurrent, experts": (
        lambda folder: save_mixture(folder / "source", "jamba", "bfloat16"),
        ["--pattern=2:4", "--samples=48", "--method=obs-admm"],
    ),
    "GPTQ": (JOBS["GPTQ"][0], ["--pattern=2:4", "--samples=96", "--propagate=pruned"]),
    "MXFP4": (JOBS["MXFP4"][0], ["--pattern=2:4", "--samples=96"]),
    "tuned experts": (
        lambda folder: save_mixture(folder / "source", "qwen3_moe", "bfloat16"),
        ["--pattern=2:4", "--samples=24", "--tune=block", "--tune-epochs=2"],
    ),
    "FP8 of experts in one tensor": (
        lambda folder: save_mixture(folder / "source", "llama4_text", "bfloat16"),
        ["--pattern=2:4", "--samples=48", "--method=hwpq", "--propagate=pruned"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random(tmp_path: Path, kind: str) -> None:
    make, job = KINDS[kind]
    source = make(tmp_path)
    np.save(tmp_path / "tokens.npy", np.random.default_rng(3).integers(5, VOCAB - 9, 3000))
    given = [str(tmp_path / "tokens.npy"), "--seqlen=32", *job]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

    def command(name: str) -> list[str]:
        out = tmp_path / name / "out"
        return [sys.executable, "-m", "streamprune", "prune", str(source), str(out), "--calib", *given]

    with start(command("whole"), environment) as run:
        wait_for(run, 1)
        begun = time.perf_counter()
        _, errors = run.communicate(timeout=300)
        took = time.perf_counter() - begun
    assert run.returncode == 0, errors
    wanted, hits = weights(tmp_path / "whole" / "out"), 0
    for seed in range(2):
        out = tmp_path / str(seed) / "out"
        hits += kill_until_done(command(str(seed)), environment, out, random.Random(f"{kind} {seed}"), took, 4)
        if not out.exists():
            finish(command(str(seed)), environment, out, wanted)
        assert weights(out) == wanted
    assert hits >= 2
