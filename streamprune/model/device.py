"""The device to compute on, and the dtypes to compute and cache in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from streamprune.errors import UsageError
from streamprune.model.arithmetic import compute_name
from streamprune.model.extra_memory import CONTEXT


def compute_dtype(requested: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in; see and raises as compute_name."""
    name = compute_name(requested, str(stored).removeprefix("torch."), device.type == "cpu")
    found: torch.dtype = getattr(torch, name)
    return found


def cache_dtype(stored: torch.dtype, compute: torch.dtype) -> torch.dtype:
    """The dtype of cached hidden states: the stored one, or float32 where float16 might overflow."""
    return torch.float32 if stored == torch.float16 and compute != torch.float16 else stored


def resolve_device(requested: str) -> torch.device:
    """The device to compute on; "auto" is the GPU if there is one. Raises UsageError when it cannot be used.

    Only the CPU and CUDA (which in torch includes ROCm): other devices lack float64 or streams.
    """
    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(requested)
        if device.type not in ("cpu", "cuda"):
            raise UsageError(f"--device {requested}: choose cpu or cuda (cuda:0, cuda:1 …)")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UsageError(f"--device {requested} cannot be used here: {' '.join(str(e).split())[:160]}") from e
    return device


@contextmanager
def exact_products() -> Iterator[None]:
    """Within it, float32 matrix products have full precision, even if the caller has allowed TF32, or bf16 on the CPU.

    With 10 or 7 bits of mantissa, Gram matrices could not be factorised.
    """
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # set per backend, as torch 2.9 and later allow
        backends: Any = torch.backends
        owners = (backends.cuda.matmul, backends.mkldnn.matmul)
        each = [owner.fp32_precision for owner in owners]

        def restore() -> None:
            for owner, value in zip(owners, each, strict=True):
                owner.fp32_precision = value
    else:

        def restore() -> None:
            torch.set_float32_matmul_precision(before)

    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        restore()


def free_on(device: torch.device) -> int | None:
    """Bytes that this process may use on a device: nine tenths of the free memory, and its context; None if unknown."""
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # free, but held by torch
    return int(0.9 * (torch.cuda.mem_get_info(device)[0] + cached)) + CONTEXT


def limit_memory(limit: int | None, device: torch.device) -> None:
    """Limits torch's allocator to `limit` bytes of a device, including its context; None removes the limit."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index  # torch needs a number here
        total = torch.cuda.mem_get_info(index)[1]
        share = 1.0 if limit is None else min(1.0, max(0.0, (limit - CONTEXT) / total))
        torch.cuda.set_per_process_memory_fraction(share, index)
