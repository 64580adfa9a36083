"""Whole jobs with either kernels: what Torch prunes on its CPU device is what Numba prunes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from calls import prune
from safetensors.torch import load_file

from streamprune.errors import UsageError


@pytest.mark.parametrize("amount", [{"sparsity": 0.6}, {"pattern": "2:4"}, {"sparsity": 0.5, "method": "wanda"}])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_both_backends_give_the_same_output(
    models: Callable[..., Path], text: Path, tmp_path: Path, kind: str, amount: dict[str, Any]
) -> None:
    outs = {}
    for backend in ("numba", "torch"):
        outs[backend] = tmp_path / backend
        prune(models(kind), outs[backend], calib=text, samples=4, seqlen=32, backend=backend, **amount)
    for shard in sorted(outs["numba"].glob("*.safetensors")):
        ours, theirs = load_file(shard), load_file(outs["torch"] / shard.name)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            differ = int((tensor != theirs[name]).sum())
            assert differ <= tensor.numel() // 1000, f"{name}: {differ} of {tensor.numel()} weights differ"
            if tensor.dim() == 2:
                dim = 0 if kind == "gpt2" and ".h." in name else 1
                assert bool(((tensor == 0).sum(dim) == (theirs[name] == 0).sum(dim)).all()), f"{name}: counts differ"


def test_the_backend_is_part_of_the_job_and_is_checked(models: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--backend jax"):
        prune(models(), tmp_path / "out", sparsity=0.5, backend="jax")
