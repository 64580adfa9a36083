"""Refits of one linear: time to prepare a Gram matrix, and time for rows, compared with one product with the matrix."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator

import torch
from bench_kernels import device_named
from bench_rig import BenchError, Row, figure, interleaved

PRODUCT = "one product, float32"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `refits` takes besides the common options."""
    parser.add_argument("--shape", default="1024x4096", help="ROWSxINPUTS (default: %(default)s)")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="what the pass computes in"
    )


def refits(arguments: argparse.Namespace) -> Iterator[Row]:
    """Every refit at 50 %: preparing for a Gram, and refitting rows; in products of the rows with the Gram."""
    from streamprune.methods.gram import Gram
    from streamprune.methods.inverse import Damping
    from streamprune.methods.refits import METHODS, RefitRequest
    from streamprune.methods.selection import Amount, select
    from streamprune.process.ranks import ALONE

    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", arguments.shape)
    if not found:
        raise BenchError(f"--shape {arguments.shape}: write it as ROWSxINPUTS, such as 1024x4096")
    rows, width = int(found.group(1)), int(found.group(2))
    device = device_named(arguments.device)
    torch.manual_seed(0)
    factors = torch.randn(width // 4 + 1, width) / 8
    x = (torch.randn(2 * width, width // 4 + 1) @ factors + torch.randn(2 * width, width)).to(device)
    gram = Gram(x.T @ x, x[:0], len(x), products=getattr(torch, arguments.dtype))
    del x
    weight = (torch.randn(rows, width) * 0.02).to(device)

    def keep(some: torch.Tensor, share: float) -> torch.Tensor:
        kept = select(
            some, gram.diagonal, 2, selector="exact", want_keep=True, **Amount(0.5).at(share)._asdict()
        ).keep  # fmt: skip
        assert kept is not None
        return kept

    ask = RefitRequest(0.5, None, keep)
    masked = weight * keep(weight, 1.0)

    def timed(name: str, work: object) -> dict[str, float]:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        work()  # type: ignore[operator]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return {name: time.perf_counter() - begun}

    states = {name: method.prepare(gram, Damping(method.damping), ALONE).state for name, method in METHODS.items()}
    measures = [lambda: timed(PRODUCT, lambda: weight @ gram.matrix)]
    for name, method in METHODS.items():
        measures += [
            lambda n=name, m=method: timed(f"{n}, prepare", lambda: m.prepare(gram, Damping(m.damping), ALONE)),
            lambda n=name, m=method: timed(f"{n}, rows", lambda: m.solve(weight, masked, gram, states[n], ask)),
        ]
    runs = interleaved(measures, arguments.repeat)
    for name, seconds in runs.items():
        on = f"{arguments.shape} at 50 % on {device.type}, products in {arguments.dtype} where that will do"
        yield figure(name, seconds, PRODUCT, runs[PRODUCT], unit="s", on=on)
