"""The device to compute on, and the dtypes to compute and cache in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from streamprune.errors import UsageError


def native_bf16() -> bool:
    """Whether the processor multiplies bf16 matrices in hardware (AMX, AVX512-BF16, Arm BF16)."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return False
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    flags = set(found.group(1).split()) if found else set()
    return bool(flags & {"amx_bf16", "avx512_bf16", "bf16"})


def compute_dtype(requested: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in: the requested one or, with "auto", the stored one if it is fast here, else float32.

    Raises UsageError for an unknown name.
    """
    if requested not in ("auto", "float32", "bfloat16", "float16"):
        raise UsageError(f"--dtype {requested}: choose auto, float32, bfloat16 or float16")
    if requested != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[requested]
    if device.type != "cpu":
        return stored
    return torch.bfloat16 if stored == torch.bfloat16 and native_bf16() else torch.float32


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
