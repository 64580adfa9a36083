"""What a run needs before it writes anything; whatever can be refused is refused here."""

from __future__ import annotations

import datetime
import functools
import io
import math
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamprune.calibration.gram_sums import MOST_HELD, HoldOut
from streamprune.calibration.grams import LayerGrams, gram_bytes, largest_at_once
from streamprune.calibration.statistics import StatisticsFile
from streamprune.calibration.windows import Tokens, tokens_digest
from streamprune.disk import durable
from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.linears import compile_filter
from streamprune.disk.state import JobState
from streamprune.errors import CorruptStateError, ResourceError, UnsupportedError, UsageError
from streamprune.methods.selection import Amount, parse_pattern
from streamprune.methods.tuning import state_bytes
from streamprune.model.beside import RefitNeeds, TuneNeeds
from streamprune.model.budget import (
    Layout,
    estimate,
    layout_for,
    token_bytes,
    waiting_bytes,
)
from streamprune.model.device import cache_dtype
from streamprune.model.differentiable import survey
from streamprune.model.loader import WeightLoader
from streamprune.model.shapes import linear_shape
from streamprune.model.skeleton import Skeleton, Stage
from streamprune.process.memory import format_bytes
from streamprune.pruning.forward import CalibrationPass
from streamprune.pruning.linears import check_widths, selected_linears
from streamprune.pruning.paired import PairedPass
from streamprune.pruning.quantise import Quantisation, check_codable
from streamprune.pruning.refit import Refit, needs_of
from streamprune.pruning.shard import StageWriter
from streamprune.pruning.spec import JobSpec
from streamprune.pruning.target import Target
from streamprune.pruning.tuning import tuned_names, windows_a_step

SLACK_BYTES = 64 << 20
"""Disk for everything besides weights and activations."""


def make_writer(spec: JobSpec, skeleton: Skeleton, loader: WeightLoader, backend: str) -> StageWriter | None:
    """The writer of a prune job, None for calibrate. Raises UsageError for filters and patterns that do not fit."""
    if spec.recipe is None:
        return None
    amount = Amount(spec.sparsity, parse_pattern(spec.pattern) if spec.pattern else None)
    quantisation = None
    if spec.recipe.quantize is not None:
        quantisation = Quantisation(spec.fp8_scale or "amax", spec.fp8_rounding == "compensate", backend)
    target = Target(spec.recipe, amount, backend, spec.damping or "auto", quantisation=quantisation)
    only, skip = compile_filter("--only", spec.only), compile_filter("--skip", spec.skip)
    chosen = selected_linears(skeleton.stages, only, skip)
    if quantisation is not None:
        check_codable(chosen, skeleton)
    check_widths(amount.pattern, chosen, skeleton)
    return StageWriter(skeleton, loader, target, frozenset(chosen), allow_zeros=spec.allow_zeros)


def propagated(propagate: str, skeleton: Skeleton) -> str:
    """What "auto" comes to for a refit: "asymmetric", or "pruned" for mixtures of experts.

    Raises UnsupportedError where it is asked for and cannot be.
    """
    if propagate == "auto":
        return "pruned" if skeleton.experts else "asymmetric"
    if propagate == "asymmetric" and skeleton.experts:
        raise UnsupportedError(
            "--propagate asymmetric needs the same tokens in the dense and in the pruned model, and routing sends them "
            "to other experts; pass --propagate pruned"
        )
    return propagate


def refit_needs(writer: StageWriter | None, propagate: str) -> RefitNeeds | None:
    """The memory that a job's refit takes; None where it has none."""
    if writer is None or writer.target.recipe.refit is None:
        return None
    refit = Refit(writer.target.recipe.refit, writer.target.damping)
    stages = writer.skeleton.layer_stages
    beside = beside_grams(writer.skeleton, writer.selected) if propagate == "asymmetric" else None
    return needs_of(refit, [largest_at_once(writer.in_order(stage), stage.expert_of) for stage in stages], beside)


def tune_needs(
    checkpoint: Checkpoint, skeleton: Skeleton, chosen: Collection[str], amount: Callable[[str], Amount],
    samples: int, seqlen: int, dtype: torch.dtype, device: torch.device,
) -> TuneNeeds:  # fmt: skip
    """The memory that tuning takes, where `amount(linear)` of those `chosen` is pruned, with `samples` windows.

    Raises UnsupportedError for mixtures of experts, and for layers through which gradients do not go.
    """
    if skeleton.experts:
        raise UnsupportedError(
            "--tune block is for models without experts: it would hold a layer's experts all at once; leave it out, "
            "and choose a --refit, which takes one expert at a time"
        )
    kept = survey(checkpoint, skeleton, dtype, device, lambda stage: tuned_names(skeleton, stage, chosen))
    largest = 0
    for stage in skeleton.layer_stages:
        names, layer = tuned_names(skeleton, stage, chosen), skeleton.layers[stage.index]
        sizes = {name: p.numel() for name, p in layer.named_parameters()}
        fixed = dtype.itemsize * sum(n for name, n in sizes.items() if name not in names)
        for name, masked in names.items():
            pruned = amount(f"{stage.prefix}.{name.removesuffix('.weight')}").share if masked else 0.0
            stays = math.ceil(sizes[name] * (1 - pruned))
            fixed += state_bytes(sizes[name], stays, dtype.itemsize, skeleton.dtype.itemsize)
        largest = max(largest, fixed)
    states = skeleton.hidden_size * cache_dtype(skeleton.dtype, dtype).itemsize
    per_window = seqlen * (kept + token_bytes(skeleton, seqlen, dtype) + 2 * states)
    return TuneNeeds(largest, per_window, windows_a_step(seqlen, samples), 2 * samples * seqlen * states)


def largest_refitted(stages: Sequence[Stage], chosen: Collection[str]) -> int:
    """Bytes of the weights that are refitted of one layer, of the one with most."""
    return max((sum(ref.nbytes for name, ref in s.linears.items() if name in chosen) for s in stages), default=0)


def beside_grams(skeleton: Skeleton, chosen: Collection[str]) -> int:
    """Bytes that asymmetric calibration takes beside a Gram and its drift: new weights, and one linear's debt."""
    shapes = [ref.shape for stage in skeleton.layer_stages for name, ref in stage.linears.items() if name in chosen]
    debt = 4 * skeleton.hidden_size * (max(map(max, shapes), default=0) + MOST_HELD)
    return largest_refitted(skeleton.layer_stages, chosen) + debt


def layer_grams(
    writer: StageWriter, forward: CalibrationPass, stage: Stage, room: int, folder: Path, dtype: torch.dtype
) -> LayerGrams | None:
    """The Grams of a layer whose linears are refitted, in `room` bytes or the `folder`; None where none is."""
    linears = writer.in_order(stage)
    if not writer.target.recipe.needs_gram or stage.kind != "layer" or not linears:
        return None
    hold = HoldOut.of(forward.windows.size, forward.windows.shape[1])
    products = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    rerun = functools.partial(forward.gather, stage)
    place = forward.place if isinstance(forward, PairedPass) else None
    return LayerGrams(linears, room, hold, folder, rerun, products, stage.expert_of, place)


def scratch_bytes(
    skeleton: Skeleton, refitted: Set[str], layout: Layout, tokens: int, dtype: torch.dtype, propagate: str
) -> int:
    """Disk beside the caches, at the most.

    For the one Gram at a time that is larger than the room for them, for what experts are given, and with asymmetric
    calibration for what the dense model makes of a layer and for the layer's new weights, for tuning its inputs and
    targets and the shard that is replaced. `refitted` are linears, `tokens` those of calibration, computed with in
    `dtype`.
    """
    sizes = [0]
    kept = 0
    for stage in skeleton.layer_stages:
        names = stage.linears.keys() & refitted
        sizes += [gram_bytes([linear_shape(skeleton, name, stage)[1]]) for name in names]
        kept = max(kept, sum(not names.isdisjoint(experts.linears) for experts in stage.experts))
    found = max(size if size > layout.room else 0 for size in sizes) + kept * tokens * waiting_bytes(skeleton, dtype)
    states = 0 if layout.resident else tokens * skeleton.hidden_size * cache_dtype(skeleton.dtype, dtype).itemsize
    if propagate == "asymmetric":
        found += largest_refitted(skeleton.layer_stages, refitted) + states
    if layout.windows:
        found += 2 * states + max(stage.nbytes for stage in skeleton.layer_stages)
    return found


def open_given(
    spec: JobSpec, checkpoint: Checkpoint, skeleton: Skeleton, writer: StageWriter | None
) -> StatisticsFile | None:
    """The file given with --stats, or what --allocate goes by.

    Raises UsageError unless it is this model's and has every linear that is pruned.
    """
    if spec.stats_path is None:
        return None
    given = StatisticsFile(spec.stats_path)
    if writer is None or not (writer.target.recipe.needs_statistics or spec.allocate):
        return given
    if given.model != checkpoint.identity():
        raise UsageError(f"--stats {given.path} belongs to another model; make it with `calibrate {spec.source}`")
    for stage in skeleton.layer_stages:
        for name in stage.linears.keys() & writer.selected:
            given.load(name, stage.linears[name].shape[0 if name in skeleton.transposed else 1])
    return given


def layout_of(
    spec: JobSpec, checkpoint: Checkpoint, skeleton: Skeleton, dtype: torch.dtype, device: torch.device,
    resolved: Mapping[str, Any], writer: StageWriter | None, propagate: str, shape: tuple[int, int],
) -> Layout:  # fmt: skip
    """How the job lies in memory: with batches as recorded when it began, or as memory allows. Raises ResourceError.

    `shape` is (windows, tokens of each), without calibration (0, 1).
    """
    samples, length = shape
    seqlen = length * models_at_once(propagate)
    needs, tune = refit_needs(writer, propagate), None
    if samples and writer is not None and writer.target.recipe.tune is not None:
        tune = tune_needs(checkpoint, skeleton, writer.selected, writer.target.of, samples, length, dtype, device)
    layout = layout_for(skeleton, seqlen, samples, dtype, device, spec.max_ram, spec.max_vram, refit=needs, tune=tune)
    if not samples or not resolved:
        return layout
    group = int(resolved.get("group", 1))
    windows = int(resolved.get("tune_windows", 0))
    layout = replace(layout, room=int(resolved.get("gram_room", 0)), group=group, windows=windows)
    if device.type != "cpu":
        return layout
    budget = estimate(skeleton, seqlen, dtype).refitting(needs, layout.room).tuning(tune, windows)
    recorded = int(resolved["batch"])
    if spec.max_ram is not None and budget.peak(recorded, group) > spec.max_ram:
        raise ResourceError(
            f"this job began with batches of {recorded} samples and needs --max-ram "
            f"{-(-budget.peak(recorded, group) >> 20) + 1}MiB to go on; or throw its work away with --restart"
        )
    return replace(layout, batch=recorded)


def resolve(
    spec: JobSpec, skeleton: Skeleton, layout: Layout, dtype: torch.dtype, device: torch.device, batch: int,
    windows: Tokens | None, shares: Mapping[str, float], met: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """What a job that begins has settled for, and keeps to when it is resumed; JSON values. `met` is of its text."""
    return {
        "dtype": str(dtype).removeprefix("torch."), "device": str(device), "batch": batch,
        "tokens": tokens_digest(windows) if windows is not None else None, **met,
        **({"gram_room": layout.room} if spec.recipe and spec.recipe.needs_gram else {}),
        **({"group": layout.group} if skeleton.experts else {}),
        **({"tune_windows": layout.windows} if layout.windows else {}),
        **({"allocation": shares} if shares else {}),
    }  # fmt: skip


def models_at_once(propagate: str) -> int:
    """How many models' hidden states go through a layer: with two, a window counts twice wherever memory is counted."""
    return 2 if propagate == "asymmetric" else 1


def begin(state: JobState, job: Mapping[str, Any], windows: Tokens | None) -> None:
    """Writes down that a job has begun, and keeps its calibration windows."""
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    tokens = io.BytesIO()
    if windows is not None:
        np.save(tokens, windows, allow_pickle=False)
    state.create({**job, "started": started}, tokens.getbuffer() if windows is not None else None)


def check_disk(state: JobState, output: int, cache: int) -> None:
    """Raises ResourceError unless `output` + 64 MiB and `cache` bytes fit where they are going to be."""
    needs: dict[int, tuple[Path, int]] = {}
    for path, size in ((state.partial, output + SLACK_BYTES), (state.cache, cache)):
        there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        device = there.stat().st_dev
        needs[device] = (there, needs.get(device, (there, 0))[1] + size)
    for there, size in needs.values():
        free = shutil.disk_usage(there).free
        if free < size:
            raise ResourceError(
                f"{there} has {format_bytes(free)} free, this job needs {format_bytes(size)} "
                f"({format_bytes(output)} for the output, {format_bytes(cache)} for activations); free some, "
                "choose another OUT, or put the activations elsewhere with --work DIR"
            )


def clear_rubbish(state: JobState, newest: int, records: Sequence[Mapping[str, Any]]) -> None:
    """Removes what a crash left behind: caches other than the `newest`, and temporary files.

    Raises CorruptStateError where a shard of the journal's `records` is not as it was written.
    """
    durable.make_folder(state.cache)
    keep = {f"{newest:04d}.bin", f"{newest:04d}.json"}
    for path in [*state.cache.iterdir(), *state.partial.glob(".*.tmp"), *state.folder.glob(".*.tmp")]:
        if path.parent != state.cache or path.name not in keep:
            durable.remove(path)
    for record in records:
        if record["shard"]:
            path = state.partial / record["shard"]["name"]
            if not path.is_file() or path.stat().st_size != record["shard"]["bytes"]:
                raise CorruptStateError(f"{path} is missing or damaged; start again with --restart")
