"""A decoder layer that can be differentiated: with trainable tensors in place of mapped ones, outside inference mode.

`survey` checks layers before a job writes anything. It runs each kind of layer forwards and backwards on the meta
device, where nothing is computed. That shows whether gradients reach every tuned tensor, and how many bytes autograd
keeps per token until the backward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from streamprune.disk.checkpoint import Checkpoint
from streamprune.errors import UnsupportedError
from streamprune.model.binding import replaced_tensors
from streamprune.model.blank_layer import BlankLayer
from streamprune.model.calls import Call
from streamprune.model.skeleton import Skeleton, Stage
from streamprune.model.streamed import StreamedModel

Run = Callable[[Tensor], Tensor]

_LENGTH = 16
"""Tokens in the trial run: few, so that attention scores (length²) are negligible."""


@contextmanager
def trainable(streamed: StreamedModel, stage: Stage, tensors: Mapping[str, Tensor]) -> Iterator[Run]:
    """Yields the layer's forward, from states to states, with `tensors` (named within the layer) as its parameters.

    States are (batch, seqlen, hidden) in the compute dtype, on the device. Call it outside of inference mode.
    """
    layer, known = streamed.skeleton.layers[stage.index], dict[int, Call]()

    def run(states: Tensor) -> Tensor:
        samples = states.shape[0]
        if samples not in known:
            known[samples] = _copied(streamed.calls_of(samples)[stage.index], torch.clone)
        return _forward(layer, known[samples], states)

    with replaced_tensors(layer, tensors):
        yield run


def survey(
    checkpoint: Checkpoint, skeleton: Skeleton, dtype: torch.dtype, device: torch.device,
    tuned: Callable[[Stage], Collection[str]],
) -> int:  # fmt: skip
    """The most bytes per token that autograd keeps for a layer; `tuned` names the tuned tensors within a layer.

    Raises UnsupportedError for a layer that cannot be differentiated.
    """
    trial = BlankLayer(checkpoint, skeleton, dtype, device, 1, _LENGTH)
    trial.embed()
    found = dict[tuple[Any, ...], int]()
    for stage in skeleton.layer_stages:
        names = tuple(sorted(tuned(stage)))
        layer = skeleton.layers[stage.index]
        parts = [(path, type(module), str(module.extra_repr())) for path, module in layer.named_modules()]
        key = (names, *parts)
        if names and key not in found:
            found[key] = _kept_bytes(skeleton, stage, trial.streamed, dtype, names)
    return max(found.values(), default=0)


def _kept_bytes(
    skeleton: Skeleton, stage: Stage, streamed: StreamedModel, dtype: torch.dtype, names: Collection[str]
) -> int:
    layer, kept = skeleton.layers[stage.index], dict[int, tuple[Tensor, int]]()
    blank = {
        name: torch.empty(p.shape, dtype=dtype if p.is_floating_point() else p.dtype, device="meta")
        for name, p in (*layer.named_parameters(), *layer.named_buffers())
    }
    own = {name: blank[name].requires_grad_() for name in names}
    weights = {t.untyped_storage()._cdata for t in blank.values()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = (tensor, storage.nbytes())
        return tensor

    call = _copied(streamed.calls_of(1)[stage.index], lambda t: torch.empty_like(t, device="meta"))
    states = torch.empty(1, _LENGTH, skeleton.hidden_size, dtype=dtype, device="meta")
    reason = ""
    try:
        with replaced_tensors(layer, blank):
            _backward(_forward(layer, call, states))  # without hooks: they hide errors about in-place changes
            with torch.autograd.graph.saved_tensors_hooks(pack, _same):
                _backward(_forward(layer, call, states))
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as e:
        reason = " ".join(str(e).split())[:160]
    missing = [name for name in own if own[name].grad is None]
    if reason or missing:
        kind = getattr(skeleton.model.config, "model_type", type(skeleton.model).__name__)
        reason = reason or f"no gradient reaches {missing[0]}"
        raise UnsupportedError(
            f"{kind}: {stage.prefix} ({type(layer).__name__}) cannot be differentiated as it stands, so it cannot be "
            f"tuned ({reason}); leave out --tune"
        )
    return sum(nbytes for _, nbytes in kept.values()) // _LENGTH


def _forward(layer: nn.Module, call: Call, states: Tensor) -> Tensor:
    if call.by_keyword:
        out = layer(*call.args, hidden_states=states, **call.kwargs)
    else:
        out = layer(states, *call.args, **call.kwargs)
    result: Tensor = out[0] if isinstance(out, tuple | list) else out
    return result


def _backward(made: Tensor) -> None:
    made.float().square().sum().backward()  # type: ignore[no-untyped-call]


def _copied(value: Any, copy: Callable[[Tensor], Tensor]) -> Any:
    """A layer's arguments with every tensor copied, recursively: recorded tensors are from inference mode."""
    if isinstance(value, Call):
        return dataclasses.replace(value, args=_copied(value.args, copy), kwargs=_copied(value.kwargs, copy))
    if isinstance(value, Tensor):
        return copy(value)
    if isinstance(value, tuple | list):
        copies = [_copied(v, copy) for v in value]
        return type(value)(*copies) if hasattr(value, "_fields") else type(value)(copies)
    if isinstance(value, dict):
        return {k: _copied(v, copy) for k, v in value.items()}
    return value


def _same(tensor: Tensor) -> Tensor:
    return tensor
