"""Tensors of a checkpoint as views of its mapped files (mapped.py), which are read on access and not copied."""

from __future__ import annotations

import math

import torch

from streamprune.disk.header import DTYPE_BITS, TensorRef, show
from streamprune.disk.mapped import MappedFiles
from streamprune.errors import UnsupportedError

SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, attribute)
    for name, attribute in {
        "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32",
        "I32": "int32", "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16",
        "F32": "float32", "F64": "float64", "C64": "complex64", "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
    }.items()
    if hasattr(torch, attribute)
}  # fmt: skip
"""By the name in a safetensors header, every dtype that this version of torch has."""


class ShardMaps(MappedFiles):
    """The shards of a checkpoint, mapped as needed, and their tensors. Methods may run in threads."""

    def tensor(self, ref: TensorRef) -> torch.Tensor:
        """The tensor of `ref`, its shape and dtype, on the CPU.

        A view of the file, or a copy if its offset is not a multiple of the item size.

        Raises:
            CheckpointError: the file is gone or has changed since the checkpoint was opened.
            UnsupportedError: torch has no such dtype.
            ResourceError: the file cannot be mapped.
        """
        return self._view(ref, ref.begin, ref.shape)

    def rows(self, ref: TensorRef, start: int, stop: int) -> torch.Tensor:
        """Rows start to stop (exclusive) along the first axis of `ref`, shape (stop - start, ...).

        Raises:
            IndexError: not 0 <= start <= stop <= shape[0], or the tensor is 0-d.
            CheckpointError, UnsupportedError, ResourceError: as `tensor`.
        """
        if not ref.shape or not 0 <= start <= stop <= ref.shape[0]:
            raise IndexError(f"rows {start} to {stop} of {ref.name} with shape {list(ref.shape)}")
        skipped_bits = start * math.prod(ref.shape[1:]) * DTYPE_BITS[ref.dtype]
        if skipped_bits % 8:
            raise IndexError(f"row {start} of {ref.name} begins within a byte")
        return self._view(ref, ref.begin + skipped_bits // 8, (stop - start, *ref.shape[1:]))

    def _view(self, ref: TensorRef, begin: int, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor of `shape`, in the dtype of `ref`, that begins at byte `begin` of its shard."""
        dtype, shape = _torch_type(ref, shape)
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        if self._spool is not None and (few := self._spool.aside(ref.shard, begin, count * dtype.itemsize)):
            return torch.frombuffer(bytearray(few), dtype=dtype).reshape(shape)
        data = self._map(ref.shard).data
        if begin % dtype.itemsize:
            flat = torch.frombuffer(bytearray(data[begin : begin + count * dtype.itemsize]), dtype=dtype)
        else:
            flat = torch.frombuffer(data, dtype=dtype, count=count, offset=begin)
        return flat.reshape(shape)


def _torch_type(ref: TensorRef, shape: tuple[int, ...]) -> tuple[torch.dtype, tuple[int, ...]]:
    """The torch dtype and shape of a tensor; torch counts 4-bit floats in pairs, safetensors singly."""
    paired = getattr(torch, "float4_e2m1fn_x2", None)
    if ref.dtype == "F4" and isinstance(paired, torch.dtype) and shape and shape[-1] % 2 == 0:
        return paired, (*shape[:-1], shape[-1] // 2)
    try:
        return SAFETENSORS_DTYPES[ref.dtype], shape
    except KeyError:
        raise UnsupportedError(
            f"{ref.shard}: tensor {show(ref.name)}: torch {torch.__version__} has no dtype for {ref.dtype}, "
            f"shape {list(ref.shape)}; pass a checkpoint in bf16, f16 or f32"
        ) from None
