"""A decoder layer that can be differentiated: with trainable tensors in place of mapped ones, outside inference mode.

`survey` checks layers before a job writes anything. It runs each kind of layer forwards and backwards on the meta
device, where nothing is computed. That shows whether gradients reach every tuned tensor, and how many bytes autograd
keeps per token until the backward pass.

A layer's experts stay as they are, and are run one at a time (frozen_experts.py). On the meta device there are none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.header import TensorRef
from streamprune.errors import UnsupportedError
from streamprune.model.binding import replaced_tensors
from streamprune.model.blank_layer import BlankLayer
from streamprune.model.bound_experts import bound_experts
from streamprune.model.calls import Call, mapped
from streamprune.model.frozen_experts import FrozenExperts, NoExperts
from streamprune.model.loader import WeightLoader
from streamprune.model.skeleton import Skeleton
from streamprune.model.stages import Stage
from streamprune.model.streamed import StreamedModel

Run = Callable[[Tensor], Tensor]

_LENGTH = 16
"""Tokens in the trial run: few, so that attention scores (length²) are negligible."""


class BoundExperts(NamedTuple):
    """The experts of a layer that is trained, and where their weights are."""

    frozen: FrozenExperts
    loader: WeightLoader
    sources: Mapping[str, TensorRef]


@contextmanager
def trainable(
    streamed: StreamedModel, stage: Stage, tensors: Mapping[str, Tensor], experts: BoundExperts | None = None
) -> Iterator[Run]:  # fmt: skip
    """Yields the layer's forward, with `tensors` (named within the layer) as its parameters, and its `experts`.

    It takes what is kept before the layer, (batch, seqlen, width) in the compute dtype, on the device, and gives hidden
    states (batch, seqlen, of all streams). Call it outside of inference mode.
    """
    layer, between, known = streamed.skeleton.layers[stage.index], streamed.skeleton.between, dict[int, Call]()

    def run(states: Tensor) -> Tensor:
        samples, given = states.shape[0], between.unpack(stage.index, states)
        call = None if between.ids else known.get(samples)
        if call is None:
            call = known[samples] = mapped(call_for(stage.index, given), torch.clone)
        return between.rows(call.run(layer, given.hidden, given.values)[0])

    paths = [each.path for each in stage.experts]
    frozen = nullcontext() if experts is None else bound_experts(
        streamed.skeleton, paths, experts.loader, experts.sources, experts.frozen
    )  # fmt: skip
    with streamed.replaying() as call_for, replaced_tensors(layer, tensors), frozen:
        yield run


def survey(
    checkpoint: Checkpoint, skeleton: Skeleton, dtype: torch.dtype, device: torch.device,
    tuned: Callable[[Stage], Mapping[str, bool]],
) -> int:  # fmt: skip
    """The most bytes per token that autograd keeps for a layer; `tuned` names the tuned tensors within a layer: True
    for those that gradients must reach even where there are experts, some of whose vectors only choose among them.

    Raises UnsupportedError for a layer that cannot be differentiated.
    """
    trial = BlankLayer(checkpoint, skeleton, dtype, device, 1, _LENGTH)
    trial.embed()
    found = dict[tuple[Any, ...], int]()
    for stage in skeleton.layer_stages:
        names = tuned(stage)
        layer = skeleton.layers[stage.index]
        parts = [(path, type(module), str(module.extra_repr())) for path, module in layer.named_modules()]
        key = (*sorted(names), *parts)
        if names and key not in found:
            found[key] = _kept_bytes(skeleton, stage, trial.streamed, dtype, names)
    return max(found.values(), default=0)


def _kept_bytes(
    skeleton: Skeleton, stage: Stage, streamed: StreamedModel, dtype: torch.dtype, names: Mapping[str, bool]
) -> int:
    layer, kept = skeleton.layers[stage.index], dict[int, tuple[Tensor, int]]()
    paths = [each.path for each in stage.experts]
    blank = {
        name: torch.empty(p.shape, dtype=dtype if p.is_floating_point() else p.dtype, device="meta")
        for name, p in (*layer.named_parameters(), *layer.named_buffers())
        if name in names or not any(f"{stage.prefix}.{name}".startswith(f"{path}.") for path in paths)
    }
    own = {name: blank[name].requires_grad_() for name in names}
    weights = {t.untyped_storage()._cdata for t in blank.values()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = (tensor, storage.nbytes())
        return tensor

    call = mapped(streamed.calls_of(1)[stage.index], lambda t: torch.empty_like(t, device="meta"))
    width = skeleton.between.width(stage.index, _LENGTH)
    given = skeleton.between.unpack(stage.index, torch.empty(1, _LENGTH, width, dtype=dtype, device="meta"))
    reason = ""
    try:
        with (
            replaced_tensors(layer, blank),
            bound_experts(skeleton, paths, streamed.loader, skeleton.sources, NoExperts()),
        ):
            _backward(
                call.run(layer, given.hidden, given.values)[0]
            )  # without hooks: they hide errors about in-place changes
            with torch.autograd.graph.saved_tensors_hooks(pack, _same):
                _backward(call.run(layer, given.hidden, given.values)[0])
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as e:
        reason = " ".join(str(e).split())[:160]
    missing = [name for name in own if own[name].grad is None and (names[name] or not stage.experts)]
    if reason or missing:
        kind = getattr(skeleton.model.config, "model_type", type(skeleton.model).__name__)
        reason = reason or f"no gradient reaches {missing[0]}"
        raise UnsupportedError(
            f"{kind}: {stage.prefix} ({type(layer).__name__}) cannot be differentiated as it stands, so it cannot be "
            f"tuned ({reason}); leave out --tune"
        )
    return sum(nbytes for _, nbytes in kept.values()) // _LENGTH


def _backward(made: Tensor) -> None:
    made.float().square().sum().backward()  # type: ignore[no-untyped-call]


def _same(tensor: Tensor) -> Tensor:
    return tensor
