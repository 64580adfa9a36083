"""Tuning of a layer, compared with the bare forward and backward pass of the same layer for the same tokens."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from bench_forward import BareLayer, Batches, add_calibration_options
from bench_rig import Row, call, checkpoint_in, describe, figure, into_page_cache, say, temporary_folder
from torch.utils._pytree import tree_map


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `tuning` takes besides the common options."""
    add_calibration_options(parser)
    parser.set_defaults(layers=1, samples=32, seqlen=512)
    parser.add_argument("--epochs", type=int, default=2, metavar="N", help="default: %(default)s")


def _own(x: object) -> object:
    """A copy of what was made in inference mode, through which gradients cannot be computed."""
    return x.clone() if isinstance(x, torch.Tensor) else x


class LearningLayer(BareLayer):
    """A layer whose gradients are computed."""

    def seconds(self) -> float:
        """Seconds of forward and backward passes of all batches, one after another."""
        self.layer.requires_grad_(True)
        self.calls = {size: tree_map(_own, found) for size, found in self.calls.items()}
        self._wait()
        begun = time.perf_counter()
        for size in self.batches.sizes:
            made = self._run(size)
            (made[0] if isinstance(made, tuple) else made).float().square().sum().backward()
            for parameter in self.layer.parameters():
                parameter.grad = None
        self._wait()
        return time.perf_counter() - begun


def tuning(arguments: argparse.Namespace) -> Iterator[Row]:
    """Seconds of an epoch, with all that belongs to it, against forward and backward of the windows that it learns."""
    from streamprune.calibration.windows import held_out
    from streamprune.pruning.tuning import windows_a_step

    samples, seqlen = arguments.samples, arguments.seqlen
    with temporary_folder(arguments) as folder:
        checkpoint = checkpoint_in(folder, arguments, copies=1, activations=samples * seqlen)
        say("unmeasured run")
        dtype, device, _ = _tuned(arguments, folder, checkpoint)
        learnt = samples - len(held_out(samples))
        batches = Batches(learnt, seqlen, windows_a_step(seqlen, samples), dtype, device)
        bare = LearningLayer(checkpoint, batches)
        tuned, base = list[float](), list[float]()
        for number in range(arguments.repeat):
            say(f"round {number + 1}/{arguments.repeat}")
            before = bare.seconds()
            tuned.append(_tuned(arguments, folder, checkpoint)[2])
            base.append((before + bare.seconds()) / 2)
        on = f"one layer of {describe(checkpoint)}, {batches}, {arguments.epochs} epochs"
        for case, runs in (("bare forward and backward", base), ("an epoch of tuning", tuned)):
            row = figure(case, runs, "bare forward and backward", base, unit="s", on=on)
            yield row | {"percent_of_bare": float(f"{100 / row['ratio']:.6g}")}


def _tuned(arguments: argparse.Namespace, folder: Path, checkpoint: Path) -> tuple[str, str, float]:
    """One prune in a fresh process: dtype, device, and seconds of an epoch of the first layer, the only one pruned."""
    out = folder / "out"
    into_page_cache(checkpoint)
    found = call(
        "prune", model=str(checkpoint), out=str(out), amount="2:4", resources={"device": arguments.device},
        recipe={"name": "swiftprune-tuned", "tune_epochs": arguments.epochs},
        calibration={"samples": arguments.samples, "seqlen": arguments.seqlen}, only=r"\.0\.",
    )  # fmt: skip
    shutil.rmtree(out)
    report = found["report"]
    told = next(stage["tune"] for stage in report["stages"] if "tune" in stage)
    return report["resolved"]["dtype"], report["resolved"]["device"], told["seconds"] / told["epochs"]
