"""Tensors stored by their nonzeros, in the two layouts of compressed-tensors up to 0.14.

A dense tensor `P.weight` of shape (..., in) is stored as parts, P being the name of its module. A tensor of all
experts, such as `….experts.down_proj`, may have no `.weight` in its name, and be called P itself:

    P.compressed    the kept values, in the dtype of the weight, row after row: (out, in / 2) for sparse-24-bitmask,
                    (nnz,) for sparse-bitmask
    P.bitmask       U8 (..., ceil(in / 8)): bit j % 8 (counted from the lowest) of byte j // 8 is set if column j is
    kept P.shape         I64, the dense shape: written as (rank, 1) for sparse-24-bitmask, as (rank,) for sparse-bitmask
    P.row_offsets   I64 (rows,), for sparse-bitmask only: number of kept values before each row

The reader accepts shapes of any rank and integer dtype, weights of any rank (old releases packed norms too), and parts
in different shards. Row offsets follow from the bitmask, and old files have wrong ones for tensors of rank 3, so they
are only read to find an expert's values. Imports neither torch nor numpy.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.header import DTYPE_BITS, TensorRef, show
from streamprune.errors import CheckpointError

if TYPE_CHECKING:
    from streamprune.disk.mapping import ShardMaps

TWO_FOUR, BITMASK = "sparse-24-bitmask", "sparse-bitmask"
LAYOUTS = (TWO_FOUR, BITMASK)

_NEEDED = ("compressed", "bitmask", "shape")
_PARTS = (*_NEEDED, "row_offsets")
_INTEGERS = {"I8": 1, "U8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8}
_MAX_RANK = 8
_BARE = re.compile(r"experts\.(gate_up_proj|gate_proj|up_proj|down_proj)$")


@dataclass(frozen=True)
class PackedTensor:
    """One packed tensor: `name`, `dtype` and `shape` are those of the dense one."""

    name: str
    layout: str
    """"sparse-24-bitmask" or "sparse-bitmask"."""
    dtype: str
    shape: tuple[int, ...]
    compressed: TensorRef
    bitmask: TensorRef
    shape_ref: TensorRef
    row_offsets: TensorRef | None

    @property
    def parts(self) -> tuple[TensorRef, ...]:
        """All its tensors on disk."""
        rest = () if self.row_offsets is None else (self.row_offsets,)
        return (self.compressed, self.bitmask, self.shape_ref, *rest)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the dense tensor."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    @property
    def in_features(self) -> int:
        """Length of a row, the last axis."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """Rows of the tensor as a matrix (rows, in_features); 1 for a vector."""
        return math.prod(self.shape[:-1])


def dense_name(module: str, shape: tuple[int, ...]) -> str:
    """The name of the dense tensor of this shape whose parts are called `module.compressed` and so on."""
    return module if len(shape) == 3 and _BARE.search(module) else f"{module}.weight"


def _modules(checkpoint: Checkpoint) -> dict[str, dict[str, TensorRef]]:
    """Parts by module, for modules with at least two of the three required parts (find_packed refuses incomplete
    ones)."""
    found: dict[str, dict[str, TensorRef]] = {}
    for name, ref in checkpoint.tensors.items():
        module, _, part = name.rpartition(".")
        if part in _PARTS and module:
            found.setdefault(module, {})[part] = ref
    return {module: parts for module, parts in found.items() if sum(part in parts for part in _NEEDED) >= 2}


def is_packed(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has packed tensors, by their names alone."""
    return bool(_modules(checkpoint))


def find_packed(checkpoint: Checkpoint, maps: ShardMaps) -> dict[str, PackedTensor]:
    """The packed tensors of a checkpoint by the name of the dense one, in the order of their values on disk.

    Reads the few bytes of each `P.shape`; empty for a dense checkpoint.

    Raises:
        CheckpointError: a part is missing, or parts do not fit together; the message names file and tensor.
    """
    found = {}
    for module, parts in _modules(checkpoint).items():
        packed = _packed(checkpoint, maps, module, parts)
        if packed.name in checkpoint.tensors:
            raise _bad(checkpoint, checkpoint.tensors[packed.name], "is both dense and packed")
        found[packed.name] = packed
    return found


def _packed(checkpoint: Checkpoint, maps: ShardMaps, module: str, parts: dict[str, TensorRef]) -> PackedTensor:
    missing = [part for part in _NEEDED if part not in parts]
    if missing:
        there = next(iter(parts.values()))
        raise _bad(checkpoint, there, f"belongs to a packed tensor whose {show(f'{module}.{missing[0]}')} is missing")
    values, mask, shape_ref = (parts[part] for part in _NEEDED)
    shape = _read_shape(checkpoint, maps, shape_ref)
    if DTYPE_BITS[values.dtype] % 8:
        raise _bad(checkpoint, values, f"has the dtype {values.dtype}, whose items are not whole bytes")
    wanted = (*shape[:-1], -(-shape[-1] // 8))
    if mask.dtype != "U8" or mask.shape != wanted:
        found = f"{mask.dtype} {list(mask.shape)}"
        raise _bad(checkpoint, mask, f"is {found}; a tensor of shape {list(shape)} has U8 {list(wanted)}")
    layout = BITMASK if "row_offsets" in parts else TWO_FOUR
    kept, size = math.prod(values.shape), math.prod(shape)
    if kept > size or (layout == TWO_FOUR and 2 * kept != size):
        most = f"{size // 2}" if layout == TWO_FOUR else f"at most {size}"
        raise _bad(checkpoint, values, f"holds {kept} values; {layout} of shape {list(shape)} has {most}")
    return PackedTensor(
        dense_name(module, shape), layout, values.dtype, shape, values, mask, shape_ref, parts.get("row_offsets")
    )


def _read_shape(checkpoint: Checkpoint, maps: ShardMaps, ref: TensorRef) -> tuple[int, ...]:
    width = _INTEGERS.get(ref.dtype)
    rank = math.prod(ref.shape)
    if width is None or not 1 <= rank <= _MAX_RANK:
        raise _bad(checkpoint, ref, f"is {ref.dtype} {list(ref.shape)}, which is no shape")
    data, signed = maps.raw(ref), ref.dtype[0] == "I"
    shape = tuple(int.from_bytes(data[i : i + width], "little", signed=signed) for i in range(0, len(data), width))
    if min(shape) < 1 or math.prod(shape) >= 2**60:
        raise _bad(checkpoint, ref, f"says {show(list(shape))}, which is no shape")
    return shape


def _bad(checkpoint: Checkpoint, ref: TensorRef, why: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path / ref.shard}: tensor {show(ref.name)} {why}; download the checkpoint again"
    )


def packed_refs(ref: TensorRef, layout: str, kept: int) -> list[TensorRef]:
    """The parts into which the dense tensor `ref` (…, in) with `kept` nonzeros is packed, with begin 0.

    In the order compressed, bitmask, shape, row_offsets; the last for sparse-bitmask only. `layout` is one of LAYOUTS;
    for sparse-24-bitmask, `kept` is not used.
    """
    module = ref.name.removesuffix(".weight")
    *before, width = ref.shape
    rank = len(ref.shape)

    def part(name: str, dtype: str, shape: tuple[int, ...]) -> TensorRef:
        return TensorRef(f"{module}.{name}", ref.shard, dtype, shape, 0, math.prod(shape) * DTYPE_BITS[dtype] // 8)

    two_four = layout == TWO_FOUR
    parts = [
        part("compressed", ref.dtype, (*before, width // 2) if two_four else (kept,)),
        part("bitmask", "U8", (*before, -(-width // 8))),
        part("shape", "I64", (rank, 1) if two_four else (rank,)),
    ]
    return parts if two_four else [*parts, part("row_offsets", "I64", (math.prod(before),))]
