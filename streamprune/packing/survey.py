"""The survey before packing: one pass over the bytes of a checkpoint, in file order.

It counts the nonzeros of each row of the layers' linears and fused experts, checks whether they satisfy 2:4, and hashes
the shards, so that `unpack` can verify what it restores. From the counts follows what is packed, and in which layout.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.durable import AtomicFile
from streamprune.disk.header import TensorRef, header_prefix, read_header
from streamprune.disk.linears import expert_names, find_linears
from streamprune.disk.mapping import ShardMaps
from streamprune.disk.packed import BITMASK, TWO_FOUR, dense_name, packed_refs
from streamprune.errors import CheckpointError, UnsupportedError
from streamprune.methods.bitmask import count_kept, holds_24
from streamprune.packing.rows import pieces, rows_of
from streamprune.process.memory import format_bytes

COUNT = np.dtype("<u4")
"""Dtype of the file of counts: nonzeros of a row."""


@dataclass(frozen=True)
class Survey:
    """Which tensors are packed, and how; stored in `job.json`."""

    layout: str
    kept: dict[str, int]
    """Nonzeros of each packed tensor, by name, in file order."""
    rows_before: dict[str, int]
    """Index of each tensor's first row in the file of counts."""
    shards: dict[str, dict[str, Any]]
    """{bytes, xxh3_128} of each source shard."""
    counts: str
    """xxh3_128 of the file of counts."""
    sparsity: float
    """Fraction of zeros in the packed linears."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Linear:
    ref: TensorRef
    kept: int
    rows_before: int
    two_four: bool

    def saves(self, layout: str) -> int:
        """Bytes that packing saves; negative if the packed form is larger."""
        if layout == TWO_FOUR and not self.two_four:
            return -1
        return self.ref.nbytes - sum(part.nbytes for part in packed_refs(self.ref, layout, self.kept))


def survey(checkpoint: Checkpoint, maps: ShardMaps, counts: Path, layout: str) -> Survey:
    """Reads a checkpoint once, and writes the nonzeros of each row to the file `counts`: uint32 (rows,) per linear.

    `layout` is one of LAYOUTS, or "auto": sparse-24-bitmask if all linears that sparse-bitmask would make smaller
    satisfy 2:4, else sparse-bitmask.

    Raises:
        UnsupportedError: nothing would become smaller.
        CheckpointError: the checkpoint cannot be read, or changes while it is read.
    """
    linears: list[_Linear] = []
    shards = {}
    chosen = {ref.name for ref in find_linears(checkpoint).values()}
    chosen |= {name for name, ref in checkpoint.tensors.items() if can_be_packed(checkpoint, ref)}
    with AtomicFile(counts, reread=True) as file:
        for shard in checkpoint.shards:
            digest = xxhash.xxh3_128(source_header(checkpoint, shard))
            for ref in checkpoint.tensors.values():
                if ref.shard != shard:
                    continue
                if ref.name in chosen:
                    linears.append(_count(maps, ref, file, digest))
                else:
                    for piece in pieces(maps, ref):
                        digest.update(piece)
            shards[shard] = {"bytes": checkpoint.shard_stats[shard][0], "xxh3_128": digest.hexdigest()}
    return _decide(checkpoint, linears, shards, layout, file.digest)


def can_be_packed(checkpoint: Checkpoint, ref: TensorRef) -> bool:
    """Whether a tensor of fused experts can be packed: `unpack` must find its name again."""
    fused = len(ref.shape) == 3 and bool(expert_names(checkpoint, ref))
    return fused and dense_name(ref.name.removesuffix(".weight"), ref.shape) == ref.name


def source_header(checkpoint: Checkpoint, shard: str) -> bytes:
    """The header of a shard with its length; raises CheckpointError if it has changed since the checkpoint was
    opened."""
    header = read_header(checkpoint.path / shard)
    whole = header_prefix(header) + header
    if xxhash.xxh3_128_hexdigest(whole) != checkpoint.shard_headers[shard]:
        raise CheckpointError(
            f"{checkpoint.path / shard}: has changed since it was opened; start again when nothing else writes to it"
        )
    return whole


def _count(maps: ShardMaps, ref: TensorRef, counts: AtomicFile, digest: Any) -> _Linear:
    before, total, two_four = counts.size // COUNT.itemsize, 0, True
    for bits in rows_of(maps, ref):
        digest.update(bits.reshape(-1).view(np.uint8).data)
        kept = count_kept(bits)
        counts.write(kept.astype(COUNT).tobytes())
        total += int(kept.sum())
        two_four = two_four and holds_24(bits)
    return _Linear(ref, total, before, two_four)


def _decide(
    checkpoint: Checkpoint, linears: list[_Linear], shards: dict[str, dict[str, Any]], layout: str, counts: str
) -> Survey:
    if layout == "auto":
        worth = [n.two_four for n in linears if n.saves(BITMASK) > 0]
        layout = TWO_FOUR if worth and all(worth) else BITMASK
    smaller = [n for n in linears if n.saves(layout) > 0]
    if not smaller:
        size = format_bytes(sum(n.ref.nbytes for n in linears))
        zeros = sum(math.prod(n.ref.shape) - n.kept for n in linears)
        share = 100 * zeros / max(1, sum(math.prod(n.ref.shape) for n in linears))
        what = f"{len(linears)} linears ({size}) have {share:.1f} % zeros" if linears else "no linears were found"
        raise UnsupportedError(
            f"{checkpoint.path}: {what}; none of them would become smaller as {layout}, so there is nothing to "
            "pack; prune it first"
        )
    weights = sum(math.prod(n.ref.shape) for n in smaller)
    return Survey(
        layout=layout,
        kept={n.ref.name: n.kept for n in smaller},
        rows_before={n.ref.name: n.rows_before for n in smaller},
        shards=shards,
        counts=counts,
        sparsity=1 - sum(n.kept for n in smaller) / weights,
    )
