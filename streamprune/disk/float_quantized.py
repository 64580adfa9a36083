"""compressed-tensors' `float-quantized` checkpoints: FP8 weights with one scale per output channel.

A linear P is stored as `P.weight` F8_E4M3 (out, in) and `P.weight_scale` (out, 1); its weights are scale × code. When
the model runs, the inputs of these linears are rounded to FP8 as well, with a scale of its own for each token.
`quantization_config` in config.json describes this, and lists the linears that are not quantised under `ignore`
(https://github.com/vllm-project/compressed-tensors). Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamprune.disk.checkpoint import Checkpoint, quantisation_of
from streamprune.disk.header import show
from streamprune.disk.packed import is_packed
from streamprune.errors import UnsupportedError

FORMAT = "float-quantized"
SCALE = "_scale"
"""Suffix: the scales of P.weight are called P.weight_scale."""

_EIGHT_BITS = {"num_bits": 8, "type": "float", "symmetric": True}


@dataclass(frozen=True)
class Scheme:
    """How a float-quantized checkpoint is to be run."""

    rounds_inputs: bool
    """Whether the inputs of quantised linears are rounded to FP8, token by token."""


def configured(config: Mapping[str, Any], ignore: Sequence[str]) -> bytes:
    """config.json with the description of an FP8 checkpoint; `ignore` are the linears that are not FP8."""
    description = {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": FORMAT,
                "weights": {**_EIGHT_BITS, "strategy": "channel", "dynamic": False},
                "input_activations": {**_EIGHT_BITS, "strategy": "token", "dynamic": True},
                "output_activations": None,
            }
        },
        "sparsity_config": {},
        "transform_config": {},
    }
    text = json.dumps({**config, "quantization_config": description}, indent=2, ensure_ascii=False)
    return text.encode() + b"\n"


def read_scheme(checkpoint: Checkpoint) -> Scheme | None:
    """The scheme of a float-quantized checkpoint; None for one that is not quantised.

    Raises UnsupportedError for any other quantisation, and for packed weights; the message says what is not supported.
    """
    found = quantisation_of(checkpoint)
    if found is None:
        if is_packed(checkpoint):
            raise UnsupportedError(f"{checkpoint.path}: the weights are packed; restore them with `unpack`")
        return None
    where, description = found

    def refuse(why: str) -> UnsupportedError:
        return UnsupportedError(
            f"{checkpoint.path / 'config.json'}: {where}: {show(why)}; of quantised checkpoints, only FP8 ones "
            f"in compressed-tensors' {FORMAT} format can be read"
        )

    if not isinstance(description, dict) or description.get("quant_method") != "compressed-tensors":
        method = description.get("quant_method", "unknown") if isinstance(description, dict) else description
        raise refuse(f"the weights are quantised ({method})")
    sparsity = description.get("sparsity_config")
    if sparsity and not (
        isinstance(sparsity, dict) and sparsity.get("format") == "dense"
    ):  # a dense one only counts zeros
        raise UnsupportedError(f"{checkpoint.path}: the weights are packed; restore them with `unpack`")
    groups = description.get("config_groups")
    if not isinstance(groups, dict) or not groups or description.get("kv_cache_scheme"):
        raise refuse("it has no config_groups, or a kv_cache_scheme")
    rounds = set()
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, dict) else None
        inputs = group.get("input_activations") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or not _is_eight_bits(weights) or group.get("output_activations"):
            raise refuse(f"weights as {weights}")
        if weights.get("strategy") not in ("channel", "tensor") or weights.get("dynamic"):
            raise refuse(f"the weights' strategy is {weights.get('strategy')}")
        if inputs is not None and not (
            isinstance(inputs, dict)
            and _is_eight_bits(inputs)
            and inputs.get("strategy") == "token"
            and inputs.get("dynamic")
        ):
            raise refuse(f"input_activations as {inputs}")
        rounds.add(inputs is not None)
    if len(rounds) > 1:
        raise refuse("config_groups that treat inputs differently")
    return Scheme(rounds.pop())


def _is_eight_bits(scheme: Mapping[str, Any]) -> bool:
    return all(scheme.get(key, value) == value for key, value in _EIGHT_BITS.items())
