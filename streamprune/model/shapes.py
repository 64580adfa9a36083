"""Sizes read from a model's configuration and headers: of linears, attention and experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamprune.model.stages import Outline, Stage
from streamprune.process.memory import available_bytes

if TYPE_CHECKING:
    from streamprune.model.skeleton import Skeleton

_PAGE_CACHE_SHARE = 0.7
"""Share of the available memory that the page cache is assumed to fill."""


def linear_shape(model: Outline, name: str, stage: Stage) -> tuple[int, int]:
    """(out, in) of a linear, even if its weight is stored transposed."""
    rows, width = stage.linears[name].shape
    return (width, rows) if name in model.transposed else (rows, width)


def attention_width(skeleton: Skeleton) -> int:
    """Width of all queries of a token: heads · head_dim, or the hidden size if the configuration lacks these."""
    config = skeleton.model.config.get_text_config()  # type: ignore[union-attr, operator]
    heads, each = getattr(config, "num_attention_heads", None), getattr(config, "head_dim", None)
    return int(heads) * int(each) if heads and each else skeleton.hidden_size


def routed_share(skeleton: Skeleton) -> float:
    """The fraction of a layer's experts that a token is routed to; 1 if the configuration does not say."""
    config = skeleton.model.config.get_text_config()  # type: ignore[union-attr, operator]
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k", "top_k_experts")
    chosen = next((n for name in names if isinstance(n := getattr(config, name, None), int)), None)
    experts = max((len(e.down) for e in skeleton.experts.values()), default=0)
    return min(1.0, chosen / experts) if chosen and experts else 1.0


def uncached_experts(stage: Stage) -> int:
    """Bytes of a layer's experts if the page cache cannot hold them all, so that each use reads them again; else 0."""
    experts = sum(stage.linears[name].nbytes for e in stage.experts for name in e.linears)
    free = available_bytes()
    return experts if free is not None and experts > _PAGE_CACHE_SHARE * free else 0
