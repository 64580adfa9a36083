"""Finds out what a model keeps between its layers, from trials with a few tokens: see between.py.

Two trials run what comes before the layers, with weights that cost nothing. They show the shape of hidden states, and
whether layers are given something that depends on the tokens. If layers return more than hidden states, or are given a
dictionary that they could put something into, all of them are run on the meta device, where nothing is computed. That
shows what each hands on, and which layers use it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as fx_config
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from streamprune.disk.checkpoint import Checkpoint
from streamprune.errors import UnsupportedError
from streamprune.model.between import Leaf, Parcel
from streamprune.model.binding import bound, replaced_tensors
from streamprune.model.blank_layer import Blank
from streamprune.model.calls import Place, mapped, same
from streamprune.model.loader import WeightLoader
from streamprune.model.passes import out_of_memory_named
from streamprune.model.recorders import Recorded, kind_of, record
from streamprune.model.skeleton import Skeleton
from streamprune.model.stages import Stage

_TOKENS = 8
"""In a trial's window."""

Record = Callable[[Tensor], Recorded]


def traced(checkpoint: Checkpoint, skeleton: Skeleton, dtype: torch.dtype) -> Skeleton:
    """A skeleton that knows what its model keeps between layers. Raises UnsupportedError if that cannot be found."""
    known: list[Recorded] = []

    def recorded(ids: Tensor) -> Recorded:
        device = next((b.device for b in skeleton.model.buffers()), torch.device("cpu"))
        loader = WeightLoader(Blank(checkpoint, dtype, device), device, copies=False)
        with out_of_memory_named(device), _Sketch(), bound(skeleton, None, loader, dtype, head=False):
            found = record(skeleton, ids.to(device), known[0] if known else None, compare=True)
        known.append(replace(found, calls=[]))
        return found

    ids = [_ids(skeleton, 2, _TOKENS, step) for step in (1, 2)]
    first, second = recorded(ids[0]), recorded(ids[1])
    depends = not all(same(a, b) for a, b in zip(first.calls, second.calls, strict=True))
    streams, order = _arranged(skeleton, first, recorded)
    aside = _looked_up(first, second) // ids[0].numel()
    between = replace(skeleton.between, known=True, streams=streams, order=order, ids=depends, aside=aside)
    between = replace(between, parcels=_parcels(skeleton, first, recorded))
    return replace(skeleton, between=between, streams=between.hidden // skeleton.hidden_size)


def _looked_up(first: Recorded, second: Recorded) -> int:
    """How many numbers among the layers' arguments depend on the tokens."""
    found: dict[int, int] = {}
    for one, other in zip(first.calls, second.calls, strict=True):
        for a, b in zip(*(pytree.tree_leaves((c.args, c.kwargs)) for c in (one, other)), strict=True):
            if isinstance(a, Tensor) and not same(a, b):
                storage = a.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes() // a.itemsize
    return sum(found.values())


def _ids(skeleton: Skeleton, batch: int, length: int, step: int = 1) -> Tensor:
    """Ids (batch, length), different for each `step`, from the middle of the vocabulary: others may be special."""
    third = max(1, skeleton.vocab_size // 3)
    return (torch.arange(batch * length).view(batch, length) * step) % third + third


def _arranged(skeleton: Skeleton, first: Recorded, recorded: Record) -> tuple[tuple[int, ...], tuple[int, int]]:
    """(sizes of hidden states beside batch and tokens, the dimensions of these two)."""
    shape = first.states.shape
    if len(shape) == 3 and shape[:2] == (2, _TOKENS):
        return tuple(shape[2:]), (0, 1)
    other = recorded(_ids(skeleton, 3, _TOKENS + 1)).states.shape
    batch, tokens = (
        [at for at, two in enumerate(zip(shape, other, strict=True)) if two == sizes]
        for sizes in ((2, 3), (_TOKENS, _TOKENS + 1))
    )
    if len(batch) != 1 or len(tokens) != 1:
        raise UnsupportedError(
            f"{kind_of(skeleton)} gives its layers states {list(shape)}, of which it cannot be said what belongs to "
            "which token"
        )
    order = (batch[0], tokens[0])
    return tuple(n for at, n in enumerate(shape) if at not in order), order


def _parcels(
    skeleton: Skeleton, first: Recorded, recorded: Record
) -> Callable[[int], Sequence[Sequence[Parcel]]] | None:
    """Between.parcels of a model; None where layers return nothing but hidden states, nor have a place to put it."""
    returned = any(call.outputs for call in first.calls)
    if not returned and not first.calls[0].shared:
        return None

    def follow(batch: int, length: int) -> list[Handed]:
        return _follow(skeleton, recorded(_ids(skeleton, batch, length)))

    def at(length: int) -> list[list[Parcel]]:
        alone = follow(1, max(2, length))  # models treat a single token otherwise, and no job has such windows
        return [_of_one(*both) for both in zip(found, alone, strict=True)]

    try:
        found = [_put_together(skeleton, *both) for both in zip(follow(2, _TOKENS), follow(3, _TOKENS), strict=True)]
    except (RuntimeError, NotImplementedError, TypeError, ValueError, KeyError, AttributeError, IndexError) as e:
        if not returned and all(first.calls[0].kwargs[name] for name in first.calls[0].shared):
            return None  # dictionaries that are full before the first layer are there to be read
        raise UnsupportedError(
            f"{kind_of(skeleton)} hands more than hidden states from layer to layer, and what cannot be found out "
            f"({' '.join(str(e).split())[:160]}); its layers cannot be streamed one by one"
        ) from e
    if any(found):
        return functools.cache(at)
    return (lambda length: [[]] * len(found)) if returned else None


Handed = dict[Place, Any]
"""Place of what is handed on -> tree of tensors."""


@torch.inference_mode()
def _follow(skeleton: Skeleton, found: Recorded) -> list[Handed]:
    """Runs all layers on the meta device: what is handed on before each, as far as a later layer uses it."""
    hidden = torch.empty_like(found.states, device="meta")
    calls = [mapped(call, lambda t: torch.empty_like(t, device="meta")) for call in found.calls]
    values, steps = Handed(), list[_Step]()
    for stage, call in zip(skeleton.layer_stages, calls, strict=True):
        layer = skeleton.layers[stage.index]
        reachable = {place: v for place, v in values.items() if place[0] == "shared"}
        reachable |= {p: values[p] for p in [("output", o.layer, o.number) for o in call.outputs] if p in values}
        uses = _Uses()
        with _on_meta(skeleton, stage, layer), uses:
            after, made = call.run(layer, hidden, reachable)
        if after.shape != hidden.shape:
            raise UnsupportedError(
                f"{kind_of(skeleton)}: {stage.prefix} turns states {list(hidden.shape)} into {list(after.shape)}"
            )
        new = {p: v for p, v in made.items() if v is not None and not (p in values and values[p] is v)}
        steps.append(_Step(dict(values), reachable, new, uses.seen))
        values = values | new
        hidden = after
    kept, found_before = set[Place](), list[Handed]()
    for step in reversed(steps):
        kept = step.needs(kept)
        found_before.append({place: step.before[place] for place in step.before if place in kept})
    return [*reversed(found_before), {}]


@dataclass(frozen=True)
class _Step:
    """A layer in a trial: what had been handed on before it, what of it the layer can see, what is new after it."""

    before: Handed
    reachable: Handed
    new: Handed
    seen: dict[int, Tensor]
    """The tensors that the layer used, by id."""

    def needs(self, later: set[Place]) -> set[Place]:
        """What must be kept before the layer, if later ones need `later`."""
        passed = {id(leaf) for place in later if place in self.new for leaf in pytree.tree_leaves(self.new[place])}
        used = {
            place
            for place, value in self.reachable.items()
            if any(id(leaf) in self.seen or id(leaf) in passed for leaf in _tensors(value))
        }
        return {place for place in later if place not in self.new} | used


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _put_together(skeleton: Skeleton, two: Handed, three: Handed) -> list[Parcel]:
    """What is handed on, of trials with batches of two and of three windows."""
    return [_parcel(skeleton, place, two[place], three.get(place)) for place in two]


def _parcel(skeleton: Skeleton, place: Place, two: Any, three: Any) -> Parcel:
    leaves, tree = pytree.tree_flatten(two)
    others = pytree.tree_leaves(three)
    made: list[Leaf | Any] = []
    for a, b in zip(leaves, others, strict=True):
        if not isinstance(a, Tensor):
            made.append(a)
            continue
        batch = [at for at, sizes in enumerate(zip(a.shape, b.shape, strict=True)) if sizes == (2, 3)]
        if len(batch) != 1 or a.dtype.is_complex:
            raise UnsupportedError(
                f"{kind_of(skeleton)} hands {a.dtype} {list(a.shape)} from layer to layer, of which it cannot be said "
                "what belongs to which window"
            )
        made.append(Leaf(tuple(n for at, n in enumerate(a.shape) if at != batch[0]), batch[0], a.dtype))
    return Parcel(place, tuple(made), tree)


def _of_one(parcels: list[Parcel], one: Handed) -> list[Parcel]:
    """The same parcels with the shapes of a trial with a single window."""
    made = []
    for parcel in parcels:
        leaves = list[Leaf | Any]()
        for known, tensor in zip(parcel.leaves, pytree.tree_leaves(one[parcel.place]), strict=True):
            if isinstance(known, Leaf):
                shape = tuple(n for at, n in enumerate(tensor.shape) if at != known.batch)
                leaves.append(replace(known, shape=shape))
            else:
                leaves.append(known)
        made.append(replace(parcel, leaves=tuple(leaves)))
    return made


@contextmanager
def _on_meta(skeleton: Skeleton, stage: Stage, layer: nn.Module) -> Iterator[None]:
    """Within it, a layer computes on the meta device, and its experts nothing at all."""
    buffers = {name: torch.empty_like(b, device="meta") for name, b in layer.named_buffers()}
    idle = [skeleton.model.get_submodule(experts.path) for experts in stage.experts]
    for module in idle:
        module.__dict__["forward"] = _nothing
    try:
        with replaced_tensors(layer, buffers), _everything_kept():
            yield
    finally:
        for module in idle:
            del module.__dict__["forward"]


@contextmanager
def _everything_kept() -> Iterator[None]:
    """Within it, indexing with a mask on the meta device keeps everything, as values are not known there."""
    before = fx_config.meta_nonzero_assume_all_nonzero
    fx_config.meta_nonzero_assume_all_nonzero = True
    try:
        yield
    finally:
        fx_config.meta_nonzero_assume_all_nonzero = before


def _nothing(hidden: Tensor, *rest: Any, **more: Any) -> Tensor:
    return torch.zeros_like(hidden)


class _Uses(TorchFunctionMode):
    """Remembers all tensors that an operation is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in pytree.tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self.seen[id(value)] = value
        return func(*args, **(kwargs or {}))


class _Sketch(TorchFunctionMode):
    """Within it, embeddings and products with weights give something that depends on their input, at once."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.embedding:
            ids, weight = args[0], args[1] if len(args) > 1 else kwargs["weight"]
            spread = torch.arange(1, weight.shape[1] + 1, device=ids.device)
            return torch.sin((ids.unsqueeze(-1) + 1.0) * spread).to(weight.dtype)
        if func is F.linear:
            x, weight = args[0], args[1] if len(args) > 1 else kwargs["weight"]
            return x[..., torch.arange(weight.shape[0], device=x.device) % x.shape[-1]]
        return func(*args, **(kwargs or {}))
