"""Linears into the compressed form of Torch's sparse kernels: which they take, on which GPU, and the conversion.

torch.sparse.to_sparse_semi_structured takes float16 and bfloat16 (of float32 it wants 1:2) whose rows and columns are
multiples of 16 with cuSPARSELt, of 32 and 64 with CUTLASS. It pads the tokens to a multiple of 8, and compresses what
is not 2:4 without a word: two of four numbers are lost. `takes` looks first. Experts that are one tensor of three
dimensions and GPT-2's Conv1D are no nn.Linear and stay dense.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from streamprune.errors import ResourceError, UsageError

CUSPARSELT, CUTLASS = "cusparselt", "cutlass"
LEAST_CAPABILITY = (8, 0)  # Ampere: the first tensor cores that skip zeros
_CHUNK = 8 << 20  # weights looked at once

Convert = Callable[[Tensor, str], Tensor]
"""From a weight and a backend to what multiplies in its place."""


def takes(weight: Tensor, backend: str = CUSPARSELT) -> str | None:
    """None if Torch's sparse kernels multiply with this weight, (out, in) on any device, and the same comes out.

    Otherwise why not, in a few words. `backend` is "cusparselt" or "cutlass"; shapes are those of Torch's own tables.
    """
    if weight.ndim != 2:
        return f"{weight.ndim} dimensions"
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return str(weight.dtype).removeprefix("torch.")
    if not weight.is_contiguous():
        return "not contiguous"
    rows, columns = least_shape(weight.dtype, backend)
    if not weight.numel() or weight.shape[0] % rows or weight.shape[1] % columns:
        return f"{weight.shape[0]}x{weight.shape[1]}: no multiple of {rows}x{columns}"
    at_once = max(1, _CHUNK // weight.shape[1])
    for begin in range(0, weight.shape[0], at_once):
        if int((weight[begin : begin + at_once].view(-1, 4) != 0).sum(1).max()) > 2:
            return "not 2:4"
    return None


def least_shape(dtype: torch.dtype, backend: str) -> tuple[int, int]:
    """(out, in) that a sparse weight must be multiples of."""
    kinds = {
        CUSPARSELT: torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
        CUTLASS: torch.sparse.SparseSemiStructuredTensorCUTLASS,
    }
    least = kinds[backend]._DTYPE_SHAPE_CONSTRAINTS[dtype]
    return int(least.sparse_min_rows), int(least.sparse_min_cols)


def choose_backend(capability: tuple[int, int], cusparselt: bool) -> str:
    """The kernels for a GPU of this compute capability; `cusparselt` says whether Torch was built with it.

    Torch's CUTLASS kernels check for 8.x themselves. Raises ResourceError where there are none.
    """
    here = f"this GPU has compute capability {capability[0]}.{capability[1]}"
    if capability < LEAST_CAPABILITY:
        raise ResourceError(f"{here}, 2:4 kernels need 8.0 or more (Ampere): choose another with --device")
    if not cusparselt and capability[0] != 8:
        raise ResourceError(f"{here}, CUTLASS kernels are for 8.x: install a Torch that is built with cuSPARSELt")
    return CUSPARSELT if cusparselt else CUTLASS


def find_gpu(device: str) -> str:
    """The backend for --device. Raises UsageError for anything but cuda, ResourceError where no GPU can do it."""
    if not re.fullmatch(r"cuda(:\d+)?", device):
        raise UsageError(f"--device {device}: 2:4 kernels are for NVIDIA GPUs; choose cuda, or cuda:1 …")
    if not torch.cuda.is_available():
        raise ResourceError("no CUDA GPU here: 2:4 kernels need one of compute capability 8.0 or more (Ampere, 2020)")
    if (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise ResourceError(f"--device {device}: there are only {torch.cuda.device_count()} GPUs, counted from 0")
    return choose_backend(torch.cuda.get_device_capability(device), torch.backends.cusparselt.is_available())


def to_sparse(weight: Tensor, backend: str) -> Tensor:
    """Torch's compressed form of a weight that it `takes`; its warning about a prototype is left out."""
    torch.sparse.SparseSemiStructuredTensor._FORCE_CUTLASS = backend == CUTLASS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse.to_sparse_semi_structured(weight.detach())


@dataclass(frozen=True)
class Conversion:
    """Names of the linears that were converted; why each other one was not; one dense weight of each shape."""

    converted: tuple[str, ...]
    skipped: Mapping[str, str]
    examples: Mapping[str, tuple[str, Tensor]]

    def __str__(self) -> str:
        reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(self.skipped.values()).most_common())
        said = f"{len(self.converted)} of {len(self.converted) + len(self.skipped)} linears run in 2:4"
        return f"{said}; left dense: {reasons}" if reasons else said


def convert_linears(model: nn.Module, backend: str, convert: Convert = to_sparse) -> Conversion:
    """Replaces the weight of each nn.Linear that Torch takes by what `convert` makes of it."""
    converted: list[str] = []
    skipped: dict[str, str] = {}
    examples: dict[str, tuple[str, Tensor]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        dense = module.weight
        if (reason := takes(dense, backend)) is not None:
            skipped[name] = reason
            continue
        module.weight = nn.Parameter(convert(dense, backend), requires_grad=False)
        examples.setdefault(f"{dense.shape[0]}x{dense.shape[1]}", (name, dense))
        converted.append(name)
    return Conversion(tuple(converted), skipped, examples)
