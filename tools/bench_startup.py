"""How long commands take to begin, against `python -c "import torch, numba"`."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from bench_rig import Ran, Row, chosen_shape, figure, interleaved, run, say, streamprune, temporary_folder
from make_checkpoint import add_shape_options, write_checkpoint

IMPORTS = "import torch, numba"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `startup` takes besides the common options."""
    add_shape_options(parser, "narrow")


def startup(arguments: argparse.Namespace) -> Iterator[Row]:
    """Whole processes less the work that they report, on a model of one small layer."""
    with temporary_folder(arguments) as folder:
        shape = chosen_shape(arguments, layers=1, vocab=2048, hidden=64, intermediate=128, heads=4, kv_heads=2)
        model, statistics, text = folder / "model", folder / "statistics", folder / "text"
        write_checkpoint(model, arguments.seed, shape)
        text.write_text(" ".join(f"w{number}" for number in range(200)))
        few = ["--samples", "2", "--seqlen", "16", "--device", arguments.device]
        _done(streamprune("calibrate", str(model), str(statistics), *few))
        done = folder / "done"
        job = ["--pattern", "2:4", "--device", arguments.device]
        _done(streamprune("prune", str(model), str(done), *job, "--stats", str(statistics)))

        def imports() -> dict[str, float]:
            return {IMPORTS: _done(run("-c", IMPORTS)).seconds}

        def prune(case: str, *more: str) -> Callable[[], dict[str, float]]:
            return lambda: {case: _to_work(folder / "out", "prune", str(model), str(folder / "out"), *job, *more)}

        def again() -> dict[str, float]:
            ran = streamprune("prune", str(model), str(done), *job, "--stats", str(statistics))
            return {"prune that is done already": _done(ran).seconds}

        def evaluate() -> dict[str, float]:
            ran = streamprune("eval", str(model), "--text", str(text), "--seqlen", "16", "--device", arguments.device)
            return {"eval of a few words, whole process": _done(ran).seconds}

        measures = [
            imports, prune("prune --stats, without its work", "--stats", str(statistics)),
            prune("prune, without its work", *few[:4]), evaluate, again,
        ]  # fmt: skip
        say("unmeasured runs")
        for measure in measures:
            measure()
        runs = interleaved(measures, arguments.repeat)
        for case, seconds in runs.items():
            yield figure(case, seconds, IMPORTS, runs[IMPORTS], unit="s", on="from the start of the process")


def _done(ran: Ran) -> Ran:
    """The same; raises BenchError if it failed."""
    if ran.code or ran.out.startswith("{"):
        _ = ran.result
    return ran


def _to_work(out: Path, *arguments: str) -> float:
    """Seconds of a process less those that its report counts as work."""
    ran = _done(streamprune(*arguments))
    work = json.loads((out / "streamprune.json").read_text())["seconds"]
    shutil.rmtree(out)
    return ran.seconds - float(work)
