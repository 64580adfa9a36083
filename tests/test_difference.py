"""`inspect --against`: what differs from the source, and by how much, is what a plain computation on tensors finds."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import entry, make, shard_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from streamprune.cli import main
from streamprune.errors import CheckpointError, UsageError
from streamprune.inspection import count as inspection_count
from streamprune.inspection import difference
from streamprune.inspection import stored as stored_tensors
from streamprune.inspection.difference import LinearDifference
from streamprune.inspection.inspect import inspect
from streamprune.methods.bitmask import pack_rows
from streamprune.tables import inspection_table

NAME = "model.layers.0.mlp.up_proj"
WEIGHT = f"{NAME}.weight"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def model(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    make(folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def weights(rows: int, inputs: int, seed: int = 0, zeros: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, inputs, generator=generator)
    values[torch.rand(rows, inputs, generator=generator) < zeros] = 0
    return values


def one(tmp_path: Path, mine: Mapping[str, torch.Tensor], source: Mapping[str, torch.Tensor]) -> LinearDifference:
    found = inspect(model(tmp_path / "mine", mine), against=model(tmp_path / "source", source))
    assert len(found.linears) == 1
    difference = found.linears[0].difference
    assert difference is not None and found.against is not None
    assert found.against.relative_error == difference.relative_error
    return difference


def check(found: LinearDifference, mine: torch.Tensor, source: torch.Tensor) -> None:
    """Against float64 tensors of the values."""
    assert found.kept_changed == int(((mine != source) & (mine != 0)).sum())
    assert found.revived == int(((mine != 0) & (source == 0)).sum())
    norm = float(source.norm())
    error = float((mine - source).norm())
    if error == 0 or norm == 0:
        assert found.relative_error == (0.0 if error == 0 else None)
    else:
        assert found.relative_error == pytest.approx(error / norm, rel=1e-6)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.integers(1, 40), st.integers(1, 70), st.integers(0, 2**31))
def test_values_of_all_dtypes(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: torch.dtype,
    source_dtype: torch.dtype,
    rows: int,
    inputs: int,
    seed: int,
) -> None:
    source = weights(rows, inputs, seed, 0.2).to(source_dtype)
    mine = source.double()
    generator = torch.Generator().manual_seed(seed)
    mine[torch.rand(mine.shape, generator=generator) < 0.5] = 0
    noisy = torch.rand(mine.shape, generator=generator) < 0.1
    mine = torch.where(noisy, mine + 0.25, mine).to(dtype)
    found = one(tmp_path_factory.getbasetemp() / "all", {WEIGHT: mine}, {WEIGHT: source})
    check(found, mine.double(), source.double())
    same = dtype == source_dtype and bool((mine.view(torch.uint8) == source.view(torch.uint8)).all())
    assert found.status == ("equal" if same else "changed")


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e30])
@pytest.mark.parametrize("rows", [1, 48, 700])
def test_bf16_by_the_compiled_loop(tmp_path: Path, rows: int, scale: float) -> None:
    """Whole lanes, runs that do not fill a block, and numbers whose squares float32 does not hold."""
    source = (weights(rows, 112, seed=rows, zeros=0.1) * scale).bfloat16()
    mine = source.where(weights(rows, 112, seed=1) < 0.5, (source.float() * 1.25 + 0.01 * scale).bfloat16())
    mine[weights(rows, 112, seed=2) < 0] = 0
    check(one(tmp_path, {WEIGHT: mine}, {WEIGHT: source}), mine.double(), source.double())


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(37, 1), (37,), ()])
def test_fp8_is_compared_dequantised(tmp_path: Path, scale_dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    source = weights(37, 96, 3).bfloat16()
    scale = (weights(math.prod(shape), 1, 4).abs() + 0.01).reshape(shape).to(scale_dtype)
    wide = scale.float() if not shape else scale.float().reshape(37, 1)
    codes = (source.float() / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
    codes = (codes.float() + 0.0).to(torch.float8_e4m3fn)  # no -0.0
    found = one(tmp_path, {WEIGHT: codes, f"{WEIGHT}_scale": scale}, {WEIGHT: source})
    check(found, (codes.float() * wide).double(), source.double())
    assert found.status == "changed" and found.source_dtype == "BF16"
    report = inspect(tmp_path / "mine", against=tmp_path / "source", expect="fp8")
    assert report.ok and report.against is not None
    assert dict(report.against.tensors) == {WEIGHT: "changed"}  # the scale is no tensor of its own


def test_between_two_fp8_checkpoints(tmp_path: Path) -> None:
    codes, scale = weights(6, 32).to(torch.float8_e4m3fn), torch.rand(6, 1) + 0.5
    same = {WEIGHT: codes, f"{WEIGHT}_scale": scale}
    assert one(tmp_path, same, same).status == "equal"
    other = scale.clone()
    other[2] *= 2
    found = one(tmp_path, same, {WEIGHT: codes, f"{WEIGHT}_scale": other})
    check(found, (codes.float() * scale).double(), (codes.float() * other).double())
    assert found.status == "changed" and found.kept_changed == int((codes[2].float() != 0).sum())
    check(
        one(tmp_path, same, {WEIGHT: codes, f"{WEIGHT}_scale": scale.flatten()}),
        (codes.float() * scale).double(),
        (codes.float() * scale).double(),
    )


def test_scales_that_do_not_fit_make_no_figures(tmp_path: Path) -> None:
    codes = weights(6, 32).to(torch.float8_e4m3fn)
    found = one(tmp_path, {WEIGHT: codes, f"{WEIGHT}_scale": torch.ones(3, 1)}, {WEIGHT: weights(6, 32)})
    assert found == LinearDifference("changed", "F32", None, None, None, None)
    assert found.relative_error is None
    told = inspect(tmp_path / "mine", against=tmp_path / "source")
    json.dumps(told.to_json(), allow_nan=False)
    assert " - " in inspection_table(told)


def packed(weight: torch.Tensor, two_four: bool) -> dict[str, torch.Tensor]:
    bits = weight.view(torch.int16).numpy().view(np.uint16)
    values, mask = pack_rows(bits, two_four)
    kept = torch.from_numpy(values.copy().view(np.int16)).view(weight.dtype)
    parts = {f"{NAME}.compressed": kept.reshape(len(weight), -1) if two_four else kept}
    parts |= {f"{NAME}.bitmask": torch.from_numpy(mask), f"{NAME}.shape": torch.tensor(weight.shape)}
    if not two_four:
        counts = (bits != 0).sum(1)
        parts[f"{NAME}.row_offsets"] = torch.from_numpy(np.cumsum(counts) - counts)
    return parts


@pytest.mark.parametrize("two_four", [True, False])
def test_packed_against_dense_and_back(tmp_path: Path, two_four: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_tensors, "_UNPACKED_BYTES", 1000)  # neither rows nor blocks divide it
    source = weights(70, 64, 5).bfloat16()
    mine = source.reshape(70, 16, 4).clone()
    mine[..., :2] = 0
    mine = mine.reshape(70, 64)
    mine[3, 2] = 7
    for a, b in ((packed(mine, two_four), {WEIGHT: source}), ({WEIGHT: source}, packed(mine, two_four))):
        pair = (mine, source) if f"{NAME}.shape" in a else (source, mine)
        found = one(tmp_path, a, b)
        check(found, pair[0].double(), pair[1].double())
        assert found.status == "changed"
    found = one(tmp_path, packed(mine, two_four), {WEIGHT: mine})
    assert (found.status, found.relative_error, found.kept_changed) == ("equal", 0.0, 0)


def test_packed_tensors_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    weight = weights(8, 64).bfloat16()
    weight[:, ::2] = 0
    parts = packed(weight, False)
    parts[f"{NAME}.compressed"] = torch.cat([parts[f"{NAME}.compressed"], torch.ones(1, dtype=torch.bfloat16)])
    with pytest.raises(CheckpointError, match="values"):
        one(tmp_path, {WEIGHT: weight}, parts)
    with pytest.raises(CheckpointError, match="values"):
        one(tmp_path, parts, {WEIGHT: weight})


def test_zeros_nan_and_overflow(tmp_path: Path) -> None:
    nothing, some = torch.zeros(2, 8), torch.ones(2, 8)
    found = one(tmp_path, {WEIGHT: some}, {WEIGHT: nothing})
    assert (found.relative_error, found.revived, found.kept_changed) == (None, 16, 16)
    found = one(tmp_path, {WEIGHT: nothing}, {WEIGHT: some})
    assert (found.relative_error, found.revived, found.kept_changed) == (1.0, 0, 0)
    found = one(tmp_path, {WEIGHT: -nothing}, {WEIGHT: nothing})
    assert (found.status, found.relative_error, found.kept_changed) == ("changed", 0.0, 0)
    broken = some.clone()
    broken[0, 0] = math.nan
    assert one(tmp_path, {WEIGHT: broken}, {WEIGHT: broken}).status == "equal"
    found = one(tmp_path, {WEIGHT: broken}, {WEIGHT: some})
    assert (found.relative_error, found.kept_changed) == (None, 1)
    json.dumps(inspect(tmp_path / "mine", against=tmp_path / "source").to_json(), allow_nan=False)
    big = torch.full((2, 8), 3e38)
    assert one(tmp_path, {WEIGHT: -big}, {WEIGHT: big}).relative_error is None  # 6e38 is no float32


REST = {
    "model.norm.weight": torch.arange(40.0),
    "model.embed_tokens.weight": torch.ones(10, 4),
    "model.bias": torch.tensor(3),
    "model.empty": torch.empty(0, 4),
    "model.flags": torch.tensor([True, False, True]),
}


def test_status_of_every_tensor(tmp_path: Path) -> None:
    source = {
        **REST,
        WEIGHT: weights(4, 32),
        "model.layers.1.fc.weight": weights(4, 32),
        "lm_head.weight": weights(3, 8),
    }
    mine = dict(source)
    assert set(statuses(tmp_path, mine, source).values()) == {"equal"}
    mine["model.norm.weight"] = REST["model.norm.weight"].clone()
    mine["model.norm.weight"][39] = 1
    mine["model.flags"] = REST["model.flags"].to(torch.uint8)
    mine["model.embed_tokens.weight"] = torch.ones(4, 10)
    mine[WEIGHT] = mine[WEIGHT].bfloat16()
    mine["model.layers.1.fc.weight"] = weights(4, 16)
    mine["new"] = torch.ones(1)
    del mine["lm_head.weight"]
    found = statuses(tmp_path, mine, source)
    assert found == {
        **dict.fromkeys(("model.bias", "model.empty"), "equal"),
        "model.norm.weight": "changed", "model.flags": "other dtype", "model.embed_tokens.weight": "other shape",
        WEIGHT: "changed", "model.layers.1.fc.weight": "other shape", "new": "extra", "lm_head.weight": "missing",
    }  # fmt: skip
    report = inspect(tmp_path / "mine", against=tmp_path / "source")
    assert report.ok is None and report.failures == ()
    told = json.loads(json.dumps(report.to_json(), allow_nan=False))["against"]
    assert (told["tensors"], told["equal"], told["linears_changed"], len(told["amiss"])) == (9, 2, 1, 6)
    text = inspection_table(report)
    assert "of 9 tensors 2 equal, 1 linears changed" in text
    assert "  changed, but no linear: model.norm.weight\n" in text
    assert "  missing: lm_head.weight\n" in text


def statuses(tmp_path: Path, mine: Mapping[str, torch.Tensor], source: Mapping[str, torch.Tensor]) -> dict[str, str]:
    found = inspect(model(tmp_path / "mine", mine), against=model(tmp_path / "source", source))
    assert found.against is not None
    return dict(found.against.tensors)


def test_a_change_in_the_first_block_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(difference, "_ITEMS", 1)
    monkeypatch.setattr(difference, "_BLOCK_BYTES", 4)
    source = {WEIGHT: weights(4, 32), "model.norm.weight": torch.ones(40)}
    mine = {name: tensor.clone() for name, tensor in source.items()}
    for tensor in mine.values():
        tensor.view(-1)[0] += 1
    assert set(statuses(tmp_path, mine, source).values()) == {"changed"}


def test_scales_of_tensors_that_are_no_linears_count_too(tmp_path: Path) -> None:
    codes = weights(6, 32).to(torch.float8_e4m3fn)
    source = {WEIGHT: weights(4, 32), "lm_head.weight": codes, "lm_head.weight_scale": torch.ones(6, 1)}
    assert set(statuses(tmp_path, source, source).values()) == {"equal"}
    other = {**source, "lm_head.weight_scale": torch.full((6, 1), 2.0)}
    assert statuses(tmp_path, other, source) == {WEIGHT: "equal", "lm_head.weight": "changed"}


def test_expect_and_against_together(tmp_path: Path) -> None:
    source = {**REST, WEIGHT: weights(4, 32)}
    half = weights(4, 32)
    half.view(-1, 4)[:, 1:3] = 0

    def failures(**other: torch.Tensor | None) -> tuple[str, ...]:
        mine = {name: t for name, t in {**source, WEIGHT: half, **other}.items() if t is not None}
        found = inspect(model(tmp_path / "mine", mine), against=model(tmp_path / "source", source), expect="2:4")
        assert found.ok == (not found.failures)
        assert inspect(tmp_path / "mine", expect="2:4").ok
        return found.failures

    where = f"compared with {tmp_path / 'source'}"
    assert failures() == ()
    assert failures(**{"model.bias": torch.tensor(4)}) == (f"model.bias: changed, {where}",)
    assert failures(**{"model.bias": torch.tensor(3.0)}) == (f"model.bias: other dtype, {where}",)
    assert failures(**{"model.bias": None}) == (f"model.bias: missing, {where}",)
    assert failures(**{f"{NAME}.bias": torch.ones(4)}) == (f"{NAME}.bias: extra, {where}",)
    assert failures(**{f"{WEIGHT}_scale": torch.ones(4)}) == (f"{WEIGHT}_scale: extra, {where}",)  # of no FP8 linear
    assert failures(**{"layers.9.fc.weight": half.clone()}) == (f"layers.9.fc.weight: extra, {where}",)


def test_linears_left_out_are_not_compared(tmp_path: Path) -> None:
    names = ("layers.0.a", "layers.0.b", "layers.1.a")
    source = {f"{name}.weight": weights(4, 32) for name in names} | {"norm": torch.ones(3)}
    mine = {name: torch.zeros_like(t) for name, t in source.items()} | {"norm": torch.ones(3)}
    model(tmp_path / "mine", mine), model(tmp_path / "source", source)
    found = inspect(tmp_path / "mine", against=tmp_path / "source", only="a$", expect="0.5")
    assert found.ok and found.against is not None
    assert dict(found.against.tensors) == {
        "layers.0.a.weight": "changed", "layers.1.a.weight": "changed", "norm": "equal",
    }  # fmt: skip


def test_blocks_and_chunks_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = {WEIGHT: weights(61, 33, 1).half(), "embed": weights(50, 7), "odd": torch.arange(5, dtype=torch.uint8)}
    mine = {**source, WEIGHT: weights(61, 33, 1, 0.5)}
    model(tmp_path / "mine", mine), model(tmp_path / "source", source)
    whole = inspect(tmp_path / "mine", against=tmp_path / "source")
    for block, items, chunk in ((1, 1, 8), (1000, 100, 1001 * 8), (2**18, 70, 64)):
        monkeypatch.setattr(inspection_count, "_BLOCK_BYTES", block)
        monkeypatch.setattr(difference, "_BLOCK_BYTES", block)
        monkeypatch.setattr(difference, "_ITEMS", items)
        monkeypatch.setattr(stored_tensors, "_CHUNK_BYTES", chunk)
        found = inspect(tmp_path / "mine", against=tmp_path / "source")
        assert found.against is not None and whole.against is not None
        assert dict(found.against.tensors) == dict(whole.against.tensors)
        a, b = found.linears[0].difference, whole.linears[0].difference
        assert a is not None and b is not None
        assert (a.kept_changed, a.revived, a.status) == (b.kept_changed, b.revived, b.status)
        assert a.relative_error == pytest.approx(b.relative_error, rel=1e-12)


def test_a_source_that_cannot_be_read(tmp_path: Path) -> None:
    model(tmp_path / "mine", {WEIGHT: weights(4, 32)})
    with pytest.raises(CheckpointError, match="no such folder"):
        inspect(tmp_path / "mine", against=tmp_path / "nowhere")
    with pytest.raises(UsageError):
        inspect(tmp_path / "mine", against=tmp_path / "nowhere", expect="2:4,3:4")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = {WEIGHT: weights(4, 32), "norm": torch.ones(3)}
    half = weights(4, 32)
    half.view(-1, 4)[:, 1:3] = 0
    a, b = str(model(tmp_path / "mine", {**source, WEIGHT: half})), str(model(tmp_path / "source", source))
    assert main(["inspect", a, "--against", b, "--expect", "2:4", "--expect", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "kept changed" in out and "rel. error" in out and out.endswith("expected 2:4,0.5: yes\n")
    assert "revived" not in out and max(map(len, out.splitlines()[:4])) <= 120
    assert main(["inspect", a, "--against", b]) == 0
    model(tmp_path / "mine", {WEIGHT: half})
    assert main(["inspect", a, "--against", b]) == 0
    capsys.readouterr()
    assert main(["inspect", a, "--against", b, "--expect", "2:4", "--json"]) == 2
    shown = capsys.readouterr()
    assert json.loads(shown.out)["against"]["amiss"] == {"norm": "missing"}
    assert shown.err == f"streamprune: norm: missing, compared with {b}\n"


if sys.platform == "linux":

    def test_memory_stays_flat(tmp_path: Path) -> None:
        """Two sparse files of 128 MiB each, one tensor of them no linear."""
        rows, inputs = 8 * 1024, 4096
        size = 2 * rows * inputs
        header = {
            WEIGHT: entry("BF16", [rows, inputs], 0, size),
            "embed": entry("BF16", [rows, inputs], size, 2 * size),
        }
        for name in ("mine", "source"):
            folder = make(tmp_path / name)
            content = shard_bytes(header)
            with (folder / "model.safetensors").open("wb") as file:
                file.write(content)
                file.truncate(len(content) + 2 * size)
        inspect(model(tmp_path / "small", {WEIGHT: weights(4, 32)}), against=tmp_path / "small")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = status("VmRSS")
        found = inspect(tmp_path / "mine", against=tmp_path / "source")
        assert found.against is not None and set(found.against.tensors.values()) == {"equal"}
        assert status("VmHWM") - before < 64 * 2**20

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))
