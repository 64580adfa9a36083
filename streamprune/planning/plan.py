"""`plan`: what pruning a checkpoint will take, from its headers and two seconds of measuring.

Sizes are exact. Peak memory is the same estimate that `--max-ram` and `--max-vram` work with (model/budget.py). Time
is what each stage does (planning/cost.py) ÷ what this machine does in a second (planning/speeds.py), measured on pieces
of the model's shapes and on up to 64 MiB of the checkpoint. Writing is taken to be as fast as reading, since nothing is
written; weights are taken to be pruned by `ewma`, and not to be in the system's cache; a refit to choose its damping.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from streamprune.calibration.grams import largest_at_once
from streamprune.calibration.texts import check_bos, check_seqlen, default_seqlen, positions
from streamprune.calibration.tokens import has_bos
from streamprune.disk.checkpoint import open_checkpoint, refuse_quantised
from streamprune.disk.claims import check_claims
from streamprune.disk.hub import resolve_model
from streamprune.disk.linears import compile_filter
from streamprune.errors import UsageError
from streamprune.methods.recipes import Recipe, check_propagate, check_tune, make_recipe
from streamprune.methods.selection import Amount
from streamprune.model.beside import RefitNeeds, TuneNeeds, least_beside
from streamprune.model.budget import Budget, Layout, estimate, layout_for, memory_of
from streamprune.model.device import cache_dtype, compute_dtype, resolve_device
from streamprune.model.shapes import linear_shape
from streamprune.model.skeleton import Skeleton, build_skeleton, stored_dtype
from streamprune.planning.cost import PAIRED_FORWARDS, RunShape, Speeds, Split, Work, stage_seconds, work_of
from streamprune.planning.refits import planned_refits
from streamprune.planning.speeds import measure
from streamprune.pruning.linears import selected_linears
from streamprune.pruning.prepare import (
    SLACK_BYTES,
    beside_grams,
    models_at_once,
    propagated,
    scratch_bytes,
    tune_needs,
)
from streamprune.pruning.quantise import check_codable, coded
from streamprune.pruning.refit import Refit, needs_of


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
    model: str | Path, *, method: str = "swiftprune", refit: str | None = None, quantize: str | None = None,
    tune: str | None = None, tune_epochs: int | None = None,
    samples: int = 128, seqlen: int | None = None, bos: str = "auto", with_stats: bool = False,
    propagate: str | None = None, only: str | None = None, skip: str | None = None,
    device: str = "auto", dtype: str = "auto", max_vram: int | None = None, trust_remote_code: bool = False,
    speeds: Speeds | None = None,
) -> Plan:  # fmt: skip
    """Plans a prune of `model` calibrated on `samples` windows of `seqlen` tokens, or `with_stats` from a file.

    `method`, `refit`, `quantize`, `tune` and `bos` are as for prune; what is tuned is taken to be half pruned.
    `max_vram` (of a GPU) is in bytes. `speeds` take
    the place of measuring. Raises the errors of streamprune.errors; up to 64 MiB of weights are read to time the disk.
    """
    recipe = _recipe(method, refit, quantize, tune, with_stats)
    epochs = check_tune(recipe, tune_epochs, None)[0] or 0
    checkpoint = open_checkpoint(resolve_model(str(model)))
    refuse_quantised(checkpoint)
    check_claims(checkpoint)
    length = seqlen if seqlen is not None else default_seqlen(checkpoint.config)
    propagation = check_propagate(recipe, propagate)
    if samples < 1:
        raise UsageError("--samples must be at least 1")
    check_seqlen(length, checkpoint.config)
    check_bos(bos)
    target = resolve_device(device)
    compute = compute_dtype(dtype, stored_dtype(checkpoint), target)
    skeleton = build_skeleton(checkpoint, compute, trust_remote_code=trust_remote_code)
    propagation = propagated(propagation, skeleton)
    chosen = selected_linears(skeleton.stages, compile_filter("--only", only), compile_filter("--skip", skip))
    saved = 0
    if recipe.quantize is not None:
        check_codable(chosen, skeleton)
        saved = sum(ref.nbytes - sum(new.nbytes for new in coded(ref)) for ref in chosen.values())
    windows = samples if _has_pass(recipe, with_stats, propagation) else 0
    length = positions(length, windows > 0 and has_bos(checkpoint.path, bos, trust_remote_code), checkpoint.config)
    on_device = target.type != "cpu"
    needs = _needs(recipe, skeleton, chosen, propagation)
    models = models_at_once(propagation)
    tuning = None
    if recipe.tune is not None:
        tuning = tune_needs(checkpoint, skeleton, chosen, lambda _: Amount(0.5), samples, length, compute, target)
    budget = estimate(skeleton, models * length, compute, on_device=on_device)
    layout = layout_for(skeleton, models * length, windows, compute, target, None, max_vram, refit=needs, tune=tuning)
    course = course_of(skeleton, windows, length, compute, layout, propagation, on_device, epochs)
    works = [work_of(skeleton, s, chosen, length, compute.itemsize) for s in skeleton.stages]
    if recipe.refit is not None:
        refits = planned_refits(recipe.refit, checkpoint, skeleton, chosen, compute, layout.room, windows, length)
        works = [replace(w, refit=r) for w, r in zip(works, refits, strict=True)]
    source = "given" if speeds else "measured now"
    if speeds is None:
        work = max(works[1:-1], key=lambda w: w.nbytes)
        work = replace(work, refit=max((w.refit for w in works), key=lambda r: r.float32))  # maybe not that layer's
        speeds = measure(checkpoint, skeleton, compute, target, work, course, layout.batch, length)
    seconds = stage_seconds(works, course, speeds)
    split = sum(seconds, Split())
    stages = _stages(skeleton, chosen, works, course, seconds)
    cache = 2 * models * course.tokens * course.state_bytes
    output = checkpoint.nbytes - saved
    scratch = scratch_bytes(skeleton, chosen.keys() if needs else set(), layout, course.tokens, compute, propagation)
    peak, least, least_vram = _memory(budget, layout, needs, tuning, windows, on_device)
    if on_device:
        least_vram += memory_of(skeleton, models * length, windows, compute, 1, False, min(windows, 1))
    return Plan(
        model=str(model), architecture=str(checkpoint.config.get("model_type")),
        parameters=sum(math.prod(t.shape) for t in checkpoint.tensors.values()), stages=stages,
        peak_ram_bytes=peak, least_ram_bytes=least, vram_bytes=layout.nbytes, least_vram_bytes=least_vram,
        layout=_layout_in_words(layout, windows) if on_device else "",
        output_bytes=output, cache_bytes=cache + scratch, disk_bytes=output + cache + scratch + SLACK_BYTES,
        flops=sum(s.flops for s in stages), seconds=split.total, split=split, batch=layout.batch,
        dtype=str(compute).removeprefix("torch."), device=str(target),
        rests_on=f"{source}: {_in_words(speeds, course, recipe)}",
    )  # fmt: skip


def _recipe(
    method: str, refit: str | None, quantize: str | None, tune: str | None, with_stats: bool
) -> Recipe:  # fmt: skip
    recipe = make_recipe(method, refit=refit, quantize=quantize, tune=tune)
    if with_stats and recipe.tune is not None:
        raise UsageError("--stats has sums only, and --tune learns from states: leave one of them out")
    if with_stats and recipe.needs_gram:  # in the words of job.prune
        raise UsageError(f"--stats has sums only, and {recipe.refit} needs more: leave it out, or choose --refit none")
    return recipe


def _has_pass(recipe: Recipe, with_stats: bool, propagate: str) -> bool:
    return not with_stats and (recipe.needs_statistics or recipe.aims or propagate == "pruned")


def _needs(recipe: Recipe, skeleton: Skeleton, chosen: Collection[str], propagate: str) -> RefitNeeds | None:
    """The memory of a refit, as prepare.refit_needs has it."""
    if recipe.refit is None:
        return None
    layers = []
    for stage in skeleton.layer_stages:
        widths = {name: linear_shape(skeleton, name, stage)[1] for name in stage.linears if name in chosen}
        layers.append(largest_at_once(widths, stage.expert_of))
    beside = beside_grams(skeleton, chosen) if propagate == "asymmetric" else None
    return needs_of(Refit(recipe.refit, "auto"), layers, beside)


def _memory(
    budget: Budget, layout: Layout, needs: RefitNeeds | None, tune: TuneNeeds | None, windows: int, on_device: bool
) -> tuple[int, int, int]:
    """RAM at the peak, and the least that will do; on a device, the least for a refit and for tuning there."""
    if not windows:
        return budget.base + budget.reserve, budget.base + budget.reserve, 0
    if on_device:
        return budget.peak(layout.batch, layout.group), budget.peak(1), least_beside(needs, tune)
    least = needs.least if needs else 0
    return (
        budget.refitting(needs, layout.room).tuning(tune, layout.windows).peak(layout.batch, layout.group),
        budget.refitting(needs, least).tuning(tune, 1).peak(1),
        0,
    )


def course_of(
    skeleton: Skeleton, samples: int, seqlen: int, dtype: torch.dtype, layout: Layout, propagate: str, on_device: bool,
    epochs: int = 0,
) -> RunShape:  # fmt: skip
    """How a run over `samples` windows goes in a layout; with samples = 0 there is no pass.

    An epoch of tuning is three passes, of which the backward one takes two.
    """
    batches = -(-samples // max(1, layout.batch))
    return RunShape(
        tokens=samples * seqlen, batches=batches, groups=-(-batches // layout.group),
        forwards={"dense": 1, "pruned": 2, "asymmetric": PAIRED_FORWARDS}[propagate] + 3 * epochs,
        state_bytes=skeleton.hidden_size * cache_dtype(skeleton.dtype, dtype).itemsize,
        threads=torch.get_num_threads(), on_device=on_device, layers=layout.layers, resident=layout.resident,
    )  # fmt: skip


def _stages(
    skeleton: Skeleton, chosen: Collection[str], works: Sequence[Work], course: RunShape, seconds: Sequence[Split]
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


def _in_words(s: Speeds, course: RunShape, recipe: Recipe) -> str:
    """What a reader can check: the speeds that matter most."""
    found = []
    if course.tokens:
        found += [
            f"matrix products {s.products / 1e9:.0f} GFLOP/s",
            f"other work in a layer {s.elementwise / 1e9:.1f} GB/s",
        ]
    if recipe.refit is not None:
        found += [f"products of a refit in float32 {s.float32 / 1e9:.0f} GFLOP/s"]
    found += [f"selecting {s.selection / 1e6:.0f} MB/s"]
    if course.on_device:
        found += [f"to the GPU {s.link / 1e9:.1f} GB/s"]
    found += [f"reading the checkpoint {s.reading / 1e6:.0f} MB/s"]
    if s.writing == s.reading:
        found += ["writing taken as fast as reading"]
    return ", ".join(found)
