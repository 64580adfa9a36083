"""Prune any Hugging Face safetensors causal LM out of core, one layer at a time.

    import streamprune

    streamprune.prune("meta-llama/Llama-3.1-8B", "llama-2of4", pattern="2:4")
    streamprune.evaluate("llama-2of4", "wiki.txt", seqlen=2048).perplexity

The same verbs as on the command line: prune, calibrate, evaluate, plan, inspect, pack, unpack. Errors are those of
streamprune.errors. Nothing heavy is imported before a verb is called.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamprune.evaluation import evaluate
    from streamprune.inspection import inspect
    from streamprune.job import calibrate, prune
    from streamprune.packing import pack, unpack
    from streamprune.planning import plan

__all__ = ["calibrate", "evaluate", "inspect", "pack", "plan", "prune", "unpack"]

_HOMES = {
    "prune": "job",
    "calibrate": "job",
    "evaluate": "evaluation",
    "plan": "planning",
    "inspect": "inspection",
    "pack": "packing",
    "unpack": "packing",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"streamprune.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
