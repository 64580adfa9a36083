"""Pruning a quantised checkpoint in its own format: codes of pruned weights become zero, all other bytes stay.

Works for formats with a byte a weight, in which the code 0 is the weight 0 whatever the scale: FP8 (with scales for
blocks, channels or tensors) and int8 without zero points. Kept weights are exactly those that were there.

Not for integers in words: their zero points are codes, so that zeros would be exact, too, but a word holds several
weights, and in GPTQ and AWQ inputs come first, whereas rows are pruned and written one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.encoded import FLOAT, INTEGER, EncodedRef
from streamprune.disk.header import DTYPE_BITS, TensorRef
from streamprune.disk.quantised import PlainView, stored_parts
from streamprune.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from streamprune.disk.mapping import ShardMaps

Parts = Mapping[str, tuple[TensorRef, ...]]
"""Quantised weight -> all tensors that are stored of it, the codes first."""


def parts_to_keep(checkpoint: Checkpoint, linears: Mapping[str, TensorRef]) -> Parts:
    """What is stored of each quantised weight of a checkpoint, of which `linears` are pruned.

    Raises UsageError for a checkpoint without quantised weights, UnsupportedError where codes have no zero.
    """
    if not isinstance(checkpoint, PlainView) or not any(isinstance(ref, EncodedRef) for ref in linears.values()):
        raise UsageError(
            "--quantize keep keeps the format of quantised weights, and none of those that are pruned is; leave it out"
        )
    if checkpoint.streamed:
        raise UnsupportedError("--quantize keep needs MODEL on the disk; leave out --fetch stream")
    for name, ref in linears.items():
        if not isinstance(ref, EncodedRef):
            continue
        encoding = ref.encoding
        if encoding.kind not in (FLOAT, INTEGER) or encoding.zero is not None:
            raise UnsupportedError(
                f"{name}: --quantize keep works for FP8 and for int8 without zero points, not for "
                f"{checkpoint.method} as it is here; leave it out for bf16, or choose fp8"
            )
    parts = stored_parts(checkpoint)
    for codes, *others in parts.values():
        for other in others:
            if other.name == f"{codes.name}_scale" and codes.nbytes * 8 % DTYPE_BITS[other.dtype]:
                raise UnsupportedError(
                    f"{codes.name} has {codes.nbytes} bytes, after which its scales would not be aligned; leave out "
                    "--quantize keep"
                )
    return parts


def codes_of(ref: TensorRef) -> TensorRef:
    """The codes of a quantised weight, or of a part of it."""
    assert isinstance(ref, EncodedRef)
    return next(iter(ref.stored))


def zeroed(maps: ShardMaps, ref: TensorRef, begin: int, rows: Tensor) -> Tensor:
    """The codes of a weight's stored rows from `begin` on, those that are 0 in `rows` set to 0: uint8, same shape."""
    import torch

    row = ref.nbytes // ref.shape[0]
    own = replace(ref, begin=ref.begin + begin * row, end=ref.begin + (begin + len(rows)) * row)
    codes = torch.frombuffer(bytearray(maps.raw(codes_of(own))), dtype=torch.uint8).view(rows.shape)
    return codes.masked_fill_(rows == 0, 0)
