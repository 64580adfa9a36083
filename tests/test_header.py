"""Headers: each way to be malformed is one clear error, and fuzzed files never end in another exception."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from checkpoint_files import DATA, GOOD, JSON, ONE, entry, make, refused, shard_bytes
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamprune.disk.checkpoint import open_checkpoint
from streamprune.disk.header import DTYPE_BITS, MAX_HEADER_BYTES
from streamprune.errors import CheckpointError


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_every_dtype_of_the_format(tmp_path: Path, dtype: str) -> None:
    nbytes = 8 * DTYPE_BITS[dtype] // 8
    header = {"t": entry(dtype, [2, 4], 0, nbytes)}
    folder = make(tmp_path / "m", {"model.safetensors": shard_bytes(header, bytes(nbytes))})
    assert open_checkpoint(folder).tensors["t"].nbytes == nbytes


MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "byte 0"),
    "seven bytes": (b"\0" * 7, "byte 7"),
    "header too long": (struct.pack("<Q", MAX_HEADER_BYTES + 1), str(MAX_HEADER_BYTES + 1)),
    "header of 2**63": (struct.pack("<Q", 2**63) + b"{}", str(2**63)),
    "header past the end": (struct.pack("<Q", 100) + b"{}", "byte 108"),
    "empty header": (shard_bytes(b""), "byte 8"),
    "not UTF-8": (shard_bytes(b'{"\xff": 1}'), "byte 2 is not UTF-8"),
    "not JSON": (shard_bytes(b"{nonsense}"), "the header is malformed"),
    "cut JSON": (shard_bytes(b'{"a":{"dtype":'), "the header is malformed"),
    "rest after JSON": (shard_bytes(b"{} {}"), "the header is malformed"),
    "zero padding": (shard_bytes(b"{}\0\0"), "the header is malformed"),
    "an array": (shard_bytes(b"[]"), "byte 8"),
    "a blank first": (shard_bytes(b" {}"), "byte 8"),
    "deep nesting": (shard_bytes(b'{"a":' * 100_000), "nested"),
    "huge integer": (shard_bytes(b'{"a":' + b"9" * 5000 + b"}"), "the header is malformed"),
    "no tensors": (shard_bytes({}), "holds no tensors"),
    "metadata only": (shard_bytes({"__metadata__": {"format": "pt"}}), "holds no tensors"),
    "metadata a list": (shard_bytes({"__metadata__": [], "a": ONE}, b"x"), "__metadata__"),
    "metadata numbers": (shard_bytes({"__metadata__": {"k": 1}, "a": ONE}, b"x"), "__metadata__"),
    "twice the name": (
        shard_bytes(b'{"a":%s,"a":%s}' % ((json.dumps(ONE).encode(),) * 2), b"x"),
        "a occurs twice",
    ),
    "twice the dtype": (
        shard_bytes(b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"x"),
        "dtype occurs twice",
    ),
    "surrogate name": (shard_bytes(b'{"\\ud800":%s}' % json.dumps(ONE).encode(), b"x"), "\\ud800"),
    "empty name": (shard_bytes({"": ONE}, b"x"), "name is empty"),
    "newline in name": (shard_bytes({"a\nb": entry("U8", [2], 0, 1)}, b"x"), "a\\nb"),
    "entry a number": (shard_bytes({"a": 1}), "not an object"),
    "no dtype": (shard_bytes({"a": {"shape": [1], "data_offsets": [0, 1]}}, b"x"), "dtype None"),
    "unknown dtype": (shard_bytes({"a": entry("F12", [1], 0, 1)}, b"x"), "F12"),
    "dtype a list": (shard_bytes({"a": entry(["U8"], [1], 0, 1)}, b"x"), "dtype"),  # type: ignore[arg-type]
    "no shape": (shard_bytes({"a": {"dtype": "U8", "data_offsets": [0, 1]}}, b"x"), "shape None"),
    "negative size": (shard_bytes({"a": entry("U8", [-1, -1], 0, 1)}, b"x"), "shape"),
    "float size": (shard_bytes({"a": entry("U8", [1.0], 0, 1)}, b"x"), "shape"),
    "true as size": (shard_bytes({"a": entry("U8", [True], 0, 1)}, b"x"), "shape"),
    "NaN as size": (shard_bytes({"a": entry("U8", [float("nan")], 0, 1)}, b"x"), "shape"),
    "size of 2**64": (shard_bytes({"a": entry("U8", [2**64], 0, 1)}, b"x"), "shape"),
    "sizes that overflow": (shard_bytes({"a": entry("F32", [2**62] * 60, 0, 4)}, b"xxxx"), "takes"),
    "65 axes": (shard_bytes({"a": entry("U8", [1] * 65, 0, 1)}, b"x"), "shape"),
    "no offsets": (shard_bytes({"a": {"dtype": "U8", "shape": [1]}}, b"x"), "data_offsets None"),
    "one offset": (
        shard_bytes({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}, b"x"),
        "data_offsets",
    ),
    "negative offset": (shard_bytes({"a": entry("U8", [1], -1, 0)}, b"x"), "data_offsets"),
    "false as offset": (shard_bytes({"a": entry("U8", [1], False, 1)}, b"x"), "data_offsets"),
    "offsets swapped": (shard_bytes({"a": entry("U8", [1], 1, 0)}, b"x"), "1 to 0"),
    "too few bytes": (shard_bytes({"a": entry("F32", [2], 0, 4)}, b"xxxx"), "takes 8 bytes"),
    "half a byte": (shard_bytes({"a": entry("F4", [3], 0, 2)}, b"xx"), "takes 2 bytes"),
    "a hole first": (shard_bytes({"a": entry("U8", [1], 1, 2)}, b"xx"), "a gap"),
    "a hole": (shard_bytes({"a": ONE, "b": entry("U8", [1], 2, 3)}, b"xxx"), "a gap"),
    "an overlap": (
        shard_bytes({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"xxx"),
        "an overlap",
    ),
    "the same bytes": (shard_bytes({"a": ONE, "b": ONE}, b"x"), "an overlap"),
    "truncated": (shard_bytes(GOOD, DATA[:-1]), f"end at byte {len(shard_bytes(GOOD, DATA))}"),
    "rest after data": (shard_bytes(GOOD, DATA + b"!"), f"end at byte {len(shard_bytes(GOOD, DATA))}"),
}


@pytest.mark.parametrize("case", sorted(MALFORMED))
def test_malformed_shard(tmp_path: Path, case: str) -> None:
    content, needle = MALFORMED[case]
    refused(make(tmp_path / "m", {"model.safetensors": content}), "model.safetensors", needle)


BASE = shard_bytes({"__metadata__": {"format": "pt"}, **GOOD}, DATA)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(BASE) - 1), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(-3, 3),
)
@example([(8, 0x20)], 0)
def test_fuzzed_bytes_give_a_checkpoint_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], longer: int
) -> None:
    content = bytearray(BASE[: len(BASE) + longer] if longer < 0 else BASE + bytes(longer))
    for at, value in changes:
        content[min(at, len(content) - 1)] = value
    folder = make(tmp_path_factory.getbasetemp() / "fuzz", {"model.safetensors": bytes(content)})
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError as error:
        assert len(str(error).splitlines()) == 1
        str(error).encode()
    else:
        assert sum(ref.nbytes for ref in checkpoint.tensors.values()) == 19 + longer
        assert all(ref.end <= len(content) for ref in checkpoint.tensors.values())


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=3) | st.just("__metadata__"),
        JSON | st.fixed_dictionaries({"dtype": st.just("U8") | JSON, "shape": JSON, "data_offsets": JSON}),
        max_size=3,
    )
)
def test_fuzzed_headers_give_a_checkpoint_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, object]
) -> None:
    folder = make(tmp_path_factory.getbasetemp() / "fuzz", {"model.safetensors": shard_bytes(header, b"x")})
    try:
        open_checkpoint(folder)
    except CheckpointError as error:
        assert len(str(error).splitlines()) == 1
        str(error).encode()
