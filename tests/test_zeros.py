"""Linears of zeros: what broken downloads leave, named before it is pruned; and zeros that are nothing amiss."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import calibrate, prune
from refusals import refused
from safetensors.torch import load_file, save_file

from streamprune.cli import main
from streamprune.disk.checkpoint import open_checkpoint
from streamprune.disk.header import TensorRef
from streamprune.disk.mapping import ShardMaps
from streamprune.errors import CheckpointError
from streamprune.inspection.inspect import inspect
from streamprune.methods.counting import long_run
from streamprune.model.zeros import refuse_empty, zero_rows

Models = Callable[..., Path]
HOW: dict[str, Any] = {"pattern": "2:4", "samples": 2, "seqlen": 8}
UP = "model.layers.1.mlp.up_proj.weight"

pytestmark = pytest.mark.usefixtures("one_thread")


def zeroed(source: Path, folder: Path, **places: slice) -> Path:
    """A copy of a checkpoint whose tensors, by parts of their names, have rows of zeros."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        for part, rows in places.items():
            if part in name and name.endswith("weight"):
                tensors[name][rows] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([], 0), ([0], 0), (range(4), 4), (range(3), 0), (range(28, 32), 4), (range(32), 32), (range(0, 32, 2), 0),
        ([*range(3), *range(5, 12)], 7),
    ],
)  # fmt: skip
def test_long_runs(rows: Any, found: int) -> None:
    zero = np.zeros(32, bool)
    zero[list(rows)] = True
    assert long_run(zero) == found
    assert long_run(np.ones(2, bool)) == 2 and long_run(np.zeros(0, bool)) == 0
    assert long_run(np.repeat([True, False], [100, 900])) == 0 and long_run(np.repeat([True, False], [125, 875])) == 125


@pytest.mark.parametrize("width", [1, 5, 8, 64, 100])
def test_rows_of_zeros(width: int) -> None:
    """-0.0 is zero; a single weight anywhere is enough, NaN too."""
    rows = torch.zeros(width + 3, width, dtype=torch.bfloat16)
    rows[torch.arange(width), torch.arange(width)] = 1
    rows[width] = -0.0
    rows[width + 1, width // 2] = float("nan")
    assert zero_rows(rows).tolist() == [False] * width + [True, False, True]


@pytest.mark.parametrize("how", ["magnitude", "swiftprune", "obs-admm"])
@pytest.mark.parametrize("rows", [slice(None), slice(50, None)])
def test_prune_names_it(models: Models, text: Path, tmp_path: Path, how: str, rows: slice) -> None:
    """With a forward pass or without, and nothing half-written stays."""
    source = zeroed(models(), tmp_path / "model", **{UP: rows})
    what = "is all zeros" if rows == slice(None) else "has 14 consecutive zero rows of 64"
    refused(CheckpointError, lambda: prune(source, tmp_path / "out", method=how, calib=text, **HOW),
            "model.safetensors", UP, what, "--allow-zeros")  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    done = prune(source, tmp_path / "out", method=how, calib=text, allow_zeros=True, **HOW)
    assert done.status == "done"
    assert not load_file(tmp_path / "out" / "model.safetensors")[UP][rows].any()


def test_with_statistics_and_where_nothing_is_pruned(models: Models, text: Path, tmp_path: Path) -> None:
    calibrate(models(), tmp_path / "stats", calib=text, samples=2, seqlen=8)
    source = zeroed(models(), tmp_path / "model", **{UP: slice(50, None)})
    refused(CheckpointError, lambda: prune(source, tmp_path / "out", calib=text, skip="up_proj", **HOW), UP)
    empty = zeroed(models(), tmp_path / "empty", **{UP: slice(None)})
    refused(CheckpointError, lambda: calibrate(empty, tmp_path / "more", calib=text, samples=2, seqlen=8), UP)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "model", "stats"]


def test_experts(models: Models, text: Path, tmp_path: Path) -> None:
    source = zeroed(models("mixtral"), tmp_path / "model", **{"layers.1.block_sparse_moe.experts.2.w1": slice(None)})
    refused(CheckpointError, lambda: prune(source, tmp_path / "out", calib=text, **HOW), "experts.2.w1", "all zeros")


def test_what_may_be_zeros(models: Models, text: Path, tmp_path: Path) -> None:
    """Unused tokens, biases, norms, scattered rows; and an output of ours that is pruned again."""
    source = zeroed(models(), tmp_path / "model", embed_tokens=slice(9, 180), lm_head=slice(9, 180), norm=slice(None))
    source = zeroed(source, tmp_path / "more", **{UP: slice(None, None, 2)})
    prune(source, tmp_path / "out", method="magnitude", sparsity=0.9)
    prune(tmp_path / "out", tmp_path / "again", method="magnitude", sparsity=0.95)
    gpt2 = zeroed(models("gpt2"), tmp_path / "gpt2", **{"mlp.c_fc.weight": slice(0, 3)})
    prune(gpt2, tmp_path / "out2", method="magnitude", sparsity=0.5)


def test_inspect_counts_it(models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = zeroed(models(), tmp_path / "model", **{UP: slice(None), "0.mlp.up_proj": slice(8)})
    found = inspect(source)
    assert {n.name: n.zero_rows for n in found.linears if n.zero_rows} == {
        UP.removesuffix(".weight"): 64, "model.layers.0.mlp.up_proj": 8
    }  # fmt: skip
    assert found.totals.zero_rows == 72
    assert main(["inspect", str(source)]) == 0
    assert "faults: 72 empty rows" in capsys.readouterr().out
    assert inspect(models()).totals.zero_rows == 0


def test_pages_that_were_looked_at_are_released(models: Models) -> None:
    """Of every linear of every layer, or memory would grow with the number of layers."""
    looked, released = set[str](), set[str]()

    class Recorded(ShardMaps):
        def rows(self, ref: TensorRef, start: int, stop: int) -> torch.Tensor:
            looked.add(ref.name)
            released.discard(ref.name)
            return super().rows(ref, start, stop)

        def release(self, refs: Iterable[TensorRef], *, drop_cache: bool = False) -> None:
            refs = list(refs)
            released.update(ref.name for ref in refs)
            super().release(refs, drop_cache=drop_cache)

    checkpoint = open_checkpoint(models())
    linears = [ref for name, ref in checkpoint.tensors.items() if "proj" in name]
    with Recorded(checkpoint) as maps:
        refuse_empty(maps, linears)
    assert looked == released == {ref.name for ref in linears} and len(linears) == 21
