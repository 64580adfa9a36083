"""Plausibility of config.json against the shard headers, before a model with a billion layers is built.

Only sizes that the checkpoint cannot possibly have are refused here; other errors are found, with the tensor's name,
when tensors are matched with the model. Sections such as `text_config` are checked in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamprune.disk.checkpoint import Checkpoint, open_checkpoint
from streamprune.disk.header import show
from streamprune.errors import CheckpointError, UnsupportedError

_LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "num_mtp_layers", "num_nextn_predict_layers",
)  # fmt: skip
_SIZES = (
    "vocab_size", "hidden_size", "n_embd", "d_model", "intermediate_size", "moe_intermediate_size", "ffn_dim",
    "n_inner", "shared_expert_intermediate_size", "d_ff", "head_dim", "num_attention_heads", "num_key_value_heads",
    "n_head", "num_heads", "word_embed_proj_dim", "q_lora_rank", "kv_lora_rank",
)  # fmt: skip
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "moe_num_experts")
_HARMLESS = 1 << 10, 1 << 24, 1 << 16
"""Numbers of layers, sizes and experts that are always accepted: they are built quickly, and may be unused
leftovers."""


def refuse_adapter(checkpoint: Checkpoint) -> None:
    """Refuses a folder with an adapter beside full weights: transformers would load another model than the weights.

    Raises:
        UnsupportedError: there is an adapter_config.json.
    """
    path = checkpoint.path / "adapter_config.json"
    if path.exists():
        raise UnsupportedError(
            f"{path}: an adapter beside full weights; transformers would load the adapter and its base, which is "
            "another model than these weights: merge it (peft's merge_and_unload) and pass what that saves, or move "
            "the adapter's files away to use these weights alone"
        )


def check_folder(name: str) -> None:
    """check_claims for a model that is a folder: for commands that import torch before they open their model."""
    if Path(name).is_dir():
        check_claims(open_checkpoint(Path(name)))


def check_claims(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError if config.json has far more layers or experts, or larger sizes, than the tensors allow.

    Also raises UnsupportedError as refuse_adapter.
    """
    refuse_adapter(checkpoint)
    tensors = len(checkpoint.tensors)
    axis = max((size for ref in checkpoint.tensors.values() for size in ref.shape), default=0)
    layers, sizes, experts = map(max, _HARMLESS, (tensors, axis, max(tensors, axis)))
    limits = {
        **dict.fromkeys(_LAYERS, (layers, f"holds {tensors} tensors")),
        **dict.fromkeys(_SIZES, (sizes, f"holds no tensor with an axis longer than {axis}")),
        **dict.fromkeys(_EXPERTS, (experts, f"holds {tensors} tensors, of axes up to {axis}")),
    }
    sections = {"": checkpoint.config, **{f"{k}.": v for k, v in checkpoint.config.items() if isinstance(v, Mapping)}}
    for prefix, section in sections.items():
        for name, (limit, why) in limits.items():
            value: Any = section.get(name)
            if isinstance(value, int | float) and value > limit:
                raise CheckpointError(
                    f"{checkpoint.path / 'config.json'}: {prefix}{name} is {show(value)}, but the checkpoint {why}; "
                    "the two do not belong together, download the checkpoint again"
                )
