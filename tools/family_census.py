"""Every family that transformers knows, from its own tables: tried, refused by what it is, or not tried.

The tables are those of causal language models and of models with several modalities, whose text model would be pruned.
What is added to transformers thus shows up here: tried with its default configuration made tiny (tests/shrunk.py), or
as not tried, until tests/families.py or tests/mixtures.py has a tiny configuration of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Census:
    """Model types of transformers, beside those that are tried."""

    every: tuple[str, ...]
    """All, tried ones included."""
    alike: Mapping[str, str]
    """Not tried itself -> a family that is tried and has the same model class."""
    refused: tuple[str, ...]
    """Encoder-decoder models, which are refused for that."""
    unknown: tuple[str, ...]
    """Of none of these kinds: nobody knows."""


def class_names() -> dict[str, str]:
    """Model type -> name of the class that would load the whole model, as model/skeleton.py chooses it."""
    from transformers.models.auto import modeling_auto as auto

    several = {**auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, **auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    return {**auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **several}


def census(tried: Collection[str]) -> Census:
    """What transformers knows, where the families `tried` have a row of their own."""
    classes = class_names()
    by_class = {classes[kind]: kind for kind in reversed([*tried]) if kind in classes}
    left = sorted(classes.keys() - set(tried))
    refused = [kind for kind in left if _encodes(kind)]
    alike = {kind: by_class[classes[kind]] for kind in left if classes[kind] in by_class and kind not in refused}
    unknown = [kind for kind in left if kind not in alike and kind not in refused]
    return Census(tuple(sorted(classes.keys() | set(tried))), alike, tuple(refused), tuple(unknown))


def _encodes(kind: str) -> bool:
    """Whether the default configuration of a model type is that of an encoder-decoder model."""
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.for_model(kind)
        return any(getattr(c, "is_encoder_decoder", False) for c in (config, config.get_text_config(decoder=True)))
    except Exception:  # noqa: BLE001 - no default configuration of it is valid
        return False


def lines(found: Census, tried: Collection[str]) -> list[str]:
    """The census as Markdown, where the families `tried` have a row in a table."""
    from transformers import __version__

    unknown = [kind for kind in found.unknown if kind not in tried]
    return [
        f"Of the {len(found.every)} model types that transformers {__version__} has for causal language models, alone "
        f"or within several modalities, {len(tried)} were tried, {len(found.alike)} more have the model class of one "
        f"of these, {len(found.refused)} more are encoder-decoder models, which are refused, and {len(unknown)} were "
        "not tried.",
        "",
        f"- the class of another: {', '.join(f'`{kind}` ({other})' for kind, other in found.alike.items())}",
        f"- encoder-decoder: {', '.join(f'`{kind}`' for kind in found.refused)}",
        f"- not tried, no tiny configuration is known: {', '.join(f'`{kind}`' for kind in unknown)}",
    ]
