"""`plan`: what pruning a checkpoint will take, from its headers and two seconds of measuring.

Sizes are exact. Peak memory is the same estimate that `--max-ram` and `--max-vram` work with (model/budget.py). Time
is what each stage does (model/cost.py) ÷ what this machine does in a second (model/speeds.py), measured on pieces of
the model's shapes and on up to 64 MiB of the checkpoint. Writing is taken to be as fast as reading, since nothing is
written; weights are taken to be pruned by `ewma`, and not to be in the system's cache.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from streamprune.disk.checkpoint import open_checkpoint, refuse_quantised
from streamprune.disk.hub import resolve_model
from streamprune.errors import UsageError
from streamprune.job_prepare import SLACK_BYTES
from streamprune.model.budget import (
    Layout,
    cache_dtype,
    compute_dtype,
    estimate,
    layout_for,
    memory_of,
    resolve_device,
)
from streamprune.model.cost import Course, Speeds, Split, Work, stage_seconds, work_of
from streamprune.model.skeleton import Skeleton, build_skeleton, stored_dtype
from streamprune.model.speeds import measure
from streamprune.model.texts import check_seqlen, default_seqlen
from streamprune.spec import compile_filter
from streamprune.stage_writer import selected_linears


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
    """Peak memory of the GPU, its driver's included; 0 on the CPU."""
    least_vram_bytes: int
    """The smallest --max-vram that would do; 0 on the CPU."""
    layout: str
    """What is on the GPU at once, in words; empty on the CPU."""
    output_bytes: int
    cache_bytes: int
    disk_bytes: int
    """What is checked before starting: output + cache + 64 MiB."""
    flops: int
    seconds: float
    """Of the work, without the start of the program."""
    split: Split
    """What these seconds go to: they add up to `seconds`."""
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
    dtype: str = "auto", max_vram: int | None = None, trust_remote_code: bool = False, speeds: Speeds | None = None,
) -> Plan:  # fmt: skip
    """Plans a prune of `model` calibrated on `samples` windows of `seqlen` tokens, or `with_stats` from a file.

    `max_vram` (of a GPU) is in bytes. `speeds` take the place of measuring. Raises the errors of streamprune.errors;
    no weight is read but up to 64 MiB to time the disk.
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
    windows = 0 if with_stats else samples
    on_device = target.type != "cpu"
    budget = estimate(skeleton, length, compute, on_device=on_device)
    layout = layout_for(skeleton, length, windows, compute, target, None, max_vram)
    course = course_of(skeleton, windows, length, compute, layout, propagate, on_device)
    works = [work_of(skeleton, s, chosen, length, compute.itemsize) for s in skeleton.stages]
    source = "given" if speeds else "measured now"
    if speeds is None:
        work = max(works[1:-1], key=lambda w: w.nbytes)
        speeds = measure(checkpoint, skeleton, compute, target, work, course, layout.batch, length)
    seconds = stage_seconds(works, course, speeds)
    split = sum(seconds, Split())
    stages = _stages(skeleton, chosen, works, course, seconds)
    bare = budget.base + budget.reserve
    return Plan(
        model=str(model), architecture=str(checkpoint.config.get("model_type")),
        parameters=sum(math.prod(t.shape) for t in checkpoint.tensors.values()), stages=stages,
        peak_ram_bytes=budget.peak(layout.batch) if windows else bare,
        least_ram_bytes=budget.peak(1) if windows else bare,
        vram_bytes=layout.nbytes,
        least_vram_bytes=memory_of(skeleton, length, windows, compute, 1, False, min(windows, 1)) if on_device else 0,
        layout=_layout_in_words(layout, windows) if on_device else "",
        output_bytes=checkpoint.nbytes, cache_bytes=2 * course.tokens * course.state_bytes,
        disk_bytes=checkpoint.nbytes + 2 * course.tokens * course.state_bytes + SLACK_BYTES,
        flops=sum(s.flops for s in stages), seconds=split.total, split=split, batch=layout.batch,
        dtype=str(compute).removeprefix("torch."), device=str(target),
        rests_on=f"{source}: {_in_words(speeds, course)}",
    )  # fmt: skip


def course_of(
    skeleton: Skeleton, samples: int, seqlen: int, dtype: torch.dtype, layout: Layout, propagate: str, on_device: bool
) -> Course:
    """How a run over `samples` windows goes in a layout; with samples = 0 there is no pass."""
    return Course(
        tokens=samples * seqlen, batches=-(-samples // max(1, layout.batch)),
        forwards=2 if propagate == "pruned" else 1,
        state_bytes=skeleton.hidden_size * cache_dtype(skeleton.dtype, dtype).itemsize,
        threads=torch.get_num_threads(), on_device=on_device, layers=layout.layers, resident=layout.resident,
    )  # fmt: skip


def _stages(
    skeleton: Skeleton, chosen: Collection[str], works: Sequence[Work], course: Course, seconds: Sequence[Split]
) -> tuple[StagePlan, ...]:
    return tuple(
        StagePlan(
            stage.name, stage.nbytes, sum(name in chosen for name in stage.linears),
            course.passes(work) * course.tokens * (work.products + work.attention), split.total,
        )
        for stage, work, split in zip(skeleton.stages, works, seconds, strict=True)
    )  # fmt: skip


def _layout_in_words(layout: Layout, samples: int) -> str:
    layers = f"{layout.layers} layer{'s' if layout.layers > 1 else ''} at once"
    if not samples:
        return layers
    return f"{layers}, {'all activations stay there' if layout.resident else 'activations go to the disk and back'}"


def _in_words(s: Speeds, course: Course) -> str:
    """What a reader can check: the speeds that matter most."""
    found = []
    if course.tokens:
        found += [
            f"matrix products {s.products / 1e9:.0f} GFLOP/s",
            f"other work in a layer {s.elementwise / 1e9:.1f} GB/s",
        ]
    found += [f"selecting {s.selection / 1e6:.0f} MB/s"]
    if course.on_device:
        found += [f"to the GPU {s.link / 1e9:.1f} GB/s"]
    found += [f"reading the checkpoint {s.reading / 1e6:.0f} MB/s"]
    if s.writing == s.reading:
        found += ["writing taken as fast as reading"]
    return ", ".join(found)
