"""Parts of a layer that end with a linear, as attention does: what the part returns is what its last linear makes.

Once such a linear's inputs have been kept, the part need not run again for as long as what is before the linear stays
as it is: the linear alone, with whatever weights it has by then, gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from streamprune.model.prunable import is_linear
from streamprune.model.shapes import linear_shape
from streamprune.model.skeleton import Skeleton
from streamprune.model.stages import Stage

_WIDEST = 2
"""Inputs wider than this many hidden states are not kept: they would take more disk than they save time."""


class End(NamedTuple):
    """A linear and the part of a layer that it seems to end, as module paths."""

    linear: str
    part: str
    width: int
    """Numbers for each token in the linear's input."""
    returned: int | None = None
    """Length of the tuple that the part returns, of which only the first is used; None if it returns a tensor."""

    def holds(self, linear: str) -> bool:
        """Whether a linear belongs to the part."""
        return linear.startswith(self.part + ".")


def ends_of(skeleton: Skeleton, stage: Stage) -> list[End]:
    """Those of a layer, judged by names; none where layers hand on more than hidden states, as a part that does not run
    would not do that."""
    found: dict[str, End] = {}
    if stage.kind != "layer" or skeleton.between.parcels is not None:
        return []
    for path, module in skeleton.layers[stage.index].named_modules():
        part = f"{stage.prefix}.{path}"
        inside = [f"{part}.{name}" for name, each in module.named_modules() if name and is_linear(each)]
        if path and len(inside) > 1 and inside[-1] in stage.linears and inside[-1] not in found:
            width = linear_shape(skeleton, inside[-1], stage)[1]
            if width <= _WIDEST * skeleton.hidden_size:
                found[inside[-1]] = End(inside[-1], part, width)
    return list(found.values())


def confirmed(skeleton: Skeleton, ends: Sequence[End], run: Callable[[Tensor], Tensor], states: Tensor) -> list[End]:
    """Those of `ends` that are what they seem: `run`, a layer, makes the same of `states` (batch, tokens, width)."""
    inputs: dict[str, list[Any]] = {end.linear: [] for end in ends}
    outputs: dict[str, list[Any]] = {end.part: [] for end in ends}

    def seeing(seen: list[Any]) -> Callable[..., None]:
        return lambda _, args: seen.append(args[0] if args else None)

    def seeing_output(seen: list[Any]) -> Callable[..., None]:
        return lambda _, __, made: seen.append(len(made) if isinstance(made, tuple) else None)

    with ExitStack() as hooks:
        for name, seen in inputs.items():
            hooks.enter_context(skeleton.model.get_submodule(name).register_forward_pre_hook(seeing(seen)))
        for name, seen in outputs.items():
            hooks.enter_context(skeleton.model.get_submodule(name).register_forward_hook(seeing_output(seen)))
        wanted = run(states)
    found = []
    for end in ends:
        seen, made = inputs[end.linear], outputs[end.part]
        if len(seen) == len(made) == 1 and isinstance(seen[0], Tensor) and seen[0].shape[:2] == states.shape[:2]:
            tried = end._replace(returned=made[0])
            with replayed(skeleton, {tried: seen[0]}):
                found += [tried] if torch.equal(run(states), wanted) else []
    return found


@contextmanager
def replayed(skeleton: Skeleton, inputs: Mapping[End, Tensor]) -> Iterator[None]:
    """Within it, parts of a layer return what their last linear makes of its kept input (batch, tokens, in)."""
    changed: list[nn.Module] = []
    try:
        for end, x in inputs.items():
            part = skeleton.model.get_submodule(end.part)
            part.forward = _shortcut(skeleton.model.get_submodule(end.linear), x, end.returned)
            changed.append(part)
        yield
    finally:
        for part in changed:
            del part.__dict__["forward"]


def _shortcut(linear: nn.Module, x: Tensor, returned: int | None) -> Callable[..., Any]:
    def forward(*_: Any, **__: Any) -> Any:
        made = linear(x)
        return made if returned is None else (made, *[None] * (returned - 1))

    return forward
