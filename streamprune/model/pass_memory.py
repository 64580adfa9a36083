"""Memory that a forward pass takes: for each token, and with all its weights and states on a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamprune.model.extra_memory import CONTEXT

if TYPE_CHECKING:
    import torch

    from streamprune.model.skeleton import Skeleton

KERNELS = 384 << 20
"""Device memory for temporaries of the selection kernels (kernels/torch_ops.py)."""

_ROUTING = 256
"""Approximate bytes of a token's routing: experts, their weights, and temporaries to find an expert's tokens."""


def waiting_bytes(skeleton: Skeleton, dtype: torch.dtype) -> int:
    """Bytes of a token that waits for experts: their input, their output, and the routing; 0 where there are none."""
    return 2 * skeleton.hidden_size * dtype.itemsize + _ROUTING if skeleton.experts else 0


def token_bytes(skeleton: Skeleton, seqlen: int, dtype: torch.dtype) -> int:
    """Peak bytes of activations per token in a layer's forward pass.

    Nine states as they are kept between layers, of which three are being read or written in the background, and four
    activations of the widest linear, in the compute dtype; for models with more than hidden states also what is looked
    up by the tokens, and streams in float32.
    """
    widths = [max(ref.shape) for s in skeleton.layer_stages for ref in s.linears.values()]
    between = skeleton.between
    per_token = (9 * between.most(seqlen) + 4 * max(widths, default=skeleton.hidden_size)) * dtype.itemsize
    if not skeleton.ordinary:
        per_token += 3 * between.hidden * 4 + 4 * between.aside * dtype.itemsize  # streams are mixed in float32
    per_token += waiting_bytes(skeleton, dtype)
    config = skeleton.model.config.get_text_config()  # type: ignore[union-attr, operator]
    if getattr(config, "_attn_implementation", "sdpa") == "eager":
        per_token += (
            3 * seqlen * int(getattr(config, "num_attention_heads", None) or 0) * 4
        )  # scores, mask and softmax in full
    return per_token


def memory_of(
    skeleton: Skeleton, seqlen: int, samples: int, dtype: torch.dtype, layers: int, resident: bool, batch: int,
    *, head: bool = False,
) -> int:  # fmt: skip
    """Estimated peak device bytes of a budget.Layout. Resident states count twice: a layer's input and output."""
    from streamprune.model.device import cache_dtype

    weights = max((layers * s.resident for s in skeleton.layer_stages), default=0)
    if head:  # its weight may be tied to the embedding's
        weights = max(
            weights, *(t.nbytes for s in (skeleton.stages[0], skeleton.stages[-1]) for t in s.resident_tensors)
        )
    state = seqlen * skeleton.between.most(seqlen) * cache_dtype(skeleton.dtype, dtype).itemsize
    states = 2 * samples * state if resident else 0
    in_flight = 4 * batch * state
    return CONTEXT + KERNELS + weights + states + in_flight + batch * seqlen * token_bytes(skeleton, seqlen, dtype)
