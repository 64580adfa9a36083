"""The linears of a layer that write to the residual stream.

They are recognised by their outputs, which add up to what the layer adds to the stream. With norms after the sublayers,
or scaled residuals, no set of linears does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from streamprune.model.skeleton import Skeleton

_MOST_WRITERS = 8
"""Most linears that are considered as writers to the residual stream, as all their subsets are tried."""

_UNEXPLAINED = 0.1
"""Relative difference allowed between what a layer adds to a token and the sum of writers' outputs: rounding."""


def writers_among(
    skeleton: Skeleton, names: Collection[str], run: Callable[[Tensor], Tensor], states: Tensor
) -> list[str]:
    """Those of the linears `names` that write to the residual stream, judged by `run`, the layer, on `states`."""
    with outputs_of(skeleton, names) as made:
        after = run(states)
    after, states = (skeleton.between.states(each) for each in (after, states))
    added = after.float() - states.to(after.device).float()
    return writers_of(added, {name: y for name, y in made.items() if y.shape == added.shape})


@contextmanager
def outputs_of(skeleton: Skeleton, names: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """While open, collects the latest output of each of the linears `names`, (…, out) float32."""
    found: dict[str, Tensor] = {}

    def seeing(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], made: Tensor) -> None:
            found[name] = made.float()

        return hook

    hooks = [skeleton.model.get_submodule(name).register_forward_hook(seeing(name)) for name in names]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def writers_of(added: Tensor, outputs: Mapping[str, Tensor]) -> list[str]:
    """The linears whose `outputs` (batch, seqlen, hidden) add up to what a layer `added` to its states (same shape).

    Of all sets, the one with the smallest median relative error over tokens; empty if that exceeds _UNEXPLAINED.
    """
    names, size = list(outputs)[:_MOST_WRITERS], torch.linalg.vector_norm(added, dim=-1).clamp_min(1e-30)
    best, least = list[str](), _UNEXPLAINED
    for number in range(1, len(names) + 1):
        for some in combinations(names, number):
            rest = added - sum(outputs[name] for name in some)
            part = float((torch.linalg.vector_norm(rest, dim=-1) / size).median())
            if part < least:
                best, least = list(some), part
    return best
