"""Layers for multi-token prediction: stored behind a model's own layers, and pruned only if asked.

transformers does not run them, so there are no statistics of what they are given, and their weights are chosen by
magnitude. A tensor of such a layer (`model.layers.61.REST` of a model with 61 layers, `mtp.layers.0.REST`) holds
linears where a layer of the model has a tensor of the same shape, called REST there, that does. The others stay as they
are: norms, embeddings, heads, routers, and what joins a state and a token.
"""

from __future__ import annotations

import re
from dataclasses import replace

from streamprune.disk.header import TensorRef
from streamprune.errors import UsageError
from streamprune.model.stages import Outline, Stage

_NUMBERED = re.compile(r"(.*?(?:^|\.)(?:layers|h|blocks)\.\d+)\.(.+)")


def with_further(model: Outline) -> Outline:
    """The model with the linears of its layers for multi-token prediction as linears of the stage `head`.

    Raises UsageError if there are none.
    """
    patterns: dict[tuple[str, tuple[int, ...]], tuple[Stage, TensorRef, list[str]]] = {}
    for stage in reversed(model.layer_stages):
        held: dict[str, list[str]] = {}
        for name, ref in stage.linears.items():
            held.setdefault(ref.name, []).append(name)
        for tensor in stage.tensors:
            if tensor.name in held and (found := _NUMBERED.fullmatch(tensor.name)):
                patterns.setdefault((found[2], tensor.shape), (stage, tensor, held[tensor.name]))
    head = model.stages[-1]
    linears, transposed = dict[str, TensorRef](), set[str]()
    for tensor in head.tensors:
        found = _NUMBERED.fullmatch(tensor.name) if tensor.name in head.unclaimed else None
        like = patterns.get((found[2], tensor.shape)) if found else None
        if found is None or like is None or like[1].dtype != tensor.dtype:
            continue
        stage, whole, names = like
        for name in names:
            ref = stage.linears[name]
            begin = tensor.begin + ref.begin - whole.begin
            own = f"{found[1]}{name.removeprefix(stage.prefix)}"
            linears[own] = replace(tensor, shape=ref.shape, begin=begin, end=begin + ref.nbytes)
            transposed |= {own} if name in model.transposed else set()
    if not linears:
        raise UsageError(
            "--mtp prune: no layer for multi-token prediction with linears like those of the model's layers is among "
            "the tensors; leave it out"
        )
    stages = (*model.stages[:-1], replace(head, linears=linears))
    return replace(model, stages=stages, transposed=model.transposed | transposed)


def without_further(model: Outline) -> Outline:
    """The model without what `with_further` has added, as it is written to statistics files."""
    head = model.stages[-1]
    names = frozenset(head.linears)
    stages = (*model.stages[:-1], replace(head, linears={}))
    return replace(model, stages=stages, transposed=model.transposed - names) if names else model
