"""Autograd's backward pass in Python, for the tensors of stand_in.py: torch's own engine asks for a real device."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction


def backward(root: Tensor) -> None:
    """As `root.backward()` of a scalar."""
    for node, (grad,) in _reached(root, torch.ones_like(root), ()):
        leaf = node.variable
        leaf.grad = grad if leaf.grad is None else leaf.grad + grad


def grad(root: Tensor, inputs: Sequence[Tensor], given: Tensor) -> tuple[Tensor, ...]:
    """As `torch.autograd.grad`, of inputs that other tensors have led to."""
    found = dict(_reached(root, given, {x.grad_fn for x in inputs}))
    return tuple(found[x.grad_fn][x.output_nr] for x in inputs)


def _reached(root: Tensor, given: Tensor, ends: Collection[Any]) -> Iterator[tuple[Any, list[Tensor]]]:
    """The nodes that gradients do not go beyond, `ends` and leaves, with those that reach them, summed."""
    if root.grad_fn is None:
        raise RuntimeError("element 0 of tensors does not require grad and does not have a grad_fn")
    known: dict[Any, list[Tensor | None]] = {root.grad_fn: [given]}
    with torch.no_grad():
        for node in _in_order(root.grad_fn, ends):
            grads = known.pop(node, [])
            if node in ends or hasattr(node, "variable"):
                if any(each is not None for each in grads):
                    yield node, grads
                continue
            made = (node.apply if isinstance(node, BackwardCFunction) else node)(*grads)
            parts = made if isinstance(made, tuple) else (made,)
            for (after, place), part in zip(node.next_functions, parts, strict=False):
                if after is not None and part is not None:
                    wanted = after._input_metadata[place]
                    part = part.sum_to_size(wanted.shape).to(wanted.dtype)
                    sums = known.setdefault(after, [])
                    sums += [None] * (place + 1 - len(sums))
                    before = sums[place]
                    sums[place] = part if before is None else before + part


def _in_order(root: Any, ends: Collection[Any]) -> Iterator[Any]:
    """Every node of a graph after all nodes that give to it; none beyond `ends`."""

    def following(node: Any) -> Iterator[Any]:
        return (after for after, _ in (() if node in ends else node.next_functions) if after is not None)

    waiting: dict[Any, int] = {}
    found, look = {root}, [root]
    while look:
        for after in following(look.pop()):
            waiting[after] = waiting.get(after, 0) + 1
            if after not in found:
                found.add(after)
                look.append(after)
    ready = [root]
    while ready:
        node = ready.pop()
        yield node
        for after in following(node):
            waiting[after] -= 1
            if not waiting[after]:
                ready.append(after)
