"""How groups of tensors are put into shards, from names, dtypes and shapes alone."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamprune.disk.header import DTYPE_BITS, TensorRef
from streamprune.disk.shards import arrange

DTYPES = ("F64", "F32", "BF16", "U8")


def ref(name: str, dtype: str, *shape: int) -> TensorRef:
    return TensorRef(name, "source", dtype, shape, 0, math.prod(shape) * DTYPE_BITS[dtype] // 8)


GROUPS = st.lists(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(0, 9)), min_size=1, max_size=4), min_size=1, max_size=6
)


@given(GROUPS, st.one_of(st.none(), st.integers(1, 300)))
def test_every_tensor_has_an_aligned_place(groups: list[list[tuple[str, int]]], limit: int | None) -> None:
    """Parts and tensors follow each other without gaps, as the header says; shards are as large as they may be."""
    made = [[ref(f"{i}.{n}", dtype, size) for n, (dtype, size) in enumerate(group)] for i, group in enumerate(groups)]
    parts = arrange(made, limit)
    assert [{t.name for t in part.tensors} for part in parts] == [{t.name for t in group} for group in made]
    for i, part in enumerate(parts):
        first = i == 0 or parts[i - 1].is_last
        assert bool(part.header) == first and (part.begin == 0) == first
        assert first or (part.begin, part.name) == (parts[i - 1].end, parts[i - 1].name)
        at = part.begin + len(part.header)
        for tensor in part.tensors:
            assert tensor.begin == at and tensor.begin % (DTYPE_BITS[tensor.dtype] // 8) == 0
            assert tensor.shard == part.name
            at = tensor.end
        assert at == part.end
    assert parts[-1].is_last
    shards = {part.name: [p for p in parts if p.name == part.name] for part in parts}
    for members in shards.values():
        header = json.loads(members[0].header[8:])
        data = len(members[0].header)
        for tensor in (t for part in members for t in part.tensors):
            assert header[tensor.name]["data_offsets"] == [tensor.begin - data, tensor.end - data]
        held = sum(t.nbytes for part in members for t in part.tensors)
        assert (limit is None and len(members) == 1) or (limit is not None and (len(members) == 1 or held <= limit))


@pytest.mark.parametrize(("limit", "names"), [(None, 3), (1, 3), (10**6, 1)])
def test_an_odd_tensor_does_not_cut_a_shard(limit: int | None, names: int) -> None:
    """A layer with a scalar in bf16 leaves the next one aligned to two bytes, which is enough for bf16."""
    layers = [[ref(f"{i}.scale", "BF16", 1), ref(f"{i}.weight", "BF16", 4, 4)] for i in range(3)]
    parts = arrange(layers, limit)
    assert len({part.name for part in parts}) == names
    assert (parts[0].name == "model.safetensors") == (names == 1)


def test_a_wider_dtype_cuts_it_where_it_must() -> None:
    parts = arrange([[ref("a", "BF16", 1)], [ref("b", "F32", 1)]], 10**6)
    assert [part.name for part in parts] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
