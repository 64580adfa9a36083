"""`plan`: what pruning a checkpoint will take, from its headers alone.

Sizes are exact. Peak memory is the same estimate that `--max-ram` works with (model/budget.py). Time is
arithmetic ÷ this machine's measured matrix speed + bytes ÷ its measured reading speed, both taken in about a
second: one product of the model's own shape, and up to 64 MiB of the checkpoint read past the page cache.
Writing is taken to be as fast as reading.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from streamprune.disk.checkpoint import Checkpoint, open_checkpoint, refuse_quantised
from streamprune.disk.hub import resolve_model
from streamprune.errors import UsageError
from streamprune.model.budget import cache_dtype, choose_batch, compute_dtype, estimate, resolve_device
from streamprune.model.skeleton import Skeleton, Stage, build_skeleton, stored_dtype
from streamprune.model.texts import check_seqlen, default_seqlen
from streamprune.spec import compile_filter
from streamprune.stage_writer import selected_linears

_SLACK_BYTES = 64 << 20
_READ_BYTES = 64 << 20


@dataclass(frozen=True)
class StagePlan:
    """One stage: bytes of its tensors, linears to prune, operations of its forward pass, estimated seconds."""

    name: str
    nbytes: int
    linears: int
    flops: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What a prune takes. Bytes, operations (a multiply-add is two) and seconds."""

    model: str
    architecture: str
    parameters: int
    stages: tuple[StagePlan, ...]
    peak_ram_bytes: int
    least_ram_bytes: int
    """The smallest --max-ram that would do."""
    vram_bytes: int
    """On a GPU: largest stage, activations of a batch, and rows being pruned; 0 on the CPU."""
    output_bytes: int
    cache_bytes: int
    disk_bytes: int
    """What is checked before starting: output + cache + 64 MiB."""
    flops: int
    seconds: float
    batch: int
    dtype: str
    device: str
    rests_on: str
    """What the estimate of time rests on."""

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return asdict(self)


def plan(
    model: str | Path, *, samples: int = 128, seqlen: int | None = None, with_stats: bool = False,
    propagate: str = "dense", only: str | None = None, skip: str | None = None, device: str = "auto",
    dtype: str = "auto", trust_remote_code: bool = False,
) -> Plan:  # fmt: skip
    """Plans a prune of `model` calibrated on `samples` windows of `seqlen` tokens, or `with_stats` from a file.

    Raises the errors of streamprune.errors; no weight is read but up to 64 MiB to time the disk.
    """
    checkpoint = open_checkpoint(resolve_model(str(model)))
    refuse_quantised(checkpoint)
    length = seqlen if seqlen is not None else default_seqlen(checkpoint.config)
    if propagate not in ("dense", "pruned"):
        raise UsageError(f"--propagate {propagate}: choose dense or pruned")
    if samples < 1:
        raise UsageError("--samples must be at least 1")
    check_seqlen(length, checkpoint.config)
    target = resolve_device(device)
    compute = compute_dtype(dtype, stored_dtype(checkpoint), target)
    skeleton = build_skeleton(checkpoint, compute, trust_remote_code=trust_remote_code)
    chosen = selected_linears(skeleton.stages, compile_filter("--only", only), compile_filter("--skip", skip))
    tokens = 0 if with_stats else samples * length
    forwards = 2 if propagate == "pruned" else 1
    budget = estimate(skeleton, length, compute)
    batch = choose_batch(budget, samples, length, None)
    reading, computing = _read_speed(checkpoint), _matmul_speed(skeleton, compute, target)
    hidden = skeleton.hidden_size * cache_dtype(skeleton.dtype, compute).itemsize
    stages = []
    for stage in skeleton.stages:
        flops = forwards * tokens * _token_flops(skeleton, stage, length)
        traffic = 2 * stage.nbytes + (forwards + 1) * tokens * hidden * (stage.kind == "layer")
        count = sum(name in chosen for name in stage.linears)
        stages.append(StagePlan(stage.name, stage.nbytes, count, flops, flops / computing + traffic / reading))
    cache = 2 * tokens * hidden
    largest = max(s.nbytes for s in skeleton.stages)
    on_gpu = target.type != "cpu"
    peak = budget.peak(batch) if tokens else budget.base + budget.reserve
    return Plan(
        model=str(model), architecture=str(checkpoint.config.get("model_type")),
        parameters=sum(math.prod(t.shape) for t in checkpoint.tensors.values()),
        stages=tuple(stages), peak_ram_bytes=peak,
        least_ram_bytes=budget.peak(1) if tokens else peak,
        vram_bytes=largest + batch * budget.per_sample + (64 << 20) if on_gpu else 0,
        output_bytes=checkpoint.nbytes, cache_bytes=cache, disk_bytes=checkpoint.nbytes + cache + _SLACK_BYTES,
        flops=sum(s.flops for s in stages), seconds=sum(s.seconds for s in stages), batch=batch,
        dtype=str(compute).removeprefix("torch."), device=str(target),
        rests_on=f"measured now: matrix products {computing / 1e9:.0f} GFLOP/s, "
        f"reading the checkpoint {reading / 1e6:.0f} MB/s; writing taken as fast as reading",
    )  # fmt: skip


def _token_flops(skeleton: Skeleton, stage: Stage, seqlen: int) -> int:
    """Operations a token takes in a layer: two a weight, and causal attention over half the window."""
    if stage.kind != "layer":
        return 0
    return 2 * sum(ref.shape[0] * ref.shape[1] for ref in stage.linears.values()) + 2 * seqlen * skeleton.hidden_size


def _matmul_speed(skeleton: Skeleton, dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of one product as large as a batch of this model, best of three."""
    tokens = 512
    width = max((max(ref.shape) for s in skeleton.layer_stages for ref in s.linears.values()), default=1024)
    a = torch.ones(tokens, skeleton.hidden_size, dtype=dtype, device=device)
    b = torch.ones(min(width, 8192), skeleton.hidden_size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):
        begun = time.perf_counter()
        float(torch.nn.functional.linear(a, b)[0, 0])
        best = min(best, time.perf_counter() - begun)
    return 2 * tokens * a.shape[1] * b.shape[0] / best


def _read_speed(checkpoint: Checkpoint) -> float:
    """Bytes a second from the largest shard, the page cache left aside where the system allows it."""
    shard = max(checkpoint.shards, key=lambda s: checkpoint.shard_stats[s][0])
    size = min(_READ_BYTES, checkpoint.shard_stats[shard][0])
    with (checkpoint.path / shard).open("rb", buffering=0) as f:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(f.fileno(), 0, size, os.POSIX_FADV_DONTNEED)
        buffer = bytearray(4 << 20)
        begun, got = time.perf_counter(), 0
        while got < size and (n := f.readinto(buffer)):
            got += n
        return got / max(time.perf_counter() - begun, 1e-6)
