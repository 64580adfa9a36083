"""Writes a safetensors shard as a stream: the header from what is known beforehand, then tensor after tensor.

The format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON header
padded with spaces to a multiple of 8, then the tensors' bytes without gaps. Tensors are ordered like the
safetensors library orders them, by falling item size and then by name, so every one of them is aligned; FP8 weights
come before their scales, which are known last.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamprune.disk.durable import AtomicFile, Buffer, replace_file
from streamprune.disk.header import DTYPE_BITS, TensorRef
from streamprune.process.background import BackgroundWorker

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

    `content(tensor)` yields the tensor's bytes in pieces; names, dtypes and shapes are those of `tensors`. It is asked
    for an FP8 weight before it is asked for the weight's scale. `metadata`
    is {"format": "pt"} unless given. One thread produces pieces while another hashes and writes them, PIECES_AHEAD of
    them at most in between. `written(tensor, begin, end)` is called, in the writing thread, when those bytes of a
    tensor have been handed to the system and their buffer is free again.

    Raises ValueError when a tensor's pieces do not add up to its size (nothing is left behind then), and what
    durable.AtomicFile raises.
    """
    ordered = in_order(tensors)
    return fill_in_order(path, header_of(ordered, metadata or {"format": "pt"}), ordered, content, written)


def fill_in_order(
    path: Path,
    header: bytes,
    ordered: Iterable[TensorRef],
    content: Callable[[TensorRef], Iterable[Buffer]],
    written: Callable[[TensorRef, int, int], None] | None = None,
) -> AtomicFile:
    """As fill_shard, for a header that is there already, with its 8 bytes of length, and tensors in its order."""
    file = AtomicFile(path)

    def write(piece: tuple[TensorRef, int, Buffer]) -> None:
        tensor, begin, data = piece
        file.write(data)
        if written is not None:
            written(tensor, begin, begin + memoryview(data).nbytes)

    try:
        file.write(header)
        with BackgroundWorker(write, PIECES_AHEAD) as behind:
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


def in_order(tensors: Iterable[TensorRef]) -> list[TensorRef]:
    """Tensors as they lie in a shard, each at a multiple of its item size.

    Raises ValueError for an FP8 weight with an odd number of bytes in all, after which its scale would not be.
    """
    refs = {t.name: t for t in tensors}
    scales = [name for name in refs if (weight := name.removesuffix("_scale")) in refs and _is_fp8(refs[weight], name)]
    weights = [name.removesuffix("_scale") for name in scales]
    for name, scale in zip(weights, scales, strict=True):
        if refs[name].nbytes * 8 % DTYPE_BITS[refs[scale].dtype]:
            raise ValueError(f"{name}: {refs[name].nbytes} bytes, which no scale of {refs[scale].dtype} can follow")
    late = {*weights, *scales}
    rest = sorted(refs.keys() - late, key=lambda n: (-DTYPE_BITS[refs[n].dtype], n))
    wide = [n for n in rest if DTYPE_BITS[refs[n].dtype] > 8]
    narrow = rest[len(wide) :]
    return [refs[n] for n in (*wide, *sorted(weights), *sorted(scales), *narrow)]


def _is_fp8(weight: TensorRef, scale: str) -> bool:
    return scale != weight.name and weight.dtype == "F8_E4M3"


def header_of(tensors: Iterable[TensorRef], metadata: Mapping[str, str]) -> bytes:
    """The header of a shard that holds `tensors` in this order, with the 8 bytes of length before it."""
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
