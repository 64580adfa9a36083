"""What decoder layers are called with beside hidden states, recorded once for each shape of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

CALLS_BYTES = 64 << 20
"""Memory for what is recorded of batches of different shapes; that of the last two is kept in any case."""


Place = tuple[str, int | str, Any]
"""Where something that a layer hands on was found: ("output", layer, number) for what it returns beside hidden states,
("shared", argument, key) for what it puts into a dictionary that all layers are given."""


@dataclass(frozen=True)
class Output:
    """Among a layer's arguments, in place of what an earlier layer has returned beside hidden states."""

    layer: int
    number: int


@dataclass(frozen=True)
class Call:
    """The arguments of one decoder layer besides the hidden states, which are argument 0 or `hidden_states`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_keyword: bool
    layer: int = -1
    shared: frozenset[str] = frozenset()
    """Keywords of dictionaries that all layers are given, and into which they may put something."""

    @property
    def outputs(self) -> list[Output]:
        """What of earlier layers' outputs is among the arguments."""
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Output)]

    def run(self, layer: nn.Module, hidden: Tensor, values: Mapping[Place, Any]) -> tuple[Tensor, dict[Place, Any]]:
        """The layer's output for these hidden states and what earlier layers handed on, and what is handed on then.

        An output of an earlier layer that is not among the `values` is None.
        """

        def fill(value: Any) -> Any:
            return values.get(("output", value.layer, value.number)) if isinstance(value, Output) else value

        args, kwargs = [fill(value) for value in self.args], {k: fill(v) for k, v in self.kwargs.items()}
        for name in self.shared:
            kwargs[name] = copy(kwargs[name])
            kwargs[name].update({key: v for (kind, at, key), v in values.items() if (kind, at) == ("shared", name)})
        out = layer(*args, hidden_states=hidden, **kwargs) if self.by_keyword else layer(hidden, *args, **kwargs)
        first, *rest = out if isinstance(out, tuple | list) else (out,)
        handed: dict[Place, Any] = {("output", self.layer, number): value for number, value in enumerate(rest)}
        for name in self.shared:
            there = self.kwargs[name]
            handed |= {("shared", name, key): v for key, v in kwargs[name].items() if there.get(key) is not v}
        return first, handed


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A layer's arguments with `change` applied to every tensor, recursively."""
    if isinstance(value, Call):
        return replace(value, args=mapped(value.args, change), kwargs=mapped(value.kwargs, change))
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        copies = [mapped(v, change) for v in value]
        return type(value)(*copies) if hasattr(value, "_fields") else type(value)(copies)
    if isinstance(value, dict):
        return {k: mapped(v, change) for k, v in value.items()}
    return value


class RecordedCalls:
    """The arguments of all layers by the shape of a batch (samples, seqlen), and batches to record them with again."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], list[Call]] = {}
        self._nbytes: dict[tuple[int, int], int] = {}
        self._examples: dict[int, Tensor] = {}
        """Of each length the largest batch of ids so far."""
        self._recorded: set[tuple[int, int]] = set()

    def see(self, ids: Tensor) -> None:
        """Before a batch of ids (samples, seqlen) is recorded."""
        if len(ids) > len(self._examples.get(ids.shape[1], ())):
            self._examples[ids.shape[1]] = ids

    def is_new(self, samples: int, seqlen: int) -> bool:
        """Whether this is asked for the first time of this shape."""
        new = (samples, seqlen) not in self._recorded
        self._recorded.add((samples, seqlen))
        return new

    @property
    def largest(self) -> int:
        """Samples of the largest batch that was seen."""
        return max(map(len, self._examples.values()), default=1)

    @property
    def length(self) -> int:
        """Of the first batch that was seen: that of all where they have the same."""
        return next(iter(self._examples))

    def of(self, samples: int, seqlen: int) -> list[Call] | None:
        """What is known for batches of this shape."""
        return self._known.get((samples, seqlen))

    def example(self, samples: int, seqlen: int) -> Tensor:
        """A batch of this shape, of ids that were seen."""
        known = self._examples[seqlen]
        return known.repeat(-(-samples // len(known)), 1)[:samples]

    def remember(self, samples: int, seqlen: int, calls: list[Call]) -> list[Call]:
        """What is known for this shape: `calls`, if it was nothing. The oldest are forgotten beyond CALLS_BYTES."""
        known = self._known.setdefault((samples, seqlen), calls)
        if known is calls:
            self._nbytes[samples, seqlen] = _nbytes(calls)
            for oldest in list(self._known)[:-2]:
                if sum(self._nbytes.values()) > CALLS_BYTES:
                    del self._known[oldest], self._nbytes[oldest]
        return known


def _nbytes(calls: list[Call]) -> int:
    """Bytes of the tensors among layers' arguments, each counted once."""
    found: dict[int, int] = {}
    waiting: list[Any] = [part for call in calls for part in (call.args, call.kwargs)]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            found[id(value)] = value.nbytes
        elif isinstance(value, dict | tuple | list):
            waiting.extend(value.values() if isinstance(value, dict) else value)
    return sum(found.values())


def same(a: Any, b: Any) -> bool:
    """Whether two layers' arguments are equal, all the way down."""
    if isinstance(a, Call) and isinstance(b, Call):
        return same(a.args, b.args) and same(a.kwargs, b.kwargs)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and bool(torch.equal(a, b)))
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, Output):
        return bool(a == b)
    return type(a) is type(b) and (not isinstance(a, bool | int | float | str) or a == b)
