"""`streamprune.json`, the report that is written beside the weights. Format version: disk/journal.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.hub import hub_name
from streamprune.disk.quantised import PlainView
from streamprune.process.versions import versions
from streamprune.pruning.records import Resolved, StageRecord
from streamprune.pruning.spec import JobSpec
from streamprune.settings import Calibration

_EXPERTS = {key: getattr(Calibration, key) for key in ("expert_stats", "expert_tokens")}


def build_report(
    spec: JobSpec, resolved: Resolved, calibration: Mapping[str, Any],
    records: Sequence[StageRecord], files: Sequence[Mapping[str, Any]], source: Mapping[str, Any], *,
    seconds: float, startup: float, peak: int, dense: Mapping[str, str], shared: Mapping[str, Sequence[Any]],
    ranks: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:  # fmt: skip
    """The report of a finished job.

    `seconds` is the work of all runs of the job; `startup` is how many seconds the last run took before its first
    stage (imports, skeleton, tokens); `peak` is the highest resident memory of all runs, in bytes. `source` are the
    fields about MODEL that source_of returns, and how it was quantised. `dense` are matrices of layers that stay
    dense, by parameter name -> why (model/prunable.py), `shared` the linears that several layers use
    (model/shared.py). `ranks` says of each of several ranks its windows (without a pass, the stages that it
    wrote in the last run), its peak memory, and how long it waited for others in that run, the exchange of data
    included. Optional fields of a stage: `gram_passes`, extra passes for Gram matrices that did not fit into memory
    during the first; `pooled`, linears of experts that saw too few tokens and fell back to statistics pooled over the
    layer's experts; `tune`, errors before and after tuning the layer (methods/tuning.py), on held-out windows and on as
    many others.
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
        **({"left_dense": dict(dense)} if dense else {}),
        **({"shared": {name: [other for _, other in uses] for name, uses in shared.items()}} if shared else {}),
        "stages": [
            {"name": r.stage, "seconds": round(r.seconds, 3), "peak_rss_bytes": r.peak}
            | {key: value for key in ("gram_passes", "pooled", "tune") if (value := getattr(r, key)) is not None}
            for r in records
        ],
        **({"ranks": list(ranks)} if ranks else {}),
        "files": list(files),
        "versions": versions(),
    }


def source_of(checkpoint: Checkpoint, content: str, carries: bool) -> dict[str, Any]:
    """Fields of a report about MODEL: its content, its name on the hub if it comes from there, and tensors and (if it
    `carries` files) files that were left behind."""
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
    """Messages that the user must see about a finished job, one sentence each: fallbacks, and what was left behind."""
    found = []
    job, resolved = report.get("job") or {}, report.get("resolved") or {}
    if method := report.get("dequantised"):
        kept = job.get("quantize") == "keep"
        zeros = "its format was kept, with the codes of pruned weights set to zero"
        found.append(f"the source is quantised ({method}); {zeros if kept else 'it was dequantised before pruning'}")
    experts = [f"--{key.replace('_', '-')}" for key in _EXPERTS if job.get(key) not in (None, _EXPERTS[key])]
    if experts and job.get("calib") is not None and "group" not in resolved:
        found.append(f"the model has no experts, so that {' and '.join(experts)} made no difference")
    if job.get("mtp") == "prune":
        found.append("linears of layers for multi-token prediction were chosen from by magnitude, as no text was run")
    stages: Sequence[Mapping[str, Any]] = report.get("stages", ())
    if behind := report.get("left_behind"):
        found.append(f"files not copied, as they are no part of the model: {_some(behind)}")
    if beside := report.get("beside_index"):
        found.append(f"tensors left out, as the index does not name them in their file: {_some(beside)}")
    calibration: Mapping[str, Any] = report.get("calibration", {})
    if replaced := calibration.get("replaced"):
        found.append(f"{replaced} bytes of the calibration text are invalid and were replaced by U+FFFD")
    if tokens := calibration.get("text_tokens"):
        found.append(f"the calibration text has only {tokens} tokens, so that windows overlap; give more text")
    if dense := report.get("left_dense"):
        found.append(f"weights that cannot be pruned and stay dense: {_some(list(dense))}")
    shared = report.get("shared", {})
    if shared and any("error" in linear for linear in report.get("linears", ())):
        found.append(f"weights that several layers use keep their values, without a refit: {_some(list(shared))}")
    if pooled := [name for stage in stages for name in stage.get("pooled", ())]:
        found.append(
            f"experts that saw too few tokens use statistics pooled over their layer's experts: {_some(pooled)}"
        )
    if batch := report.get("out_of_memory_batch"):
        found.append(f"memory ran out; the work was continued with batches of {batch}")
    passes = sum(stage.get("gram_passes", 0) for stage in stages)
    if passes and calibration.get("propagate") != "asymmetric":  # which needs a pass for each Gram by design
        found.append(
            f"Gram matrices did not fit into memory and took {passes} more passes; more memory (--max-ram) avoids them"
        )
    linears: Sequence[Mapping[str, Any]] = report.get("linears", ())
    if rows := sum(linear.get("rows_not_refitted", 0) for linear in linears):
        counted = "1 row" if rows == 1 else f"{rows} rows"
        found.append(f"{counted} would have been worse after the refit and kept the recipe's mask alone")
    if other := [linear["name"] for linear in linears if "damping_asked" in linear]:
        found.append(f"more damping than requested was needed: {_some(other)}")
    return found


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
