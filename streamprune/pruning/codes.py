"""How a job stores linears in FP8: the names, sizes and dtypes of their tensors, known from headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from streamprune.disk.float_quantized import SCALE
from streamprune.disk.header import DTYPE_BITS, TensorRef
from streamprune.errors import UnsupportedError
from streamprune.model.stages import Outline


@dataclass(frozen=True)
class Quantisation:
    """How a job quantises: `scale` is "amax" or "mse"; `compensates`: whether rounding errors are compensated for."""

    scale: str = "amax"
    compensates: bool = False
    backend: str | None = None


def coded(ref: TensorRef) -> tuple[TensorRef, TensorRef]:
    """The two tensors that a weight `ref` is stored as, its codes and its scales, without file offsets yet."""
    rows, size = ref.shape[0], ref.shape[0] * ref.shape[1]
    width = DTYPE_BITS[ref.dtype] // 8
    codes = replace(ref, dtype="F8_E4M3", begin=0, end=size)
    return codes, replace(ref, name=ref.name + SCALE, shape=(rows, 1), begin=0, end=rows * width)


def check_codable(linears: Mapping[str, TensorRef], model: Outline) -> None:
    """Raises UnsupportedError for a linear that a `float-quantized` checkpoint cannot represent.

    Not for `linears` that are parts of a tensor (expert_codes.py).
    """
    for name, ref in linears.items():
        if name in model.transposed:
            raise UnsupportedError(
                f"{name} is a Conv1D, which FP8 checkpoints cannot hold; pass --quantize none, or --skip it"
            )
        if not ref.name.endswith("weight"):
            raise UnsupportedError(
                f"{name}: its tensor is called {ref.name}, and only tensors called *.weight can have scales; --skip it"
            )
        if ref.shape[0] * ref.shape[1] * 8 % DTYPE_BITS[ref.dtype]:
            raise UnsupportedError(
                f"{name} has {ref.shape[0]} x {ref.shape[1]} weights, an odd number of bytes in FP8, after which its "
                "scales would not be aligned; --skip it"
            )
