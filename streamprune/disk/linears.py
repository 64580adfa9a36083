"""Which tensors of a checkpoint are linears of its layers, by names, dtypes and shapes alone: no model is built.

A *linear* is here a 2-D tensor `NAME.weight` of a floating dtype whose name lies in a numbered list of layers
(`layers.7.`, `h.7.`, `blocks.7.`), except norms, embeddings, routers of experts, and the layers of vision and audio
towers. Fused experts (3-D tensors) are not counted.
"""

from __future__ import annotations

import re

from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.header import TensorRef

FLOATING = frozenset({"F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3"})
"""Dtypes of linears; the FNUZ kinds of float8 are not here."""

_LAYER = re.compile(r"(^|\.)(layers|h|blocks|block|layer)\.\d+\.")
_NO_LINEAR = re.compile(
    r"(^|\.)(vision|visual|audio)[^.]*\.|router|(^|[._])(gate|wg|norm|layernorm|ln|emb|embed|embedding|embeddings|"
    r"embed_tokens|relative_attention_bias)(_?\d+)?$"
)
_NUMBER = re.compile(r"[0-9]{1,18}")
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_CONV1D_NAMES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})


def is_linear_weight(name: str) -> bool:
    """Whether the name of a tensor is that of a layer's linear; dtype and shape are for the caller to look at."""
    module = name.removesuffix(".weight")
    return module != name and bool(_LAYER.search(name)) and not _NO_LINEAR.search(module)


def find_linears(checkpoint: Checkpoint) -> dict[str, TensorRef]:
    """The linears of a checkpoint by module name, layer 2 before layer 10; the rule is at the top."""
    found = {
        name.removesuffix(".weight"): ref
        for name, ref in checkpoint.tensors.items()
        if len(ref.shape) == 2 and ref.nbytes > 0 and ref.dtype in FLOATING and is_linear_weight(name)
    }
    return dict(sorted(found.items(), key=lambda item: by_number(item[0])))


def by_number(name: str) -> tuple[tuple[bool, int, str], ...]:
    """A sort key for module names: numbers between dots count as numbers."""
    return tuple(
        (False, 0, part) if not _NUMBER.fullmatch(part) else (True, int(part), part) for part in name.split(".")
    )


def is_conv1d(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the linear `name` is one of transformers' Conv1D, stored as (in, out)."""
    return checkpoint.config.get("model_type") in _CONV1D_MODELS and name.rpartition(".")[2] in _CONV1D_NAMES
