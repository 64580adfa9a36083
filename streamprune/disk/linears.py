"""Which tensors of a checkpoint are linears of its layers, by name, dtype and shape alone: no model is built.

A *linear* here is a 2-D tensor `NAME.weight` of a floating dtype whose name is within a numbered list of layers
(`layers.7.`, `h.7.`, `blocks.7.`), except norms, embeddings, routers of experts, coefficients that mix streams of
hidden states, `dt_proj` of Mamba layers, which stays dense, and the layers of vision and audio towers: where there is a
`language_model` or a `text_model`, all that is not within it. Fused experts, a 3-D tensor (experts, rows, columns) or
DBRX's 2-D one (experts · rows, columns), are not linears here; `expert_names` lists their matrices.
"""

from __future__ import annotations

import re

from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.header import TensorRef
from streamprune.errors import UsageError

FLOATING = frozenset({"F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3"})
"""Dtypes of linears; the FNUZ variants of float8 are not supported."""

_LAYER = re.compile(r"(^|\.)(layers|h|blocks|block|layer)\.\d+\.")
_NO_LINEAR = re.compile(
    r"(^|\.)(vision|visual|audio)[^.]*\.|router|(^|\.)(gate|wg|shared_expert_gate)(_?\d+)?$|\.(mixer|mamba)\.dt_proj$|"
    r"_coefs$|block_inject_weight$|\.gate\.|"
    r"(^|[._])(norm|layernorm|ln|emb|embed|embedding|embeddings|embed_tokens|relative_attention_bias)(_?\d+)?$"
)
_TEXT_MODEL = re.compile(r"(^|\.)(language_model|text_model)\.")
_NUMBER = re.compile(r"[0-9]{1,18}")
_EXPERT = re.compile(r"\.experts\.([0-9]{1,18})\.")
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_CONV1D_NAMES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})
_FUSED = re.compile(
    r"(?:^|\.)(gate_up_proj|gate_proj|up_proj|down_proj|input_linear|output_linear|w1|w2|w3|v1|fc1|fc2)$"
)
_STACKED, _STACKED_DOWN = ".experts.mlp", re.compile(r"\.experts\.\d+\.w2$")
"""DBRX's experts; the matrices of the last projection are stored (in, out)."""
_TRANSPOSED_EXPERTS = frozenset({"gpt_oss", "openai_privacy_filter", "aria", "aria_text", "llama4", "llama4_text"})


def is_linear_weight(name: str) -> bool:
    """Whether a tensor's name is that of a layer's linear; the caller checks dtype and shape."""
    module = name.removesuffix(".weight")
    return module != name and bool(_LAYER.search(name)) and not _NO_LINEAR.search(module)


def find_linears(checkpoint: Checkpoint) -> dict[str, TensorRef]:
    """The linears of a checkpoint by module name, layer 2 before layer 10; see the top for the rule."""
    found = {
        name.removesuffix(".weight"): ref
        for name, ref in checkpoint.tensors.items()
        if len(ref.shape) == 2 and ref.nbytes > 0 and ref.dtype in FLOATING and is_linear_weight(name)
    }
    within = {name: ref for name, ref in found.items() if _TEXT_MODEL.search(name)}
    found = within or found
    if checkpoint.config.get("zero_expert_num"):
        found = {name: ref for name, ref in found.items() if not _gives_back(checkpoint, name)}
    return dict(sorted(found.items(), key=lambda item: by_number(item[0])))


def _gives_back(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a linear is of an expert that gives back its input, and so is not used; transformers stores some."""
    number, routed = _EXPERT.search(name), checkpoint.config.get("n_routed_experts")
    return number is not None and isinstance(routed, int) and int(number[1]) >= routed


def by_number(name: str) -> tuple[tuple[bool, int, str], ...]:
    """A sort key for module names that compares numbers between dots by value."""
    return tuple(
        (False, 0, part) if not _NUMBER.fullmatch(part) else (True, int(part), part) for part in name.split(".")
    )


def expert_names(checkpoint: Checkpoint, ref: TensorRef) -> list[str]:
    """The names of the experts' matrices in a tensor, `….experts.3.down_proj.weight`; empty for other tensors.

    JetMoE's attention has experts, too; they stay dense.
    """
    module = ref.name.removesuffix(".weight")
    parent, _, leaf = module.rpartition(".")
    if ref.dtype not in FLOATING or not _LAYER.search(ref.name) or not _FUSED.search(module):
        return []
    if ".self_attention." in module:
        return []
    if len(ref.shape) == 3:
        count = ref.shape[0]
    elif len(ref.shape) == 2 and parent.endswith(_STACKED):
        settings = checkpoint.config.get("ffn_config")
        count = settings.get("moe_num_experts", 0) if isinstance(settings, dict) else 0
        if not isinstance(count, int) or count < 1 or ref.shape[0] % count:
            return []
        parent = parent.removesuffix(".mlp")
    else:
        return []
    within = parent if parent.endswith("experts") else f"{parent}.experts"
    return [f"{within}.{expert}.{leaf}.weight" for expert in range(count)]


def is_transposed(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the linear `name` is stored as (in, out), as in transformers' Conv1D and the experts of some models."""
    kind, leaf = checkpoint.config.get("model_type"), name.rpartition(".")[2]
    conv1d = kind in _CONV1D_MODELS and leaf in _CONV1D_NAMES
    stacked = kind == "dbrx" and bool(_STACKED_DOWN.search(name))
    together = kind in _TRANSPOSED_EXPERTS and ".experts." in name and bool(_FUSED.search(leaf))
    return conv1d or stacked or (together and not _is_apart(checkpoint, name))


def _is_apart(checkpoint: Checkpoint, name: str) -> bool:
    """Whether an expert's linear has a tensor of its own, as stored for FP8: such are (out, in) in all models."""
    return f"{name}.weight" in checkpoint.tensors


def compile_filter(flag: str, pattern: str | None) -> re.Pattern[str] | None:
    """The compiled --only or --skip expression, None for None. Raises UsageError if it is not a regular expression."""
    if pattern is None:
        return None
    try:
        return re.compile(pattern)
    except re.error as e:
        raise UsageError(f"{flag} {pattern!r} is not a regular expression: {e}") from e
