"""A weight that is stored as codes and scales, seen as the dense tensor that they encode.

An EncodedRef has the name, dtype and shape of the dense weight, and a byte range from 0 on that exists in no file:
slicing by bytes, as experts are sliced, gives a slice of the dense weight. Its Encoding says what is stored. Imports
neither torch nor numpy.

With one scale for a block of (r, c) weights, a matrix (rows, columns) has ceil(rows / r) x ceil(columns / c) scales; a
weight of three dimensions has as many for each of its matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.header import DTYPE_BITS, TensorRef, show
from streamprune.errors import CheckpointError

FLOAT, INTEGER, PACKED, PAIRS = "float", "integer", "packed", "pairs"
"""Kinds of codes: FP8 numbers; integers of a byte; integers in words of 32 bits; FP4 numbers, two in a byte."""
GPTQ, AWQ = "gptq", "awq"
"""Two more: integers in words of 32 bits along the inputs, the first axis, or along the outputs, the second."""


@dataclass(frozen=True)
class Encoding:
    """How a weight of `shape` is stored: weight = (code - zero point) x scale."""

    kind: str
    shape: tuple[int, ...]
    """Of the dense weight; `pairs`, `gptq` and `awq` are stored with the last two axes exchanged."""
    block: tuple[int, int]
    """Rows and columns, as they are stored, that share a scale."""
    codes: TensorRef
    scale: TensorRef
    zero: TensorRef | None = None
    bits: int = 8
    rounded: str = "F32"
    """The dtype to which the product is rounded before it is converted to the weight's dtype."""
    groups: TensorRef | None = None
    """The group, a row of scales, of each input; without it, inputs that follow each other are a group."""
    symmetric: bool = False
    """Whether every zero point is half of the codes' range, whatever is stored."""
    less_one: bool = False
    """Whether zero points are stored less one: a word less the word of ones, borrowing between its codes."""

    @property
    def transposed(self) -> bool:
        """Whether the weight's last axis is the codes' last but one."""
        return self.kind in (PAIRS, GPTQ, AWQ)

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of each matrix, as it is stored."""
        rows, columns = self.shape[-2:]
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def scales(self) -> tuple[int, int, int]:
        """Matrices, and scales along the rows and the columns of each."""
        rows, columns = self.matrix
        return math.prod(self.shape[:-2]), -(-rows // self.block[0]), -(-columns // self.block[1])

    @property
    def parts(self) -> tuple[TensorRef, ...]:
        """All that is stored of it."""
        return (self.codes, self.scale, *(part for part in (self.zero, self.groups) if part is not None))


@dataclass(frozen=True)
class EncodedRef(TensorRef):
    """A dense weight, or a part of it. `begin` and `end` count bytes of the dense weight, not of a file."""

    encoding: Encoding

    @classmethod
    def whole(cls, name: str, dtype: str, encoding: Encoding) -> EncodedRef:
        """The whole weight `name`, dequantised to `dtype`."""
        size = math.prod(encoding.shape) * DTYPE_BITS[dtype] // 8
        return cls(name, encoding.codes.shard, dtype, encoding.shape, 0, size, encoding)

    @property
    def stored(self) -> Iterator[TensorRef]:
        """The bytes of files that it is decoded from, about: the same share of codes, scales and zero points."""
        size = math.prod(self.encoding.shape) * DTYPE_BITS[self.dtype] // 8
        begin, end = (min(max(at, 0), size) for at in (self.begin, self.end))
        for part in self.encoding.parts if size else ():
            at = (part.nbytes * begin // size, part.nbytes * end // size)
            yield replace(part, begin=part.begin + at[0], end=part.begin + at[1])


def written(ref: TensorRef) -> TensorRef:
    """The plain tensor of that name, dtype and shape, as it is written to an output."""
    return TensorRef(ref.name, ref.shard, ref.dtype, ref.shape, ref.begin, ref.end)


def fits(scale: TensorRef, wanted: tuple[int, ...]) -> bool:
    """Whether a tensor has the shape `wanted`, axes of length 1 left out."""
    return [n for n in scale.shape if n != 1] == [n for n in wanted if n != 1]


def damaged_tensor(checkpoint: Checkpoint, ref: TensorRef, why: str) -> CheckpointError:
    """The error for a tensor that is damaged."""
    return CheckpointError(
        f"{checkpoint.path / ref.shard}: tensor {show(ref.name)} {why}; download the checkpoint again"
    )


def missing_tensor(checkpoint: Checkpoint, ref: TensorRef, other: str) -> CheckpointError:
    """The error for a tensor without the tensor `other` that belongs to it."""
    return CheckpointError(
        f"{checkpoint.path / ref.shard}: tensor {show(ref.name)} is there without {show(other)}; is the download "
        "complete?"
    )


def bad_scale(scale: TensorRef, codes: TensorRef, says: object, row: int, column: int) -> CheckpointError:
    """The error for a scale with which codes stand for no numbers, or for zeros alone."""
    return CheckpointError(
        f"{scale.shard}: tensor {show(scale.name)} is {says} for {show(codes.name)} (row {row}, column {column} of "
        "scales); the checkpoint is damaged, download it again"
    )


def bad_zero(zero: TensorRef, codes: TensorRef, says: int, row: int, column: int) -> CheckpointError:
    """The error for a zero point of codes that are symmetric."""
    return CheckpointError(
        f"{zero.shard}: tensor {show(zero.name)} has {says} for {show(codes.name)} (group {row}, output {column}), but "
        "by config.json codes are symmetric (sym); correct config.json, or download the checkpoint again"
    )


def bad_group(groups: TensorRef, codes: TensorRef, says: int, place: int, count: int) -> CheckpointError:
    """The error for an input whose group has no scales."""
    return CheckpointError(
        f"{groups.shard}: tensor {show(groups.name)} puts input {place} of {show(codes.name)} into group {says}, where "
        f"groups are 0 to {count - 1}; the checkpoint is damaged, download it again"
    )


def wrong_scales(checkpoint: Checkpoint, encoding: Encoding) -> CheckpointError:
    """The error for scales that do not fit their codes."""
    scale, codes = encoding.scale, encoding.codes
    said = "" if encoding.kind == PAIRS else ", as config.json has it"
    return damaged_tensor(
        checkpoint, scale,
        f"is {scale.dtype} {list(scale.shape)}, which are no scales of {show(codes.name)} {list(codes.shape)}: "
        f"wanted are {list(encoding.scales)}, one for {encoding.block[0]} x {encoding.block[1]} weights{said}",
    )  # fmt: skip
