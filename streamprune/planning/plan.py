"""`plan`: predicts what pruning a checkpoint takes, from its headers and two seconds of measuring.

Sizes are exact. Peak memory is the estimate that `--max-ram` and `--max-vram` are checked against (model/budget.py).
Time is the work of each stage (planning/cost.py) divided by the speeds of this machine (planning/speeds.py), which are
measured on parts of the model's shapes and on up to 64 MiB of the checkpoint. How much of the processors other
programs take meanwhile makes it a range. It assumes that writing is as fast as
reading, as nothing is written; that weights are selected by `ewma`; that the checkpoint is not in the page cache; and
that a refit chooses its damping.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from streamprune.calibration.texts import positions
from streamprune.calibration.tokens import has_bos
from streamprune.calibration.windows import held_out
from streamprune.disk.room import SLACK_BYTES
from streamprune.disk.shards import arrange
from streamprune.methods.allocation import LOOKS
from streamprune.methods.recipes import Recipe
from streamprune.model.budget import WITHOUT_TORCH, Layout, streaming_bytes, streaming_layout
from streamprune.model.device import cache_dtype
from streamprune.model.shapes import routed_share
from streamprune.model.skeleton import Skeleton
from streamprune.model.stages import Stage
from streamprune.planning.cost import stage_seconds
from streamprune.planning.ranks import RanksPlan, with_ranks
from streamprune.planning.refits import planned_refits
from streamprune.planning.speeds import measure
from streamprune.planning.work import RunShape, Speeds, Split, StageWork, paired_forwards, work_of
from streamprune.process.load import Others
from streamprune.pruning.describe import HALF, describe_prune, open_model
from streamprune.pruning.expert_tuning import tokens_a_step
from streamprune.pruning.memory import activation_bytes, layout_of, memory_bytes, spool_bytes
from streamprune.pruning.setup import Setup, check_given, open_given
from streamprune.pruning.target import Target
from streamprune.pruning.tuning import windows_a_step
from streamprune.settings import Calibration, Resources

_CALIBRATION, _RESOURCES = Calibration(), Resources()
_NOWHERE = Path("OUT")
"""Placeholder: `plan` writes nothing."""


@dataclass(frozen=True)
class StagePlan:
    """One stage: bytes of its tensors, number of linears to prune, operations of its passes, estimated seconds."""

    name: str
    nbytes: int
    linears: int
    flops: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What a prune job takes, in bytes, operations (a multiply-add counts as two) and seconds."""

    model: str
    architecture: str
    parameters: int
    stages: tuple[StagePlan, ...]
    peak_ram_bytes: int
    least_ram_bytes: int
    """The smallest --max-ram that is accepted."""
    vram_bytes: int
    """Peak GPU memory, including the driver's; 0 on the CPU."""
    least_vram_bytes: int
    """The smallest --max-vram that is accepted; 0 on the CPU."""
    layout: str
    """What is on the GPU at once, as text; empty on the CPU."""
    output_bytes: int
    cache_bytes: int
    disk_bytes: int
    """Free disk space that is required to start: output + cache + spool + 64 MiB."""
    flops: int
    seconds: float
    """Estimated seconds of work, without starting the program."""
    split: Split
    """`seconds` by kind of work."""
    batch: int
    dtype: str
    device: str
    rests_on: str
    """The speeds that the estimate is based on, as text."""
    spool_bytes: int = 0
    """Of the shards that are there at once with `fetch` "stream", else 0."""
    shared: RanksPlan | None = None
    """With several ranks: what each of them takes."""
    busy: float | None = None
    """Share of the processors that other programs took while speeds were measured; None if unknown, or not measured."""

    @property
    def seconds_range(self) -> tuple[float, float]:
        """What `seconds` may become if those programs end, and if they take as much again."""
        busy = self.busy or 0.0
        return self.seconds * (1 - busy), self.seconds * (1 + busy)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        values = {key: value for key, value in asdict(self).items() if key != "shared" or value is not None}
        return values | {"seconds_range": list(self.seconds_range)}


def plan(
    model: str | Path, amount: float | str = HALF, recipe: str | Recipe = "swiftprune", *,
    calibration: Calibration = _CALIBRATION, stats: str | Path | None = None, save_stats: str | Path | None = None,
    propagate: str | None = None, only: str | None = None, skip: str | None = None, resources: Resources = _RESOURCES,
    fetch: str = "whole", nproc: int = 1, trust_remote_code: bool = False, speeds: Speeds | None = None,
) -> Plan:  # fmt: skip
    """Plans the job that `prune` would do with the same arguments, and refuses what `prune` would refuse.

    `nproc` ranks share the work (pruning/README.md). Without `speeds`, they are measured; this reads up to 64 MiB of
    weights. Raises the errors of streamprune.errors.
    """
    checkpoint = open_model(model, fetch=fetch)
    spec = describe_prune(
        checkpoint, _NOWHERE, amount, recipe, calibration=calibration, stats=stats, save_stats=save_stats,
        propagate=propagate, only=only, skip=skip, resources=resources, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    setup = Setup.of(spec, checkpoint)
    outline = None
    if spec.stats is not None:
        given, outline = open_given(spec, checkpoint)
        check_given(given, setup)
    light = outline is not None and setup.needs_no_torch
    run = _Run.of(setup, light)
    # Before measuring, which leaves this process larger than a job's.
    peak, least, least_vram = memory_bytes(setup, run.layout, run.windows, run.length)
    if light:
        peak = least = streaming_bytes(WITHOUT_TORCH)
    refits = planned_refits(setup, run.layout.room, run.windows, run.length)
    works = [replace(w, refit=r) for w, r in zip(run.works, refits, strict=True)]
    source, busy = "given" if speeds else "measured now", None
    if speeds is None:
        others = Others()
        work = max(works[1:-1], key=lambda w: w.nbytes)
        work = replace(work, refit=max((w.refit for w in works), key=lambda r: r.float32))  # may be another layer's
        speeds = measure(
            checkpoint, setup.skeleton, setup.dtype, setup.device, work, run.shape, run.layout.batch, run.length
        )
        busy = others.share()
    seconds = [
        found + run.allocating(work, speeds)
        for work, found in zip(works, stage_seconds(works, run.shape, speeds), strict=True)
    ]
    split = sum(seconds, Split())
    target = run.target
    stages = _stages(setup.skeleton, target.selected, works, run.shape, seconds)
    cache = activation_bytes(setup, run.layout, run.windows, run.length)
    spool = spool_bytes(setup, run.layout)
    return Plan(
        model=str(model), architecture=str(checkpoint.config.get("model_type")),
        parameters=sum(math.prod(t.shape) for t in checkpoint.tensors.values()), stages=stages,
        peak_ram_bytes=peak, least_ram_bytes=least, vram_bytes=run.layout.nbytes, least_vram_bytes=least_vram,
        layout=_layout_in_words(run.layout, run.windows) if run.shape.on_device else "",
        output_bytes=target.output_bytes, cache_bytes=cache, spool_bytes=spool,
        disk_bytes=target.output_bytes + cache + spool + SLACK_BYTES,
        flops=sum(s.flops for s in stages), seconds=split.total, split=split, batch=run.layout.batch,
        dtype=str(setup.dtype).removeprefix("torch."), device=str(setup.device),
        rests_on=f"{source}: {_in_words(speeds, run.shape, target.recipe)}",
        shared=run.shared(nproc, works, split, cache, speeds) if nproc != 1 else None, busy=busy,
    )  # fmt: skip


@dataclass(frozen=True)
class _Run:
    """A planned run: `windows` of `length` tokens (0 without a pass), its layout, and the work of each stage."""

    target: Target
    windows: int
    length: int
    layout: Layout
    shape: RunShape
    works: tuple[StageWork, ...]
    looks: int
    """How often --allocate runs the selection over all weights; 0 without it."""
    shard_bytes: int | None

    @classmethod
    def of(cls, setup: Setup, light: bool) -> _Run:
        """The run of a job, which is `light` if it imports no torch."""
        spec, skeleton, target = setup.spec, setup.skeleton, setup.target
        assert target is not None
        recipe, drawn = target.recipe, spec.calibration
        samples = drawn.samples if drawn else 0
        length = drawn.seqlen if drawn else 1
        if drawn is not None:
            begins = has_bos(setup.checkpoint.path, drawn.bos, spec.trust_remote_code)
            length = positions(length, begins, setup.checkpoint.config)
        if light:
            layout = streaming_layout(spec.resources.ram, spec.resources.vram, WITHOUT_TORCH)
        else:
            layout = layout_of(setup, None, (samples, length))
        # --allocate gathers statistics in a pass of its own, which is the only one unless weights get new values.
        gathers = recipe.allocate is not None and spec.stats is None and recipe.aims
        on_device = setup.device.type != "cpu"
        paired = paired_forwards(recipe.refit is not None, on_device, recipe.tune_epochs is not None)
        forwards = {"dense": 1, "pruned": 2, "asymmetric": paired}[setup.propagate] + gathers
        shape = shape_of(
            skeleton, samples, length, setup.dtype, layout, forwards, on_device, epochs=recipe.tune_epochs or 0
        )
        works = tuple(
            _learning(work_of(skeleton, s, target.selected, length, setup.dtype.itemsize), target, s)
            for s in skeleton.stages
        )
        looks = LOOKS.get(recipe.allocate or "", 0)
        return cls(target, samples, length, layout, shape, works, looks, spec.shard_bytes)

    def shared(self, nproc: int, works: Sequence[StageWork], split: Split, cache: int, speeds: Speeds) -> RanksPlan:
        """What `nproc` ranks make of it."""
        stages = self.target.skeleton.stages
        refitted = [{s.expert_of[n] for n in self.target.linears_of(s) if n in s.expert_of} for s in stages]
        shards = {part.name for part in arrange([self.target.tensors_of(s) for s in stages], self.shard_bytes)}
        experts = max(map(len, refitted))
        return with_ranks(nproc, self.shape, works, split, cache, experts, len(shards), speeds)

    def allocating(self, work: StageWork, s: Speeds) -> Split:
        """Time that --allocate spends on a stage, reading its linears and selecting from them."""
        if not self.looks or work.kind != "layer":
            return Split()
        return Split(
            selection=self.looks * work.pruned / s.selection,
            disk=(1 + (not self.target.recipe.aims)) * work.pruned / s.reading,  # once more where the pass is its own
        )


def shape_of(
    skeleton: Skeleton, samples: int, seqlen: int, dtype: torch.dtype, layout: Layout, forwards: int, on_device: bool,
    epochs: int = 0,
) -> RunShape:  # fmt: skip
    """The parameters of a run over `samples` windows in a layout, in `forwards` passes, none with samples = 0.

    An epoch of tuning counts as three more passes: forward, and two for backward; steps have a cost of their own.
    """
    batches = -(-samples // max(1, layout.batch))
    steps, apart = 0, 0
    if epochs:
        routed = (samples - len(held_out(samples))) * seqlen * routed_share(skeleton)
        steps, apart = epochs * _steps(samples, seqlen), epochs * _steps_apart(int(routed))
    return RunShape(
        tokens=samples * seqlen, batches=batches, groups=-(-batches // layout.group),
        forwards=forwards + 3 * epochs,
        state_bytes=skeleton.between.most(seqlen) * cache_dtype(skeleton.dtype, dtype).itemsize,
        threads=torch.get_num_threads(), on_device=on_device, layers=layout.layers, resident=layout.resident,
        tuning=3 * epochs, steps=steps, steps_apart=apart,
        parts=epochs * -(-samples // layout.windows) if layout.windows else 0,
    )  # fmt: skip


def _steps(samples: int, seqlen: int) -> int:
    """Steps of tuning in an epoch."""
    return (samples - len(held_out(samples))) // windows_a_step(seqlen, samples)


def _steps_apart(tokens: int) -> int:
    """As _steps, of an expert that sees so many tokens."""
    return tokens // tokens_a_step(tokens) if tokens else 0


def _learning(work: StageWork, target: Target, stage: Stage) -> StageWork:
    """The work of a stage, with what tuning changes of it."""
    if target.recipe.tune is None:
        return work
    apart, within = 0.0, 0.0
    for name, ref in stage.linears.items():
        stays = math.prod(ref.shape) * (1 - target.of(name).share) if name in target.selected else 0.0
        if name in stage.expert_of:
            apart += stays
        else:
            within += stays
    experts = {expert for name, expert in stage.expert_of.items() if name in target.selected}
    return replace(work, learnt=int(within), learnt_apart=int(apart), experts=len(experts))


def _stages(
    skeleton: Skeleton, chosen: Collection[str], works: Sequence[StageWork], run: RunShape, seconds: Sequence[Split]
) -> tuple[StagePlan, ...]:
    return tuple(
        StagePlan(
            stage.name, stage.nbytes, sum(name in chosen for name in stage.linears),
            int(run.passes(work) * run.tokens * (work.products + work.attention)), split.total,
        )
        for stage, work, split in zip(skeleton.stages, works, seconds, strict=True)
    )  # fmt: skip


def _layout_in_words(layout: Layout, samples: int) -> str:
    layers = f"{layout.layers} layer{'s' if layout.layers > 1 else ''} at once"
    if not samples:
        return layers
    return f"{layers}, {'all activations stay there' if layout.resident else 'activations go to the disk and back'}"


def _in_words(s: Speeds, run: RunShape, recipe: Recipe) -> str:
    """The speeds that matter most, as text that a reader can check."""
    found = []
    if run.tokens:
        found += [
            f"matrix products {s.products / 1e9:.0f} GFLOP/s",
            f"other work in a layer {s.elementwise / 1e9:.1f} GB/s",
        ]
    if recipe.refit is not None:
        found += [f"products of a refit in float32 {s.float32 / 1e9:.0f} GFLOP/s"]
    found += [f"selecting {s.selection / 1e6:.0f} MB/s"]
    if run.on_device:
        found += [f"to the GPU {s.link / 1e9:.1f} GB/s"]
    found += [f"reading the checkpoint {s.reading / 1e6:.0f} MB/s"]
    if s.writing == s.reading:
        found += ["writing taken as fast as reading"]
    return ", ".join(found)
