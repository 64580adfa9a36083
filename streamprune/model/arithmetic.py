"""Where and in which dtype to compute, by name: as far as that can be known without torch. See device.py."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.float_quantized import SCALE
from streamprune.errors import UnsupportedError, UsageError
from streamprune.model.stages import PRUNABLE

COMPUTED = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""By the name in a safetensors header."""

_GPUS = ("nvidia*", "nvhost*", "nvmap", "kfd", "dxg")
"""What a driver of NVIDIA, Tegra, AMD or WSL puts into /dev."""
_DEVICES = Path("/dev")


def stored_name(checkpoint: Checkpoint) -> str:
    """The dtype of most bytes of a checkpoint, not counting FP8 weights and their scales.

    Raises UnsupportedError when it is not BF16, F16 or F32.
    """
    sizes: dict[str, int] = {}
    scaled = {name for name in checkpoint.tensors if name + SCALE in checkpoint.tensors}
    left_out = {*scaled, *(name + SCALE for name in scaled)}
    for ref in [ref for name, ref in checkpoint.tensors.items() if name not in left_out] or checkpoint.tensors.values():
        sizes[ref.dtype] = sizes.get(ref.dtype, 0) + ref.nbytes
    largest = max(sizes, key=lambda d: sizes[d])
    if largest not in PRUNABLE:
        raise UnsupportedError(f"{checkpoint.path}: most weights are {largest}; only BF16, F16 and F32 can be pruned")
    return largest


def native_bf16() -> bool:
    """Whether the processor multiplies bf16 matrices in hardware (AMX, AVX512-BF16, Arm BF16)."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return False
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    flags = set(found.group(1).split()) if found else set()
    return bool(flags & {"amx_bf16", "avx512_bf16", "bf16"})


def compute_name(requested: str, stored: str, on_cpu: bool) -> str:
    """The dtype to compute in: the requested one or, with "auto", the stored one if it is fast here, else float32.

    `stored` is a name such as "bfloat16". Raises UsageError for an unknown name.
    """
    if requested not in ("auto", *COMPUTED.values()):
        raise UsageError(f"--dtype {requested}: choose auto, float32, bfloat16 or float16")
    if requested != "auto":
        return requested
    if not on_cpu:
        return stored
    return "bfloat16" if stored == "bfloat16" and native_bf16() else "float32"


def is_cpu(requested: str) -> bool:
    """Whether a --device is certainly the CPU: this machine has no GPU, as far as its drivers say.

    Where torch is there, it is asked. False means that it has to be.
    """
    if requested != "auto":
        return requested == "cpu"
    if (torch := sys.modules.get("torch")) is not None:
        return not torch.cuda.is_available()
    return sys.platform == "darwin" or not any(any(_DEVICES.glob(name)) for name in _GPUS)
