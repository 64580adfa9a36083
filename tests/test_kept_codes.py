"""`--quantize keep`: the output is the source, with the codes of pruned weights set to zero."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import evaluate, plan, prune
from mixtures import save_mixture
from quantised_files import FUSED, LINEARS, blocks_of, compressed, pairs_of, quantise, rewritten
from refusals import refused
from whole_model import stored

from streamprune.disk.checkpoint import open_checkpoint
from streamprune.disk.quantised import plain
from streamprune.errors import UnsupportedError, UsageError
from streamprune.inspection.inspect import inspect
from streamprune.methods.recipes import Recipe
from streamprune.model.decoded import maps_of

GIVEN: dict[str, Any] = {"samples": 4, "seqlen": 24, "seed": 3, "dtype": "float32", "pattern": "2:4"}
FORMATS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "blocks": blocks_of,
    "blocks, powers": lambda: blocks_of((8, 16), torch.float8_e8m0fnu),
    "float channel": lambda: compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    "float tensor": lambda: compressed("float-quantized", num_bits=8, type="float", strategy="tensor"),
    "int channel": lambda: compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
    "naive group": lambda: compressed(
        "naive-quantized", num_bits=8, type="int", strategy="group", group_size=16, symmetric=True
    ),
}  # fmt: skip
WITHOUT: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "zero points": lambda: compressed(
        "naive-quantized", num_bits=8, type="int", strategy="group", group_size=16, symmetric=False
    ),
    "packed": lambda: compressed(
        "pack-quantized", num_bits=4, type="int", strategy="group", group_size=16, symmetric=True
    ),
}  # fmt: skip

Models = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("one_thread")


def byte_for_byte(coded: Path, dense: Path, out: Path, pruned: Path) -> int:
    """Checks `out` against its source `coded`, and against what became of `dense`; how many linears were pruned."""
    before, after, mask, whole = stored(coded), stored(out), stored(pruned), stored(dense)
    assert before.keys() == after.keys()
    changed = 0
    for name, tensor in before.items():
        found = after[name]
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        if name in mask and tensor.dtype.itemsize == 1:
            codes = torch.where(mask[name] == 0, 0, tensor.view(torch.uint8))
            assert torch.equal(found.view(torch.uint8), codes), name
            changed += not torch.equal(mask[name], whole[name])
        else:
            wanted = mask.get(name, tensor)
            assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8)), name
    assert (out / "config.json").read_bytes() == (coded / "config.json").read_bytes()
    return changed


@pytest.mark.parametrize("form", FORMATS)
def test_the_source_with_zeros(models: Models, text: Path, tmp_path: Path, form: str) -> None:
    """Which weights are pruned is what the dense model says; and what loads is what those two say."""
    coded, dense = quantise(models("llama", layers=2), tmp_path, *FORMATS[form]())
    done = prune(coded, tmp_path / "out", calib=text, quantize="keep", **GIVEN)
    pruned = prune(dense, tmp_path / "pruned", calib=text, **GIVEN).out
    assert byte_for_byte(coded, dense, done.out, pruned) == 14
    view = plain(open_checkpoint(done.out))
    with maps_of(view) as maps:
        for name, tensor in stored(pruned).items():
            assert torch.equal(maps.tensor(view.tensors[name]), tensor), name
    assert any("format was kept" in note for note in done.notes)
    assert "unchanged, bit for bit" in (done.out / "README.md").read_text()
    against = inspect(done.out, against=coded, expect="2:4")
    assert against.ok, against.failures


def test_what_is_evaluated_is_what_loads(models: Models, text: Path, tmp_path: Path) -> None:
    coded, dense = quantise(models("llama", layers=2), tmp_path, *blocks_of())
    outs = [
        prune(coded, tmp_path / "out", calib=text, quantize="keep", **GIVEN).out,
        prune(dense, tmp_path / "pruned", calib=text, **GIVEN).out,
    ]
    found = [evaluate(out, text, seqlen=32, dtype="float32", work=tmp_path).perplexity for out in outs]
    assert found[0] == found[1]


def test_a_part_of_the_linears(models: Models, text: Path, tmp_path: Path) -> None:
    """Those that are not pruned keep their codes, and linears without codes are pruned as they are."""
    encode, config = FORMATS["float channel"]()
    some = re.compile(r"layers\.\d+\..*(q|k|up)_proj\.weight$")
    coded, dense = quantise(models("llama", layers=2), tmp_path, encode, config, some)
    how = {"only": r"layers\.1\..*(q|v|up)_proj"}
    out = prune(coded, tmp_path / "out", calib=text, quantize="keep", **GIVEN, **how).out
    pruned = prune(dense, tmp_path / "pruned", calib=text, **GIVEN, **how).out
    assert byte_for_byte(coded, dense, out, pruned) == 2
    name = "model.layers.1.self_attn.v_proj.weight"
    assert bool(((stored(out)[name].reshape(-1, 4) == 0).sum(1) == 2).all())


def test_scales_of_inputs_are_carried_over(models: Models, tmp_path: Path) -> None:
    coded, dense = quantise(models("llama", layers=2), tmp_path, *FORMATS["float tensor"]())
    name = "model.layers.0.mlp.up_proj.input_scale"
    more = rewritten(coded, tmp_path / "more", lambda t: t.update({name: torch.ones(1)}))
    out = prune(more, tmp_path / "out", method="magnitude", sparsity=0.5, quantize="keep").out
    pruned = prune(dense, tmp_path / "pruned", method="magnitude", sparsity=0.5).out
    byte_for_byte(more, dense, out, pruned)
    assert name in stored(out)


@pytest.mark.parametrize("fused", [False, True])
def test_experts(text: Path, tmp_path: Path, fused: bool) -> None:
    """Of each expert by itself, and of all in one tensor; layers that predict further tokens keep their codes."""
    source = save_mixture(tmp_path / "source", "deepseek_v3", "bfloat16", fused=fused)
    encode, config = blocks_of((8, 16))

    def each(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        if weight.dim() == 2:
            return encode(name, weight)
        made = [encode(name, matrix) for matrix in weight]
        return {n: torch.stack([m[0][n] for m in made]) for n in made[0][0]}, torch.stack([m[1] for m in made])

    which = re.compile(f"{LINEARS.pattern}|{FUSED.pattern}")
    coded, dense = quantise(source, tmp_path, each, config, which)
    out = prune(coded, tmp_path / "out", calib=text, quantize="keep", **GIVEN).out
    pruned = prune(dense, tmp_path / "pruned", calib=text, **GIVEN).out
    assert byte_for_byte(coded, dense, out, pruned) > 10


def test_it_resumes(models: Models, text: Path, tmp_path: Path) -> None:
    coded, _ = quantise(models("llama", layers=2), tmp_path, *blocks_of())
    whole = prune(coded, tmp_path / "whole", calib=text, quantize="keep", **GIVEN).out

    def stop(progress: Any) -> None:
        if progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(coded, tmp_path / "out", calib=text, quantize="keep", **GIVEN, progress=stop)
    out = prune(coded, tmp_path / "out", calib=text, quantize="keep", **GIVEN).out
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert prune(coded, tmp_path / "out", calib=text, quantize="keep", **GIVEN).status == "up-to-date"
    planned = plan(coded, samples=4, seqlen=24, pattern="2:4", quantize="keep")
    assert planned.output_bytes < 1.1 * sum(t.nbytes for t in open_checkpoint(coded).tensors.values())


# ---- refusals


@pytest.mark.parametrize("form", WITHOUT)
def test_formats_without_a_zero(models: Models, text: Path, tmp_path: Path, form: str) -> None:
    coded, _ = quantise(models("llama", layers=2), tmp_path, *WITHOUT[form]())
    with pytest.raises(UnsupportedError, match=r"FP8 and for int8 without zero points, not for .*-quantized"):
        prune(coded, tmp_path / "out", calib=text, quantize="keep", **GIVEN)
    assert not (tmp_path / "out.partial").exists()


def test_four_bits_are_refused(text: Path, tmp_path: Path) -> None:
    source = save_mixture(tmp_path / "source", "gpt_oss", "bfloat16", hidden_size=64, intermediate_size=96)
    coded, _ = quantise(source, tmp_path, *pairs_of(), FUSED)
    with pytest.raises(UnsupportedError, match="not for mxfp4"):
        prune(coded, tmp_path / "out", calib=text, quantize="keep", **GIVEN)


def test_what_it_does_not_go_with(models: Models, text: Path, tmp_path: Path) -> None:
    refused(UsageError, lambda: Recipe.named("obs-admm", quantize="keep"), "--quantize keep", "leave out --refit")
    refused(UsageError, lambda: Recipe.named("swiftprune-tuned", quantize="keep"), "--quantize keep", "--tune")
    refused(UsageError, lambda: Recipe(quantize="keep", fp8_scale="mse"), "--fp8-scale")
    how = {"calib": text, "quantize": "keep", **GIVEN}
    refused(UsageError, lambda: prune(models(), tmp_path / "out", **how), "none of those that are pruned is")
    coded, _ = quantise(models("llama", layers=2), tmp_path, *blocks_of())
    with pytest.raises(UsageError, match="--propagate dense"):
        prune(coded, tmp_path / "out", propagate="pruned", **how)
    assert json.loads((coded / "config.json").read_text())["quantization_config"]
