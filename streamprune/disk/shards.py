"""Writes a safetensors shard as a stream: the header from what is known beforehand, then tensor after tensor.

The format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON header
padded with spaces to a multiple of 8, then the tensors' bytes without gaps. Tensors are ordered like the
safetensors library orders them, by falling item size and then by name, so every one of them is aligned.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamprune.disk.behind import Behind
from streamprune.disk.durable import AtomicFile, Buffer, replace_file
from streamprune.disk.header import TensorRef

ITEM_BITS = {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32}
"""Bits an item of the dtypes wider than 16; the rest follow by name."""


PIECES_AHEAD = 2
"""Pieces that may wait to be written."""


@dataclass(frozen=True)
class ShardSummary:
    """What was written: file name, bytes of the file, its xxh3_128."""

    name: str
    nbytes: int
    digest: str


def shard_name(number: int, total: int) -> str:
    """`model-00007-of-00034.safetensors`; number counts from 1."""
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def write_shard(
    path: Path,
    tensors: Iterable[TensorRef],
    content: Callable[[TensorRef], Iterable[Buffer]],
    metadata: Mapping[str, str] | None = None,
    written: Callable[[TensorRef, int, int], None] | None = None,
) -> ShardSummary:
    """Streams one shard to `path`, atomically and durably. Arguments and errors as for `fill_shard`."""
    with fill_shard(path, tensors, content, metadata, written) as file:
        return ShardSummary(path.name, file.size, file.digest)


def fill_shard(
    path: Path,
    tensors: Iterable[TensorRef],
    content: Callable[[TensorRef], Iterable[Buffer]],
    metadata: Mapping[str, str] | None = None,
    written: Callable[[TensorRef, int, int], None] | None = None,
) -> AtomicFile:
    """Streams one shard to a temporary file, complete but for its commit: the caller commits or abandons it.

    `content(tensor)` yields the tensor's bytes in pieces; names, dtypes and shapes are those of `tensors`. `metadata`
    is {"format": "pt"} unless given. One thread produces pieces while another hashes and writes them, PIECES_AHEAD of
    them at most in between. `written(tensor, begin, end)` is called, in the writing thread, when those bytes of a
    tensor have been handed to the system and their buffer is free again.

    Raises ValueError when a tensor's pieces do not add up to its size (nothing is left behind then), and what
    durable.AtomicFile raises.
    """
    ordered = sorted(tensors, key=lambda t: (-ITEM_BITS.get(t.dtype, 16), t.name))
    file = AtomicFile(path)

    def write(piece: tuple[TensorRef, int, Buffer]) -> None:
        tensor, begin, data = piece
        file.write(data)
        if written is not None:
            written(tensor, begin, begin + memoryview(data).nbytes)

    try:
        file.write(_header(ordered, metadata or {"format": "pt"}))
        with Behind(write, PIECES_AHEAD) as behind:
            for tensor in ordered:
                size = 0
                for data in content(tensor):
                    behind.put((tensor, size, data))
                    size += memoryview(data).nbytes
                if size != tensor.nbytes:
                    raise ValueError(f"{tensor.name}: {size} bytes written, {tensor.nbytes} announced")
    except BaseException:
        file.abandon()
        raise
    return file


def _header(tensors: Iterable[TensorRef], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for t in tensors:
        header[t.name] = {
            "dtype": t.dtype,
            "shape": list(t.shape),
            "data_offsets": [offset, offset + t.nbytes],
        }
        offset += t.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_index(path: Path, metadata: Mapping[str, Any], total_size: int, weight_map: Mapping[str, str]) -> str:
    """Writes `model.safetensors.index.json` as transformers does; returns its xxh3_128."""
    index = {
        "metadata": {**metadata, "total_size": total_size},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return replace_file(path, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
