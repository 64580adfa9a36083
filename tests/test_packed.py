"""Packed tensors: rows to nonzeros and back against a slow reference, and parts that do not fit are refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import entry, make, shard_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from streamprune.disk.checkpoint import Checkpoint, open_checkpoint
from streamprune.disk.header import TensorRef
from streamprune.disk.mapping import ShardMaps
from streamprune.disk.packed import BITMASK, TWO_FOUR, find_packed, is_packed, packed_refs
from streamprune.errors import CheckpointError
from streamprune.methods.bitmask import count_kept, holds_24, pack_rows, unpack_rows
from streamprune.packing.rows import unpacked_rows

UNSIGNED = [np.uint8, np.uint16, np.uint32, np.uint64]
NAME = "model.layers.0.mlp.up_proj"


def sparse(rows: int, width: int, dtype: Any, share: float, seed: int = 0) -> Any:
    """Random bits of which `share` stay; among them are ones with the highest bit alone, as -0.0 has."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(1, np.iinfo(dtype).max, (rows, width), dtype, endpoint=True)
    bits[rng.random(bits.shape) < 0.1] = 1 << (8 * bits.itemsize - 1)
    return bits * (rng.random(bits.shape) < share).astype(dtype)


def two_four(rows: int, width: int, dtype: Any, seed: int = 0) -> Any:
    """Random bits with at most two of four, and sometimes fewer."""
    bits = sparse(rows, width, dtype, 0.9, seed).reshape(-1, 4)
    order = np.argsort(np.random.default_rng(seed).random(bits.shape), axis=1)[:, :2]
    np.put_along_axis(bits, order, 0, axis=1)
    return bits.reshape(rows, width)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(UNSIGNED), st.integers(1, 9), st.integers(1, 70), st.sampled_from([0, 0.02, 0.5, 1]),
    st.integers(0, 99),
)  # fmt: skip
def test_rows_go_to_nonzeros_and_back(dtype: Any, rows: int, width: int, share: float, seed: int) -> None:
    bits = sparse(rows, width, dtype, share, seed)
    before = bits.copy()
    values, mask = pack_rows(bits, False)
    assert np.array_equal(values, bits[bits != 0]) and values.dtype == dtype
    assert np.array_equal(mask, np.packbits(bits != 0, axis=1, bitorder="little"))
    assert np.array_equal(count_kept(bits), (bits != 0).sum(1))
    found = unpack_rows(values, mask, width)
    assert np.array_equal(found, bits) and found.dtype == dtype
    assert np.array_equal(bits, before)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(UNSIGNED), st.integers(1, 9), st.integers(1, 20), st.integers(0, 99))
def test_two_of_four_and_back(dtype: Any, rows: int, groups: int, seed: int) -> None:
    bits = two_four(rows, 4 * groups, dtype, seed)
    kept = np.zeros(bits.shape, bool)
    for row, line in zip(bits, kept, strict=True):  # nonzeros, then the zeros with the lowest numbers
        for g in range(0, 4 * groups, 4):
            order = sorted(range(4), key=lambda j, row=row, g=g: (row[g + j] == 0, j))  # type: ignore[misc]
            line[[g + j for j in order[:2]]] = True
    values, mask = pack_rows(bits, True)
    assert np.array_equal(values, bits[kept]) and values.size == bits.size // 2
    assert np.array_equal(mask, np.packbits(kept, axis=1, bitorder="little"))
    assert np.array_equal(unpack_rows(values, mask, 4 * groups), bits)
    assert holds_24(bits)


@pytest.mark.parametrize("dtype", UNSIGNED)
def test_what_does_not_hold_two_four(dtype: Any) -> None:
    bits = two_four(3, 16, dtype)
    bits[1, 8:12] = [1, 0, 2, 3]
    assert not holds_24(bits)
    with pytest.raises(ValueError, match="2:4"):
        pack_rows(bits, True)
    odd = np.zeros((3, 6), dtype)  # no groups of four
    assert not holds_24(odd)
    with pytest.raises(ValueError, match="2:4"):
        pack_rows(odd, True)
    across = np.zeros((1, 8), dtype)
    across[0, 2:6] = 1  # four in a row, but two of each group
    assert holds_24(across)


def test_slices_are_packed_as_copies_are() -> None:
    whole = sparse(10, 40, np.uint16, 0.5)
    for part in (whole[::2], whole[:, 3:30], whole.T):
        for found, wanted in zip(pack_rows(part, False), pack_rows(part.copy(), False), strict=True):
            assert np.array_equal(found, wanted)


def test_values_must_fit_the_bitmask() -> None:
    values, mask = pack_rows(sparse(4, 13, np.uint16, 0.5), False)
    for wrong in (values[:-1], np.append(values, values[:1])):
        with pytest.raises(ValueError, match="do not fit"):
            unpack_rows(wrong, mask, 13)
    mask = mask.copy()
    mask[2, -1] |= 1 << 5
    with pytest.raises(ValueError, match="beyond column 12"):
        unpack_rows(values, mask, 13)
    for width in (8, 17):
        with pytest.raises(ValueError, match=f"2 bytes a row for {width} columns"):
            unpack_rows(values, mask, width)


# ---- on disk

DTYPES = {"U8": np.uint8, "I64": np.int64, "I32": np.int32, "U16": np.uint16, "BF16": np.uint16, "F32": np.uint32}


def parts_of(bits: Any, dtype: str = "BF16", layout: str = BITMASK, **changes: Any) -> dict[str, Any]:
    """Tensors (dtype, array) of one packed matrix; `changes` replace or (None) remove parts."""
    values, mask = pack_rows(bits.reshape(-1, bits.shape[-1]), layout == TWO_FOUR)
    mask = mask.reshape(*bits.shape[:-1], -1)
    shape = np.array(bits.shape, np.int64)
    parts: dict[str, Any] = {"compressed": (dtype, values), "bitmask": ("U8", mask), "shape": ("I64", shape)}
    if layout == TWO_FOUR:
        parts["compressed"] = (dtype, values.reshape(bits.shape[0], -1))
        parts["shape"] = ("I64", shape.reshape(-1, 1))
    else:
        parts["row_offsets"] = ("I64", np.zeros(bits.shape[:-1], np.int64))  # of no importance
    parts |= changes
    return {f"{NAME}.{part}": value for part, value in parts.items() if value is not None}


def write(folder: Path, *shards: Mapping[str, tuple[str, Any]]) -> Checkpoint:
    """A checkpoint with these tensors in these shards."""
    files, where = {}, {}
    for number, tensors in enumerate(shards):
        header, data = {}, b""
        for name, (dtype, array) in tensors.items():
            header[name] = entry(dtype, list(array.shape), len(data), len(data) + array.nbytes)
            data += array.tobytes()
            where[name] = f"model-{number}.safetensors"
        files[f"model-{number}.safetensors"] = shard_bytes(header, data)
    return open_checkpoint(make(folder, files, index={"weight_map": where}))


def unpacked(checkpoint: Checkpoint, chunk_bytes: int = 1 << 24) -> Any:
    """All rows of the one packed tensor of a checkpoint."""
    with ShardMaps(checkpoint) as maps:
        (packed,) = find_packed(checkpoint, maps).values()
        chunks = [(first, bits.copy()) for first, bits in unpacked_rows(maps, packed, chunk_bytes)]
    assert [first for first, _ in chunks] == list(np.cumsum([0, *(len(bits) for _, bits in chunks)])[:-1])
    return np.concatenate([bits for _, bits in chunks]).reshape(packed.shape)


@pytest.mark.parametrize("chunk", [1, 100, 1 << 24])
@pytest.mark.parametrize(("layout", "width"), [(TWO_FOUR, 12), (BITMASK, 13)])
def test_a_tensor_is_found_and_unpacked_in_chunks(tmp_path: Path, layout: str, width: int, chunk: int) -> None:
    bits = two_four(9, width, np.uint16) if layout == TWO_FOUR else sparse(9, width, np.uint16, 0.4)
    tensors = {**parts_of(bits, layout=layout), "other": ("U8", np.arange(3, dtype=np.uint8))}
    checkpoint = write(tmp_path / "c", tensors)
    assert is_packed(checkpoint)
    with ShardMaps(checkpoint) as maps:
        found = find_packed(checkpoint, maps)
    assert list(found) == [f"{NAME}.weight"]
    packed = found[f"{NAME}.weight"]
    assert (packed.layout, packed.dtype, packed.shape) == (layout, "BF16", (9, width))
    assert packed.dense_nbytes == bits.nbytes
    assert packed.nbytes == sum(a.nbytes for n, (_, a) in tensors.items() if n != "other")
    assert (packed.row_offsets is None) == (layout == TWO_FOUR)
    assert np.array_equal(unpacked(checkpoint, chunk), bits)


def test_parts_in_different_shards_at_odd_places(tmp_path: Path) -> None:
    bits = sparse(6, 11, np.uint32, 0.5)
    parts = list(parts_of(bits, "F32").items())
    odd = {"odd": ("U8", np.zeros(1, np.uint8))}
    checkpoint = write(tmp_path / "c", {**odd, **dict(parts[:1])}, dict(parts[1:2]), dict(parts[2:]))
    assert np.array_equal(unpacked(checkpoint), bits)


@pytest.mark.parametrize("shape", [(13,), (2, 3, 13), (1, 1, 2, 9)])
def test_tensors_of_any_rank(tmp_path: Path, shape: tuple[int, ...]) -> None:
    bits = sparse(int(np.prod(shape[:-1])), shape[-1], np.uint16, 0.5).reshape(shape)
    assert np.array_equal(unpacked(write(tmp_path / "c", parts_of(bits)), 20), bits)


@pytest.mark.parametrize(("dtype", "column"), [("I32", False), ("I32", True), ("U8", False), ("U16", True)])
def test_shapes_of_any_integer_dtype(tmp_path: Path, dtype: str, column: bool) -> None:
    bits = sparse(4, 10, np.uint16, 0.5)
    shape = np.array([4, 10], DTYPES[dtype]).reshape((-1, 1) if column else -1)
    assert np.array_equal(unpacked(write(tmp_path / "c", parts_of(bits, shape=(dtype, shape)))), bits)


def test_nothing_kept(tmp_path: Path) -> None:
    bits = np.zeros((5, 9), np.uint16)
    assert np.array_equal(unpacked(write(tmp_path / "c", parts_of(bits))), bits)


def test_a_dense_checkpoint_is_not_packed(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "c", {
        "a.weight": ("U8", np.ones((2, 2), np.uint8)), "b.shape": ("I64", np.array([2, 2])),
        "shape": ("I64", np.array([1])), "bitmask": ("U8", np.ones(1, np.uint8)),
    })  # fmt: skip
    assert not is_packed(checkpoint)
    with ShardMaps(checkpoint) as maps:
        assert find_packed(checkpoint, maps) == {}


def i64(*numbers: int) -> tuple[str, Any]:
    return "I64", np.array(numbers, np.int64)


BITS = sparse(6, 12, np.uint16, 0.5)
MALFORMED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no bitmask": ({"bitmask": None}, "compressed", "bitmask is missing"),
    "no values": ({"compressed": None}, "bitmask", "compressed is missing"),
    "no shape": ({"shape": None}, "compressed", "shape is missing"),
    "shape of floats": ({"shape": ("F32", np.array([6, 12], np.float32))}, "shape", "no shape"),
    "shape of none": ({"shape": i64()}, "shape", "no shape"),
    "shape of many": ({"shape": i64(*[1] * 9)}, "shape", "no shape"),
    "negative shape": ({"shape": i64(-6, -12)}, "shape", "no shape"),
    "empty shape": ({"shape": i64(0, 12), "bitmask": ("U8", np.zeros((0, 2), np.uint8))}, "shape", "no shape"),
    "huge shape": ({"shape": i64(2**40, 2**40)}, "shape", "no shape"),
    "another shape": ({"shape": i64(6, 20)}, "bitmask", "has U8 [6, 3]"),
    "rows missing": ({"bitmask": ("U8", np.zeros((5, 2), np.uint8))}, "bitmask", "has U8 [6, 2]"),
    "mask of another dtype": ({"bitmask": ("I8", np.zeros((6, 2), np.int8))}, "bitmask", "is I8"),
    "too many values": ({"compressed": ("BF16", np.ones(73, np.uint16))}, "compressed", "at most 72"),
    "2:4 with another number": ({"row_offsets": None}, "compressed", "sparse-24-bitmask of shape [6, 12] has 36"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_parts_that_do_not_fit(tmp_path: Path, name: str) -> None:
    changes, part, why = MALFORMED[name]
    checkpoint = write(tmp_path / "c", parts_of(BITS, **changes))
    assert is_packed(checkpoint)
    with ShardMaps(checkpoint) as maps, pytest.raises(CheckpointError) as caught:
        find_packed(checkpoint, maps)
    message = str(caught.value)
    assert why in message and f"{NAME}.{part}" in message and "model-0.safetensors" in message
    assert len(message.splitlines()) == 1


def test_dense_and_packed_at_once(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "c", {**parts_of(BITS), f"{NAME}.weight": ("BF16", BITS)})
    with ShardMaps(checkpoint) as maps, pytest.raises(CheckpointError, match="both dense and packed"):
        find_packed(checkpoint, maps)


@pytest.mark.parametrize("chunk", [24, 1 << 24])
@pytest.mark.parametrize("change", ["one value less", "one more", "a bit more", "a bit less", "a bit beyond"])
def test_bits_and_values_that_differ_in_number(tmp_path: Path, change: str, chunk: int) -> None:
    bits = sparse(6, 13, np.uint16, 0.5)
    bits[5, 0], bits[5, 1] = 0, 7
    values, mask = pack_rows(bits, False)
    mask = mask.copy()
    if change == "one value less":
        values = values[:-1]
    elif change == "one more":
        values = np.append(values, values[:1])
    elif change == "a bit beyond":
        mask[3, 1] |= 1 << 5
    else:
        mask[5, 0] ^= 1 if change == "a bit more" else 2
    checkpoint = write(tmp_path / "c", parts_of(bits, compressed=("BF16", values), bitmask=("U8", mask)))
    with pytest.raises(CheckpointError, match=r"model-0\.safetensors.*bitmask"):
        unpacked(checkpoint, chunk)


@pytest.mark.parametrize(("layout", "width"), [(TWO_FOUR, 12), (BITMASK, 13)])
def test_planned_parts_are_those_that_are_written(layout: str, width: int) -> None:
    bits = two_four(9, width, np.uint16) if layout == TWO_FOUR else sparse(9, width, np.uint16, 0.4)
    dense = TensorRef(f"{NAME}.weight", "a.safetensors", "BF16", bits.shape, 100, 100 + bits.nbytes)
    planned = packed_refs(dense, layout, int((bits != 0).sum()))
    wanted = parts_of(bits, layout=layout)
    assert {p.name: (p.dtype, p.shape, p.nbytes) for p in planned} == {
        name: (dtype, array.shape, array.nbytes) for name, (dtype, array) in wanted.items()
    }
