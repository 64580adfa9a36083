"""What is computed on, and in which dtype."""

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
    """The dtype to compute in: as asked, or with "auto" the stored one where it is fast, else float32.

    Raises UsageError for another dtype.
    """
    if requested not in ("auto", "float32", "bfloat16", "float16"):
        raise UsageError(f"--dtype {requested}: choose auto, float32, bfloat16 or float16")
    if requested != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[requested]
    if device.type != "cpu":
        return stored
    return torch.bfloat16 if stored == torch.bfloat16 and native_bf16() else torch.float32


def cache_dtype(stored: torch.dtype, compute: torch.dtype) -> torch.dtype:
    """What hidden states are cached in: the stored dtype, or float32 where float16 might not hold what was computed."""
    return torch.float32 if stored == torch.float16 and compute != torch.float16 else stored


def resolve_device(requested: str) -> torch.device:
    """The device to compute on; "auto" is the GPU if there is one. Raises UsageError when it cannot be used.

    CUDA (and ROCm, which torch calls by the same name) or the CPU: other devices lack float64 or streams.
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
    """Within it, products of float32 matrices are float32's: a caller may have allowed TF32, or bf16 on the CPU.

    Their 10 or 7 bits would make Gram matrices that cannot be factorised.
    """
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set for one backend alone, which torch 2.9 and later can do
        backends: Any = torch.backends
        places = (backends.cuda.matmul, backends.mkldnn.matmul)
        each = [place.fp32_precision for place in places]

        def restore() -> None:
            for place, value in zip(places, each, strict=True):
                place.fp32_precision = value
    else:

        def restore() -> None:
            torch.set_float32_matmul_precision(before)

    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        restore()
