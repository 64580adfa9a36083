"""As test_crash.py, of quantised sources, and of models whose layers hand on more than hidden states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calls import prune
from conftest import VOCAB
from families import save_model
from gptq_files import gptq
from mixtures import save_mixture
from quantised_files import FUSED, blocks_of, pairs_of, quantise
from test_crash import Crasher, show

Make = Callable[[Path], Path]


def _blocks(folder: Path) -> Path:
    return quantise(save_model(folder / "source", "llama", 2), folder, *blocks_of())[0]


def _mxfp4(folder: Path) -> Path:
    source = save_mixture(folder / "source", "gpt_oss", "bfloat16", hidden_size=64, intermediate_size=96)
    return quantise(source, folder, *pairs_of(), FUSED)[0]


def _gptq(folder: Path) -> Path:
    return quantise(save_model(folder / "source", "llama", 2), folder, *gptq(desc_act=True))[0]


def _gemma(folder: Path) -> Path:
    return save_model(folder / "source", "gemma3n_text", 4)


JOBS: dict[str, tuple[Make, dict[str, Any]]] = {
    "FP8 in blocks": (_blocks, {"propagate": "pruned"}),
    "MXFP4": (_mxfp4, {}),
    "codes kept": (_blocks, {"quantize": "keep"}),
    "keys, lookups, streams": (
        lambda folder: save_model(folder / "source", "gemma3n_text", 4),
        {"propagate": "pruned"},
    ),
    "GPTQ": (_gptq, {"propagate": "pruned"}),
    "indices": (lambda folder: save_mixture(folder / "source", "glm_moe_dsa", "bfloat16"), {}),
    "streams, experts by tokens": (lambda folder: save_mixture(folder / "source", "deepseek_v4", "bfloat16"), {}),
}
USUAL = list(JOBS)[:4]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def crasher_of(tmp_path: Path) -> Callable[[str], Crasher]:
    """The crasher of a job of JOBS."""

    def make(name: str) -> Crasher:
        source, how = JOBS[name]
        model = source(tmp_path)
        np.save(tmp_path / "tokens.npy", np.random.default_rng(3).integers(0, VOCAB, 500))
        given = {"calib": tmp_path / "tokens.npy", "samples": 4, "seqlen": 16, "pattern": "2:4", **how}
        root = tmp_path / "root"
        root.mkdir()
        return Crasher(root, lambda: prune(model, root / "out", **given), ("out",))

    return make


@pytest.mark.parametrize("name", USUAL)
def test_some_moments(crasher_of: Callable[[str], Crasher], name: str) -> None:
    crasher = crasher_of(name)
    states = crasher.disk.states
    assert len(states["killed"]) > 100
    for kind, count in (("killed", 5), ("lost", 2)):
        every = len(states[kind]) // (count + 1)
        states[kind] = dict(list(states[kind].items())[every::every])
        assert count <= len(states[kind]) <= count + 2
    failures = crasher.failures("killed") + crasher.failures("lost")
    assert not failures, show(failures)


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_every_moment(crasher_of: Callable[[str], Crasher], name: str) -> None:
    crasher = crasher_of(name)
    failures = [f for kind in crasher.disk.states for f in crasher.failures(kind)]
    assert not failures, show(failures)
