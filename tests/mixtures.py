"""Mixtures of experts: tiny ones of many families, and what each expert sees, in the whole model in memory.

The reference shares with the program the calibration windows, and nothing else: it hooks the modules of experts of
transformers' model, and computes expert by expert what goes into their two matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from families import HIDDEN, VOCAB, save_tokenizer
from safetensors.torch import save_file
from whole_model import BATCH, Stats

LIKE = "llama"
"""The family whose layers are called as those of all mixtures here."""

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

    settings: Mapping[str, Any] = field(default_factory=dict)
    up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"


FUSED = ("gate_up_proj",)
UP = {True: "gate_up_proj", False: "up_proj"}
"""What transformers calls the weight that sees the hidden states, of experts with and without a gate."""

MIXTURES: dict[str, Mixture] = {
    "mixtral": Mixture(_FOUR, ("w1", "w3"), "w2"),
    "phimoe": Mixture(_FOUR, ("w1", "w3"), "w2"),
    "qwen2_moe": Mixture(_EIGHT | {"shared_expert_intermediate_size": 32}),
    "qwen3_moe": Mixture(_EIGHT | {"head_dim": 8}),
    "olmoe": Mixture(_EIGHT | {"intermediate_size": 16}),
    "deepseek_v3": Mixture(_ROUTED | _LATENT | {"n_group": 2, "num_key_value_heads": 4}),
    "dots1": Mixture(_ROUTED),
    "glm4_moe": Mixture(_ROUTED),
    "ernie4_5_moe": Mixture(
        {
            "intermediate_size": 64, "moe_intermediate_size": 16, "moe_num_experts": 8, "moe_k": 2,
            "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
        }
    ),
    "hunyuan_v1_moe": Mixture(
        {"intermediate_size": 16, "num_experts": 4, "moe_topk": 2, "head_dim": 8, "num_shared_expert": 1}
    ),
    "granitemoe": Mixture(_FOUR, FUSED),
    "gpt_oss": Mixture(
        _FOUR
        | {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
        FUSED,
    ),
    "aria_text": Mixture(
        {"intermediate_size": 32, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}, FUSED
    ),
    "nemotron_h": Mixture(
        {
            "intermediate_size": 64, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
            "moe_shared_expert_intermediate_size": 32, "layers_block_type": ["attention", "moe"], "n_group": 1,
            "topk_group": 1, "head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8,
            "n_groups": 1,
        },
        ("up_proj",),
    ),
}  # fmt: skip


def save_mixture(
    folder: Path, kind: str, dtype: str = "float32", seed: int = 0, fused: bool = False, **settings: Any
) -> Path:
    """A random model; `fused` stores its experts as transformers holds them, in tensors of three dimensions."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **{**_COMMON, **MIXTURES[kind].settings, **settings})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4.0)
            elif "norm" in name and name.endswith("weight"):
                parameter.mul_(torch.exp(torch.randn(parameter.shape)).to(parameter.dtype))
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    if fused:
        save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(folder)
    return folder


def experts_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The modules that hold experts, by path."""
    for path, module in model.named_modules():
        down = module._parameters.get("down_proj")
        if down is not None and down.dim() == 3:
            yield path, module


def matrix(module: Any, leaf: str, expert: int) -> torch.Tensor:
    """(out, in) of one expert."""
    weight: torch.Tensor = getattr(module, leaf).detach()[expert]
    return weight.t() if module.is_transposed else weight


def names_of(path: str, expert: int, mixture: Mixture, fused: bool = False) -> tuple[list[str], str]:
    """What the linears of an expert are called: those that see the hidden states, and the one after them."""
    up, down = (FUSED, "down_proj") if fused else (mixture.up, mixture.down)
    return [f"{path}.{expert}.{leaf}" for leaf in up], f"{path}.{expert}.{down}"


def weights_of_experts(model: torch.nn.Module, mixture: Mixture, fused: bool = False) -> dict[str, torch.Tensor]:
    """Each expert's matrices (out, in) by name; what stands side by side in one tensor is cut apart."""
    found: dict[str, torch.Tensor] = {}
    for path, module in experts_of(model):
        for expert in range(len(module.down_proj)):  # type: ignore[arg-type]
            up, down = names_of(path, expert, mixture, fused)
            both = matrix(module, UP[module.has_gate], expert)  # type: ignore[index]
            found |= dict(zip(up, both.chunk(len(up)), strict=True))
            found[down] = matrix(module, "down_proj", expert)
    return found


class Seen:
    """What every expert's linears see, by name: (tokens, sum, sum of squares), of all experts, also unused ones.

    With `weighted`, an input x that the routing gives the weight r counts as r·x.
    """

    def __init__(self, model: Any, mixture: Mixture, weighted: bool = True, fused: bool = False) -> None:
        self.stats: Stats = {}
        self.roles: list[list[str]] = []
        """Linears that have the same place in the experts of one layer."""
        self._mixture, self._weighted, self._fused = mixture, weighted, fused
        self._hooks = [
            module.register_forward_hook(lambda module, args, out, path=path: self._see(path, module, args, out))
            for path, module in experts_of(model)
        ]
        for path, module in experts_of(model):
            names = [names_of(path, e, mixture, fused) for e in range(len(module.down_proj))]
            self.roles += [list(role) for role in zip(*([*up, down] for up, down in names), strict=True)]

    def _see(self, path: str, module: Any, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        hidden, chosen, shares = args
        total = torch.zeros_like(hidden)
        for expert in range(len(module.down_proj)):
            token, place = (chosen == expert).nonzero(as_tuple=True)
            x, share = hidden[token], shares[token, place][:, None]
            both = x @ matrix(module, UP[module.has_gate], expert).t()
            both = both + module.gate_up_proj_bias[expert] if module.has_bias else both
            middle = module._apply_gate(both) if module.has_gate else module.act_fn(both)
            result = middle @ matrix(module, "down_proj", expert).t()
            result = result + module.down_proj_bias[expert] if module.has_bias else result
            total.index_add_(0, token, result * share)
            up, down = names_of(path, expert, self._mixture, self._fused)
            for name in up:
                self._add(name, x, share)
            self._add(down, middle, share)
        torch.testing.assert_close(total, out.view_as(total), rtol=1e-4, atol=1e-5)  # or it is no reference

    def _add(self, name: str, x: torch.Tensor, share: torch.Tensor) -> None:
        x = (x * share if self._weighted else x).double()
        zeros = torch.zeros(x.shape[1], dtype=torch.float64)
        tokens, total, squares = self.stats.get(name, (0, zeros, zeros))
        self.stats[name] = (tokens + len(x), total + x.sum(0), squares + (x * x).sum(0))

    def stop(self) -> None:
        for hook in self._hooks:
            hook.remove()

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
    with torch.no_grad():
        for batch in windows.split(BATCH):
            model(input_ids=batch, use_cache=False)
    seen.stop()
    return seen
