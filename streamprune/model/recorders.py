"""How a model calls its decoder layers: learnt from a run of its own forward in which recorders take their places.

A recorder passes its input on unchanged and keeps its arguments, so that one run yields exactly the arguments that the
architecture gives each layer: masks of each kind, rotary embeddings, alibi, what is looked up by the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from streamprune.errors import UnsupportedError
from streamprune.model.calls import Call, Output
from streamprune.model.configuration import one_line
from streamprune.model.copies import is_of_device
from streamprune.model.skeleton import Skeleton
from streamprune.process.memory import is_out_of_memory

OUTPUTS = (None, 1, 2)
"""What layers may return, tried in this order: hidden states alone, or a tuple that has so many other things behind
them."""


class Recorder(nn.Module):
    """Takes the place of decoder layer `number`: keeps its arguments, returns its input, or `replace` if that is set.

    With `compare`, `handed_on` tells whether its input is what the `first` recorder passed on.
    """

    def __init__(self, number: int, outputs: int | None, first: Recorder | None, compare: bool) -> None:
        super().__init__()
        self.number, self.outputs, self.compare = number, outputs, compare
        self.first = [first] if first else []  # in a list, so that it does not become a submodule
        self.received: Tensor | None = None
        self.handed_on = False
        self.call: Call | None = None
        self.replace: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        by_keyword = "hidden_states" in kwargs
        states = kwargs.pop("hidden_states") if by_keyword else args[0]
        if not self.first:
            self.received = states.clone()  # the model may change the states in place later
            self.handed_on = True
        elif self.compare:
            given = self.first[0].received
            self.handed_on = given is not None and states.shape == given.shape and bool(torch.equal(states, given))
        else:
            self.handed_on = True
        self.call = Call(args if by_keyword else args[1:], kwargs, by_keyword, self.number)
        out = states if self.replace is None else self.replace
        return out if self.outputs is None else (out, *(Output(self.number, k) for k in range(self.outputs)))


@dataclass(frozen=True)
class Recorded:
    """A recorded run: hidden states before the first layer, as the model shapes them; each layer's arguments; and how
    many things the layers' outputs have beside hidden states (None: no tuple)."""

    states: Tensor
    calls: list[Call]
    outputs: int | None


@contextmanager
def recorders(skeleton: Skeleton, outputs: int | None, compare: bool = True) -> Iterator[list[Recorder]]:
    """Replaces every decoder layer by a recorder, see Recorder for `compare`."""
    layers = skeleton.layers
    real = list(layers)
    made = [Recorder(0, outputs, None, compare)]
    made += [Recorder(number, outputs, made[0], compare) for number in range(1, len(real))]
    for i, (recorder, layer) in enumerate(zip(made, real, strict=True)):
        for attribute in ("attention_type", "layer_type", "is_sliding", "block_type"):  # some models read these
            if hasattr(layer, attribute):
                setattr(recorder, attribute, getattr(layer, attribute))
        layers[i] = recorder
    try:
        yield made
    finally:
        for i, layer in enumerate(real):
            layers[i] = layer


@torch.inference_mode()
def record(skeleton: Skeleton, ids: Tensor, known: Recorded | None, compare: bool) -> Recorded:
    """Runs the model's own forward on ids (batch, tokens); what is outside its layers must be bound.

    `known` is an earlier run of it. Raises UnsupportedError for a model that does something between its layers.
    """
    objection, failure = "", None
    for outputs in OUTPUTS if known is None else (known.outputs,):
        with recorders(skeleton, outputs, compare) as made:
            model = skeleton.model
            base = getattr(model, str(getattr(model, "base_model_prefix", "")), None)
            base = model.get_decoder() if base is None else base  # type: ignore[operator]
            try:
                final = base(input_ids=ids, use_cache=False)[0]
            except (RuntimeError, IndexError, ValueError, TypeError, AttributeError) as e:
                if is_out_of_memory(e) or is_of_device(e):
                    raise  # says nothing about the model; as an UnsupportedError it would discard unfinished work
                failure = e.with_traceback(None)  # its frames hold tensors
                final = None  # probably it expects a tuple from its layers, or none
            objection, first = _objection(made, final, ids), made[0].received
            if first is not None and not objection:
                return Recorded(first, _marked([r.call for r in made if r.call is not None]), outputs)
    reason = f" ({one_line(failure)})" if failure is not None else ""
    raise UnsupportedError(f"{kind_of(skeleton)} {objection}{reason}") from failure


def _marked(calls: list[Call]) -> list[Call]:
    """The calls, with the names of dictionaries that all layers are given."""
    shared = frozenset(
        name
        for name, value in calls[0].kwargs.items()
        if isinstance(value, MutableMapping) and all(call.kwargs.get(name) is value for call in calls)
    )
    return [replace(call, shared=shared) for call in calls] if shared else calls


def _objection(made: list[Recorder], final: Tensor | None, ids: Tensor) -> str:
    """Why layers cannot be streamed, after a recorded run with output `final` (None: it failed); "" if they can be."""
    if made[0].received is None or final is None or not all(r.handed_on for r in made) or final.shape[:2] != ids.shape:
        return (
            "does something between its decoder layers (or does not call them all in order); its layers cannot be "
            "streamed one by one"
        )
    return ""


def kind_of(skeleton: Skeleton) -> str:
    """The name of a model's family."""
    return str(getattr(skeleton.model.config, "model_type", type(skeleton.model).__name__))
