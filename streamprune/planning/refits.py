"""The work of a job's refits, for `plan`: from shapes, and from running the layer's code without weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from streamprune.calibration.collector import Collector
from streamprune.calibration.gram_sums import HoldOut
from streamprune.calibration.grams import gram_bytes, largest_at_once
from streamprune.disk.checkpoint import Checkpoint
from streamprune.model.blank_layer import BlankLayer
from streamprune.model.shapes import linear_shape, routed_share
from streamprune.model.skeleton import Skeleton
from streamprune.model.stages import Stage
from streamprune.planning.refit_cost import (
    EFFORTS,
    NO_REFIT,
    TRIED,
    Refitted,
    RefitWork,
    Trials,
    expert_work,
    refit_work,
)
from streamprune.pruning.refit import Refit, chunk_rows, sampled
from streamprune.pruning.setup import Setup


def planned_refits(setup: Setup, room: int, samples: int, seqlen: int) -> list[RefitWork]:
    """The refit work of each stage, in order, with `samples` windows of `seqlen` tokens and `room` bytes for Grams."""
    target, skeleton, dtype = setup.target, setup.skeleton, setup.dtype
    if target is None or (refit := target.recipe.refit) is None:
        return [NO_REFIT] * len(skeleton.stages)
    effort = EFFORTS[refit]
    native, compiled = effort.native and dtype == torch.bfloat16, effort.compiled * (setup.device.type == "cpu")
    effort = effort._replace(native=native, compiled=compiled)
    tokens, dampings = samples * seqlen, min(TRIED, len(Refit(refit, target.damping).dampings))
    routed = int(tokens * routed_share(skeleton))
    trials = Trials(dampings, HoldOut.of(tokens, seqlen).kept_out(tokens))
    of_expert = functools.partial(
        expert_work, effort, tokens=routed, trials=Trials(dampings, HoldOut.among(routed).kept_out(routed))
    )
    shared = inputs_shared(setup.checkpoint, skeleton, dtype, min(seqlen, 16))
    known: dict[tuple[Refitted, ...], RefitWork] = {}  # most experts of a model are equal

    def linear(stage: Stage, name: str, shares: str) -> Refitted:
        rows, width = linear_shape(skeleton, name, stage)
        chunks = -(-rows // chunk_rows(width, rows))
        return Refitted(shares, rows, width, stage.linears[name].nbytes, len(sampled(rows)), chunks)

    def of(stage: Stage) -> RefitWork:
        apart = stage.expert_of
        widths = target.linears_of(stage)
        within = {name: name.removeprefix(stage.prefix) for name in widths if name not in apart}
        together = [linear(stage, n, shared.get(w, w)) for n, w in within.items()]
        at_once = largest_at_once(widths, apart)
        left = room - gram_bytes(at_once) + gram_bytes(each.width for each in together)
        work = refit_work(effort, together, left, tokens, trials)
        for experts in stage.experts:
            for up, down in zip(experts.up, experts.down, strict=True):
                ordered = sorted((n for n in (*up, down) if n in widths), key=lambda n: stage.linears[n].name)
                key = tuple(linear(stage, n, "down" if n == down else "up") for n in ordered)
                if key and key not in known:
                    known[key] = of_expert(key, sum(math.prod(linear_shape(skeleton, n, stage)) for n in up))
                found = known.get(key, NO_REFIT)
                work += replace(found, apart=found.float32 + found.native)
        return work

    return [of(stage) if stage.kind == "layer" else NO_REFIT for stage in skeleton.stages]


def inputs_shared(checkpoint: Checkpoint, skeleton: Skeleton, dtype: torch.dtype, length: int) -> dict[str, str]:
    """Which linears of a layer share an input tensor: linear -> the first linear with this input, as names in a layer.

    Found by running the first layer without weights on `length` tokens. Raises UnsupportedError for a model whose
    layers cannot be run one by one.
    """
    layer, stage = BlankLayer(checkpoint, skeleton, dtype, torch.device("cpu"), 1, length), skeleton.layer_stages[0]
    layer.embed()
    collector = Collector(lambda rows, total, squares: None)

    def hook(name: str) -> Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda _, args, named: collector.watch(name, args[0] if args else next(iter(named.values())))

    routed = {name for experts in stage.experts for name in experts.linears}
    within = {name: name.removeprefix(stage.prefix) for name in stage.linears if name not in routed}
    hooks = [
        skeleton.layers[0].get_submodule(path[1:]).register_forward_pre_hook(hook(path), with_kwargs=True)
        for path in within.values()
    ]
    try:
        with layer.ready() as run:
            run()
    finally:
        for each in hooks:
            each.remove()
    return collector.groups
