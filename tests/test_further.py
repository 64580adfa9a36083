"""`--mtp prune`: layers for multi-token prediction, which nothing runs, are pruned by magnitude."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import calibrate, plan, prune
from mixtures import save_mixture
from quantised_files import blocks_of, quantise, rewritten
from whole_model import stored

from streamprune.errors import UsageError
from streamprune.methods.recipes import Recipe
from streamprune.pruning.command import command_of

GIVEN: dict[str, Any] = {"samples": 4, "seqlen": 24, "seed": 3, "dtype": "float32", "pattern": "2:4"}
FURTHER = re.compile(r"layers\.46\.|^mtp\.")

pytestmark = pytest.mark.usefixtures("one_thread")


def beside(tensors: dict[str, torch.Tensor], name: str = "model.layers.46.") -> None:
    """Adds a layer like the last one, with other values, and what joins a state and a token."""
    more = {n.replace("model.layers.1.", name): t for n, t in tensors.items() if n.startswith("model.layers.1.")}
    made = torch.Generator().manual_seed(5)
    tensors |= {n: (torch.randn(t.shape, generator=made) * 0.1).to(t.dtype) for n, t in more.items()}
    tensors[f"{name}eh_proj.weight"] = torch.randn(32, 64, generator=made).to(next(iter(more.values())).dtype)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("further")
    return rewritten(save_mixture(folder / "source", "glm4_moe", "bfloat16"), folder / "model", beside)


def fewest(weight: torch.Tensor) -> torch.Tensor:
    """2:4 by magnitude."""
    groups = weight.float().abs().reshape(-1, 4)
    keep = torch.zeros_like(groups).scatter_(1, groups.argsort(dim=1, stable=True)[:, 2:], 1)
    return torch.where(keep.view(weight.shape) > 0, weight, 0)


def check(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> int:
    """That linears of further layers are pruned by magnitude, and nothing else of them is touched; how many are."""
    count = 0
    for name in [name for name in before if FURTHER.search(name)]:
        linear = name.endswith("_proj.weight") and "eh_proj" not in name
        wanted = fewest(before[name]) if linear else before[name]
        assert torch.equal(after[name], wanted), name
        count += linear
    return count


@pytest.mark.parametrize("method", ["swiftprune", "wanda", "obs-admm"])
def test_by_magnitude(model: Path, text: Path, tmp_path: Path, method: str) -> None:
    done = prune(model, tmp_path / "out", calib=text, method=method, mtp="prune", expert_tokens=8, **GIVEN)
    assert check(stored(model), stored(done.out)) == 4 + 3 * 8 + 3
    plainly = prune(model, tmp_path / "plain", calib=text, method=method, expert_tokens=8, **GIVEN)
    own = stored(plainly.out)
    assert all(torch.equal(t, own[n]) for n, t in stored(done.out).items() if not FURTHER.search(n))
    assert all(torch.equal(t, own[n]) for n, t in stored(model).items() if FURTHER.search(n)), "dense by default"
    reported = {linear["name"] for linear in done.report["linears"]}
    assert "model.layers.46.mlp.experts.3.up_proj" in reported and done.report["job"]["mtp"] == "prune"
    assert "mtp" not in plainly.report["job"] and any("by magnitude" in note for note in done.notes)
    assert "--mtp prune" in command_of(done.report["job"])


def test_from_statistics(model: Path, text: Path, tmp_path: Path) -> None:
    """Which know nothing of further layers, also where they are saved by a job that prunes these."""
    asked = {"calib": text, "samples": 4, "seqlen": 24, "seed": 3, "dtype": "float32"}
    calibrate(model, tmp_path / "statistics", **asked)
    saved = tmp_path / "saved"
    whole = prune(model, tmp_path / "whole", mtp="prune", pattern="2:4", save_stats=saved, **asked).out
    for number, stats in enumerate((tmp_path / "statistics", saved)):
        out = prune(model, tmp_path / f"out{number}", mtp="prune", pattern="2:4", stats=stats).out
        assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
        dense = prune(model, tmp_path / f"dense{number}", pattern="2:4", stats=stats).out
        own = stored(dense)
        assert all(torch.equal(t, own[n]) for n, t in stored(model).items() if FURTHER.search(n))


def test_other_names_and_fused_experts(text: Path, tmp_path: Path) -> None:
    source = save_mixture(tmp_path / "source", "qwen3_next", "bfloat16", fused=True)
    named = rewritten(source, tmp_path / "model", lambda t: beside(t, "mtp.layers.0."))
    out = prune(named, tmp_path / "out", method="magnitude", pattern="2:4", mtp="prune").out
    before, after = stored(named), stored(out)
    for leaf in ("experts.gate_up_proj", "experts.down_proj", "shared_expert.up_proj.weight"):
        name = f"mtp.layers.0.mlp.{leaf}"
        assert torch.equal(after[name], fewest(before[name])), name
    assert torch.equal(after["mtp.layers.0.mlp.gate.weight"], before["mtp.layers.0.mlp.gate.weight"])


def test_in_fp8_and_as_the_source_is(model: Path, text: Path, tmp_path: Path) -> None:
    name = "model.layers.46.mlp.experts.3.up_proj.weight"
    out = prune(model, tmp_path / "out", calib=text, mtp="prune", quantize="fp8", **GIVEN).out
    codes, scale = stored(out)[name], stored(out)[f"{name}_scale"]
    wanted = fewest(stored(model)[name])
    assert codes.dtype == torch.float8_e4m3fn and torch.equal(codes.float() == 0, wanted == 0)
    torch.testing.assert_close(codes.float() * scale.float(), wanted.float(), rtol=0.07, atol=1e-3)
    encode, config = blocks_of((8, 16))
    coded, dense = quantise(model, tmp_path, encode, config, re.compile(r"layers\.\d+\.mlp\.experts.*proj\.weight$"))
    out = prune(coded, tmp_path / "kept", method="magnitude", pattern="2:4", mtp="prune", quantize="keep").out
    before, zero = stored(coded)[name].view(torch.uint8), fewest(stored(dense)[name]) == 0
    assert torch.equal(stored(out)[name].view(torch.uint8), torch.where(zero, 0, before))


def test_refusals(models: Callable[..., Path], model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--mtp prune: no layer"):
        prune(models(), tmp_path / "out", method="magnitude", pattern="2:4", mtp="prune")
    with pytest.raises(UsageError, match="--mtp all: choose dense or prune"):
        Recipe(mtp="all")
    assert Recipe(mtp="dense") == Recipe()
    how = {"method": "magnitude", "pattern": "2:4"}
    assert plan(model, **how, mtp="prune").output_bytes == plan(model, **how).output_bytes
    assert json.loads((model / "config.json").read_text())["num_hidden_layers"] == 2
