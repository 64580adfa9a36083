"""A tiny configuration of any family of transformers, made from its default one without knowing the family.

Sizes are replaced by small ones, by the names that configurations use for them; everything else stays as it is. Where
no valid model comes of it, the family needs a configuration of its own (families.py, mixtures.py).
"""

from __future__ import annotations

from functools import cache
from typing import Any

from families import HIDDEN, VOCAB, Family

LARGEST = 6_000_000
"""Parameters of a model that still is tiny enough to be tried."""

_WIDTHS = ("hidden_size", "n_embd", "d_model", "embed_dim", "projection_dim", "out_hidden_size", "text_hidden_size",
           "hidden_dim")  # fmt: skip
_INNER = ("intermediate_size", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "dff")
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers", "decoder_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_MIXED = ("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size")
_LATENT = ("q_lora_rank", "kv_lora_rank")
_HEAD_WIDTHS = ("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "linear_key_head_dim", "d_kv",
                "linear_value_head_dim", "index_head_dim")  # fmt: skip
_SIZES: dict[str, int] = {
    "vocab_size": VOCAB, "num_key_value_heads": 2, "max_position_embeddings": 64, "n_positions": 64,
    "sliding_window": 8, "num_experts_per_tok": 2, "image_size": 16, "patch_size": 8, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "mamba_n_heads": 4,
    "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "n_groups": 1, "ssm_state_size": 8, "chunk_size": 8, "time_step_rank": 4, "state_size": 8,
    **dict.fromkeys(_WIDTHS, HIDDEN), **dict.fromkeys(_INNER, 64), **dict.fromkeys(_DEPTHS, 2),
    **dict.fromkeys(_HEADS, 4), **dict.fromkeys(_EXPERTS, 8), **dict.fromkeys(_MIXED, 16), **dict.fromkeys(_LATENT, 16),
    **dict.fromkeys(_HEAD_WIDTHS, 8),
}  # fmt: skip
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_BY_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type")


def shrunk(kind: str) -> Any:
    """A tiny configuration of the model type `kind`. Raises whatever the configuration's own checks raise."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind)
    _shrink(config)
    return config


def shorten_sections(config: Any) -> None:
    """Sections of positions in three dimensions, in the lengths that the tiny heads have."""
    text = config.get_text_config(decoder=True)
    found = dict(getattr(text, "rope_parameters", None) or {"rope_type": "default", "rope_theta": 10000.0})
    pairs = int(_SIZES["head_dim"] * found.get("partial_rotary_factor", 1.0)) // 2
    text.rope_parameters = found | {"mrope_section": [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]}


def _shrink(config: Any) -> None:
    special = 3
    if getattr(config, "is_decoder", None) is False:
        config.is_decoder = True
    for name, value in list(vars(config).items()):
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            _shrink(value)
        elif isinstance(value, bool):
            continue
        elif name in _SIZES and isinstance(value, int) and value > _SIZES[name]:
            setattr(config, name, _SIZES[name])
        elif name in _BY_LAYER and isinstance(value, list | tuple):
            setattr(config, name, list(dict.fromkeys(value))[:2] if len(set(value)) > 1 else list(value)[:2])
        elif isinstance(value, int) and (name.endswith(("_token_id", "_token_index"))):
            special += name not in _SPECIAL
            setattr(config, name, _SPECIAL.get(name, special))
    if getattr(config, "kv_lora_rank", None):
        config.num_key_value_heads = config.num_attention_heads  # latent attention: all heads have keys of their own


@cache
def found(kind: str) -> Family | None:
    """The family of a model type without a configuration of its own; None where no tiny model of it can be run."""
    import torch

    for adapt in (None, shorten_sections):
        try:
            config = shrunk(kind)
            if adapt is not None:
                adapt(config)
            config = type(config).from_dict(config.to_dict())  # as it is read from a file
            loader = loader_of(config)
            with torch.device("meta"):
                parameters = dict(loader.from_config(config).named_parameters())
            if sum(p.numel() for p in parameters.values()) > LARGEST:
                return None
            model = loader.from_config(config).eval()
            with torch.no_grad():
                model.generate(torch.arange(10, 26)[None], max_new_tokens=2, pad_token_id=0)
            inside = {*(model.get_decoder() if config.get_text_config() is not config else model).modules()}
            paths = [path for path, m in model.named_modules() if m in inside and _are_layers(m, config)]
            layers = min(paths, key=len)
            if any(p.dim() == 3 and "conv" not in name and name.startswith(layers) for name, p in parameters.items()):
                return None  # experts in one tensor need a family in mixtures.py
            return Family(type(model).__name__, layers=layers, auto=loader.__name__, config=config)
        except Exception:  # noqa: BLE001 - whatever a model that does not fit together raises
            continue
    return None


def loader_of(config: Any) -> Any:
    """The class of transformers that makes and loads the whole model, as model/skeleton.py chooses it."""
    import transformers

    known = [transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText,
             transformers.AutoModelForMultimodalLM]  # fmt: skip
    if config.get_text_config() is not config:
        known = [*known[1:], known[0]]
    return next(loader for loader in known if type(config) in loader._model_mapping)


def _are_layers(module: Any, config: Any) -> bool:
    import torch

    text = config.get_text_config(decoder=True)
    return isinstance(module, torch.nn.ModuleList) and len(module) == text.num_hidden_layers
