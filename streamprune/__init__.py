"""Prune any Hugging Face safetensors causal LM out of core, one layer at a time.

    import streamprune

    calibration = streamprune.Calibration("c4.jsonl", samples=64, seqlen=2048)
    streamprune.prune("meta-llama/Llama-3.1-8B", "llama-2of4", "2:4", "obs-admm", calibration=calibration)
    streamprune.evaluate("llama-2of4", "wiki.txt", seqlen=2048).perplexity

The same verbs as on the command line: prune, calibrate, evaluate (on tasks: evaluate_tasks), plan, inspect, report,
pack, unpack, upload. Recipe, Calibration and Resources hold what the flags of the command line say.
`with show_progress("prune") as progress` shows a bar, in notebooks too: prune(…, progress=progress). Errors are those
of streamprune.errors. Nothing heavy is imported before a verb is called.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamprune.evaluation.evaluate import evaluate
    from streamprune.evaluation.tasks import evaluate_tasks
    from streamprune.inspection.inspect import inspect
    from streamprune.methods.recipes import Recipe
    from streamprune.packing.job import pack, unpack
    from streamprune.planning.plan import plan
    from streamprune.progress import show_progress
    from streamprune.pruning.job import calibrate, prune
    from streamprune.publishing.upload import upload
    from streamprune.reporting.page import report
    from streamprune.settings import Calibration, Resources

__all__ = [
    "Calibration", "Recipe", "Resources", "calibrate", "evaluate", "evaluate_tasks", "inspect", "pack", "plan", "prune",
    "report", "show_progress",
    "unpack", "upload",
]  # fmt: skip

_HOMES = {
    "prune": "pruning.job",
    "calibrate": "pruning.job",
    "evaluate": "evaluation.evaluate",
    "evaluate_tasks": "evaluation.tasks",
    "plan": "planning.plan",
    "inspect": "inspection.inspect",
    "report": "reporting.page",
    "pack": "packing.job",
    "unpack": "packing.job",
    "upload": "publishing.upload",
    "show_progress": "progress",
    "Recipe": "methods.recipes",
    "Calibration": "settings",
    "Resources": "settings",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"streamprune.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
