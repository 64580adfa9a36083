"""Writes a safetensors shard as a stream: the header first, then one tensor after the other.

The format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON header
padded with spaces to a multiple of 8, then the tensors' bytes without gaps. Tensors are in the order of the
safetensors library, by decreasing item size and then by name, so that all are aligned; except that FP8 weights come
before their scales, which are not known before the weights are quantised.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from streamprune.disk.durable import AtomicFile, Buffer, FilePart, replace_file
from streamprune.disk.header import DTYPE_BITS, TensorRef
from streamprune.process.background import BackgroundWorker

PIECES_AHEAD = 2
"""Number of pieces that may be queued for the writing thread."""


File = TypeVar("File", AtomicFile, FilePart)

_METADATA = {"format": "pt"}


@dataclass(frozen=True)
class Part:
    """Where a group of tensors lies in a shard: `tensors` in their order, from byte `begin` on.

    The first part of a shard begins with its `header`. `begin` and `end` are bytes of the file `name`.
    """

    name: str
    begin: int
    header: bytes
    tensors: tuple[TensorRef, ...]
    """With their places in the shard."""
    is_last: bool

    @property
    def end(self) -> int:
        return self.begin + len(self.header) + sum(ref.nbytes for ref in self.tensors)


def arrange(groups: Sequence[Iterable[TensorRef]], shard_bytes: int | None) -> list[Part]:
    """Puts groups of tensors into shards, one part a group, in their order.

    A shard holds as many groups as fit into `shard_bytes` of tensors, and one at least; with None, one. A shard also
    ends where the next group would not be aligned. Raises ValueError as `in_order`.
    """
    ordered = [in_order(group) for group in groups]
    sizes = [sum(ref.nbytes for ref in group) for group in ordered]
    shards: list[list[int]] = []
    held = 0
    for number, size in enumerate(sizes):
        widest = max((DTYPE_BITS[ref.dtype] // 8 for ref in ordered[number]), default=1)
        fits = shard_bytes is not None and held + size <= shard_bytes and held % max(1, widest) == 0
        if not shards or not fits:
            shards.append([])
            held = 0
        shards[-1].append(number)
        held += size
    whole = shard_bytes is not None and len(shards) == 1
    parts: list[Part] = []
    for n, members in enumerate(shards, 1):
        name = "model.safetensors" if whole else shard_name(n, len(shards))
        parts += _parts(name, [ordered[number] for number in members])
    return parts


def _parts(name: str, groups: Sequence[Sequence[TensorRef]]) -> Iterator[Part]:
    header = header_of([ref for group in groups for ref in group], _METADATA)
    at = 0
    for i, group in enumerate(groups):
        begin, own = at, b"" if i else header
        at += len(own)
        placed = []
        for ref in group:
            placed.append(replace(ref, shard=name, begin=at, end=at + ref.nbytes))
            at += ref.nbytes
        yield Part(name, begin, own, tuple(placed), i == len(groups) - 1)


@dataclass(frozen=True)
class ShardSummary:
    """A written shard: name, size in bytes and xxh3_128 of the file."""

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
    """Streams one shard to `path`, atomically and durably. Arguments and errors as `fill_shard`."""
    with fill_shard(path, tensors, content, metadata, written) as file:
        return ShardSummary(path.name, file.size, file.digest)


def fill_shard(
    path: Path,
    tensors: Iterable[TensorRef],
    content: Callable[[TensorRef], Iterable[Buffer]],
    metadata: Mapping[str, str] | None = None,
    written: Callable[[TensorRef, int, int], None] | None = None,
) -> AtomicFile:
    """Streams one shard to a temporary file; the caller commits or abandons it.

    `content(tensor)` yields the tensor's bytes in pieces; it is called for an FP8 weight before it is called for the
    weight's scale. `metadata` is {"format": "pt"} by default. The caller's thread produces pieces while another thread
    hashes and writes them, with at most PIECES_AHEAD pieces queued. `written(tensor, begin, end)` is called in the
    writing thread when these bytes of a tensor have been written and their buffer may be reused.

    Raises ValueError if a tensor's pieces do not add up to its size (nothing is left behind then), and what
    durable.AtomicFile raises.
    """
    ordered = in_order(tensors)
    return fill_in_order(AtomicFile(path), header_of(ordered, metadata or _METADATA), ordered, content, written)


def fill_in_order(
    file: File,
    header: bytes,
    ordered: Iterable[TensorRef],
    content: Callable[[TensorRef], Iterable[Buffer]],
    written: Callable[[TensorRef, int, int], None] | None = None,
) -> File:
    """As fill_shard, for a file that is open, a header that is there already and tensors in its order.

    The header has its 8 bytes of length; it is empty for a part that does not begin its file.
    """

    def write(piece: tuple[TensorRef, int, Buffer]) -> None:
        tensor, begin, data = piece
        file.write(data)
        if written is not None:
            written(tensor, begin, begin + memoryview(data).nbytes)

    try:
        file.write(header)
        with BackgroundWorker(write, PIECES_AHEAD) as writer:
            for tensor in ordered:
                size = 0
                for data in content(tensor):
                    writer.put((tensor, size, data))
                    size += memoryview(data).nbytes
                if size != tensor.nbytes:
                    raise ValueError(f"{tensor.name}: {size} bytes written, {tensor.nbytes} announced")
    except BaseException:
        file.abandon()
        raise
    return file


def in_order(tensors: Iterable[TensorRef]) -> list[TensorRef]:
    """Tensors in the order in which a shard stores them, each at a multiple of its item size.

    Raises ValueError for an FP8 weight whose size would leave the scale behind it unaligned.
    """
    refs = {t.name: t for t in tensors}
    scales = [name for name in refs if (weight := name.removesuffix("_scale")) in refs and _is_fp8(refs[weight], name)]
    weights = [name.removesuffix("_scale") for name in scales]
    for name, scale in zip(weights, scales, strict=True):
        if refs[name].nbytes * 8 % DTYPE_BITS[refs[scale].dtype]:
            raise ValueError(f"{name}: a scale of {refs[scale].dtype} is not aligned after {refs[name].nbytes} bytes")
    late = {*weights, *scales}
    rest = sorted(refs.keys() - late, key=lambda n: (-DTYPE_BITS[refs[n].dtype], n))
    wide = [n for n in rest if DTYPE_BITS[refs[n].dtype] > 8]
    narrow = rest[len(wide) :]
    return [refs[n] for n in (*wide, *sorted(weights), *sorted(scales), *narrow)]


def _is_fp8(weight: TensorRef, scale: str) -> bool:
    return scale != weight.name and weight.dtype == "F8_E4M3"


def header_of(tensors: Iterable[TensorRef], metadata: Mapping[str, str]) -> bytes:
    """The header of a shard with `tensors` in this order, preceded by its 8 bytes of length."""
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
    """Writes an index (`model.safetensors.index.json`) as transformers does; returns its xxh3_128."""
    index = {
        "metadata": {**metadata, "total_size": total_size},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return replace_file(path, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
