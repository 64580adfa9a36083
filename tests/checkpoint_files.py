"""Small checkpoints for tests, sound and not, written by hand; and what every refusal must look like."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from streamprune.disk.checkpoint import open_checkpoint
from streamprune.errors import CheckpointError, StreampruneError


def entry(dtype: str, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def shard_bytes(header: object, data: bytes = b"") -> bytes:
    """A safetensors file of any header: bytes as they are, else as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


GOOD = {"a": entry("F32", [2, 2], 0, 16), "b": entry("U8", [3], 16, 19)}
DATA = bytes(range(19))
ONE = entry("U8", [1], 0, 1)

# any JSON value
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def make(folder: Path, shards: dict[str, bytes] | None = None, **files: object) -> Path:
    """A checkpoint folder; `files` maps config / index to JSON content."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (shards or {"model.safetensors": shard_bytes(GOOD, DATA)}).items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps(files.get("config", {"model_type": "llama"})))
    if "index" in files:
        (folder / "model.safetensors.index.json").write_text(json.dumps(files["index"]))
    return folder


def refused(folder: Path, *needles: str, kind: type[StreampruneError] = CheckpointError) -> str:
    with pytest.raises(StreampruneError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert len(message.splitlines()) == 1
    message.encode()
    for needle in needles:
        assert needle in message
    return message
