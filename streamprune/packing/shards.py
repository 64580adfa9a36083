"""Writing shards: packed ones, and from packed ones the original ones, or dense ones if the original is not
recorded."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import xxhash

from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.durable import AtomicFile, Buffer
from streamprune.disk.header import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    TensorRef,
    check_header,
    header_prefix,
    show,
)
from streamprune.disk.mapping import ShardMaps
from streamprune.disk.packed import TWO_FOUR, PackedTensor, packed_refs
from streamprune.disk.shards import fill_in_order, header_of
from streamprune.errors import CheckpointError, UnsupportedError
from streamprune.methods.bitmask import pack_rows
from streamprune.packing.rows import pieces, rows_of, unpacked_rows
from streamprune.packing.survey import COUNT, Survey, source_header

HEADER_KEY = "streamprune.header"
"""Key in the metadata of a packed shard: the JSON text of the source shard's header, with its padding."""

MASK_BYTES = 32 << 20
"""A bitmask up to this size is kept in memory until it is written; a larger one is computed a second time."""


class Packer:
    """Writes packed shards. `counts` is the survey's file with the nonzeros of each row."""

    def __init__(self, checkpoint: Checkpoint, maps: ShardMaps, survey: Survey, counts: Path) -> None:
        self._checkpoint, self._maps, self._survey, self._counts = checkpoint, maps, survey, counts
        self._two_four = survey.layout == TWO_FOUR
        self._masks: tuple[str, list[Buffer]] = "", []

    def parts(self, shard: str) -> list[TensorRef]:
        """The tensors of a packed shard in file order, with begin 0.

        Wide dtypes come first. A bitmask follows its values directly if its size keeps the next tensor aligned.
        """
        refs: list[TensorRef] = []
        after: dict[str, TensorRef] = {}
        for ref in self._checkpoint.tensors.values():
            if ref.shard != shard:
                continue
            if ref.name not in self._survey.kept:
                refs.append(replace(ref, begin=0, end=ref.nbytes))
                continue
            values, mask, *rest = packed_refs(ref, self._survey.layout, self._survey.kept[ref.name])
            refs += [values, *rest]
            if mask.nbytes * 8 % DTYPE_BITS[values.dtype] == 0:
                after[values.name] = mask
            else:
                refs.append(mask)
        refs.sort(key=lambda ref: (-DTYPE_BITS[ref.dtype], ref.name))
        return [part for ref in refs for part in (ref, after.get(ref.name)) if part is not None]

    def header(self, shard: str) -> bytes:
        """The header of a packed shard, with its length. Raises UnsupportedError if it exceeds the format's limit."""
        path = self._checkpoint.path / shard
        text = source_header(self._checkpoint, shard)[8:]
        _, metadata = check_header(path, text, self._checkpoint.shard_stats[shard][0])
        header = header_of(self.parts(shard), {**metadata, HEADER_KEY: text.decode()})
        if len(header) > MAX_HEADER_BYTES:
            raise UnsupportedError(
                f"{path}: its packed header would take {len(header)} bytes, the format allows {MAX_HEADER_BYTES}; "
                "spread the checkpoint over more shards"
            )
        return header

    def fill(self, path: Path, shard: str) -> AtomicFile:
        """Streams a packed shard to `path`; the caller commits it.

        Raises CheckpointError if the source cannot be read or has changed, and UnsupportedError as `header`.
        """
        parts = self.parts(shard)
        source = {f"{name.removesuffix('.weight')}.": name for name in self._survey.kept}
        tensors = self._checkpoint.tensors

        def content(part: TensorRef) -> Iterator[Buffer]:
            module, _, kind = part.name.rpartition(".")
            if part.name in tensors:
                yield from pieces(self._maps, tensors[part.name], release=False)
                return
            ref = tensors[source[f"{module}."]]
            if kind == "shape":
                yield np.array(ref.shape, "<i8").tobytes()
            elif kind == "row_offsets":
                yield from self._offsets(ref)
            else:
                yield from self._packed(ref, kind, part)

        return fill_in_order(AtomicFile(path), self.header(shard), parts, content, _release(self._maps, tensors))

    def _packed(self, ref: TensorRef, kind: str, part: TensorRef) -> Iterator[Buffer]:
        made_of, masks = self._masks
        self._masks = "", []
        if kind == "bitmask" and made_of == ref.name:
            yield from masks
            return
        keep = kind == "compressed" and math.prod(ref.shape[:-1]) * -(-ref.shape[-1] // 8) <= MASK_BYTES
        masks = []
        written = 0
        for bits in rows_of(self._maps, ref):
            values, mask = pack_rows(bits, self._two_four)
            piece = values.view(np.uint8).data if kind == "compressed" else mask.reshape(-1).data
            written += piece.nbytes
            if written > part.nbytes:
                break
            yield piece
            if keep:
                masks.append(mask.reshape(-1).data)
        if written != part.nbytes:
            raise CheckpointError(
                f"{self._checkpoint.path / ref.shard}: tensor {show(ref.name)} has changed since it was counted; start "
                "again with --restart when nothing else writes to it"
            )
        if keep:
            self._masks = ref.name, masks

    def _offsets(self, ref: TensorRef) -> Iterator[Buffer]:
        """The row offsets: nonzeros in all rows before each row, (rows,) int64."""
        with self._counts.open("rb") as f:
            f.seek(self._survey.rows_before[ref.name] * COUNT.itemsize)
            counts = np.frombuffer(f.read(math.prod(ref.shape[:-1]) * COUNT.itemsize), COUNT).astype(np.int64)
        yield (np.cumsum(counts) - counts).astype("<i8").tobytes()


@dataclass(frozen=True)
class Unpacker:
    """Writes unpacked shards of a packed checkpoint."""

    checkpoint: Checkpoint
    maps: ShardMaps
    packed: Mapping[str, PackedTensor]

    def restore(self, path: Path, shard: str, size: int) -> AtomicFile:
        """Streams the original shard of `size` bytes to `path`, by its recorded header; the caller commits it.

        Raises CheckpointError if the header is missing or malformed, or does not fit the tensors of the shard.
        """
        header, refs = self._original(shard, size)
        release = _release(self.maps, self.checkpoint.tensors)
        return fill_in_order(AtomicFile(path), header, refs, self._content, release)

    def digest(self, shard: str, size: int) -> str:
        """The xxh3_128 of what `restore` would write. Raises CheckpointError, as restore."""
        header, refs = self._original(shard, size)
        digest = xxhash.xxh3_128(header)
        for ref in refs:
            for piece in self._content(ref, release=True):
                digest.update(piece)
        return digest.hexdigest()

    def _original(self, shard: str, size: int) -> tuple[bytes, list[TensorRef]]:
        """The header of the original shard, with its length, and its tensors in file order."""
        source = self.checkpoint.path / shard
        kept = json.loads(source_header(self.checkpoint, shard)[8:]).get("__metadata__", {}).get(HEADER_KEY)
        if not isinstance(kept, str):
            raise CheckpointError(f"{source}: __metadata__ has no {HEADER_KEY}; download it again")
        header = kept.encode(errors="surrogatepass")
        refs, _ = check_header(source, header, size)
        self._check_fit(shard, refs)
        return header_prefix(header) + header, refs

    def plain(self, path: Path, shard: str) -> AtomicFile | None:
        """Streams the tensors of a shard, unpacked, to `path`; the caller commits it. None if the shard has none."""
        refs = sorted(self.dense(shard), key=lambda ref: (-DTYPE_BITS[ref.dtype], ref.name))
        if not refs:
            return None
        metadata = json.loads(source_header(self.checkpoint, shard)[8:]).get("__metadata__", {})
        metadata.pop(HEADER_KEY, None)
        header = header_of(refs, metadata or {"format": "pt"})
        return fill_in_order(
            AtomicFile(path), header, refs, self._content, _release(self.maps, self.checkpoint.tensors)
        )

    def dense(self, shard: str) -> list[TensorRef]:
        """The tensors that a shard unpacks to, with begin 0. A packed tensor belongs to the shard with its values."""
        parts = {part.name for packed in self.packed.values() for part in packed.parts}
        there = [
            TensorRef(p.name, shard, p.dtype, p.shape, 0, p.dense_nbytes)
            for p in self.packed.values()
            if p.compressed.shard == shard
        ]
        there += [
            replace(ref, begin=0, end=ref.nbytes)
            for ref in self.checkpoint.tensors.values()
            if ref.shard == shard and ref.name not in parts
        ]
        return there

    def _check_fit(self, shard: str, refs: Iterable[TensorRef]) -> None:
        wanted = {ref.name: (ref.dtype, ref.shape) for ref in refs}
        found = {ref.name: (ref.dtype, ref.shape) for ref in self.dense(shard)}
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                said, there = wanted.get(name, "not there"), found.get(name, "not there")
                raise CheckpointError(
                    f"{self.checkpoint.path / shard}: tensor {show(name)} is {show(said)} according to {HEADER_KEY}, "
                    f"but {show(there)} according to its parts; download it again"
                )

    def _content(self, ref: TensorRef, release: bool = False) -> Iterator[Buffer]:
        packed = self.packed.get(ref.name)
        if packed is None:
            yield from pieces(self.maps, self.checkpoint.tensors[ref.name], release=release)
            return
        for _, bits in unpacked_rows(self.maps, packed):
            yield bits.reshape(-1).view(np.uint8).data


def _release(maps: ShardMaps, sources: Mapping[str, TensorRef]) -> Callable[[TensorRef, int, int], None]:
    """A callback that gives back the pages of copied tensors once their bytes have been written."""

    def release(ref: TensorRef, begin: int, end: int) -> None:
        source = sources.get(ref.name)
        if source is not None:
            maps.release([replace(source, begin=source.begin + begin, end=source.begin + end)], drop_cache=True)

    return release
