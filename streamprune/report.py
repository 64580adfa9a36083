"""`streamprune.json`: what was done to a model, beside its weights. Format version: disk/journal.py."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

from streamprune.pruning.recipes import RECIPES
from streamprune.spec import JobSpec, version_of


def recipe_name(spec: JobSpec) -> str | None:
    """The recipe's name, or "score+selector" for one without a name."""
    if spec.recipe is None:
        return None
    named = next((name for name, recipe in RECIPES.items() if recipe == spec.recipe), None)
    parts = (spec.recipe.score, spec.recipe.selector, spec.recipe.refit, spec.recipe.quantize)
    return named or "+".join(part for part in parts if part)


def build_report(
    spec: JobSpec, resolved: Mapping[str, Any], calibration: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]], files: Sequence[Mapping[str, Any]], *,
    seconds: float, startup: float, peak: int,
) -> dict[str, Any]:  # fmt: skip
    """The report of a finished job.

    `seconds` are those of the work over all runs it took, `startup` those that the last run needed before it could
    begin (imports, skeleton, tokens), `peak` the resident bytes of the highest run. A stage whose Gram matrices had no
    room beside its pass has `gram_passes`, the passes more that they took; `pooled` are linears of experts that saw too
    few tokens, and went by what all experts of the layer saw.
    """
    reduced = [r["batch"] for r in records if r["batch"]]
    linears = [linear for record in records for linear in record["linears"]]
    pruned = sum(n["pruned"] for n in linears)
    weights = sum(n["rows"] * n["in_features"] for n in linears)
    return {
        "recipe": recipe_name(spec),
        "sparsity": pruned / weights if weights else 0.0,
        "seconds": round(seconds, 3),
        "startup_seconds": round(startup, 3),
        "peak_rss_bytes": peak,
        **({"out_of_memory_batch": min(reduced)} if reduced else {}),
        "job": spec.fixed(),
        "resolved": dict(resolved),
        "calibration": dict(calibration),
        "linears": linears,
        "stages": [
            {"name": r["stage"], "seconds": round(r["seconds"], 3), "peak_rss_bytes": r["peak"]}
            | {key: r[key] for key in ("gram_passes", "pooled") if key in r}
            for r in records
        ],
        "files": list(files),
        "versions": {"python": platform.python_version()}
        | {
            name: version_of(name) for name in ("streamprune", "torch", "transformers", "numba", "numpy", "safetensors")
        },
    }
