"""`demo`: prunes and evaluates the small trained model that is part of the package, in a temporary folder."""

from __future__ import annotations

import importlib.resources
import tempfile
from pathlib import Path
from typing import Any

from streamprune.evaluation.evaluate import evaluate
from streamprune.inspection.inspect import inspect
from streamprune.progress import Progress, ProgressCallback
from streamprune.pruning.job import JobResult, prune
from streamprune.settings import Calibration, Resources

SAMPLES, SEQLEN = 64, 256


def run_demo(progress: ProgressCallback) -> list[dict[str, Any]]:
    """Prunes the demo model to 50 % and to 2:4, and evaluates the results and the dense model on held-out text.

    Returns one row of JSON values per model, for tables.demo_table.
    """
    package = importlib.resources.files("streamprune")
    jobs: list[tuple[str, float | str | None, str]] = [
        ("dense", None, ""),
        ("50 % (swiftprune)", 0.5, "swiftprune"),
        ("2:4 (swiftprune)", "2:4", "swiftprune"),
        ("50 % (magnitude)", 0.5, "magnitude"),
    ]
    calibration = Calibration(samples=SAMPLES, seqlen=SEQLEN)
    rows = []
    with (
        importlib.resources.as_file(package / "demo_model") as model,
        importlib.resources.as_file(package / "text" / "heldout.txt.gz") as text,
        tempfile.TemporaryDirectory(prefix="streamprune-demo-") as folder,
    ):
        for number, (name, amount, recipe) in enumerate(jobs):
            result: JobResult | None = None
            out = model
            if amount is not None:
                out = Path(folder) / f"out{number}"
                result = prune(model, out, amount, recipe, calibration=calibration)
            found = evaluate(out, text, seqlen=SEQLEN, resources=Resources(work=folder))
            zeros = inspect(out).totals
            pattern = next((p for p, count in zeros.patterns.items() if count == zeros.linears and p != "none"), None)
            rows.append({
                "model": name, "perplexity": found.perplexity, "sparsity": zeros.sparsity, "pattern": pattern,
                "prune_seconds": result.seconds if result else None, "eval_seconds": found.seconds,
                "peak_rss_bytes": max(found.peak_rss_bytes, result.peak_rss_bytes if result else 0),
            })  # fmt: skip
            progress(Progress(name, number + 1, len(jobs), found.seconds + (result.seconds if result else 0.0)))
    return rows
