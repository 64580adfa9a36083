"""What packing a checkpoint would come to: one pass over its bytes, in the order of its files.

Counts what is kept in each row of the layers' linears, sees whether they hold 2:4, and hashes the shards as they are,
so that `unpack` can tell that it restores them. From this follows which linears are packed, and how.
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
from streamprune.disk.linears import find_linears
from streamprune.disk.mapping import ShardMaps
from streamprune.disk.packed import BITMASK, TWO_FOUR, packed_refs
from streamprune.errors import CheckpointError, UnsupportedError
from streamprune.methods.bitmask import count_kept, holds_24
from streamprune.packing.rows import pieces, rows_of
from streamprune.process.memory import format_bytes

COUNT = np.dtype("<u4")
"""What is kept of a row, in the file of counts."""


@dataclass(frozen=True)
class Survey:
    """What is packed, and how; goes into `job.json`."""

    layout: str
    kept: dict[str, int]
    """Packed tensors by name, in the order of the files, and their nonzeros."""
    rows_before: dict[str, int]
    """Where their rows begin in the file of counts."""
    shards: dict[str, dict[str, Any]]
    """Of each source shard: bytes, xxh3_128."""
    counts: str
    """xxh3_128 of the file of counts."""
    sparsity: float
    """Share of zeros in the linears that are packed."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Linear:
    ref: TensorRef
    kept: int
    rows_before: int
    two_four: bool

    def saves(self, layout: str) -> int:
        """Bytes that packing saves; negative where it costs some."""
        if layout == TWO_FOUR and not self.two_four:
            return -1
        return self.ref.nbytes - sum(part.nbytes for part in packed_refs(self.ref, layout, self.kept))


def survey(checkpoint: Checkpoint, maps: ShardMaps, counts: Path, layout: str) -> Survey:
    """Reads a checkpoint once. `layout` is one of LAYOUTS, or "auto"; the file `counts` gets uint32 (rows,) of all
    linears, one after the other.

    "auto" is sparse-24-bitmask when all linears that sparse-bitmask would make smaller hold 2:4, else sparse-bitmask.

    Raises:
        UnsupportedError: nothing would become smaller.
        CheckpointError: the checkpoint cannot be read, or changes meanwhile.
    """
    linears: list[_Linear] = []
    shards = {}
    chosen = {ref.name for ref in find_linears(checkpoint).values()}
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


def source_header(checkpoint: Checkpoint, shard: str) -> bytes:
    """The first bytes of a shard, as they were when the checkpoint was opened. Raises CheckpointError."""
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
            f"{checkpoint.path}: {what}; none of them would become smaller as {layout}: there is nothing to pack, "
            "prune it first"
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
