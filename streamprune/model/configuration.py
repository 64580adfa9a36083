"""config.json as transformers reads it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from streamprune.disk.checkpoint import Checkpoint
from streamprune.errors import CheckpointError, UnsupportedError

_ATTENTIONS = (None, "eager", "sdpa")
_EXPERTS = (None, "eager", "batched_mm", "grouped_mm")


def load_config(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    """transformers' configuration of a checkpoint; ways of computing that need other packages are left to transformers.

    Raises UnsupportedError for an architecture that it does not know and for encoder-decoder models, CheckpointError
    for what is no configuration of its architecture.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = checkpoint.config.get("model_type")
    if not isinstance(kind, str):
        raise UnsupportedError(f"{checkpoint.path}/config.json names no model_type, so its architecture is unknown")
    if kind not in CONFIG_MAPPING and not (trust_remote_code and checkpoint.config.get("auto_map")):
        custom = (
            ", or pass --trust-remote-code to run the code in its folder" if checkpoint.config.get("auto_map") else ""
        )
        raise UnsupportedError(f"model_type {kind!r} is unknown to this transformers; a newer one may know it{custom}")
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as e:
        raise CheckpointError(
            f"{checkpoint.path}/config.json is not a valid {kind} configuration: {one_line(e)}"
        ) from e
    for part in (config, *_parts(config)):
        _compute_with_what_is_here(part)
    if any(getattr(c, "is_encoder_decoder", False) for c in (config, config.get_text_config(decoder=True))):
        raise UnsupportedError(f"{kind} is an encoder-decoder model; only decoder-only causal models can be pruned")
    return config


def _parts(config: Any) -> Iterator[Any]:
    """The configurations within one, at any depth."""
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            yield part
            yield from _parts(part)


def _compute_with_what_is_here(config: Any) -> None:
    """Kernels that a checkpoint names (FlashAttention, those of the hub) are how it was run, not what it is."""
    if config._attn_implementation not in _ATTENTIONS:
        config._attn_implementation_internal = None
    if config._experts_implementation not in _EXPERTS:
        config._experts_implementation_internal = None


def one_line(error: BaseException) -> str:
    """What an error of a library says."""
    return " ".join(str(error).split())[:300] or type(error).__name__
