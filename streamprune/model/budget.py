"""How much memory a pass takes, and how many samples a batch may therefore hold.

peak = base + reserve + stage + batch · seqlen · per_token

base       resident memory of this process once everything is imported and the skeleton is built
reserve    compiling kernels, row chunks of weights, buffers of the matrix library
stage      bytes of the largest stage: its weights are mapped, and resident while it is at work
per_token  the widest moment of a layer's forward pass: six states of the hidden size and four
           activations of the widest linear, in the dtype that is computed in
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from streamprune.errors import ResourceError, UsageError
from streamprune.memory import available_bytes, resident_bytes
from streamprune.model.skeleton import Skeleton
from streamprune.spec import format_bytes

BATCH_TOKENS = 2048
"""Tokens in a batch when memory allows; more would not make matrix products any faster."""

RESERVE = 160 << 20


@dataclass(frozen=True)
class Budget:
    """The estimate for one job. All sizes in bytes."""

    base: int
    reserve: int
    stage: int
    per_sample: int

    def peak(self, batch: int) -> int:
        """Estimated peak resident memory with `batch` samples at a time."""
        return self.base + self.reserve + self.stage + batch * self.per_sample


def estimate(skeleton: Skeleton, seqlen: int, dtype: torch.dtype, base: int | None = None) -> Budget:
    """The budget of a pass with windows of `seqlen` tokens computed in `dtype`."""
    largest = max(s.nbytes for s in skeleton.stages)
    return Budget(
        base if base is not None else resident_bytes(),
        RESERVE,
        largest,
        seqlen * token_bytes(skeleton, seqlen, dtype),
    )


def token_bytes(skeleton: Skeleton, seqlen: int, dtype: torch.dtype) -> int:
    """Bytes of activations a token takes at the widest moment of a layer."""
    widths = [max(ref.shape) for s in skeleton.layer_stages for ref in s.linears.values()]
    per_token = (6 * skeleton.hidden_size + 4 * max(widths, default=skeleton.hidden_size)) * dtype.itemsize
    config = skeleton.model.config.get_text_config()  # type: ignore[union-attr, operator]
    if getattr(config, "_attn_implementation", "sdpa") == "eager":
        per_token += 3 * seqlen * int(config.num_attention_heads) * 4  # scores, mask and softmax in full
    return per_token


def choose_batch(budget: Budget, samples: int, seqlen: int, max_ram: int | None) -> int:
    """Samples a batch. Raises ResourceError when not even one fits into `max_ram` bytes, or into the machine."""
    batch = max(1, min(samples, BATCH_TOKENS // seqlen))
    limit, whose = max_ram, "--max-ram"
    if limit is None:
        free = available_bytes()
        if free is None:
            return batch
        limit, whose = resident_bytes() + free, "this machine's free memory of"
    if budget.peak(1) > limit:
        least = -(-budget.peak(1) >> 20) + 1
        raise ResourceError(
            f"{whose} {format_bytes(limit)} is not enough: this job needs --max-ram {least}MiB "
            f"({format_bytes(budget.stage)} for the largest stage, {format_bytes(budget.per_sample)} for one sample, "
            f"the rest for the program itself)"
        )
    return min(batch, (limit - budget.peak(0)) // budget.per_sample) if budget.per_sample else batch


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
    """The device to compute on; "auto" is the GPU if there is one. Raises UsageError when it cannot be used."""
    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(requested)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UsageError(f"--device {requested} cannot be used here: {' '.join(str(e).split())[:160]}") from e
    return device
