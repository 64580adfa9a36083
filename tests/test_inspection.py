"""Inspection counts what a slow reference counts, and each expectation fails where it should."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import entry, make, shard_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from streamprune.disk.checkpoint import open_checkpoint
from streamprune.disk.linears import find_linears
from streamprune.disk.packed import BITMASK, LAYOUTS, TWO_FOUR
from streamprune.errors import CheckpointError, UnsupportedError, UsageError
from streamprune.inspection import count as inspection_count
from streamprune.inspection import stored as stored_tensors
from streamprune.inspection.inspect import inspect
from streamprune.inspection.report import LinearReport
from streamprune.methods.bitmask import pack_rows
from streamprune.tables import inspection_table

NAME = "model.layers.0.mlp.up_proj"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def model(folder: Path, weights: dict[str, torch.Tensor], config: object = None) -> Path:
    make(folder, config=config or {"model_type": "llama"})
    save_file({f"{name}.weight": w.contiguous() for name, w in weights.items()}, folder / "model.safetensors")
    return folder


def one(folder: Path, weight: torch.Tensor, expect: str | None = None) -> tuple[LinearReport, tuple[str, ...]]:
    found = inspect(model(folder, {NAME: weight}), expect=expect)
    assert found.ok is (None if expect is None else not found.failures)
    assert len(found.linears) == 1
    return found.linears[0], found.failures


def dense(rows: int, inputs: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Weights without a zero, positive and negative."""
    values = torch.arange(1, rows * inputs + 1) % 13 + 1.0
    return (values * (-1) ** torch.arange(rows * inputs)).reshape(rows, inputs).to(dtype)


def pruned(rows: int, inputs: int, n: int, m: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """N neighbours of every M inputs kept, at places that differ from group to group."""
    keep = torch.zeros(rows, inputs // m, m, dtype=torch.bool)
    for k in range(n):
        at = (torch.arange(rows)[:, None] + torch.arange(inputs // m) + k) % m
        keep.scatter_(2, at[..., None], True)
    return torch.where(keep.reshape(rows, inputs), dense(rows, inputs, torch.float32), 0.0).to(dtype)


@st.composite
def odd_weights(draw: st.DrawFn) -> torch.Tensor:
    """Small matrices of any dtype with many zeros, some -0.0, NaN and Inf."""
    dtype = draw(st.sampled_from(DTYPES))
    rows, inputs = draw(st.integers(1, 6)), draw(st.sampled_from([1, 3, 4, 6, 8, 12, 16, 24, 32, 64, 96]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.randn(rows, inputs, generator=generator).clamp(0.1, 100)
    kind = torch.rand(rows, inputs, generator=generator)
    values[kind < draw(st.sampled_from([0.0, 0.3, 0.6, 0.95]))] = 0.0
    if draw(st.booleans()):
        special = torch.randint(0, 40, (rows, inputs), generator=generator)
        values[special == 0], values[special == 1] = -0.0, math.nan
        if dtype not in (torch.float8_e4m3fn,):  # which has no Inf
            values[special == 2], values[special == 3] = math.inf, -math.inf
    return values.to(dtype)


def tightest(nonzero: list[list[bool]], expected_m: int = 2) -> str | None:
    """The reference of LinearReport.pattern, group by group."""
    held = []
    for m in {2, 4, 8, 16, 32, expected_m}:
        if len(nonzero[0]) % m:
            continue
        groups = [sum(row[i : i + m]) for row in nonzero for i in range(0, len(row), m)]
        n, p = max(groups), sum(groups) / len(groups) / m
        more = sum(math.comb(m, k) * p**k * (1 - p) ** (m - k) for k in range(n + 1, m + 1))
        if 0 < n < m and (sum(groups) >= 0.9 * n * len(groups) or len(nonzero[0]) // m * more >= 10):
            held.append((n / m, m, f"{n}:{m}"))
    return min(held)[2] if held else None


@settings(max_examples=200, deadline=None)
@given(odd_weights(), st.sampled_from(["1:2", "2:4", "1:3", "3:6", "4:8", "7:16", "5:12", "16:32"]))
def test_counts_equal_a_slow_reference(
    tmp_path_factory: pytest.TempPathFactory, weight: torch.Tensor, expect: str
) -> None:
    report, failures = one(tmp_path_factory.getbasetemp() / "odd", weight, expect)
    wide = weight.double()
    nonzero = (wide != 0).tolist()
    zeros = [row.count(False) for row in nonzero]
    assert report.shape == tuple(weight.shape)
    assert (report.zeros, report.min_row_zeros, report.max_row_zeros) == (sum(zeros), min(zeros), max(zeros))
    assert report.negative_zeros == int(((wide == 0) & wide.signbit()).sum())
    assert report.nans == int(wide.isnan().sum())
    assert report.infs == int(wide.isinf().sum())
    n, m = map(int, expect.split(":"))
    assert report.pattern == tightest(nonzero, m)
    if weight.shape[1] % m:
        assert "do not divide" in failures[0]
        return
    over = [
        (y, x, sum(row[x : x + m]))
        for y, row in enumerate(nonzero)
        for x in range(0, len(row), m)
        if sum(row[x : x + m]) > n
    ]
    told = [f for f in failures if "nonzeros" in f]
    assert bool(told) == bool(over)
    if over:
        y, x, count = over[0]
        assert f"row {y}, inputs {x} to {x + m - 1}: {count} nonzeros" in told[0]
        assert f"({len(over)} such groups)" in told[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (3, 4), (3, 6), (4, 8), (6, 8), (4, 16), (12, 32)])
def test_patterns_are_found_and_hold(tmp_path: Path, dtype: torch.dtype, n: int, m: int) -> None:
    weight = pruned(5, 96, n, m, dtype)
    report, failures = one(tmp_path / "m", weight, f"{n}:{m}")
    assert not failures
    assert report.sparsity == 1 - n / m
    assert report.pattern == tightest((weight.double() != 0).tolist(), m)
    if math.gcd(n, m) == 1 or m == 4:
        assert report.pattern == f"{n}:{m}"
    weight[4, 95], weight[4, 94], weight[4, 93], weight[4, 92] = 1, 1, 1, 1  # a full group of 4 at the end
    if n < 4:
        _, failures = one(tmp_path / "m", weight, f"{n}:{m}")
        assert len(failures) == 1
        first = max(m, 4)  # the first overfull group begins so far from the end
        assert failures[0].startswith(f"{NAME}: row 4, inputs {96 - first} to {95 - first + m}: ")


def test_unstructured_zeros_are_no_pattern(tmp_path: Path) -> None:
    weight = dense(64, 256)
    weight[torch.rand(64, 256, generator=torch.Generator().manual_seed(0)) < 0.5] = 0
    assert tightest((weight != 0).tolist()) is None
    report, failures = one(tmp_path / "m", weight, "2:4")
    assert report.pattern is None
    assert failures
    assert one(tmp_path / "z", torch.zeros(4, 32))[0].pattern is None
    assert one(tmp_path / "z", torch.zeros(4, 32), "2:4")[1] == ()


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_two_four_with_zeros_among_the_kept(tmp_path: Path, share: float) -> None:
    """More zeros than the pattern asks for do not hide it, unless there are so few weights that it may be chance."""
    generator = torch.Generator().manual_seed(1)
    weight = pruned(8, 1024, 2, 4)
    weight[torch.rand(weight.shape, generator=generator) < share] = 0
    report, failures = one(tmp_path / "m", weight, "2:4")
    assert report.pattern == tightest((weight != 0).tolist()) == "2:4"
    assert not failures
    few = weight[:, :64]
    assert one(tmp_path / "m", few)[0].pattern == ("2:4" if share < 0.1 else None)


def test_chance_and_structure_are_no_pattern(tmp_path: Path) -> None:
    """Random zeros, the same zeros in every row, and inputs that are dead altogether."""
    generator = torch.Generator().manual_seed(2)
    for sparsity in (0.5, 0.7, 0.9, 0.99):
        same = dense(1, 1024)
        same[torch.rand(same.shape, generator=generator) < sparsity] = 0
        anew = dense(64, 1024)
        anew[torch.rand(anew.shape, generator=generator) < sparsity] = 0
        assert one(tmp_path / "m", same.repeat(64, 1))[0].pattern is None
        assert one(tmp_path / "m", anew)[0].pattern is None


def test_the_expected_m_is_looked_for(tmp_path: Path) -> None:
    weight = pruned(4, 96, 5, 12)
    assert one(tmp_path / "m", weight, "6:12")[0].pattern == "5:12"
    assert one(tmp_path / "m", weight)[0].pattern is None


def test_expected_sparsity(tmp_path: Path) -> None:
    weight = dense(4, 10)
    weight[:, :7] = 0
    assert one(tmp_path / "m", weight, "0.7")[1] == ()
    assert one(tmp_path / "m", weight, "0.79")[1] == ()  # floor(7.9)
    weight[2, 0] = 1
    report, failures = one(tmp_path / "m", weight, "0.7")
    assert failures == (f"{NAME}: row 2 has 6 zeros, a sparsity of 0.7 asks for 7 of 10 (1 such rows)",)
    assert (report.min_row_zeros, report.max_row_zeros, report.zeros) == (6, 7, 27)
    assert one(tmp_path / "m", weight, "0.69")[1] == ()


@pytest.mark.parametrize(("value", "kind"), [(-0.0, "-0.0"), (math.nan, "NaN"), (math.inf, "Inf"), (-math.inf, "Inf")])
@pytest.mark.parametrize("expect", ["2:4", "0.5"])
def test_what_must_not_be_there_fails_any_expectation(tmp_path: Path, value: float, kind: str, expect: str) -> None:
    weight = pruned(3, 32, 2, 4)
    place = (weight[1] == 0 if kind == "-0.0" else weight[1] != 0).nonzero().flatten()[[2, 5]]
    weight[1, place] = value
    _, failures = one(tmp_path / "m", weight, expect)
    assert failures == (f"{NAME}: row 1, input {int(place[0])}: {kind} (2 in all)",)
    assert inspect(tmp_path / "m").failures == ()
    assert inspect(tmp_path / "m").ok is None


def test_conv1d_holds_its_pattern_along_the_first_axis(tmp_path: Path) -> None:
    weight = pruned(5, 96, 2, 4)
    name = "transformer.h.0.mlp.c_fc"
    folder = model(tmp_path / "m", {name: weight.T}, {"model_type": "gpt2"})
    for expect, ok in (("2:4", True), ("1:4", False), ("0.5", True), ("3:6", None)):
        found = inspect(folder, expect=expect)
        (report,) = found.linears
        assert (report.shape, report.transposed, report.pattern) == ((96, 5), True, "2:4")
        if ok is not None:
            assert found.ok is ok
    weight[3, 40:44] = 1
    found = inspect(model(tmp_path / "m", {name: weight.T}, {"model_type": "gpt2"}), expect="2:4")
    assert found.failures == (f"{name}: row 3, inputs 40 to 43: 4 nonzeros, 2:4 allows 2 (1 such groups)",)
    assert inspect(model(tmp_path / "n", {name: weight.T}), expect="2:4").ok is False  # llama has no Conv1D


@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_do_not_change_the_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transposed: bool) -> None:
    weight = pruned(70, 288, 3, 6, torch.float32)
    weight[41, 7], weight[50, 190], weight[69, 287] = -0.0, math.nan, math.inf
    weight[1, 198:204] = 1
    name = "h.0.c_fc"
    stored = weight.T if transposed else weight
    folder = model(tmp_path / "m", {name: stored}, {"model_type": "gpt2" if transposed else "llama"})
    whole = inspect(folder, expect="3:6")
    places = [failure.split(": ")[1] for failure in whole.failures[-3:]]
    assert places == ["row 41, input 7", "row 50, input 190", "row 69, input 287"]
    assert "row 1, inputs 198 to 203: 6 nonzeros" in whole.failures[0]
    for block, chunk in ((1, 4), (4 * 288 * 3, 4 * 288 * 7), (1, 10_000)):
        monkeypatch.setattr(inspection_count, "_BLOCK_BYTES", block)
        monkeypatch.setattr(stored_tensors, "_CHUNK_BYTES", chunk)
        assert inspect(folder, expect="3:6") == whole


LINEARS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.31.mlp.gate_proj",
    "model.layers.1.mlp.experts.7.w1",
    "model.decoder.layers.3.fc1",
    "transformer.h.11.attn.c_attn",
    "gpt_neox.layers.2.attention.query_key_value",
    "transformer.blocks.0.ffn.up_proj",
    "layers.0.q_a_proj",
]
OTHERS = [
    "lm_head",
    "model.embed_tokens",
    "transformer.wte",
    "model.layers.0.input_layernorm",
    "model.layers.0.self_attn.q_norm",
    "model.layers.0.mlp.gate",
    "model.layers.0.block_sparse_moe.gate",
    "model.layers.0.mlp.shared_expert_gate",
    "model.layers.0.feed_forward.router",
    "transformer.blocks.0.ffn.router.layer",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "vision_tower.encoder.layers.0.fc1",
    "model.visual.blocks.0.mlp.fc1",
    "playersx.0.fc",
]


def test_which_tensors_are_linears(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", {name: dense(2, 4) for name in LINEARS + OTHERS})
    assert sorted(find_linears(open_checkpoint(folder))) == sorted(LINEARS)
    towers = ["model.encoder.layers.0.fc1", "model.perceiver.layers.2.mlp.up_proj", "model.vision_tower.layers.1.fc1"]
    folder = model(tmp_path / "sees", {name: dense(2, 4) for name in [*towers, "language_model.model.layers.0.fc1"]})
    assert list(find_linears(open_checkpoint(folder))) == ["language_model.model.layers.0.fc1"]
    make(tmp_path / "n")
    odd = {
        "layers.0.conv.weight": torch.ones(2, 2, 2),
        "layers.0.vector.weight": torch.ones(2),
        "layers.0.ints.weight": torch.ones(2, 2, dtype=torch.int8),
        "layers.0.empty.weight": torch.ones(0, 2),
        "layers.0.fc.bias": torch.ones(2, 2),
        "layers.0.fc.weight": torch.ones(2, 2),
    }
    save_file(odd, tmp_path / "n" / "model.safetensors")
    assert list(find_linears(open_checkpoint(tmp_path / "n"))) == ["layers.0.fc"]


def test_linears_come_in_the_order_of_layers(tmp_path: Path) -> None:
    names = [f"layers.{i}.{leaf}" for i in range(12) for leaf in ("attn.q", "mlp.down")]
    dtypes = [torch.float32, torch.bfloat16]
    folder = model(tmp_path / "m", {name: dense(1, 4, dtypes[i % 2]) for i, name in enumerate(names)})
    assert list(find_linears(open_checkpoint(folder))) == names


def test_only_and_skip(tmp_path: Path) -> None:
    names = ["layers.0.a_proj", "layers.0.b_proj", "layers.1.a_proj"]
    a, b, c = dense(2, 4), dense(2, 4), torch.zeros(2, 4)
    folder = model(tmp_path / "m", dict(zip(names, (a, b, c), strict=True)))
    assert [r.name for r in inspect(folder, only="a_proj$").linears] == [names[0], names[2]]
    assert [r.name for r in inspect(folder, only=r"s\.0\.", skip="b").linears] == [names[0]]
    assert inspect(folder, only=r"layers\.1", expect="2:4").ok
    for arguments in ({"only": "nothing"}, {"skip": "."}):
        with pytest.raises(UsageError, match="leave none of 3 linears"):
            inspect(folder, **arguments)  # type: ignore[arg-type]
    for arguments in ({"only": "("}, {"skip": "("}):
        with pytest.raises(UsageError, match="not a regular expression"):
            inspect(folder, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "expect",
    [
        "2:4,4:8",
        "0.5,0.6",
        "2:4,",
        "fp16",
        "2:4;fp8",
        "4:2",
        "2:4:8",
        "0:4",
        "2:64",
        "x",
        "",
        "1.5",
        "1",
        "0",
        "-0.5",
        "nan",
        "50%",
        ":",
    ],
)
def test_malformed_expectations(tmp_path: Path, expect: str) -> None:
    with pytest.raises(UsageError) as caught:
        inspect(tmp_path / "never-opened", expect=expect)
    assert "--sparsity" not in str(caught.value), "it names a flag that inspect does not have"


def test_models_that_cannot_be_inspected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        inspect(tmp_path / "nowhere")
    with pytest.raises(UnsupportedError, match="looks like a layer's linear"):
        inspect(model(tmp_path / "m", {"lm_head": dense(2, 4)}), expect="2:4")


def fp8(folder: Path, scale: torch.Tensor | None, weight: torch.Tensor | None = None) -> Path:
    """An FP8 checkpoint of one linear, 2:4 unless `weight` is given."""
    codes = pruned(4, 32, 2, 4, torch.float8_e4m3fn) if weight is None else weight
    config = {"model_type": "llama", "quantization_config": {"quant_method": "compressed-tensors"}}
    make(folder, config=config)
    tensors = {f"{NAME}.weight": codes} | ({} if scale is None else {f"{NAME}.weight_scale": scale})
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("shape", [(4, 1), (4,), (1,), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sound_scales(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    scale = torch.linspace(0.5, 2, math.prod(shape)).reshape(shape).to(dtype)
    found = inspect(fp8(tmp_path / "m", scale), expect="2:4,fp8,0.5")
    report = found.linears[0]
    assert report.scale is not None
    assert (report.scale.least, report.scale.largest) == (float(scale.min()), float(scale.max()))
    assert (report.scale.bad, report.scale.fault, report.scale.shape) == (0, None, shape)
    assert (found.ok, found.expect, found.failures) == (True, "2:4,fp8,0.5", ())
    assert report.nbytes == report.nbytes_dense == 4 * 32 + scale.nbytes
    assert found.totals.dtypes == {"F8_E4M3": 1}


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_bad_scales(tmp_path: Path, bad: float) -> None:
    scale = torch.tensor([[1.0], [bad], [3.0], [bad]])
    found = inspect(fp8(tmp_path / "m", scale), expect="2:4")
    assert found.failures == (f"{NAME}: row 1: its scale is {bad:g} (2 bad ones in all)",)
    assert found.linears[0].scale is not None and found.linears[0].scale.bad == found.totals.bad_scales == 2
    json.dumps(found.to_json(), allow_nan=False)


def test_one_bad_scale_for_all_rows(tmp_path: Path) -> None:
    found = inspect(fp8(tmp_path / "m", torch.tensor(0.0)), expect="2:4")
    assert found.failures == (f"{NAME}: row 0: its scale is 0 (1 bad ones in all)",)
    assert found.totals.bad_scales == 1
    assert "1 bad scales" in inspection_table(found)


@pytest.mark.parametrize("against", [False, True])
def test_the_table_is_readable_at_120_columns(tmp_path: Path, against: bool) -> None:
    """Names and shapes of a 70B model, whose weights a hole in the file stands for."""
    name, shape = "model.layers.79.self_attn.o_proj", (28672, 8192)
    size = math.prod(shape)
    header = {
        f"{name}.weight": entry("F8_E4M3", list(shape), 0, size),
        f"{name}.weight_scale": entry("BF16", [shape[0], 1], size, size + 2 * shape[0]),
    }
    folder = make(tmp_path / "m")
    with (folder / "model.safetensors").open("wb") as file:
        file.write(shard_bytes(header))
        file.seek(size - 2, 1)
        file.write(b"\x01\x00" + b"\x80\x3f" * shape[0])
    found = inspect(folder, against=folder if against else None)
    lines = inspection_table(found).splitlines()[:3]
    assert len(lines[2]) > 80 and max(map(len, lines)) <= 120
    assert ("scales" in lines[0], "kept changed" in lines[0]) == (not against, against)


@pytest.mark.parametrize(
    ("scale", "why"),
    [
        (torch.ones(2, 1), r"the shape \[2, 1\]; 4 rows need"),
        (torch.ones(4, 2), r"the shape \[4, 2\]"),
        (torch.ones(1, 32), r"the shape \[1, 32\]"),
        (torch.ones(4, 1, dtype=torch.int32), "is I32"),
    ],
)
def test_scales_that_do_not_fit(tmp_path: Path, scale: torch.Tensor, why: str) -> None:
    found = inspect(fp8(tmp_path / "m", scale), expect="2:4")
    assert len(found.failures) == 1 and re.search(why, found.failures[0])
    assert found.totals.bad_scales == 1
    assert inspect(tmp_path / "m").failures == ()


def test_expecting_fp8(tmp_path: Path) -> None:
    assert "without a weight_scale" in inspect(fp8(tmp_path / "a", None), expect=["2:4", "fp8"]).failures[0]
    assert inspect(fp8(tmp_path / "a", None), expect="2:4").ok
    assert one(tmp_path / "b", pruned(2, 8, 2, 4), "FP8")[1] == (f"{NAME}: is BF16, not F8_E4M3",)
    negative = pruned(4, 32, 2, 4, torch.float8_e4m3fn)
    negative[1, int((negative[1].float() == 0).nonzero()[0])] = -0.0
    assert ": -0.0 (1 in all)" in inspect(fp8(tmp_path / "c", torch.ones(4, 1), negative), expect="fp8").failures[0]


def bits_of(weight: torch.Tensor) -> np.ndarray[Any, Any]:
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[weight.element_size()]
    return weight.contiguous().view(torch.uint8).numpy().view(unsigned).reshape(weight.shape)


def packed_parts(name: str, weight: torch.Tensor, layout: str) -> dict[str, torch.Tensor]:
    """What a packed checkpoint holds in place of `weight`."""
    bits = bits_of(weight)
    values, mask = pack_rows(bits, layout == TWO_FOUR)
    kept = torch.from_numpy(values.copy().view(np.uint8)).view(weight.dtype)
    parts = {"compressed": kept.reshape(len(weight), -1) if layout == TWO_FOUR else kept}
    parts |= {"bitmask": torch.from_numpy(mask), "shape": torch.tensor(weight.shape)}
    if layout == BITMASK:
        counts = (bits != 0).sum(1)
        parts["row_offsets"] = torch.from_numpy(np.cumsum(counts) - counts)
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_packed_checkpoints_are_counted_as_dense_ones(tmp_path: Path, layout: str, dtype: torch.dtype) -> None:
    weight = pruned(48, 1024, 2, 4, dtype)
    weight[3, (weight[3].float() != 0).nonzero().flatten()[5:7]] = -0.0
    if layout == BITMASK:
        weight[1, :] = 1
    scale = {f"{NAME}.weight_scale": torch.ones(48, 1)} if dtype == torch.float8_e4m3fn else {}
    for folder in ("dense", "packed"):
        make(tmp_path / folder)
    save_file({f"{NAME}.weight": weight} | scale, tmp_path / "dense" / "model.safetensors")
    parts = packed_parts(NAME, weight, layout)
    save_file(parts | scale, tmp_path / "packed" / "model.safetensors")
    want, found = inspect(tmp_path / "dense", expect="2:4"), inspect(tmp_path / "packed", expect="2:4")
    assert found.failures == want.failures
    report = found.linears[0]
    assert report.packed == layout
    assert report.nbytes == (report.nbytes_two_four if layout == TWO_FOUR else report.nbytes_bitmask)
    assert report.nbytes == sum(part.nbytes for part in (parts | scale).values())
    assert replace(report, packed=None, nbytes=want.linears[0].nbytes) == want.linears[0]
    assert (found.totals.packed, found.totals.nbytes_dense) == (1, want.totals.nbytes)
    assert "1 of 1 linears packed; all dense: " in inspection_table(found)
    assert inspect(tmp_path / "packed", against=tmp_path / "dense").linears[0].difference.status == "equal"  # type: ignore[union-attr]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_of_packing_are_what_packing_takes(tmp_path: Path, layout: str) -> None:
    """Sparse enough to gain, and the linears that would not gain stay."""
    first = pruned(64, 256, 2, 4) if layout == TWO_FOUR else pruned(64, 256, 3, 8)
    folder = model(tmp_path / "m", {"layers.0.a": first, "layers.0.b": dense(64, 256)})
    found = inspect(folder)
    a, b = found.linears
    assert found.totals.layout == layout
    assert a.nbytes_packed(layout) == sum(part.nbytes for part in packed_parts("a", first, layout).values())
    assert b.nbytes_packed(layout) == b.nbytes == 2 * 64 * 256
    assert found.totals.nbytes_packed == a.nbytes_packed(layout) + b.nbytes
    assert (a.nbytes_two_four is None) == (layout == BITMASK)
    told = json.loads(json.dumps(found.to_json()))
    assert told["linears"][0]["nbytes_packed"] == a.nbytes_packed(layout)
    assert inspect(folder, only="b$").totals.layout is None


def test_packing_goes_along_stored_rows_and_by_bits(tmp_path: Path) -> None:
    name = "transformer.h.0.mlp.c_fc"
    along_inputs = pruned(64, 96, 2, 4)
    (report,) = inspect(model(tmp_path / "a", {name: along_inputs.T}, {"model_type": "gpt2"})).linears
    assert report.pattern == "2:4" and report.nbytes_two_four is not None  # neighbouring rows differ by one place
    along_outputs = torch.zeros(64, 96, dtype=torch.bfloat16)
    along_outputs[:, :48] = 1
    (report,) = inspect(model(tmp_path / "b", {name: along_outputs.T}, {"model_type": "gpt2"})).linears
    assert report.nbytes_two_four is None
    weight = pruned(64, 96, 2, 4)
    weight[5, 8:12] = torch.tensor([1.0, -0.0, 1.0, 0.0])  # three with a bit set
    (report,) = inspect(model(tmp_path / "c", {NAME: weight})).linears
    assert (report.pattern, report.nbytes_two_four) == ("2:4", None)


def test_totals_and_json(tmp_path: Path) -> None:
    sparse, half = pruned(2, 32, 2, 4), dense(4, 32)
    half[0, 0], half[0, 1], half[0, 2] = -0.0, math.nan, math.inf
    folder = model(tmp_path / "m", {"layers.0.a": sparse, "layers.1.a": sparse.clone(), "layers.1.b": half})
    seen: list[LinearReport] = []
    found = inspect(str(folder), on_linear=seen.append)
    assert tuple(seen) == found.linears
    totals = found.totals
    assert (totals.linears, totals.weights, totals.zeros) == (3, 256, 65)
    assert (totals.negative_zeros, totals.nans, totals.infs) == (1, 1, 1)
    assert totals.sparsity == 65 / 256
    assert totals.patterns == {"2:4": 2, "none": 1}
    told = json.loads(json.dumps(found.to_json()))
    assert (told["format"], told["version"], told["ok"]) == ("streamprune-inspection", 2, None)
    assert told["linears"][0]["sparsity"] == 0.5
    assert told["totals"]["patterns"] == {"2:4": 2, "none": 1}
    assert len(told["linears"]) == 3


def test_unaligned_weights(tmp_path: Path) -> None:
    weight = pruned(2, 8, 2, 4)
    data = b"!" + weight.view(torch.uint8).numpy().tobytes()
    header = {"pad": entry("U8", [1], 0, 1), f"{NAME}.weight": entry("BF16", [2, 8], 1, 33)}
    for shift in (0, 1):
        content = shard_bytes(json.dumps(header).encode() + b" " * shift, data)
        folder = make(tmp_path / "m", {"model.safetensors": content})
        (report,) = inspect(folder, expect="2:4").linears
        assert (report.zeros, report.pattern) == (8, "2:4")


if sys.platform == "linux":

    def test_memory_stays_flat(tmp_path: Path) -> None:
        rows, inputs = 16 * 1024, 4096  # 128 MiB of bf16
        content = shard_bytes({f"{NAME}.weight": entry("BF16", [rows, inputs], 0, 2 * rows * inputs)})
        folder = make(tmp_path / "m")
        with (folder / "model.safetensors").open("wb") as file:
            file.write(content)
            file.truncate(len(content) + 2 * rows * inputs)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = status("VmRSS")
        assert inspect(folder).totals.zeros == rows * inputs
        assert status("VmHWM") - before < 48 * 2**20

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


@pytest.mark.parametrize(("kind", "transposed"), [("granitemoe", False), ("gpt_oss", True)])
def test_experts_of_one_tensor(tmp_path: Path, kind: str, transposed: bool) -> None:
    """Each is a linear, along its inputs, wherever they lie; all of a layer share a line of the table."""
    name = "model.layers.0.mlp.experts.gate_up_proj"
    weight = torch.randn(3, 8, 16).to(torch.bfloat16)
    weight.view(3, 2, 4, 16)[:, :, :2] = 0 if transposed else weight.view(3, 2, 4, 16)[:, :, :2]
    if not transposed:
        weight.view(3, 8, 4, 4)[..., :2] = 0
    weight[1, 3, 3] = 0
    for folder, values in {"pruned": weight, "source": weight * 2}.items():
        (tmp_path / folder).mkdir()
        other = {"model.layers.0.self_attn.q_proj.weight": torch.ones(4, 8)}
        save_file({name: values.contiguous(), **other}, tmp_path / folder / "model.safetensors")
        (tmp_path / folder / "config.json").write_text(json.dumps({"model_type": kind}))
    found = inspect(tmp_path / "pruned", against=tmp_path / "source", expect="2:4", only="experts")
    assert [n.name for n in found.linears] == [name.replace("gate", f"{e}.gate") for e in range(3)]
    assert all((n.pattern, n.transposed, n.shape) == ("2:4", transposed, (8, 16)) for n in found.linears)
    assert found.ok and {n.difference.kept_changed for n in found.linears if n.difference} == {64, 63}
    assert found.totals.layout == ("sparse-bitmask" if transposed else "sparse-24-bitmask")
    assert name.replace("gate", "*.gate") + " (3)" in inspection_table(found)
    wrong = inspect(tmp_path / "pruned", expect="2:4")
    assert not wrong.ok and all("q_proj" in failure for failure in wrong.failures)
