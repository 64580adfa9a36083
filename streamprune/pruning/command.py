"""The command that makes a job, from what its report or `job.json` says of it: what is as by default is left out."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from streamprune.errors import UsageError
from streamprune.methods.recipes import RECIPES, TUNE_EPOCHS, TUNE_LR, Recipe
from streamprune.settings import Calibration, Resources

_PARTS = ("score", "selector", "refit", "quantize", "tune")
_DRAWN, _USED = ("samples", "seqlen", "seed", "bos"), ("device", "dtype", "backend")
_EXPERTS = ("expert_stats", "expert_tokens")
_DEFAULTS: Mapping[str, Any] = {
    "damping": "auto", "fp8_scale": "amax", "tune_epochs": TUNE_EPOCHS, "tune_lr": TUNE_LR,
    **{key: getattr(Calibration, key) for key in (*_DRAWN, *_EXPERTS)},
    **{key: getattr(Resources, key) for key in _USED},
}  # fmt: skip


def command_of(job: Mapping[str, Any], text: object = None, model: str = "MODEL", out: str = "OUT") -> str:
    """The command line of a prune job with these fixed fields (JobSpec.fixed), to be read and run again.

    `text` is what the calibration text is called, None or "built-in" where none was given. Which field of records was
    read is not known.
    """
    name, recipe = _recipe(job)
    words: dict[str, Any] = {"sparsity": job.get("sparsity"), "pattern": job.get("pattern")}
    words["method"] = None if name == "swiftprune" else name
    for part in _PARTS:
        if _differs(job, part, recipe):
            words[part] = job.get(part) or "none"
    words |= {key: job.get(key) for key in ("damping", "allocate", "fp8_scale")}
    if (replaced := job.get("replace_tokens") or 0) != (_usual(job).replace_tokens or 0):
        words["replace_tokens"] = replaced
    rounding = "compensate" if job.get("refit") else "nearest"
    words["fp8_rounding"] = None if job.get("fp8_rounding") == rounding else job.get("fp8_rounding")
    words |= {key: job.get(key) for key in ("tune_epochs", "tune_lr", "only", "skip", "mtp")}
    if job.get("calib") is not None:
        words["calib"] = None if text in (None, "built-in") else text
        words |= {key: job.get(key) for key in _DRAWN}
    words["stats"] = None if job.get("stats") is None else "STATS"
    words["propagate"] = None if job.get("propagate") == _usual(job).propagate else job.get("propagate")
    words |= {key: job.get(key) for key in (*_EXPERTS, *_USED)}
    flags = [
        f"--{key.replace('_', '-')} {shlex.quote(str(value))}"
        for key, value in words.items()
        if value is not None and value != _DEFAULTS.get(key)
    ]
    return " ".join(["python -m streamprune prune", shlex.quote(model), shlex.quote(out), *flags])


def _usual(job: Mapping[str, Any]) -> Recipe:
    """A recipe with the defaults of the job's."""
    try:
        return Recipe(refit=job.get("refit"), tune=job.get("tune")).filled()
    except UsageError:  # of another version
        return Recipe()


def _differs(job: Mapping[str, Any], part: str, recipe: Recipe) -> bool:
    unused = part == "selector" and job.get("selector") is None  # with a pattern there is none
    return not unused and job.get(part) != getattr(recipe, part)


def _recipe(job: Mapping[str, Any]) -> tuple[str, Recipe]:
    """The named recipe that has most in common with a job's."""
    name = min(RECIPES, key=lambda name: sum(_differs(job, part, RECIPES[name]) for part in _PARTS))
    return name, RECIPES[name]
