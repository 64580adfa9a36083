"""The tensors of the dense model, whether a checkpoint stores them dense, in FP8 or packed, and their bits as a stream.

The parts of a packed tensor (disk/packed.py) count as one tensor, and the scales of an FP8 tensor (`P.weight_scale`
beside `P.weight` F8_E4M3) as part of it. A tensor of fused experts counts as one matrix per expert. Bits are read
in pieces of at most 16 MiB, whose pages are given back afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.encoded import EncodedRef
from streamprune.disk.header import DTYPE_BITS, TensorRef, show
from streamprune.disk.linears import expert_names, find_linears
from streamprune.disk.mapping import ShardMaps
from streamprune.disk.packed import PackedTensor, dense_name, find_packed
from streamprune.errors import CheckpointError

_CHUNK_BYTES = 16 * 2**20
_UNPACKED_BYTES = 4 * 2**20  # two pieces are held at a time
_AROUND_BYTES = 2**21  # on access to a page, the system may map neighbours too, up to the size of a huge page


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the dense model: `name`, `dtype` and `shape` are the dense one's.

    `scale` is the tensor of scales beside FP8 codes; values are scale × code.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored: TensorRef | PackedTensor
    scale: TensorRef | None = None
    is_part: bool = False
    """Whether it is part of a larger tensor (fused experts) that `pack` does not pack."""

    @property
    def parts(self) -> tuple[TensorRef, ...]:
        """All tensors on disk that it consists of, scales included."""
        stored = self.stored
        if isinstance(stored, PackedTensor):
            main = stored.parts
        else:
            main = tuple(stored.stored) if isinstance(stored, EncodedRef) else (stored,)
        return main if self.scale is None else (*main, self.scale)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the dense tensor, without scales."""
        return self.stored.dense_nbytes if isinstance(self.stored, PackedTensor) else self.stored.nbytes

    @property
    def layout(self) -> str | None:
        """The layout of a packed tensor, else None."""
        return self.stored.layout if isinstance(self.stored, PackedTensor) else None


def find_tensors(checkpoint: Checkpoint, maps: ShardMaps) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint by their names in the dense model.

    Raises:
        CheckpointError: parts of a packed tensor are missing or do not fit together.
    """
    packed = find_packed(checkpoint, maps)
    for tensor in packed.values():
        release_around(maps, tensor.shape_ref)
    rest = dict(checkpoint.tensors)
    for tensor in packed.values():
        for part in tensor.parts:
            del rest[part.name]
    found: dict[str, StoredTensor] = {}
    both: dict[str, TensorRef | PackedTensor] = {**rest, **packed}
    for name, stored in both.items():
        if isinstance(stored, TensorRef):
            experts = _experts_of(checkpoint, stored)
        else:
            experts = _packed_experts(checkpoint, maps, stored)
        if experts:
            found |= experts
            continue
        scale = rest.get(f"{name}_scale") if stored.dtype == "F8_E4M3" and name.endswith(".weight") else None
        found[name] = StoredTensor(name, stored.dtype, stored.shape, stored, scale)
    scales = {tensor.scale.name for tensor in found.values() if tensor.scale}
    return {name: tensor for name, tensor in found.items() if name not in scales}


def _experts_of(checkpoint: Checkpoint, ref: TensorRef) -> dict[str, StoredTensor]:
    """The experts' matrices of a tensor that holds all; empty for other tensors."""
    names, found = expert_names(checkpoint, ref), {}
    packable = len(ref.shape) == 3 and dense_name(ref.name.removesuffix(".weight"), ref.shape) == ref.name
    for number, name in enumerate(names):
        begin = ref.begin + number * ref.nbytes // len(names)
        shape = ref.shape[1:] if len(ref.shape) == 3 else (ref.shape[0] // len(names), ref.shape[1])
        part = replace(ref, shape=shape, begin=begin, end=begin + ref.nbytes // len(names))
        found[name] = StoredTensor(name, part.dtype, part.shape, part, is_part=not packable)
    return found


def _packed_experts(checkpoint: Checkpoint, maps: ShardMaps, packed: PackedTensor) -> dict[str, StoredTensor]:
    """The experts' matrices of a packed tensor that holds all; empty for other tensors."""
    whole = TensorRef(packed.name, packed.compressed.shard, packed.dtype, packed.shape, 0, packed.dense_nbytes)
    names = expert_names(checkpoint, whole)
    if not names or len(packed.shape) != 3:
        return {}
    count, rows, width = packed.shape
    kept = math.prod(packed.compressed.shape)
    if packed.row_offsets is None:
        starts = [expert * kept // count for expert in range(count)]
    else:
        offsets = np.frombuffer(maps.raw(packed.row_offsets), "<i8")
        if packed.row_offsets.dtype != "I64" or len(offsets) != count * rows:
            return {}  # old releases have others for tensors of rank 3
        starts = [int(offsets[expert * rows]) for expert in range(count)]
        maps.release([packed.row_offsets])
        if starts != sorted(starts) or starts[0] != 0 or starts[-1] > kept:
            raise CheckpointError(
                f"{packed.row_offsets.shard}: tensor {show(packed.row_offsets.name)} does not count the {kept} values; "
                "download the checkpoint again"
            )
    found, item, mask = {}, DTYPE_BITS[packed.dtype] // 8, rows * -(-width // 8)
    for expert, (name, start, stop) in enumerate(zip(names, starts, [*starts[1:], kept], strict=True)):
        values, bits = packed.compressed, packed.bitmask
        part = replace(
            packed, name=name, shape=packed.shape[1:], row_offsets=None,
            compressed=replace(
                values, shape=(stop - start,), begin=values.begin + start * item, end=values.begin + stop * item
            ),
            bitmask=replace(
                bits, shape=(rows, mask // rows), begin=bits.begin + expert * mask, end=bits.begin + (expert + 1) * mask
            ),
        )  # fmt: skip
        found[name] = StoredTensor(name, part.dtype, part.shape, part)
    return found


def linears_of(checkpoint: Checkpoint, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The linears among `tensors` by module name, as disk/linears.py defines and orders them."""
    dense = {name: TensorRef(name, "", t.dtype, t.shape, 0, t.dense_nbytes) for name, t in tensors.items()}
    return {module: tensors[ref.name] for module, ref in find_linears(replace(checkpoint, tensors=dense)).items()}


class BitStream:
    """The items of a tensor in order, as unsigned integers of the dtype's width, or as bytes if `as_bytes`."""

    def __init__(self, maps: ShardMaps, tensor: StoredTensor, *, as_bytes: bool = False) -> None:
        stored = tensor.stored
        self._chunks = _unpacked(maps, stored) if isinstance(stored, PackedTensor) else _mapped(maps, stored)
        self._view = np.dtype(f"u{1 if as_bytes else DTYPE_BITS[tensor.dtype] // 8}")
        self._left: NDArray[Any] = np.empty(0, np.uint8)

    def take(self, items: int) -> NDArray[Any]:
        """The next `items` items (items,), or as many as are left: a view, or a copy where two pieces meet.

        Raises:
            CheckpointError: the file has changed, or the parts of a packed tensor do not fit together.
        """
        wanted, taken = items * self._view.itemsize, []
        while wanted:
            if not self._left.size:
                chunk = next(self._chunks, None)
                if chunk is None:
                    break
                self._left = chunk
            taken.append(self._left[:wanted])
            self._left = self._left[wanted:]
            wanted -= taken[-1].size
        piece = taken[0] if len(taken) == 1 else np.concatenate([np.empty(0, np.uint8), *taken])
        return piece.view(self._view)

    def finish(self) -> None:
        """Call it after the last item: checks that the values and bitmask of a packed tensor end together.

        Raises:
            CheckpointError: they do not.
        """
        for _ in self._chunks:
            pass


def release_around(maps: ShardMaps, ref: TensorRef) -> None:
    """Gives back the pages of `ref`, and those next to it that may have been mapped with them."""
    maps.release([replace(ref, begin=max(0, ref.begin - _AROUND_BYTES), end=ref.end + _AROUND_BYTES)])


def _mapped(maps: ShardMaps, ref: TensorRef) -> Iterator[NDArray[np.uint8]]:
    starts = range(ref.begin, ref.end, _CHUNK_BYTES)
    chunks = [replace(ref, begin=begin, end=min(begin + _CHUNK_BYTES, ref.end)) for begin in starts]
    for i, chunk in enumerate(chunks):
        maps.prefetch(chunks[i : i + 2])
        yield np.frombuffer(maps.raw(chunk), np.uint8)
        release_around(maps, chunk)


def _unpacked(maps: ShardMaps, packed: PackedTensor) -> Iterator[NDArray[np.uint8]]:
    from streamprune.packing.rows import unpacked_rows  # here, for dense checkpoints do not need its compiled loops

    for _, bits in unpacked_rows(maps, packed, _UNPACKED_BYTES):
        yield bits.reshape(-1).view(np.uint8)
    for part in (packed.bitmask, packed.compressed):
        release_around(maps, part)
