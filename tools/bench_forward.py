"""Streamed calibration, and the whole prune, compared with a plain forward pass of the same layer."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_jobs import MIB, add_amount, amount_of
from bench_rig import (
    BenchError,
    Row,
    call,
    checkpoint_in,
    copy_durably,
    describe,
    figure,
    hidden_size,
    interleaved,
    into_page_cache,
    read_config,
    say,
    streamprune,
    temporary_folder,
)
from make_checkpoint import add_shape_options
from torch import nn


@dataclass(frozen=True)
class Batches:
    """The batches of a run: `samples` windows of `seqlen` tokens, `batch` at a time, with dtype and device."""

    samples: int
    seqlen: int
    batch: int
    dtype: str
    device: str

    @property
    def sizes(self) -> list[int]:
        """Windows of each batch."""
        return [min(self.batch, self.samples - begin) for begin in range(0, self.samples, self.batch)]

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> Batches:
        """Those of the run that made this report."""
        c, r = report["calibration"], report["resolved"]
        return cls(c["samples"], c["seqlen"], r["batch"], r["dtype"], r["device"])

    def __str__(self) -> str:
        return f"{self.samples} x {self.seqlen} tokens, {self.batch} at a time, {self.dtype} on {self.device}"


class BareLayer:
    """The first decoder layer of a checkpoint in transformers, with weights as ordinary tensors in RAM or on the
    device.

    It is called with the arguments that the model gives it, on random states (batch, seqlen, hidden).
    """

    def __init__(self, checkpoint: Path, batches: Batches) -> None:
        self.batches, self.device = batches, torch.device(batches.device)
        dtype = getattr(torch, batches.dtype)
        model, config = _one_layer_model(checkpoint, dtype)
        found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 1]
        if not found:
            raise BenchError(f"{checkpoint}: no list of decoder layers in its model; choose another checkpoint")
        layer = found[0][0]
        for parameter in layer.parameters():
            parameter.data = parameter.data.clone()  # no longer a mapped file
        self.calls = {size: _call(model.to(self.device), layer, size, batches.seqlen) for size in set(batches.sizes)}
        self.layer = layer
        del model, found
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        torch.manual_seed(0)
        width = hidden_size(config)
        self.states = {
            size: torch.randn(size, batches.seqlen, width, dtype=dtype, device=self.device) for size in self.calls
        }
        weights = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
        heads = int(config["num_attention_heads"])
        attention = heads * int(config.get("head_dim") or width // heads)
        self.flops = batches.samples * batches.seqlen * 2 * (weights + batches.seqlen * attention)
        """Operations of a pass: two a weight and token, and causal attention over half the window."""
        self.seconds()

    @torch.inference_mode()
    def seconds(self) -> float:
        """Seconds that all batches take, one after another."""
        self._wait()
        begun = time.perf_counter()
        for size in self.batches.sizes:
            self._run(size)
        self._wait()
        return time.perf_counter() - begun

    def _run(self, size: int) -> Any:
        """What the layer returns for a batch of so many windows."""
        args, kwargs = self.calls[size]
        if "hidden_states" in kwargs:
            return self.layer(*args, **kwargs | {"hidden_states": self.states[size]})
        return self.layer(self.states[size], *args[1:], **kwargs)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _one_layer_model(checkpoint: Path, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    """The checkpoint's model with its first layer only, and its configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
        text = config.get_text_config()
        text.num_hidden_layers = 1
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:1]
        model = AutoModelForCausalLM.from_pretrained(checkpoint, config=config, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as e:
        raise BenchError(f"{checkpoint}: cannot be loaded by transformers ({' '.join(str(e).split())[:200]})") from e
    model.requires_grad_(False)
    return model.eval(), text.to_dict()


@torch.inference_mode()
def _call(model: Any, layer: nn.Module, size: int, seqlen: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that a layer is called with for `size` windows."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    ids = torch.zeros(size, seqlen, dtype=torch.long, device=model.device)
    model.base_model(input_ids=ids, use_cache=False)
    hook.remove()
    return calls[0]


# ---- calibration


def add_calibration_options(parser: argparse.ArgumentParser) -> None:
    """What `calibration` takes besides the common options."""
    parser.add_argument("--checkpoint", metavar="DIR", help="this checkpoint instead of a synthetic one")
    add_shape_options(parser)
    parser.set_defaults(layers=4)
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument("--seqlen", type=int, default=2048, metavar="N", help="default: %(default)s")


def calibration(arguments: argparse.Namespace) -> Iterator[Row]:
    """FLOP/s of the streamed calibration against the bare forward of the same layer."""
    with temporary_folder(arguments) as folder:
        tokens = arguments.samples * arguments.seqlen
        checkpoint = checkpoint_in(folder, arguments, copies=0, activations=tokens)
        say("unmeasured run")
        report, _ = _calibrate(arguments, folder, checkpoint)
        bare = BareLayer(checkpoint, Batches.of(report))
        streamed: list[float] = []
        base: list[float] = []
        for number in range(arguments.repeat):
            say(f"round {number + 1}/{arguments.repeat}")
            before = bare.seconds()
            into_page_cache(checkpoint)
            report, seconds = _calibrate(arguments, folder, checkpoint)
            if Batches.of(report) != bare.batches:
                raise BenchError(f"this run took {Batches.of(report)}, the first {bare.batches}: free some memory")
            streamed.append(seconds)
            base.append((before + bare.seconds()) / 2)
        on = f"one layer of {describe(checkpoint)}, {bare.batches}"
        for case, runs in (("bare forward", base), ("streamed calibration", streamed)):
            row = figure(case, runs, "bare forward", base, unit="s", on=on)
            speed = {"tflop_per_s": bare.flops / row["value"] / 1e12, "percent_of_bare": 100 / row["ratio"]}
            yield row | {name: float(f"{value:.6g}") for name, value in speed.items()}


def _calibrate(
    arguments: argparse.Namespace, folder: Path, checkpoint: Path
) -> tuple[Mapping[str, Any], float]:  # fmt: skip
    """One calibration in a fresh process: its report, and the mean seconds of the layers after the first.

    The mean, as commits run in the background of the next layer's pass, so that delays move from layer to layer.
    """
    out = folder / "statistics"
    found = call(
        "calibrate", model=str(checkpoint), out=str(out), resources={"device": arguments.device},
        calibration={"samples": arguments.samples, "seqlen": arguments.seqlen},
    )  # fmt: skip
    out.unlink()
    seconds = [took for name, took in found["stages"] if name.startswith("layer ")][1:]
    if not seconds:
        raise BenchError("layers after the first are measured: choose --layers 2 or more")
    return found["report"], statistics.fmean(seconds)


# ---- end to end


def add_end_to_end_options(parser: argparse.ArgumentParser) -> None:
    """What `end-to-end` takes besides the common options."""
    add_calibration_options(parser)
    add_amount(parser)


def end_to_end(arguments: argparse.Namespace) -> Iterator[Row]:
    """The whole prune and plan's prediction against bare forward x layers + copying."""
    with temporary_folder(arguments) as folder:
        tokens = arguments.samples * arguments.seqlen
        checkpoint = checkpoint_in(folder, arguments, copies=1, activations=tokens)
        job = ["--samples", str(arguments.samples), "--seqlen", str(arguments.seqlen), "--device", arguments.device]
        out, peaks, planned = folder / "out", [0.0], {}

        def prune() -> dict[str, float]:
            ran = streamprune("prune", str(checkpoint), str(out), *amount_of(arguments), *job)
            peaks[:] = [max(peaks[0], ran.result["peak_rss_bytes"] / MIB)]
            return {"prune, work": ran.result["seconds"], "prune, whole process": ran.seconds}

        def plan() -> dict[str, float]:
            planned.update(streamprune("plan", str(checkpoint), *job).result)
            return {"plan's prediction": planned["seconds"]}

        def measured_prune() -> dict[str, float]:
            into_page_cache(checkpoint)
            found = prune()
            shutil.rmtree(out)
            return found

        say("unmeasured run")
        prune()
        report = json.loads((out / "streamprune.json").read_text())
        shutil.rmtree(out)
        bare = BareLayer(checkpoint, Batches.of(report))
        layers = int(read_config(checkpoint).get("num_hidden_layers") or 0)
        floor = f"bare forward x {layers} + cp"

        def least() -> dict[str, float]:
            into_page_cache(checkpoint)
            return {floor: bare.seconds() * layers + copy_durably(checkpoint, folder / "copy")}

        runs = interleaved([least, plan, measured_prune], arguments.repeat)
        on = f"{describe(checkpoint)}, {bare.batches}, {' '.join(amount_of(arguments))}, source in the page cache"
        memory = {"plan's prediction": planned["peak_ram_bytes"] / MIB, "prune, work": peaks[0]}
        for case, seconds in runs.items():
            row = figure(case, seconds, floor, runs[floor], unit="s", on=on)
            prune_s = statistics.median(runs["prune, work"])
            row["over_prune"] = float(f"{row['value'] / prune_s:.6g}")
            yield row | ({"peak_mib": round(memory[case], 2)} if case in memory else {})
