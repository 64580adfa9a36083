"""One rank against several under torchrun, each with as many threads: calibration, refits, and `prune --stats`.

A layer with experts is that of `--experts N`; a refit's job calibrates as well, on inputs of the dense model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path

from bench_rig import (
    BenchError,
    Ran,
    Row,
    checkpoint_in,
    describe,
    figure,
    interleaved,
    into_page_cache,
    run,
    say,
    temporary_folder,
)
from make_checkpoint import add_shape_options

JOBS = ("calibrate", "refit", "stats")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `ranks` takes besides the common options."""
    parser.add_argument("--checkpoint", metavar="DIR", help="this checkpoint instead of a synthetic one")
    add_shape_options(parser)
    parser.set_defaults(layers=3)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS), help="default: all")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of each rank (default: %(default)s)")
    parser.add_argument("--method", default="obs-admm", help="recipe of the refit (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=32, metavar="N", help="default: %(default)s")
    parser.add_argument("--seqlen", type=int, default=2048, metavar="N", help="default: %(default)s")


def ranks(arguments: argparse.Namespace) -> Iterator[Row]:
    """Seconds of work of each job, and of several ranks the part that they wait for others and exchange data."""
    if arguments.ranks < 2 or arguments.threads < 1:
        raise BenchError("--ranks takes numbers from 2, --threads from 1")
    with temporary_folder(arguments) as folder:
        tokens = arguments.samples * arguments.seqlen
        checkpoint = checkpoint_in(folder, arguments, copies=1, activations=tokens)
        for job in arguments.jobs:
            yield from _one_job(arguments, folder, checkpoint, job)


def _one_job(arguments: argparse.Namespace, folder: Path, checkpoint: Path, job: str) -> Iterator[Row]:
    drawn = ["--samples", str(arguments.samples), "--seqlen", str(arguments.seqlen)]
    kept, out = folder / "statistics", folder / "out"
    words = {
        "calibrate": ["calibrate", str(checkpoint), str(out), *drawn],
        "refit": ["prune", str(checkpoint), str(out), "--pattern", "2:4", "--method", arguments.method,
                  "--propagate", "dense", *drawn],
        "stats": ["prune", str(checkpoint), str(out), "--pattern", "2:4", "--stats", str(kept),
                  "--shard-size", "1GB"],
    }[job] + ["--device", arguments.device, "--json", "--quiet"]  # fmt: skip
    waited: list[float] = []

    def measured(size: int) -> dict[str, float]:
        into_page_cache(checkpoint)
        ran = _started(arguments, size, words)
        seconds = float(ran.result["seconds"])
        if size > 1:
            found = json.loads((out / "streamprune.json").read_text()) if out.is_dir() else ran.result
            waited.append(statistics.fmean(rank["waited_seconds"] for rank in found["ranks"]) / seconds)
        shutil.rmtree(out) if out.is_dir() else out.unlink()
        return {_named(job, size): seconds}

    if job == "stats":
        say("gathering statistics")
        few = ["calibrate", str(checkpoint), str(kept), "--samples", "2", "--seqlen", "32"]
        run("-m", "streamprune", *few, "--device", arguments.device, "--json", "--quiet").result  # noqa: B018
    say("unmeasured runs")
    for size in (1, arguments.ranks):
        measured(size)
    waited.clear()
    runs = interleaved([lambda: measured(1), lambda: measured(arguments.ranks)], arguments.repeat)
    on = f"{describe(checkpoint)}, OMP_NUM_THREADS={arguments.threads}"
    on += "" if job == "stats" else f", {' '.join(drawn)}"
    one, several = (_named(job, size) for size in (1, arguments.ranks))
    for case in (one, several):
        row = figure(case, runs[case], one, runs[one], unit="s", on=on)
        times = {"times": float(f"{1 / row['ratio']:.4g}")} if case == several else {}
        idle = {"waited_percent": float(f"{100 * statistics.median(waited):.4g}")} if waited and case == several else {}
        yield row | times | idle


def _named(job: str, size: int) -> str:
    return f"{job}, {size} rank{'s' if size > 1 else ''}"


def _started(arguments: argparse.Namespace, size: int, words: list[str]) -> Ran:
    """`streamprune WORDS` on its own, or as so many ranks on this machine."""
    before = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}
    os.environ |= dict.fromkeys(before, str(arguments.threads))
    try:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)] if size > 1 else []
        return run(*torchrun, "-m", "streamprune", *words)
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
