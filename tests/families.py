"""The families of architectures that are tried: each a configuration of a few thousand parameters, and a random model.

The tests and `tools/families.py` share this list. Nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VOCAB = 199
HIDDEN = 32

_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_COMMON = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_attention_heads": 4, **_SPECIAL}
_INNER = {"intermediate_size": 64, "max_position_embeddings": 64}
_GROUPED = _INNER | {"num_key_value_heads": 2}
_HEAD = _GROUPED | {"head_dim": 8}
_SLIDING = _HEAD | {"sliding_window": 8}


@dataclass(frozen=True)
class Family:
    """A model type of transformers."""

    examples: str
    """Models of it that people know, or its class in transformers."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of its configuration, beside vocabulary, width, layers and heads."""
    layers: str = "model.layers"
    """Module path of its decoder layers."""
    notes: str = ""
    vision: Mapping[str, Any] | None = None
    """Of a model that sees: its configuration beside that of the text model, which has the other settings."""
    auto: str = "AutoModelForCausalLM"
    """The class of transformers that makes and loads the whole model."""
    config: Any = None
    """The whole configuration, of a family that was found in transformers' tables (shrunk.py)."""


DENSE: dict[str, Family] = {
    "llama": Family("Llama 1 to 3, TinyLlama, Vicuna, Yi", _GROUPED),
    "mistral": Family("Mistral 7B, Nemo, Zephyr", _SLIDING),
    "ministral": Family("Ministral", _SLIDING),
    "qwen2": Family("Qwen2, Qwen2.5, QwQ", _GROUPED),
    "qwen3": Family("Qwen3, dense", _HEAD),
    "gemma": Family("Gemma", _HEAD),
    "gemma2": Family("Gemma 2", _SLIDING),
    "gemma3_text": Family("Gemma 3 270M, 1B", _SLIDING),
    "vaultgemma": Family("VaultGemma", _SLIDING),
    "phi": Family("Phi-1, 1.5, 2", _INNER),
    "phi3": Family("Phi-3, Phi-4", _GROUPED, notes="q, k, v in one linear, gate and up in one"),
    "olmo": Family("OLMo", _GROUPED),
    "olmo2": Family("OLMo 2", _GROUPED),
    "olmo3": Family("OLMo 3", _SLIDING),
    "gpt_neox": Family("Pythia, GPT-NeoX", _INNER, "gpt_neox.layers", "q, k, v in one linear"),
    "gpt_neo": Family(
        "GPT-Neo",
        {
            "intermediate_size": 64, "max_position_embeddings": 64, "window_size": 8,
            "attention_types": [[["global", "local"], 1]],
        },
        "transformer.h",
    ),
    "gptj": Family("GPT-J", {"n_positions": 64, "rotary_dim": 4, "n_inner": 64}, "transformer.h"),
    "codegen": Family(
        "CodeGen", {"n_positions": 64, "rotary_dim": 4, "n_inner": 64}, "transformer.h", "q, k, v in one linear"
    ),
    "openai-gpt": Family("GPT", {"n_positions": 64}, "transformer.h", "Conv1D: weights stored (in, out)"),
    "gpt2": Family("GPT-2, Cerebras-GPT", {"n_positions": 64}, "transformer.h", "Conv1D: weights stored (in, out)"),
    "gpt_bigcode": Family("StarCoder, SantaCoder", {"n_positions": 64}, "transformer.h", "q, k, v in one linear"),
    "starcoder2": Family("StarCoder2", _GROUPED),
    "opt": Family(
        "OPT", {"ffn_dim": 64, "word_embed_proj_dim": HIDDEN, "max_position_embeddings": 64}, "model.decoder.layers"
    ),
    "bloom": Family("BLOOM, BLOOMZ", {}, "transformer.h", "alibi; q, k, v in one linear"),
    "falcon": Family("Falcon 7B, 40B", {}, "transformer.h", "q, k, v in one linear"),
    "mpt": Family("MPT 7B, 30B", {"expansion_ratio": 2, "max_seq_len": 64}, "transformer.blocks", "alibi"),
    "stablelm": Family("StableLM", _INNER | {"num_key_value_heads": 4}),
    "cohere": Family("Command R", _GROUPED),
    "cohere2": Family("Command R7B, Command A", _SLIDING),
    "granite": Family("Granite 3", _GROUPED),
    "glm": Family("GLM-4 9B", _HEAD, notes="gate and up in one linear"),
    "glm4": Family("GLM-4-0414", _HEAD, notes="gate and up in one linear"),
    "exaone4": Family("EXAONE 4.0", _SLIDING),
    "smollm3": Family("SmolLM3", _GROUPED),
    "nemotron": Family("Nemotron-4, Minitron", _HEAD),
    "persimmon": Family("Persimmon 8B", _INNER, notes="q, k, v in one linear"),
    "xglm": Family("XGLM", {"ffn_dim": 64, "max_position_embeddings": 64}),
    "biogpt": Family("BioGPT", _INNER, "biogpt.layers"),
    "seed_oss": Family("Seed-OSS 36B", _HEAD),
    "hunyuan_v1_dense": Family("Hunyuan 0.5B to 7B", _HEAD),
    "ernie4_5": Family("ERNIE 4.5 0.3B", _HEAD),
    "helium": Family("Helium 2B", _HEAD),
    "apertus": Family("Apertus", _GROUPED),
    "arcee": Family("AFM 4.5B", _HEAD),
    "cwm": Family("Code World Model", _SLIDING),
    "diffllama": Family("DiffLlama", _GROUPED),
    "nanochat": Family("nanochat", _GROUPED),
}  # fmt: skip

OTHERS: dict[str, Family] = {
    "llama4": Family(
        "Llama 4 Scout, Maverick", layers="language_model.model.layers", auto="AutoModelForImageTextToText"
    ),
    "mixtral": Family("Mixtral", _GROUPED | {"num_local_experts": 4}),
    "bert": Family("BERT as a decoder", _INNER | {"is_decoder": True}, "bert.encoder.layer"),
}
"""For single tests."""

_SCANS = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
_STATE = {"state_size": 8, "expand": 2, "conv_kernel": 4, "num_attention_heads": None}
_NO_DT = "dt_proj stays dense"
_ZAMBA = {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "mamba_d_state": 8}
RECURRENT: dict[str, Family] = {
    "mamba": Family("Mamba", _STATE, "backbone.layers", _NO_DT),
    "falcon_mamba": Family("Falcon Mamba 7B", _STATE, "backbone.layers", _NO_DT),
    "mamba2": Family(
        "Mamba 2, Codestral Mamba", _STATE | {"num_heads": 8, "head_dim": 8, "n_groups": 1}, "backbone.layers"
    ),
    "zamba2": Family(
        "Zamba2",
        _GROUPED
        | _ZAMBA
        | {
            "mamba_headdim": 8, "n_mamba_heads": 8, "mamba_ngroups": 1, "num_mem_blocks": 1, "adapter_rank": 4,
            "use_mem_rope": False, "chunk_size": 8,
        },
        notes="layers 1 and 3 share weights, which are pruned once",
    ),
    "zamba": Family(
        "Zamba 7B", _GROUPED | _ZAMBA | {"n_mamba_heads": 2, "mamba_dt_rank": 4},
        notes="layers 1 and 3 share weights, which are pruned once; weights for each Mamba head stay dense",
    ),
    "xlstm": Family(
        "xLSTM 7B",
        {
            "num_attention_heads": None, "num_heads": 4, "num_blocks": 2, "chunk_size": 8, "qk_dim_factor": 2.0,
            "v_dim_factor": 2.0,
        },
        "backbone.blocks",
    ),
    "rwkv": Family(
        "RWKV-4",
        {
            "num_attention_heads": None, "attention_hidden_size": 32, "intermediate_size": 64, "context_length": 64,
            "rescale_every": 0,
        },
        "rwkv.blocks",
    ),
    "bamba": Family("Bamba", _GROUPED | _SCANS | {"attn_layer_indices": [1]}),
    "falcon_h1": Family(
        "Falcon-H1",
        _HEAD | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
    ),
    "recurrent_gemma": Family(
        "RecurrentGemma",
        _HEAD | {"lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
        notes="gates of recurrent layers stay dense",
    ),
    "lfm2": Family("LFM2", _GROUPED | {"layer_types": ["conv", "full_attention"]}),
    "qwen3_5_text": Family(
        "Qwen3.5, its text model",
        _HEAD
        | {
            "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        },
    ),
}  # fmt: skip
"""Layers that carry a state along the text, most of them beside attention. It does not go from layer to layer, so each
is streamed like any other; their short convolutions stay dense."""

_TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_TOWER |= {"image_size": 16, "patch_size": 8}
_QWEN = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
_BLOCKS = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 8}
_MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2]}
_INSIDE = "model.language_model.layers"
_SEES = "AutoModelForImageTextToText"
SEEING: dict[str, Family] = {
    "llava": Family(
        "LLaVA 1.5", _GROUPED | {"model_type": "llama"}, _INSIDE,
        auto=_SEES, vision={
            "vision_config": _TOWER | {"model_type": "clip_vision_model", "projection_dim": 32},
            "image_token_index": 5,
        },
    ),
    "llava_onevision": Family(
        "LLaVA-OneVision", _GROUPED | {"model_type": "qwen2"}, _INSIDE,
        auto=_SEES, vision={
            "vision_config": _TOWER | {"model_type": "siglip_vision_model"}, "image_token_index": 5,
            "video_token_index": 6,
        },
    ),
    "qwen2_vl": Family(
        "Qwen2-VL", _GROUPED | {"rope_scaling": _MROPE}, _INSIDE,
        auto=_SEES, vision={"vision_config": _BLOCKS | {"embed_dim": 32, "mlp_ratio": 2}, **_QWEN},
    ),
    "qwen2_5_vl": Family(
        "Qwen2.5-VL", _GROUPED | {"rope_scaling": _MROPE}, _INSIDE,
        auto=_SEES, vision={
            "vision_config": _BLOCKS | {"out_hidden_size": 32, "intermediate_size": 64, "fullatt_block_indexes": [0]},
            **_QWEN,
        },
    ),
    "qwen3_vl": Family(
        "Qwen3-VL", _HEAD | {"rope_scaling": _MROPE}, _INSIDE,
        auto=_SEES, vision={
            "vision_config": _BLOCKS
            | {
                "out_hidden_size": 32, "intermediate_size": 64, "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            **_QWEN,
        },
    ),
    "gemma3": Family(
        "Gemma 3 4B and larger", _SLIDING, _INSIDE,
        auto=_SEES, vision={
            "vision_config": _TOWER, "mm_tokens_per_image": 4, "image_token_index": 5, "boi_token_index": 6,
            "eoi_token_index": 7,
        },
    ),
    "mistral3": Family(
        "Mistral Small 3.1", _HEAD | {"model_type": "mistral"}, _INSIDE,
        auto=_SEES, vision={"vision_config": _TOWER | {"model_type": "pixtral", "head_dim": 8}, "image_token_index": 5},
    ),
    "idefics3": Family(
        "Idefics3, SmolVLM", _GROUPED | {"model_type": "llama"}, "model.text_model.layers",
        auto=_SEES, vision={"vision_config": _TOWER, "image_token_id": 5, "scale_factor": 1},
    ),
    "paligemma": Family(
        "PaliGemma", _HEAD | {"model_type": "gemma"}, _INSIDE,
        auto=_SEES, vision={
            "vision_config": _TOWER
            | {"model_type": "siglip_vision_model", "vocab_size": VOCAB, "projection_dim": 32},
            "image_token_index": 5, "projection_dim": 32,
        },
    ),
    "internvl": Family(
        "InternVL3", _GROUPED | {"model_type": "qwen2"}, _INSIDE,
        auto=_SEES,
        vision={"vision_config": _TOWER | {"image_size": [16, 16], "patch_size": [8, 8]}, "image_token_id": 5},
    ),
}  # fmt: skip
"""Models that see: their text model is pruned, on text alone, and everything else is carried over."""

_PER_LAYER = _HEAD | {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 12, "sliding_window": 8}
_BY_TOKENS = "each layer looks something up by the tokens"
_LAYERS_OF_EACH = ["sliding_attention", "full_attention"]
LINKED: dict[str, Family] = {
    "gemma4_text": Family(
        "Gemma 4 E2B, E4B, their text model",
        _PER_LAYER
        | {
            "num_kv_shared_layers": 2, "num_hidden_layers": 4, "layer_types": _LAYERS_OF_EACH * 2,
            "global_head_dim": 8,
        },
        notes=f"{_BY_TOKENS}; later layers use keys and values of earlier ones",
    ),
    "gemma4_unified_text": Family(
        "Gemma 4, unified, its text model",
        _PER_LAYER
        | {
            "num_kv_shared_layers": 2, "num_hidden_layers": 4, "layer_types": _LAYERS_OF_EACH * 2,
            "global_head_dim": 8,
        },
        notes=f"{_BY_TOKENS}; later layers use keys and values of earlier ones",
    ),
    "gemma3n_text": Family(
        "Gemma 3n, its text model",
        _PER_LAYER
        | {
            "num_kv_shared_layers": 2, "num_hidden_layers": 4, "layer_types": _LAYERS_OF_EACH * 2,
            "laurel_rank": 8, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4,
        },
        notes=f"{_BY_TOKENS}; later layers use keys and values of earlier ones; several streams",
    ),
}  # fmt: skip
"""Layers that take more than hidden states."""

_ENCODER = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
_ENCODER |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
_ENCODES = "AutoModelForSeq2SeqLM"
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_MIXED = {"moe_intermediate_size": 16, "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8}
_MIXED |= {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "mlp_layer_types": ["dense", "sparse"]}
_MIXED |= {**_HEAD, "num_key_value_heads": 4}
_INDEXED = _MIXED | _LATENT | {"index_topk": 16, "index_head_dim": 8, "index_n_heads": 2}
REFUSED: dict[str, Family] = {
    "t5": Family("T5, Flan-T5", {"d_kv": 8, "d_ff": 64}, notes="encoder-decoder", auto=_ENCODES),
    "bart": Family("BART", _ENCODER, notes="encoder-decoder", auto=_ENCODES),
    "doge": Family(
        "Doge, its mixtures", _GROUPED | {"is_moe": True, "num_experts": 64, "num_experts_per_tok": 2},
        notes="experts for all tokens of a batch at once",
    ),
    "xlm": Family("XLM", {"emb_dim": 32}, notes="several layer lists"),
    "mllama": Family(
        "Llama 3.2 Vision", _GROUPED | {"cross_attention_layers": [1], "rope_scaling": {"rope_type": "default"}},
        notes="between its decoder layers", auto=_SEES,
        vision={
            "vision_config": {
                "hidden_size": 32, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 4,
                "intermediate_size": 64, "vision_output_dim": 64, "image_size": 16, "patch_size": 8,
                "intermediate_layers_indices": [0], "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]],
            },
            "image_token_index": 5,
        },
    ),
}  # fmt: skip
"""Sound models that cannot be streamed layer by layer; `notes` is what the error says."""

FAMILIES = {**DENSE, **OTHERS, **RECURRENT, **SEEING, **LINKED, **REFUSED}


def family_of(kind: str) -> Family:
    """The family of a model type: one of these tables, or found in transformers' (KeyError if it is not)."""
    if kind in FAMILIES:
        return FAMILIES[kind]
    from shrunk import found

    family = found(kind)
    if family is None:
        raise KeyError(kind)
    return family


def tiny_config(kind: str, layers: int = 3) -> Any:
    """A configuration of a few thousand parameters; `layers` counts for the families of these tables."""
    from transformers import AutoConfig

    family = family_of(kind)
    if family.config is not None:
        return deepcopy(family.config)
    settings = {**_COMMON, "num_hidden_layers": layers, **family.settings}
    if family.vision is not None:
        return AutoConfig.for_model(kind, text_config=settings, **family.vision)
    return AutoConfig.for_model(kind, **settings)


def whole_class(kind: str) -> Any:
    """The transformers class that makes and loads the whole model."""
    import transformers

    return getattr(transformers, family_of(kind).auto)


def save_model(folder: Path, kind: str = "llama", layers: int = 3, dtype: str = "bfloat16", seed: int = 0) -> Path:
    """A random model with uneven feature scales and a word-level tokenizer; returns its folder."""
    import torch

    torch.manual_seed(seed)
    model = whole_class(kind).from_config(tiny_config(kind, layers), dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and not bool(parameter.any()):
                parameter.normal_(0, 0.1)  # xLSTM's gates begin with zeros
            elif parameter.dim() == 2:
                parameter.mul_(4.0)  # far from the initial near-identity, so that layers matter
            elif "norm" in name and name.endswith("weight"):
                parameter.mul_(torch.exp(torch.randn(parameter.shape)).to(parameter.dtype))
            elif name.endswith("correct_output_scale"):  # zeros, which would let nothing through
                parameter.normal_()
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """One token a word: `w0` … `w198`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
