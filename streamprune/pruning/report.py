"""`streamprune.json`: what was done to a model, beside its weights. Format version: disk/journal.py."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.hub import hub_name
from streamprune.disk.quantised import PlainView
from streamprune.process.versions import version_of
from streamprune.pruning.records import Resolved, StageRecord
from streamprune.pruning.spec import JobSpec


def build_report(
    spec: JobSpec, resolved: Resolved, calibration: Mapping[str, Any],
    records: Sequence[StageRecord], files: Sequence[Mapping[str, Any]], source: Mapping[str, Any], *,
    seconds: float, startup: float, peak: int,
) -> dict[str, Any]:  # fmt: skip
    """The report of a finished job.

    `seconds` are those of the work over all runs it took, `startup` those that the last run needed before it could
    begin (imports, skeleton, tokens), `peak` the resident bytes of the highest run. A stage whose Gram matrices had no
    room beside its pass has `gram_passes`, the passes more that they took; `pooled` are linears of experts that saw too
    few tokens, and went by what all experts of the layer saw. `source` is what else is said of MODEL: its content
    (Checkpoint.content), files and tensors that were not carried over, how it was quantised. `tune` says what tuning a
    layer came to: errors as in methods/tuning.py, of windows that were held out and of as many that were not, before
    and after.
    """
    reduced = [r.batch for r in records if r.batch]
    linears = [linear for record in records for linear in record.linears]
    pruned = sum(n["pruned"] for n in linears)
    weights = sum(n["rows"] * n["in_features"] for n in linears)
    return {
        "recipe": spec.recipe.name if spec.recipe else None,
        "sparsity": pruned / weights if weights else 0.0,
        "seconds": round(seconds, 3),
        "startup_seconds": round(startup, 3),
        "peak_rss_bytes": peak,
        **({"out_of_memory_batch": min(reduced)} if reduced else {}),
        "job": spec.fixed(),
        **source,
        "resolved": resolved.to_json(),
        "calibration": dict(calibration),
        "linears": linears,
        "stages": [
            {"name": r.stage, "seconds": round(r.seconds, 3), "peak_rss_bytes": r.peak}
            | {key: value for key in ("gram_passes", "pooled", "tune") if (value := getattr(r, key)) is not None}
            for r in records
        ],
        "files": list(files),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of Python and what a job's bytes may depend on."""
    names = ("streamprune", "torch", "transformers", "numba", "numpy", "safetensors")
    return {"python": platform.python_version()} | {name: version_of(name) for name in names}


def source_of(checkpoint: Checkpoint, content: str, carries: bool) -> dict[str, Any]:
    """What a report says of MODEL: its content, its name on the hub if it is from there, and files (if any are carried)
    and tensors that were left behind."""
    behind = checkpoint.side_files().left_behind if carries else ()
    hub = hub_name(checkpoint.path)
    return (
        {"content": content}
        | ({"base_model": hub[0]} if hub else {})
        | ({"left_behind": list(behind)} if behind else {})
        | ({"beside_index": list(checkpoint.beside)} if checkpoint.beside else {})
        | ({"dequantised": checkpoint.method} if isinstance(checkpoint, PlainView) else {})
    )


def notes_of(report: Mapping[str, Any]) -> list[str]:
    """What a user must hear of a finished job unasked: fallbacks, and what was left behind; a sentence each."""
    found = []
    if method := report.get("dequantised"):
        found.append(f"the source is quantised ({method}); it was dequantised before pruning")
    stages: Sequence[Mapping[str, Any]] = report.get("stages", ())
    if behind := report.get("left_behind"):
        found.append(f"left behind, as no part of the model: {_some(behind)}")
    if beside := report.get("beside_index"):
        found.append(f"left out, as the index does not name them there: {_some(beside)}")
    calibration: Mapping[str, Any] = report.get("calibration", {})
    if replaced := calibration.get("replaced"):
        found.append(f"{replaced} bytes of the calibration text were no characters and became U+FFFD")
    if tokens := calibration.get("text_tokens"):
        found.append(f"the calibration text has {tokens} tokens only, so that its windows overlap; give more text")
    if pooled := [name for stage in stages for name in stage.get("pooled", ())]:
        found.append(f"experts that saw too few tokens went by what all of their layer saw: {_some(pooled)}")
    if batch := report.get("out_of_memory_batch"):
        found.append(f"memory ran out on the way; the work was done in batches of {batch}")
    if passes := sum(stage.get("gram_passes", 0) for stage in stages):
        found.append(f"Gram matrices had no room beside a pass and took {passes} more; --max-ram decides")
    linears: Sequence[Mapping[str, Any]] = report.get("linears", ())
    if rows := sum(linear.get("rows_not_refitted", 0) for linear in linears):
        found.append(f"{rows} rows could not be refitted and kept their values")
    if other := [linear["name"] for linear in linears if "damping_asked" in linear]:
        found.append(f"more damping than was asked for was needed: {_some(other)}")
    return found


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
