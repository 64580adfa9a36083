"""Quantised weights in the formats of GPTQ and AWQ: which tensors belong together, and how they encode a weight.

Both store a linear P as `P.qweight`, `P.scales` and `P.qzeros`, inputs first. Which linears are quantised, and their
sizes, is derived from these tensors; bits and groups are those of config.json, which they must fit. Layouts: see
quantised.py. Imports neither torch nor numpy.

Three things that descriptions of GPTQ leave open:

- A zero point of 0, less one. GPTQModel, which is what transformers loads such checkpoints with, subtracts from the
  whole word, so that 0 borrows from its neighbour, and adds to the whole word again; so do we.
- `sym` with stored zero points that are not less one, in spite of the format, as some programs have written them. Zero
  points of symmetric codes are half of the range, as vLLM has it too; others than that, or that less one, are refused.
- Negative scales. AutoRound writes them for symmetric codes; in other codes, they are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.encoded import AWQ, GPTQ, Encoding, damaged_tensor, fits, missing_tensor, wrong_scales
from streamprune.disk.header import TensorRef, show
from streamprune.errors import UnsupportedError

METHODS = (GPTQ, AWQ)
"""As config.json names them."""

_FORMATS = {GPTQ: ("gptq", "gptq_v2"), AWQ: ("gemm",)}
_BITS = {GPTQ: (4, 8), AWQ: (4,)}
_SCALES = ("F16", "BF16", "F32")
_WORD = 32


@dataclass(frozen=True)
class Layout:
    """How the weights of a checkpoint are stored; `group_size` is -1 if all inputs are one group."""

    kind: str
    bits: int
    group_size: int
    symmetric: bool = False
    less_one: bool = False
    ordered: bool = False
    """Whether inputs of a group need not follow each other, so that `P.g_idx` must be there."""


def read_layout(method: str, description: Mapping[str, Any], refuse: Callable[[str], UnsupportedError]) -> Layout:
    """The layout of a `quantization_config`. Raises what `refuse` makes of a reason for which it is not supported."""

    def first(*keys: str) -> Any:
        return next((description[key] for key in keys if description.get(key) is not None), None)

    bits, size = first("bits", "w_bit"), first("group_size", "q_group_size")
    form = first("checkpoint_format", "format") if method == GPTQ else first("version", "format")
    form = str(_FORMATS[method][0] if form is None else form).lower()
    if form not in _FORMATS[method] or description.get("is_marlin_format"):
        raise refuse(f"{method} in the format {'marlin' if description.get('is_marlin_format') else form}")
    if type(bits) is not int or bits not in _BITS[method]:
        raise refuse(f"{method} with bits {bits}")
    if type(size) is not int or not (size == -1 or size > 0):
        raise refuse(f"{method} with group_size {size}")
    if (packed := str(description.get("pack_dtype") or "int32").removeprefix("torch.")) != "int32":
        raise refuse(f"{method} in words of {packed}")
    dynamic = description.get("dynamic") or {}
    if not isinstance(dynamic, Mapping) or not all(str(key).startswith("-:") for key in dynamic):
        raise refuse(f"{method} with other bits or groups for some linears (dynamic)")
    if method == AWQ:
        if description.get("zero_point") is False:
            raise refuse("awq without zero points")
        return Layout(AWQ, bits, size)
    ordered = description.get("desc_act") is True and size != -1
    return Layout(GPTQ, bits, size, description.get("sym") is True, form == "gptq", ordered)


def find_words(checkpoint: Checkpoint, layout: Layout) -> dict[str, Encoding]:
    """How the quantised weights are stored, by name. Raises CheckpointError for tensors that do not fit each other."""
    tensors, found = checkpoint.tensors, {}
    for name, ref in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf in ("qzeros", "g_idx") and f"{module}.qweight" not in tensors:
            raise missing_tensor(checkpoint, ref, f"{module}.qweight")
        if leaf != "qweight":
            continue
        wanted = ("scales", "qzeros", "g_idx") if layout.ordered else ("scales", "qzeros")
        for other in wanted:
            if f"{module}.{other}" not in tensors:
                raise missing_tensor(checkpoint, ref, f"{module}.{other}")
        scale, zero = tensors[f"{module}.scales"], tensors[f"{module}.qzeros"]
        groups = tensors.get(f"{module}.g_idx") if layout.kind == GPTQ else None
        found[f"{module}.weight"] = _encoding(checkpoint, layout, ref, scale, zero, groups)
    return found


def _encoding(
    checkpoint: Checkpoint, layout: Layout, ref: TensorRef, scale: TensorRef, zero: TensorRef, groups: TensorRef | None
) -> Encoding:
    if ref.dtype != "I32" or len(ref.shape) != 2 or min(ref.shape) < 1:
        sizes = "in x bits / 32, out" if layout.kind == GPTQ else "in, out x bits / 32"
        raise damaged_tensor(
            checkpoint, ref, f"is {ref.dtype} {list(ref.shape)}, where {layout.kind} has I32 [{sizes}]"
        )
    each = _WORD // layout.bits
    inputs, outputs = ref.shape
    if layout.kind == GPTQ:
        inputs *= each
    else:
        outputs *= each
    size = inputs if layout.group_size == -1 else min(layout.group_size, inputs)
    found = Encoding(
        layout.kind, (outputs, inputs), (size, 1), ref, scale, zero, layout.bits,
        scale.dtype if scale.dtype in _SCALES else "F32", groups, layout.symmetric, layout.less_one,
    )  # fmt: skip
    if scale.dtype not in _SCALES or not fits(scale, found.scales):
        raise wrong_scales(checkpoint, found)
    words = (found.scales[1], outputs // each)
    if zero.dtype != "I32" or outputs % each or not fits(zero, words):
        raise damaged_tensor(
            checkpoint, zero,
            f"is {zero.dtype} {list(zero.shape)}, where {show(ref.name)} {list(ref.shape)} needs I32 {list(words)} for "
            f"{layout.bits} bits, as config.json has it",
        )  # fmt: skip
    if groups is not None and (groups.dtype not in ("I32", "I64") or groups.shape != (inputs,)):
        raise damaged_tensor(
            checkpoint, groups,
            f"is {groups.dtype} {list(groups.shape)}, where {show(ref.name)} {list(ref.shape)} needs I32 [{inputs}]",
        )  # fmt: skip
    return found
