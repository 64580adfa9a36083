"""How a job uses memory (batches, Grams, windows at once), and how much it needs in memory and scratch files."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

from streamprune.calibration.gram_sums import MOST_HELD
from streamprune.calibration.grams import gram_bytes, largest_at_once
from streamprune.disk.quantised import PlainView
from streamprune.disk.remote import RemoteCheckpoint
from streamprune.disk.spool import shards_of, spooled_bytes
from streamprune.errors import ResourceError
from streamprune.methods.tuning import state_bytes
from streamprune.model.budget import Layout, estimate, layout_for
from streamprune.model.device import cache_dtype
from streamprune.model.differentiable import survey
from streamprune.model.ends import ends_of
from streamprune.model.extra_memory import RefitNeeds, TuneNeeds, least_extra
from streamprune.model.pass_memory import memory_of, token_bytes, waiting_bytes
from streamprune.model.shapes import linear_shape
from streamprune.model.skeleton import Skeleton
from streamprune.model.stages import Stage
from streamprune.pruning.expert_tuning import AT_ONCE
from streamprune.pruning.records import Resolved
from streamprune.pruning.refit import Refit, needs_of
from streamprune.pruning.setup import Setup
from streamprune.pruning.target import Target
from streamprune.pruning.tuning import tuned_names, windows_a_step


def layout_of(setup: Setup, resolved: Resolved | None, shape: tuple[int, int]) -> Layout:
    """The layout of a job: with the batch size recorded in `resolved` when it began, or else as memory allows.

    `shape` is (windows, tokens of each), or (0, 1) without calibration. Raises ResourceError if memory does not
    suffice.
    """
    samples, length = shape
    skeleton, dtype, device = setup.skeleton, setup.dtype, setup.device
    seqlen = length * models_at_once(setup.propagate)
    needs, tune = refit_needs(setup), tune_needs(setup, samples, length)
    resources = setup.spec.resources
    layout = layout_for(skeleton, seqlen, samples, dtype, device, resources.ram, resources.vram, refit=needs, tune=tune)
    if not samples or resolved is None:
        return layout
    group, windows = resolved.group or 1, resolved.tune_windows or 0
    layout = replace(layout, room=resolved.gram_room or 0, group=group, windows=windows)
    if device.type != "cpu":
        return layout
    budget = estimate(skeleton, seqlen, dtype).refitting(needs, layout.room).tuning(tune, windows)
    recorded = resolved.batch
    if resources.ram is not None and budget.peak(recorded, group) > resources.ram:
        raise ResourceError(
            f"this job began with batches of {recorded} samples and needs --max-ram "
            f"{-(-budget.peak(recorded, group) >> 20) + 1}MiB to continue; or discard its work with --restart"
        )
    return replace(layout, batch=recorded)


def memory_bytes(setup: Setup, layout: Layout, samples: int, length: int) -> tuple[int, int, int]:
    """(peak RAM, least RAM that is enough, least VRAM that is enough or 0 on the CPU) of a job, bytes.

    It calibrates on `samples` windows of `length` tokens, none if it has statistics already.
    """
    on_device = setup.device.type != "cpu"
    seqlen = models_at_once(setup.propagate) * length
    budget = estimate(setup.skeleton, seqlen, setup.dtype, on_device=on_device)
    refit, tune = refit_needs(setup), tune_needs(setup, samples, length)
    weights = memory_of(setup.skeleton, seqlen, samples, setup.dtype, 1, False, min(samples, 1)) if on_device else 0
    if not samples:
        return budget.base + budget.reserve, budget.base + budget.reserve, weights
    if on_device:
        return budget.peak(layout.batch, layout.group), budget.peak(1), weights + least_extra(refit, tune)
    least = refit.least if refit else 0
    return (
        budget.refitting(refit, layout.room).tuning(tune, layout.windows).peak(layout.batch, layout.group),
        budget.refitting(refit, least).tuning(tune, 1).peak(1),
        0,
    )


def activation_bytes(setup: Setup, layout: Layout, windows: int, length: int) -> int:
    """Disk space of a job's activations: the caches before and after a layer, and scratch files."""
    state = setup.skeleton.between.most(length) * cache_dtype(setup.skeleton.dtype, setup.dtype).itemsize
    caches = 2 * models_at_once(setup.propagate) * windows * length * state
    return caches + scratch_bytes(setup, layout, windows, length)


def stages_at_work(setup: Setup, layout: Layout) -> tuple[int, int]:
    """How many stages need their weights at once, and how many of them are before the one that computes.

    On a device the next one is on its way, and the one before may still be written.
    """
    late = int(layout.layers > 2)
    return 1 + late + (setup.device_name != "cpu"), late


def spool_bytes(setup: Setup, layout: Layout, done: Sequence[object] = ()) -> int:
    """Disk space of the shards that are fetched from the hub and not yet dropped, after the stages that are `done`."""
    checkpoint = setup.checkpoint
    stored = checkpoint.stored if isinstance(checkpoint, PlainView) else checkpoint
    if not isinstance(stored, RemoteCheckpoint):
        return 0
    stages = [shards_of(stage.tensors) for stage in setup.model.stages[len(done) :]]
    return spooled_bytes(stored, stages, stages_at_work(setup, layout)[0])


def models_at_once(propagate: str) -> int:
    """How many models run side by side: with two, dense and pruned, a window needs the memory of two."""
    return 2 if propagate == "asymmetric" else 1


def refit_needs(setup: Setup) -> RefitNeeds | None:
    """The memory that a job's refit needs; None without a refit."""
    target = setup.target
    if target is None or target.recipe.refit is None:
        return None
    refit = Refit(target.recipe.refit, target.damping)
    stages = target.skeleton.layer_stages
    beside = beside_grams(setup.skeleton, target.selected) if setup.propagate == "asymmetric" else None
    return needs_of(refit, [largest_at_once(target.linears_of(stage), stage.expert_of) for stage in stages], beside)


def tune_needs(setup: Setup, samples: int, seqlen: int) -> TuneNeeds | None:
    """The memory that tuning with `samples` windows of `seqlen` tokens needs; None for a job that does not tune.

    Raises UnsupportedError for layers that gradients cannot be computed through.
    """
    target = setup.target
    if not samples or target is None or target.recipe.tune is None:
        return None
    skeleton, dtype = setup.skeleton, setup.dtype
    kept = survey(
        setup.checkpoint, skeleton, dtype, setup.device, lambda stage: tuned_names(skeleton, stage, target.selected)
    )
    largest = 0
    for stage in skeleton.layer_stages:
        names, layer = tuned_names(skeleton, stage, target.selected), skeleton.layers[stage.index]
        apart = [each.path.removeprefix(f"{stage.prefix}.") + "." for each in stage.experts]
        sizes = {n: p.numel() for n, p in layer.named_parameters() if n in names or not n.startswith(tuple(apart))}
        fixed = dtype.itemsize * sum(n for name, n in sizes.items() if name not in names)
        for name, masked in names.items():
            pruned = target.least_of(f"{stage.prefix}.{name.removesuffix('.weight')}").share if masked else 0.0
            stays = math.ceil(sizes[name] * (1 - pruned))
            fixed += state_bytes(sizes[name], stays, dtype.itemsize, skeleton.dtype.itemsize)
        largest = max(largest, fixed + _frozen_bytes(stage, dtype.itemsize), _expert_bytes(setup, target, stage))
    states = skeleton.between.most(seqlen) * cache_dtype(skeleton.dtype, dtype).itemsize
    if skeleton.experts:  # their gradients by what they are given, of all tokens at once
        kept += 4 * (
            skeleton.hidden_size + max(ref.shape[0] for s in skeleton.layer_stages for ref in s.linears.values())
        )
    per_window = seqlen * (kept + token_bytes(skeleton, seqlen, dtype) + 2 * states)
    return TuneNeeds(largest, per_window, windows_a_step(seqlen, samples), 2 * samples * seqlen * states)


def _frozen_bytes(stage: Stage, itemsize: int) -> int:
    """While the rest of a layer is tuned: an expert that computes, and the next one."""
    sizes = [
        sum(math.prod(stage.linears[n].shape) for n in e.of([i])) for e in stage.experts for i in range(len(e.down))
    ]
    return 2 * itemsize * max(sizes, default=0)


def _expert_bytes(setup: Setup, target: Target, stage: Stage) -> int:
    """While an expert is tuned: its weights, gradients and moments, and what its tokens take."""
    skeleton, itemsize, most = setup.skeleton, setup.dtype.itemsize, 0
    for experts in stage.experts:
        for e in range(len(experts.down)):
            found = widths = 0
            for name in experts.of([e]):
                size, rows = math.prod(stage.linears[name].shape), max(stage.linears[name].shape)
                stays = math.ceil(size * (1 - (target.least_of(name).share if name in target.selected else 0.0)))
                found += state_bytes(size, stays, itemsize, skeleton.dtype.itemsize)
                widths += rows
            most = max(most, found + 4 * AT_ONCE * (2 * widths + 4 * skeleton.hidden_size))
    return most


def largest_refitted(stages: Sequence[Stage], chosen: Collection[str]) -> int:
    """Bytes of the refitted weights of one layer: the largest such sum of all layers."""
    return max((sum(ref.nbytes for name, ref in s.linears.items() if name in chosen) for s in stages), default=0)


def beside_grams(skeleton: Skeleton, chosen: Collection[str]) -> int:
    """Bytes that asymmetric calibration needs beside a Gram and its drift: new weights, and one linear's debt (see
    methods/gram.py)."""
    shapes = [ref.shape for stage in skeleton.layer_stages for name, ref in stage.linears.items() if name in chosen]
    debt = 4 * skeleton.hidden_size * (max(map(max, shapes), default=0) + MOST_HELD)
    return largest_refitted(skeleton.layer_stages, chosen) + debt


def scratch_bytes(setup: Setup, layout: Layout, windows: int, length: int) -> int:
    """Upper bound on the disk space of scratch files, beside the activation caches, with calibration on `windows`
    windows of `length` tokens.

    Scratch files hold a Gram that is larger than the room in memory (one at a time); the inputs routed to experts that
    are refitted; with asymmetric calibration the dense model's outputs of a layer, the layer's new weights and, for a
    refit on the CPU, both models' inputs of linears that end a part of a layer (model/ends.py); and for tuning a
    layer's inputs and targets, those of an expert, the shard part that is replaced or new experts, and with FP8 the
    layer before it becomes codes.
    """
    skeleton, dtype, tokens = setup.skeleton, setup.dtype, windows * length
    target = setup.target
    refitted = target.refitted if target else frozenset[str]()
    routed = target.selected if target and layout.windows else refitted  # tuned experts' inputs are recorded, too
    sizes = [0]
    kept = 0
    for stage in skeleton.layer_stages:
        names = stage.linears.keys() & refitted
        sizes += [gram_bytes([linear_shape(skeleton, name, stage)[1]]) for name in names]
        kept = max(kept, sum(not routed.isdisjoint(experts.linears) for experts in stage.experts))
    found = max(size if size > layout.room else 0 for size in sizes) + kept * tokens * waiting_bytes(skeleton, dtype)
    kept_dtype = cache_dtype(skeleton.dtype, dtype)
    states = 0 if layout.resident else tokens * skeleton.between.most(length) * kept_dtype.itemsize
    if setup.propagate == "asymmetric":
        found += largest_refitted(skeleton.layer_stages, refitted) + states
        if refitted and setup.device.type == "cpu":
            widths = (sum(end.width for end in ends_of(skeleton, stage)) for stage in skeleton.layer_stages)
            found += 2 * tokens * max(widths, default=0) * dtype.itemsize
    if layout.windows:
        parts = 2 if target is not None and target.quantisation is not None else 1
        found += 2 * states + parts * max(stage.nbytes for stage in skeleton.layer_stages)
        found += tokens * skeleton.hidden_size * dtype.itemsize if skeleton.experts else 0
    return found
