"""The same prune by another program for comparison: llm-compressor, in a Python environment of its own.

    python -m venv peer && peer/bin/pip install llmcompressor
    python tools/bench.py peers --peer peer/bin/python --model smollm2 --calib c4.txt --samples 32 --seqlen 512

Both get the same windows of token ids and prune to 2:4 with the method of the same name; obs-admm, which llm-compressor
does not have, is compared with its SparseGPT. wanda+pruned calibrates on the pruned layers before, as llm-compressor
does. Seconds are those of the whole process, imports included; with --text, `eval` finds perplexities afterwards. The
two programs need not be installed in the same environment.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bench_rig import ROOT, BenchError, Ran, Row, figure, interleaved, run, streamprune, temporary_folder

PEERS = {"wanda": "wanda", "wanda+pruned": "wanda", "sparsegpt": "sparsegpt", "obs-admm": "sparsegpt"}
"""Our recipes, some with the inputs they are calibrated on, and what each is measured against."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `peers` takes besides the common options."""
    parser.add_argument("--peer", metavar="PYTHON", help="the Python of an environment with llm-compressor")
    parser.add_argument("--model", metavar="MODEL", help="a checkpoint's folder (default: the demo's)")
    parser.add_argument("--calib", metavar="FILE", help="calibration text (default: the built-in one)")
    parser.add_argument("--samples", type=int, default=32, metavar="N", help="windows (default: %(default)s)")
    parser.add_argument("--seqlen", type=int, default=512, metavar="N", help="their length (default: %(default)s)")
    parser.add_argument("--text", metavar="FILE", help="text for perplexities of what was pruned")
    parser.add_argument("--methods", default=",".join(PEERS), metavar="A,B", help="(default: %(default)s)")


def peers(arguments: argparse.Namespace) -> Iterator[Row]:
    """Seconds, peak memory and perplexity of each recipe and of its peer, in turns."""
    methods = arguments.methods.split(",")
    if unknown := [m for m in methods if m not in PEERS]:
        raise BenchError(f"--methods {unknown[0]}: choose from {', '.join(PEERS)}")
    if arguments.peer is None or shutil.which(arguments.peer) is None:
        raise BenchError("--peer PYTHON: name the Python of an environment in which llm-compressor is installed")
    model = Path(arguments.model) if arguments.model else ROOT / "streamprune" / "demo_model"
    with temporary_folder(arguments) as folder:
        ids = folder / "windows.npy"
        _write_windows(arguments, model, ids)
        theirs = dict.fromkeys(PEERS[m] for m in methods)
        measures = [partial(_ours, model, ids, arguments, method, folder) for method in methods]
        measures += [partial(_theirs, model, ids, arguments, method, folder) for method in theirs]
        runs = interleaved(measures, arguments.repeat)
    on = f"{model.resolve().name}, 2:4, {arguments.samples} windows of {arguments.seqlen} tokens"
    for unit in ("s", "MiB", *(["perplexity"] if arguments.text else [])):
        for method in methods:
            other, base = PEERS[method], runs[f"llm-compressor {PEERS[method]} {unit}"]
            case = method if method == other else f"{method}, beside {other}"
            runs_of = runs[f"{method} {unit}"]
            yield figure(case, runs_of, "llm-compressor", base, unit=unit, on=f"{on}, {unit}")


def _write_windows(arguments: argparse.Namespace, model: Path, path: Path) -> None:
    """The windows that `prune` would draw, as token ids."""
    import numpy as np

    from streamprune.calibration.texts import Text
    from streamprune.calibration.windows import Source, draw_windows
    from streamprune.disk.checkpoint import open_checkpoint

    text = Text(Path(arguments.calib) if arguments.calib else None)
    source = Source(text, model, open_checkpoint(model).config, 1 << 31, bos="never")
    windows = draw_windows(source.begin(arguments.seqlen, arguments.samples), 0, Path(tempfile.gettempdir()))
    packed = io.BytesIO()
    np.save(packed, windows)
    path.write_bytes(packed.getvalue())


def _ours(model: Path, ids: Path, arguments: argparse.Namespace, method: str, folder: Path) -> dict[str, float]:
    out = folder / "out"
    name, _, inputs = method.partition("+")
    given = [
        "--method",
        name,
        *(["--propagate", inputs] if inputs else []),
        "--pattern",
        "2:4",
        "--calib",
        str(ids),
        "--bos",
        "never",
        "--work",
        str(folder),
    ]
    sizes = ["--samples", str(arguments.samples), "--seqlen", str(arguments.seqlen)]
    ran = streamprune("prune", str(model), str(out), *given, *sizes)
    return _figures(method, ran, out, model, arguments)


def _theirs(model: Path, ids: Path, arguments: argparse.Namespace, method: str, folder: Path) -> dict[str, float]:
    out = folder / "theirs"
    child = str(ROOT / "tools" / "bench_peers_child.py")
    ran = run(child, json.dumps({"model": str(model), "ids": str(ids), "method": method, "out": str(out)}),
              python=arguments.peer)  # fmt: skip
    return _figures(f"llm-compressor {method}", ran, out, model, arguments)


def _figures(name: str, ran: Ran, out: Path, tokenizer: Path, arguments: argparse.Namespace) -> dict[str, float]:
    if ran.code:
        last = ran.errors.strip().splitlines()[-1:] or ["it said nothing"]
        raise BenchError(f"{name} ended with {ran.code}: {last[0]}")
    found = {f"{name} s": ran.seconds, f"{name} MiB": (ran.hwm or 0) / 2**20}
    if arguments.text:
        for each in tokenizer.glob("*token*"):  # which llm-compressor does not write
            shutil.copy(each, out)
        done = streamprune("eval", str(out), "--text", arguments.text, "--seqlen", str(arguments.seqlen))
        found[f"{name} perplexity"] = float(done.result["perplexity"])
    shutil.rmtree(out)
    return found
