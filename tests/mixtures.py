"""Mixtures of experts: tiny ones of many families, and what each expert sees, in the whole model in memory.

The reference shares with the program the calibration windows, and nothing else: it hooks the modules of experts of
transformers' model, and computes expert by expert what goes into their two matrices.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from families import HIDDEN, SEEING, VOCAB, save_tokenizer, whole_class
from safetensors.torch import save_file
from whole_model import BATCH, Stats, stored

LIKE = "llama"
"""The family whose layers are called as those of all mixtures here."""

FUSED = ("gate_up_proj",)
_SHARED, _SEES = "shared experts", "part of a vision-language model"
_SEEN = {"rope_type": "default", "mrope_section": [1, 1, 2]}
_TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_COMMON = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_EIGHT = {"intermediate_size": 64, "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2}
_ROUTED = {
    "intermediate_size": 64, "moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 8,
}  # fmt: skip
_FOUR = {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}


@dataclass(frozen=True)
class Mixture:
    """A model type of transformers, with the names that its experts' matrices have on disk."""

    examples: str
    """Models of it that people know."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    whole: bool = False
    """Whether a tensor holds these matrices of all experts."""
    notes: str = ""
    like: str = LIKE
    """A family without experts whose layers have the same path, and which the same class loads."""
    vision: Mapping[str, Any] | None = None
    """Of a model that sees: its configuration beside that of the text model, which has the other settings."""

    @property
    def apart(self) -> bool:
        """Whether a checkpoint has a matrix for each expert; or one tensor for all."""
        return self.up != FUSED and not self.whole


UP = {True: "gate_up_proj", False: "up_proj"}
"""What transformers calls the weight that sees the hidden states, of experts with and without a gate."""

MIXTURES: dict[str, Mixture] = {
    "mixtral": Mixture("Mixtral 8x7B, 8x22B", _FOUR, ("w1", "w3"), "w2"),
    "phimoe": Mixture("Phi-3.5-MoE", _FOUR, ("w1", "w3"), "w2"),
    "qwen2_moe": Mixture("Qwen1.5-MoE, Qwen2 57B", _EIGHT | {"shared_expert_intermediate_size": 32}, notes=_SHARED),
    "qwen3_moe": Mixture("Qwen3 30B-A3B, 235B-A22B", _EIGHT | {"head_dim": 8}),
    "olmoe": Mixture("OLMoE", _EIGHT | {"intermediate_size": 16}),
    "deepseek_v3": Mixture(
        "DeepSeek-V3, R1", _ROUTED | _LATENT | {"n_group": 2, "num_key_value_heads": 4}, notes=_SHARED
    ),
    "dots1": Mixture("dots.llm1", _ROUTED, notes=_SHARED),
    "glm4_moe": Mixture("GLM-4.5, 4.6", _ROUTED, notes=_SHARED),
    "ernie4_5_moe": Mixture(
        "ERNIE 4.5 21B-A3B",
        {
            "intermediate_size": 64, "moe_intermediate_size": 16, "moe_num_experts": 8, "moe_k": 2,
            "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
        },
        notes=_SHARED,
    ),
    "hunyuan_v1_moe": Mixture(
        "Hunyuan-A13B",
        {"intermediate_size": 16, "num_experts": 4, "moe_topk": 2, "head_dim": 8, "num_shared_expert": 1},
        notes=_SHARED,
    ),
    "granitemoe": Mixture("Granite 3.0 1B-A400M", _FOUR, FUSED),
    "gpt_oss": Mixture(
        "gpt-oss, not quantised",
        _FOUR | {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
        FUSED,
        notes="stored (in, out)",
    ),
    "aria_text": Mixture(
        "Aria, its text model",
        {"intermediate_size": 32, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
        FUSED,
        notes=f"{_SHARED}; stored (in, out)",
    ),
    "llama4_text": Mixture(
        "Llama 4 Scout, Maverick, the text model",
        {"intermediate_size": 32, "intermediate_size_mlp": 64, "num_local_experts": 4, "head_dim": 8},
        FUSED,
        notes=f"{_SHARED}; stored (in, out)",
    ),
    "dbrx": Mixture(
        "DBRX",
        {
            "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        },
        ("w1", "v1"), "w2", whole=True, notes="the last stored (in, out)", like="mpt",
    ),
    "jetmoe": Mixture(
        "JetMoE 8B", {"intermediate_size": 32, "num_local_experts": 4, "kv_channels": 8, "num_key_value_heads": 2},
        ("input_linear",), "output_linear", whole=True, notes="experts of attention stay dense",
    ),
    "longcat_flash": Mixture(
        "LongCat-Flash",
        _LATENT
        | {
            "ffn_hidden_size": 64, "expert_ffn_hidden_size": 16, "n_routed_experts": 4, "moe_topk": 2,
            "zero_expert_num": 2, "num_layers": 2, "num_key_value_heads": 4, "num_hidden_layers": 4,
            "head_dim": 8,
        },
        notes="experts that give back their input",
    ),
    "inkling_text": Mixture(
        "Inkling, its text model",
        _EIGHT
        | {
            "n_routed_experts": 8, "mlp_layer_types": ["dense", "sparse"], "head_dim": 8, "swa_head_dim": 8,
            "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "d_rel": 4, "rel_extent": 64,
            "logits_mup_width_multiplier": 1.0,
        },
        FUSED,
        notes=f"{_SHARED}; short convolutions",
    ),
    "jamba": Mixture(
        "Jamba 1.5",
        {
            "intermediate_size": 32, "mamba_d_state": 8, "mamba_dt_rank": 4, "num_experts": 4,
            "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
            "expert_layer_offset": 1,
        },
        notes="recurrent layers; dt_proj stays dense",
    ),
    "nemotron_h": Mixture(
        "Nemotron 3 Nano",
        {
            "intermediate_size": 64, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
            "moe_shared_expert_intermediate_size": 32, "layers_block_type": ["attention", "moe"], "n_group": 1,
            "topk_group": 1, "head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8,
            "n_groups": 1,
        },
        ("up_proj",),
        notes=f"{_SHARED}; no gate; recurrent layers",
    ),
}  # fmt: skip

_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_LINEAR |= {"layer_types": ["linear_attention", "full_attention"]}
_INDEXED = {"index_topk": 16, "index_head_dim": 8, "index_n_heads": 2}
_SECOND = {"mlp_layer_types": ["dense", "sparse"]}
_SLIDING = {"head_dim": 8, "sliding_window": 8}
_ONE = _ROUTED | _LATENT | _SECOND | {"num_key_value_heads": 4}
_BESIDE = _FOUR | {"shared_intermediate_size": 32}
_GATED = _EIGHT | _LINEAR | {"head_dim": 8, "shared_expert_intermediate_size": 32}
_STREAMS = "several streams"
_EYES: dict[str, Any] = {
    "vision_config": {
        "depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 8, "out_hidden_size": 32, "intermediate_size": 64,
        "image_size": 16,
    },
    "image_token_id": 5, "video_token_id": 6, "image_start_token_id": 7, "image_end_token_id": 8,
    "video_start_token_id": 9, "video_end_token_id": 2,
}  # fmt: skip
_MIXED_SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}

_HALVES = {"layer_types": ["linear_attention", "full_attention"]}
MORE: dict[str, Mixture] = {
    "deepseek_v2": Mixture("DeepSeek-V2", _ROUTED | _LATENT | {"num_key_value_heads": 4}, notes=_SHARED),
    "deepseek_v32": Mixture("DeepSeek-V3.2", _ONE | _INDEXED, notes=f"{_SHARED}; sparse attention"),
    "glm4_moe_lite": Mixture("GLM-4.7-Flash", _ONE, notes=_SHARED),
    "axk1": Mixture("A.X K1", _ONE, notes=_SHARED),
    "axk2": Mixture(
        "A.X K2", _ONE | _INDEXED | {"gated_norm_rank": 4, "n_group": None, "topk_group": None},
        notes=f"{_SHARED}; sparse attention",
    ),
    "dots3_note_text": Mixture(
        "dots3-note", _ROUTED | _LATENT | _INDEXED | {"num_key_value_heads": 4}, notes=_SHARED
    ),
    "solar_open": Mixture("Solar Open 100B", _ROUTED, notes=_SHARED),
    "mimo_v2_flash": Mixture("MiMo-V2-Flash", _ROUTED | _SLIDING | {"v_head_dim": 8}),
    "kimi_linear": Mixture(
        "Kimi Linear 48B-A3B",
        _ONE | {"num_experts": 8, "num_local_experts": 8, "linear_num_heads": 4, "linear_head_dim": 8} | _HALVES,
        ("w1", "w3"), "w2", notes=f"{_SHARED}; recurrent layers",
    ),
    "bailing_hybrid": Mixture(
        "Ling 3", _ONE | {"num_experts": 8, "layer_group_size": 2}, notes=f"{_SHARED}; recurrent layers",
    ),
    "qwen3_next": Mixture("Qwen3-Next 80B-A3B", _GATED, notes=f"{_SHARED}; recurrent layers"),
    "qwen3_5_moe_text": Mixture("Qwen3.5 35B-A3B, its text model", _GATED, notes=f"{_SHARED}; recurrent layers"),
    "minimax": Mixture("MiniMax-Text-01", _FOUR | {"head_dim": 8}, ("w1", "w3"), "w2", notes="recurrent layers"),
    "minimax_m2": Mixture("MiniMax-M2", _FOUR | {"head_dim": 8, "rotary_dim": 4}, ("w1", "w3"), "w2"),
    "minimax_m3_vl_text": Mixture(
        "MiniMax-M3, its text model",
        _FOUR
        | _SECOND
        | {
            "head_dim": 8, "dense_intermediate_size": 64, "shared_intermediate_size": 32, "rotary_dim": 4,
            "index_n_heads": 2, "index_head_dim": 8, "index_block_size": 4, "index_topk_blocks": 4,
        },
        FUSED,
        notes=f"{_SHARED}; sparse attention",
    ),
    "flex_olmo": Mixture("FlexOlmo 7x7B", _EIGHT | {"intermediate_size": 16}),
    "lfm2_moe": Mixture(
        "LFM2 8B-A1B", _EIGHT | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
        ("w1", "w3"), "w2", notes="recurrent layers",
    ),
    "granitemoeshared": Mixture("Granite 3, with shared experts", _BESIDE, FUSED, notes=_SHARED),
    "granitemoehybrid": Mixture(
        "Granite 4.0",
        _BESIDE
        | {
            "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8,
            "layer_types": ["mamba", "attention"],
        },
        FUSED,
        notes=f"{_SHARED}; recurrent layers",
    ),
    "granitemoe_swa": Mixture("Granite Swash 3B-A600M", _BESIDE | {"sliding_window": 8}, FUSED, notes=_SHARED),
    "exaone_moe": Mixture(
        "K-EXAONE 236B-A23B",
        _EIGHT | _SLIDING | _SECOND | {"num_shared_experts": 1, "n_group": 1, "topk_group": 1},
        notes=_SHARED,
    ),
    "afmoe": Mixture("Trinity", _EIGHT | _SLIDING | {"num_dense_layers": 1, "num_shared_experts": 1}, notes=_SHARED),
    "cohere2_moe": Mixture(
        "Command A+",
        {
            **_EIGHT, **_SLIDING, "intermediate_size": 16, "num_shared_experts": 1,
            "prefix_dense_intermediate_size": 64,
        },
        notes=_SHARED,
    ),
    "hy_v3": Mixture("Hy3", _EIGHT | _SECOND | {"head_dim": 8, "num_shared_experts": 1}, notes=_SHARED),
    "laguna": Mixture(
        "Laguna", _EIGHT | _SECOND | {"head_dim": 8, "shared_expert_intermediate_size": 32}, notes=_SHARED
    ),
    "kolibri1": Mixture("Kolibri 1", _EIGHT | _SECOND | {"head_dim": 8}),
    "mellum": Mixture("Mellum 2 12B-A2.5B", _EIGHT | {"head_dim": 8}),
    "beam": Mixture("Beam 501B-A23B", _EIGHT | _SLIDING | _SECOND | {"n_group": 2, "topk_group": 1}),
    "flint": Mixture(
        "Flint",
        _EIGHT | _SLIDING | _MIXED_SLIDING | {"mlp_only_layers": [0], "shared_expert_intermediate_size": 32},
        notes=_SHARED,
    ),
    "qwen3_vl_moe": Mixture(
        "Qwen3-VL 30B-A3B", _EIGHT | {"head_dim": 8, "rope_scaling": _SEEN}, FUSED,
        notes=_SEES, like="qwen3_vl", vision=SEEING["qwen3_vl"].vision,
    ),
    "qwen3_5_moe": Mixture(
        "Qwen3.5 35B-A3B", _GATED, notes=f"{_SHARED}; recurrent layers; {_SEES}", like="qwen3_vl",
        vision=SEEING["qwen3_vl"].vision,
    ),
    "glm4v_moe": Mixture(
        "GLM-4.5V, 4.6V", _ROUTED | {"rope_parameters": {**_SEEN, "rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
        notes=f"{_SHARED}; {_SEES}", like="qwen3_vl", vision=SEEING["qwen2_5_vl"].vision,
    ),
    "llama4": Mixture(
        "Llama 4 Scout, Maverick",
        MIXTURES["llama4_text"].settings,
        FUSED,
        notes=f"{_SHARED}; stored (in, out); {_SEES}",
        like="llama4",
        vision={
            "vision_config": {
                **_TOWER, "image_size": 16, "patch_size": 8, "vision_output_dim": 32, "projector_input_dim": 32,
                "projector_output_dim": 32, "num_hidden_layers": 1,
            },
            "image_token_index": 5,
        },
    ),
    "aria": Mixture(
        "Aria",
        {**MIXTURES["aria_text"].settings, "model_type": "aria_text"}, FUSED,
        notes=f"{_SHARED}; stored (in, out); {_SEES}", like="llava",
        vision={
            "vision_config": {**_TOWER, "image_size": 16, "patch_size": 8, "model_type": "idefics3_vision"},
            "image_token_index": 5, "projector_patch_to_query_dict": {"4": 4},
        },
    ),
    "gemma4": Mixture(
        "Gemma 4 26B-A4B",
        _EIGHT
        | _SLIDING
        | _MIXED_SLIDING
        | {
            "enable_moe_block": True, "top_k_experts": 2, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
            "global_head_dim": 8,
        },
        FUSED, notes=f"a dense MLP beside; {_SEES}", like="gemma3",
        vision={"vision_config": {**_TOWER, "num_key_value_heads": 4, "head_dim": 8}, "image_token_id": 5},
    ),
    "zaya": Mixture(
        "ZAYA1", _EIGHT | {"num_experts_per_tok": 1, "num_key_value_heads": 4, "head_dim": 8}, FUSED,
        notes="what routers of earlier layers say",
    ),
    "glm_moe_dsa": Mixture(
        "GLM-5", _ONE | _INDEXED | {"indexer_types": ["full", "shared"]},
        notes=f"{_SHARED}; sparse attention; indices of earlier layers",
    ),
    "hy_v4": Mixture(
        "Hy4", _ONE | _INDEXED | {"index_n_heads": 8, "hc_mult": 2, "indexer_types": ["full", "shared"]}, FUSED,
        notes=f"{_SHARED}; sparse attention; indices of earlier layers; {_STREAMS}",
    ),
    "glm5_next": Mixture(
        "GLM-5 Next",
        _ONE
        | _INDEXED
        | {
            "index_n_heads": 8, "hc_mult": 2, "head_dim": 0, "qk_rope_head_dim": 0, "linear_head_dim": 8,
            "linear_num_heads": 8, "index_kpool": 4, "indexer_types": ["full", "full"],
            "layer_types": ["linear_attention", "indexed_attention"],
        },
        notes=f"{_SHARED}; recurrent layers; sparse attention; {_STREAMS}; {_SEES}", like="qwen3_vl", vision=_EYES,
    ),
    "deepseek_v4": Mixture(
        "DeepSeek-V4",
        _ROUTED
        | {
            "num_key_value_heads": 1, "head_dim": 8, "q_lora_rank": 16, "qk_rope_head_dim": 4, "o_groups": 2,
            "o_lora_rank": 8, "index_topk": 16, "index_head_dim": 8, "index_n_heads": 8, "hc_mult": 2,
            "mlp_layer_types": ["hash_moe", "moe"], "sliding_window": 8,
            "layer_types": ["sliding_attention", "compressed_sparse_attention"],
        },
        ("w1", "w3"), "w2", notes=f"{_SHARED}; sparse attention; experts by the tokens; {_STREAMS}",
    ),
    "qwen4_exp_text": Mixture(
        "Qwen4-Exp",
        _EIGHT
        | _LINEAR
        | {
            "head_dim": 8, "shared_expert_intermediate_size": 32, "hc_lowrank": 8, "hc_count": 2, "indexer_n_heads": 8,
            "linear_num_value_heads": 8, "linear_num_key_heads": 4,
            "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16, "indexer_compress_ratio": 4,
            "layer_types": ["linear_attention", "indexed_attention"],
        },
        notes=f"{_SHARED}; recurrent layers; sparse attention; {_STREAMS}",
    ),
}  # fmt: skip
"""Made of the parts that others are made of."""

EVERY = {**MIXTURES, **MORE}


def save_mixture(
    folder: Path, kind: str, dtype: str = "float32", seed: int = 0, fused: bool = False, **settings: Any
) -> Path:
    """A random model; `fused` stores its experts as transformers holds them, in tensors of three dimensions."""
    from transformers import AutoConfig

    mixture = EVERY[kind]
    if kind == "llama4":
        _mend()
    settings = {**_COMMON, **mixture.settings, **settings}
    if mixture.vision is not None:
        settings = {"text_config": settings, **mixture.vision}
    config = AutoConfig.for_model(kind, **settings)
    torch.manual_seed(seed)
    model = whole_class(mixture.like).from_config(config, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4.0)
            elif "norm" in name and name.endswith("weight"):
                parameter.mul_(torch.exp(torch.randn(parameter.shape)).to(parameter.dtype))
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):  # zeros: all tokens to one expert
                buffer.copy_(torch.rand(len(buffer), 8).argsort(1)[:, : buffer.shape[1]])
    model.save_pretrained(folder)
    if fused:
        tensors = {name: t for name, t in stored(folder).items() if not re.search(r"experts\.\d+\.", name)}
        for path, held in experts_of(model):
            tensors |= {f"{path}.{leaf}": t.detach() for leaf, t in held.module.named_parameters()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(folder)
    return folder


class Held:
    """A module of transformers that holds experts: their matrices, and what it does with what it is given."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.count = len(module.down_proj)

    def up(self, expert: int) -> list[torch.Tensor]:
        """The matrices (out, in) that see the states; their outputs stand side by side."""
        return [matrix(self.module, UP[self.module.has_gate], expert)]

    def down(self, expert: int) -> torch.Tensor:
        return matrix(self.module, "down_proj", expert)

    def middle(self, both: torch.Tensor, expert: int) -> torch.Tensor:
        """What the down projection sees, of the outputs of the other matrices."""
        module = self.module
        both = both + module.gate_up_proj_bias[expert] if module.has_bias else both
        found: torch.Tensor = module._apply_gate(both) if module.has_gate else module.act_fn(both)
        return found

    def last(self, middle: torch.Tensor, expert: int) -> torch.Tensor:
        out = middle @ self.down(expert).t()
        return out + self.module.down_proj_bias[expert] if getattr(self.module, "has_bias", False) else out

    def given(self, args: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """States (tokens, hidden), chosen experts (tokens, k), their weights (tokens, k), of the module's arguments."""
        hidden, chosen, shares = args
        return hidden.flatten(0, -2), chosen, shares

    def beside(self, args: tuple[Any, ...]) -> torch.Tensor | float:
        """What is added to the outputs of experts."""
        return 0.0


class _Gated(Held):
    def middle(self, both: torch.Tensor, expert: int) -> torch.Tensor:
        gate, up = both.chunk(2, -1)
        found: torch.Tensor = self.module.act_fn(gate) * up
        return found


class _Llama4(_Gated):
    """Given a copy of the tokens for each expert, of which those that it is not meant for are zero."""

    def up(self, expert: int) -> list[torch.Tensor]:
        return [self.module.gate_up_proj.detach()[expert].t()]

    def down(self, expert: int) -> torch.Tensor:
        weight: torch.Tensor = self.module.down_proj.detach()[expert].t()
        return weight

    def given(self, args: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        (rows,) = args
        number = torch.arange(len(rows)) // (len(rows) // self.count)
        return rows, torch.where(rows.any(1), number, -1)[:, None], torch.ones(len(rows), 1)


class _Dbrx(_Gated):
    def __init__(self, module: Any) -> None:
        self.module, self.count = module, module.num_experts

    def _part(self, leaf: str, expert: int) -> torch.Tensor:
        found: torch.Tensor = getattr(self.module.mlp, leaf).detach().unflatten(0, (self.count, -1))[expert]
        return found

    def up(self, expert: int) -> list[torch.Tensor]:
        return [self._part("w1", expert), self._part("v1", expert)]

    def down(self, expert: int) -> torch.Tensor:
        return self._part("w2", expert).t()

    def middle(self, both: torch.Tensor, expert: int) -> torch.Tensor:
        gate, up = both.chunk(2, -1)
        found: torch.Tensor = self.module.mlp.activation_fn(gate) * up
        return found


class _Longcat(_Gated):
    """Experts of higher numbers than have weights give back what they are given."""

    def up(self, expert: int) -> list[torch.Tensor]:
        return [self.module.gate_up_proj.detach()[expert]]

    def down(self, expert: int) -> torch.Tensor:
        weight: torch.Tensor = self.module.down_proj.detach()[expert]
        return weight

    def beside(self, args: tuple[Any, ...]) -> torch.Tensor | float:
        hidden, chosen, shares = self.given(args)
        return hidden * (shares * (chosen >= self.count)).sum(1, keepdim=True)


class _Shared(_Gated):
    """Experts that all tokens go through."""

    def up(self, expert: int) -> list[torch.Tensor]:
        return [self.module.gate_proj.detach()[expert], self.module.up_proj.detach()[expert]]

    def down(self, expert: int) -> torch.Tensor:
        weight: torch.Tensor = self.module.down_proj.detach()[expert]
        return weight

    def given(self, args: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden, gammas = args
        tokens = hidden.flatten(0, -2)
        return tokens, torch.arange(self.count).expand(len(tokens), -1), gammas.reshape(len(tokens), -1)


class _JetMoe(_Gated):
    def __init__(self, module: Any) -> None:
        self.module, self.count = module, len(module.input_linear.weight)

    def up(self, expert: int) -> list[torch.Tensor]:
        return [self.module.input_linear.weight.detach()[expert]]

    def down(self, expert: int) -> torch.Tensor:
        weight: torch.Tensor = self.module.output_linear.weight.detach()[expert]
        return weight

    def middle(self, both: torch.Tensor, expert: int) -> torch.Tensor:
        gate, up = both.chunk(2, -1)
        found: torch.Tensor = self.module.activation(gate) * up
        return found

    def given(self, args: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens = args[0].flatten(0, -2)
        router = self.module.router
        logits, chosen = router.layer(tokens).float().topk(router.top_k, dim=1)
        return tokens, chosen, logits.softmax(1).type_as(tokens)

    def beside(self, args: tuple[Any, ...]) -> torch.Tensor | float:
        bias: torch.Tensor = self.module.bias.detach()
        return bias


_HELD: dict[str, type[Held]] = {
    "Llama4TextExperts": _Llama4, "DbrxExperts": _Dbrx, "LongcatFlashExperts": _Longcat,
    "InklingSharedExperts": _Shared, "JetMoeMoE": _JetMoe,
}  # fmt: skip


def _mend() -> None:
    """Llama4ForConditionalGeneration reads a field that its text model's output lacks in some versions."""
    from transformers.modeling_outputs import MoeCausalLMOutputWithPast

    if not hasattr(MoeCausalLMOutputWithPast, "image_outputs"):
        MoeCausalLMOutputWithPast.image_outputs = None  # type: ignore[attr-defined]


def experts_of(model: torch.nn.Module) -> Iterator[tuple[str, Held]]:
    """The modules that hold experts, by path."""
    for path, module in model.named_modules():
        down = module._parameters.get("down_proj")
        if type(module).__name__ in _HELD:
            yield path, _HELD[type(module).__name__](module)
        elif down is not None and down.dim() == 3:
            yield path, Held(module)


def matrix(module: Any, leaf: str, expert: int) -> torch.Tensor:
    """(out, in) of one expert."""
    weight: torch.Tensor = getattr(module, leaf).detach()[expert]
    return weight.t() if module.is_transposed else weight


def names_of(path: str, expert: int, mixture: Mixture, fused: bool = False) -> tuple[list[str], str]:
    """What the linears of an expert are called: those that see the hidden states, and the one after them."""
    up, down = (mixture.up if len(mixture.up) == 1 else FUSED, "down_proj") if fused else (mixture.up, mixture.down)
    if path.endswith("shared_experts"):
        up = ("gate_proj", "up_proj")
    return [f"{path}.{expert}.{leaf}" for leaf in up], f"{path}.{expert}.{down}"


def weights_of_experts(model: torch.nn.Module, mixture: Mixture, fused: bool = False) -> dict[str, torch.Tensor]:
    """Each expert's matrices (out, in) by name; what stands side by side in one tensor is cut apart."""
    found: dict[str, torch.Tensor] = {}
    for path, held in experts_of(model):
        for expert in range(held.count):
            up, down = names_of(path, expert, mixture, fused)
            both = held.up(expert)
            found |= dict(zip(up, both if len(both) == len(up) else both[0].chunk(len(up)), strict=True))
            found[down] = held.down(expert)
    return found


See = Callable[[str, torch.Tensor, torch.Tensor], None]


def watch_experts(model: Any, mixture: Mixture, windows: torch.Tensor, see: See, fused: bool = False) -> None:
    """Runs the windows (samples, seqlen) through the whole model.

    `see(linear, x, share)` is shown what is routed to each linear of an expert, also where that is nothing: (tokens,
    in), and the routing's weights (tokens, 1).
    """

    def hook(path: str, held: Held, _: Any, args: tuple[Any, ...], more: dict[str, Any], out: torch.Tensor) -> None:
        args = (*args, *more.values())
        hidden, chosen, shares = held.given(args)
        total = torch.zeros_like(hidden) + held.beside(args)
        for expert in range(held.count):
            token, place = (chosen == expert).nonzero(as_tuple=True)
            x, share = hidden[token], shares[token, place][:, None]
            middle = held.middle(torch.cat([x @ weight.t() for weight in held.up(expert)], -1), expert)
            total.index_add_(0, token, (held.last(middle, expert) * share).to(total.dtype))
            up, down = names_of(path, expert, mixture, fused)
            for name in up:
                see(name, x, share)
            see(down, middle, share)
        torch.testing.assert_close(total.view_as(out), out, rtol=1e-4, atol=1e-5)  # or it is no reference

    hooks = [
        held.module.register_forward_hook(partial(hook, path, held), with_kwargs=True)
        for path, held in experts_of(model)
    ]
    with torch.no_grad():
        for batch in windows.split(BATCH):
            model(input_ids=batch, use_cache=False)
    for each in hooks:
        each.remove()


class Seen:
    """What every expert's linears see, by name: (tokens, sum, sum of squares), of all experts, also unused ones.

    With `weighted`, an input x that the routing gives the weight r counts as r·x.
    """

    def __init__(self, model: Any, mixture: Mixture, weighted: bool = True, fused: bool = False) -> None:
        self.stats: Stats = {}
        self.roles: list[list[str]] = []
        """Linears that have the same place in the experts of one layer."""
        self._weighted = weighted
        for path, held in experts_of(model):
            names = [names_of(path, e, mixture, fused) for e in range(held.count)]
            self.roles += [list(role) for role in zip(*([*up, down] for up, down in names), strict=True)]

    def add(self, name: str, x: torch.Tensor, share: torch.Tensor) -> None:
        x = (x * share if self._weighted else x).double()
        zeros = torch.zeros(x.shape[1], dtype=torch.float64)
        tokens, total, squares = self.stats.get(name, (0, zeros, zeros))
        self.stats[name] = (tokens + len(x), total + x.sum(0), squares + (x * x).sum(0))

    def pooled(self, least: int) -> tuple[Stats, set[str]]:
        """As a job uses them: linears that saw fewer than `least` tokens have the sums over their role. Their names."""
        found, few = dict(self.stats), set()
        for role in self.roles:
            parts = [self.stats[name] for name in role]
            total = (sum(p[0] for p in parts), sum(p[1] for p in parts), sum(p[2] for p in parts))
            for name in role:
                if self.stats[name][0] < least:
                    found[name] = total  # type: ignore[assignment]
                    few.add(name)
        return found, few


def look(model: Any, mixture: Mixture, windows: torch.Tensor, weighted: bool = True, fused: bool = False) -> Seen:
    """Runs the windows (samples, seqlen) through the whole model."""
    seen = Seen(model, mixture, weighted, fused)
    watch_experts(model, mixture, windows, seen.add, fused)
    return seen
