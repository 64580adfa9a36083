"""Reads config.json with transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from streamprune.disk.checkpoint import Checkpoint
from streamprune.errors import CheckpointError, UnsupportedError

_ATTENTIONS = (None, "eager", "sdpa")
_EXPERTS = (None, "eager", "batched_mm", "grouped_mm")


def load_config(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    """transformers' configuration of a checkpoint, without the attention and expert kernels that need other packages.

    Raises UnsupportedError for unknown architectures and encoder-decoder models, CheckpointError for an invalid
    configuration.
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
        _reset_kernels(part)
    if any(getattr(c, "is_encoder_decoder", False) for c in (config, config.get_text_config(decoder=True))):
        raise UnsupportedError(f"{kind} is an encoder-decoder model; only decoder-only causal models can be pruned")
    return config


def _parts(config: Any) -> Iterator[Any]:
    """All sub-configurations, at any depth."""
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            yield part
            yield from _parts(part)


def _reset_kernels(config: Any) -> None:
    """Lets transformers choose the kernels where the checkpoint names some that need other packages.

    FlashAttention or a kernel of the hub is how the model was run, not what it computes.
    """
    if config._attn_implementation not in _ATTENTIONS:
        config._attn_implementation_internal = None
    if config._experts_implementation not in _EXPERTS:
        config._experts_implementation_internal = None


def one_line(error: BaseException) -> str:
    """A library's error message in one line, shortened."""
    return " ".join(str(error).split())[:300] or type(error).__name__
