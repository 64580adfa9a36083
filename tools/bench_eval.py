"""`eval` compared with transformers: the same windows of the same text, through the whole model in memory.

What is timed begins with opening the checkpoint and ends with the perplexity; imports are not part of it. transformers
takes `--batch` windows at once.
"""

from __future__ import annotations

import argparse
import gzip
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bench_kernels import device_named
from bench_rig import (
    ROOT,
    BenchError,
    Row,
    checkpoint_in,
    describe,
    figure,
    interleaved,
    into_page_cache,
    say,
    streamprune,
    temporary_folder,
)
from make_checkpoint import add_shape_options
from torch.nn import functional as F

WHOLE, THEIRS = "transformers, whole", "transformers, its pass"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `eval` takes besides the common options."""
    parser.add_argument("--checkpoint", metavar="DIR", help="this checkpoint instead of a synthetic one")
    add_shape_options(parser)
    parser.set_defaults(layers=4)
    parser.add_argument("--text", metavar="FILE", help="default: the built-in held-out text")
    parser.add_argument("--samples", type=int, default=32, metavar="N", help="windows (default: %(default)s)")
    parser.add_argument("--seqlen", type=int, default=512, metavar="N", help="their length (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="transformers' windows at once")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="(default: %(default)s)")


def evaluation(arguments: argparse.Namespace) -> Iterator[Row]:
    """Seconds of `eval`, against those of transformers with and without loading the model and reading the text."""
    with temporary_folder(arguments) as folder:
        checkpoint = checkpoint_in(folder, arguments, copies=0, activations=arguments.samples * arguments.seqlen)
        text = Path(arguments.text) if arguments.text else _built_in(folder)
        given = ["--seqlen", str(arguments.seqlen), "--windows", str(arguments.samples)]
        given += ["--device", arguments.device, "--dtype", arguments.dtype]
        windows: list[int] = []

        def ours() -> dict[str, float]:
            found = streamprune("eval", str(checkpoint), "--text", str(text), "--bos", "never", *given).result
            windows[:] = [found["windows"]]
            return {"eval": found["seconds"], "eval's perplexity": found["perplexity"]}

        into_page_cache(checkpoint)
        say("unmeasured runs")
        expected = ours()["eval's perplexity"]
        theirs = _transformers(arguments, checkpoint, text)["transformers' perplexity"]
        if abs(math.log(theirs / expected)) > 0.02:
            raise BenchError(f"perplexity {theirs:.4g} by transformers, {expected:.4g} by eval: not the same windows")
        runs = interleaved([lambda: _transformers(arguments, checkpoint, text), ours], arguments.repeat)
        on = f"{describe(checkpoint)}, {windows[0]} windows of {arguments.seqlen}, {arguments.dtype}"
    for case in (WHOLE, THEIRS, "eval"):
        row = figure(case, runs[case], WHOLE, runs[WHOLE], unit="s", on=on)
        yield row | {"percent_of_theirs": float(f"{100 / row['ratio']:.4g}")}


def _built_in(folder: Path) -> Path:
    text = folder / "heldout.txt"
    text.write_bytes(gzip.decompress((ROOT / "streamprune" / "text" / "heldout.txt.gz").read_bytes()))
    return text


def _transformers(arguments: argparse.Namespace, checkpoint: Path, text: Path) -> dict[str, float]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    begun, device = time.perf_counter(), device_named(arguments.device)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=getattr(torch, arguments.dtype), local_files_only=True
    )
    model.eval().to(device)
    length = arguments.seqlen
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False, return_tensors="pt").input_ids[0]
    ids = ids[: min(len(ids) // length, arguments.samples) * length].view(-1, length)
    since, nats = time.perf_counter(), 0.0
    with torch.inference_mode():
        for part in ids.to(device).split(arguments.batch):
            for logits, row in zip(model(part, use_cache=False).logits, part, strict=True):
                nats += float(F.cross_entropy(logits[:-1].float(), row[1:], reduction="sum"))
    done = time.perf_counter()
    return {
        WHOLE: done - begun,
        THEIRS: done - since,
        "transformers' perplexity": math.exp(nats / (len(ids) * (length - 1))),
    }
