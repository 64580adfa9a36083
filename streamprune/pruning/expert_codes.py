"""FP8 for experts whose matrices are all in one tensor: they are written one by one, as linears of their own.

The format `float-quantized` has a scale for each row of a linear, and none for a tensor of all experts. Whoever stores
such experts in FP8 (llm-compressor first) therefore writes `….experts.3.gate_proj.weight`, `….up_proj.weight` and
`….down_proj.weight`, each (out, in) with its `weight_scale`. Which families can be loaded like that depends on who
loads them: transformers reads those that its tables can merge again, vLLM some more. All others are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from streamprune.disk.header import DTYPE_BITS, TensorRef
from streamprune.errors import UnsupportedError
from streamprune.model.experts import APART
from streamprune.model.stages import Outline

IN_TRANSFORMERS = frozenset({
    "afmoe", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3",
    "deepseek_v32", "dots1", "dots3_note_text", "ernie4_5_moe", "exaone_moe", "flex_olmo", "flint", "glm4_moe",
    "glm4_moe_lite", "glm4v_moe", "glm5_next", "glm_moe_dsa", "hunyuan_v1_moe", "hy_v3", "jamba", "kolibri1",
    "laguna", "llama4", "llama4_text", "mellum", "mimo_v2_flash", "nemotron_h", "olmoe", "qwen2_moe",
    "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen4_exp_text", "solar_open",
})  # fmt: skip
"""Families whose experts transformers also reads from a matrix for each expert and projection, by these names; those of
Llama 4 only where they are quantised."""
IN_VLLM = frozenset({"granitemoe", "granitemoehybrid"})
"""Families whose experts only vLLM reads like that."""
_ALWAYS_APART = frozenset({"llama4", "llama4_text"})
"""Families whose experts transformers takes for linears in every checkpoint of compressed-tensors."""

Apart = Mapping[str, tuple[TensorRef, ...]]
"""Linear of an expert -> what it is stored as: matrices (out, in) of which each has rows of it, one below the other.
Not quantised yet, and without file offsets."""


def experts_apart(kind: str, linears: Mapping[str, TensorRef], model: Outline) -> dict[str, tuple[TensorRef, ...]]:
    """What those of the `linears` that are to be quantised become whose tensor holds all experts.

    `kind` is the model type. Raises UnsupportedError where no program would load them.
    """
    shapes = {ref.name: ref.shape for stage in model.stages for ref in stage.tensors}
    found: dict[str, tuple[TensorRef, ...]] = {}
    for name, ref in linears.items():
        if shapes[ref.name] == ref.shape:
            continue
        if kind not in IN_TRANSFORMERS | IN_VLLM or name.rpartition(".")[2] not in APART:
            raise UnsupportedError(
                f"{name} is a part of {ref.name}, which holds all experts; FP8 checkpoints have no scales for such "
                f"tensors, and neither transformers nor vLLM is known to load experts of {kind} stored one by one; "
                "leave them out with --skip '\\.experts\\.', or prune to bf16 and let the server quantise while it "
                "loads (vLLM: --quantization fp8)"
            )
        found[name] = _matrices(name, ref, name in model.transposed)
    for experts in (experts for stage in model.stages for experts in stage.experts):
        left = [name for name in experts.linears if name not in linears]
        if left and (any(name in found for name in experts.linears) or _has_fused(kind, model, left[0], shapes)):
            raise UnsupportedError(
                f"{left[0]} is not pruned; in FP8, experts of {kind} can only be loaded all together: let --only and "
                "--skip choose all of a layer's experts"
            )
    return found


def _has_fused(kind: str, model: Outline, name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a linear is in a tensor that is not loaded beside linears in FP8: transformers expects linears there."""
    ref = next(stage.linears[name] for stage in model.stages if name in stage.linears)
    return kind in _ALWAYS_APART and shapes[ref.name] != ref.shape


def _matrices(name: str, ref: TensorRef, transposed: bool) -> tuple[TensorRef, ...]:
    head, _, leaf = ref.name.removesuffix(".weight").rpartition(".")
    path = head if head.endswith("experts") else f"{head}.experts"  # Granite has them as ….input_linear.weight
    _, number, leaf = name.rsplit(".", 2)
    rows, columns = ref.shape[::-1] if transposed else ref.shape
    leaves, width = APART[leaf], DTYPE_BITS[ref.dtype] // 8
    each = rows // len(leaves)
    if each * len(leaves) != rows or each * columns % width:
        raise UnsupportedError(
            f"{name} has {rows} x {columns} weights, an odd number of bytes in FP8, after which its scales would not "
            "be aligned; --skip it"
        )
    size = each * columns * width
    made = (
        replace(ref, name=f"{path}.{number}.{one}.weight", shape=(each, columns), begin=0, end=size) for one in leaves
    )
    return tuple(made)


def told_apart(reports: Sequence[Mapping[str, Any]], apart: Apart) -> list[dict[str, Any]]:
    """Reports on linears as they are stored: what is known of a matrix as a whole is said of each of its parts."""
    told: list[dict[str, Any]] = []
    for report in reports:
        path = str(report["name"]).rpartition(".")[0]
        parts = apart.get(str(report["name"]), ())
        for part in parts:
            leaf = part.name.removesuffix(".weight").rpartition(".")[2]
            rows, pruned = part.shape[0], report["pruned"] * part.shape[0] // report["rows"]
            told.append({**report, "name": f"{path}.{leaf}", "rows": rows, "pruned": pruned})
        if not parts:
            told.append(dict(report))
    return told
