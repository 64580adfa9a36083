"""What is kept between two layers: a row of numbers for each token.

For most models that is the hidden state. Others hand on several streams of them, give each layer something that is
found by the tokens, or hand keys, values or indices of one layer to later ones. All that follows the hidden state in
the token's row, so that caches, files and batches hold one tensor (batch, tokens, width), whatever the model:

    streams of the hidden state | the token's id, if layers' arguments depend on it | what earlier layers handed on

What is handed on is kept for as long as a later layer uses it. It needs no rows of its own: a window's numbers are
spread over the rows of its tokens. Integers become digits, which every dtype holds exactly. (tracing.py finds out what
a model hands on.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from streamprune.errors import UnsupportedError
from streamprune.model.calls import Place

_DIGITS = 4
"""Digits of an integer, of which bf16 holds 0 to 255 exactly: those of 32 bits."""


@dataclass(frozen=True)
class Leaf:
    """A tensor that is handed on, of one window."""

    shape: tuple[int, ...]
    """Without the batch's dimension, which is dimension `batch` of the tensor."""
    batch: int
    dtype: torch.dtype

    @property
    def numbers(self) -> int:
        """How many numbers hold it."""
        return math.prod(self.shape) * (1 if self.dtype.is_floating_point else _DIGITS)


@dataclass(frozen=True)
class Parcel:
    """Something that an earlier layer handed on: tensors, and what else there is in a tree of them."""

    place: Place
    leaves: tuple[Leaf | Any, ...]
    """In the order of the tree; what is no Leaf is a constant."""
    tree: Any

    @property
    def tensors(self) -> list[Leaf]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Leaf)]


@dataclass(frozen=True)
class Given:
    """A layer's input: hidden states as the model shapes them, ids (batch, tokens) or None, what was handed on."""

    hidden: Tensor
    ids: Tensor | None = None
    values: Mapping[Place, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Between:
    """How the numbers between two layers of a model are arranged."""

    layers: int
    streams: tuple[int, ...]
    """Sizes of the model's hidden states beside batch and tokens; for most models one, the hidden size."""
    order: tuple[int, int] = (0, 1)
    """Which dimensions of the model's hidden states are batch and tokens."""
    known: bool = False
    """Whether it was found out what is handed on."""
    ids: bool = False
    """Whether layers are given something that depends on the tokens."""
    aside: int = 0
    """Numbers for each token among all layers' arguments that depend on the tokens: in memory, but not kept."""
    parcels: Callable[[int], Sequence[Sequence[Parcel]]] | None = None
    """Length of a window -> what is handed on, before each layer and after the last; None: nothing ever."""

    @property
    def plain(self) -> bool:
        """Whether hidden states (batch, tokens, hidden) are all there is."""
        return len(self.streams) == 1 and self.order == (0, 1) and not self.ids and self.parcels is None

    def before(self, layer: int, length: int) -> Sequence[Parcel]:
        """What earlier layers handed on that a layer, or a later one, uses."""
        return self.parcels(length)[layer] if self.parcels is not None else ()

    @property
    def hidden(self) -> int:
        """Numbers of all streams of a token."""
        return math.prod(self.streams)

    def width(self, layer: int, length: int) -> int:
        """Numbers for each token before a layer, in windows of `length` tokens."""
        handed = sum(leaf.numbers for parcel in self.before(layer, length) for leaf in parcel.tensors)
        return self.hidden + self._of_ids(layer) + -(-handed // length)

    def most(self, length: int) -> int:
        """The largest width of all, in windows of `length` tokens."""
        if self.parcels is None:
            return self.hidden + self._of_ids(0)
        return max(self.width(layer, length) for layer in range(self.layers + 1))

    def states(self, numbers: Tensor) -> Tensor:
        """The hidden states among the numbers between two layers: (batch, tokens, numbers of all streams)."""
        return numbers if self.plain else numbers[..., : self.hidden]

    def rows(self, hidden: Tensor) -> Tensor:
        """Hidden states as the model shapes them -> (batch, tokens, numbers of all streams)."""
        if self.plain:
            return hidden
        return hidden.movedim(self.order, (0, 1)).flatten(2)

    def shaped(self, rows: Tensor) -> Tensor:
        """What `rows` made back in the model's shape."""
        if self.plain:
            return rows
        return rows.reshape(*rows.shape[:2], *self.streams).movedim((0, 1), self.order).contiguous()

    def pack(self, layer: int, given: Given) -> Tensor:
        """The numbers (batch, tokens, width) before a layer."""
        if self.plain:
            return given.hidden
        parts = [self.rows(given.hidden)]
        batch, length = parts[0].shape[:2]
        if self._of_ids(layer):
            assert given.ids is not None
            parts.append(_digits(given.ids, parts[0].dtype))
        numbers = [n for parcel in self.before(layer, length) for n in _numbers(parcel, given.values, batch, parts[0])]
        if numbers:
            flat = torch.cat(numbers, dim=1)
            rest = -flat.shape[1] % length
            parts.append(torch.nn.functional.pad(flat, (0, rest)).view(batch, length, -1))
        return torch.cat(parts, dim=2)

    def unpack(self, layer: int, numbers: Tensor) -> Given:
        """The input of a layer, of what `pack` made."""
        if self.plain:
            return Given(numbers)
        at = self.hidden + self._of_ids(layer)
        ids = _integers(numbers[..., self.hidden : at]) if at > self.hidden else None
        flat, values, begin = numbers[..., at:].flatten(1), dict[Place, Any](), 0
        for parcel in self.before(layer, numbers.shape[1]):
            found = []
            for leaf in parcel.leaves:
                if isinstance(leaf, Leaf):
                    found.append(_tensor(leaf, flat[:, begin : begin + leaf.numbers]))
                    begin += leaf.numbers
                else:
                    found.append(leaf)
            values[parcel.place] = pytree.tree_unflatten(found, parcel.tree)
        return Given(self.shaped(self.states(numbers)), ids, values)

    def _of_ids(self, layer: int) -> int:
        """Numbers of a token's id: none after the last layer."""
        return _DIGITS if self.ids and layer < self.layers else 0


def _numbers(parcel: Parcel, values: Mapping[Place, Any], batch: int, like: Tensor) -> list[Tensor]:
    """The tensors of a parcel as (batch, numbers) in the dtype of `like`. Raises UnsupportedError for another shape."""
    leaves, _ = pytree.tree_flatten(values.get(parcel.place))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    made = []
    for leaf, tensor in zip(parcel.tensors, tensors, strict=False):
        if tensor.dim() == len(leaf.shape) + 1:
            moved = tensor.movedim(leaf.batch, 0)
            if moved.shape == (batch, *leaf.shape):
                flat = moved.reshape(batch, -1)
                made.append(
                    flat.to(like.dtype) if leaf.dtype.is_floating_point else _digits(flat, like.dtype).flatten(1)
                )
    if len(made) != len(parcel.tensors) or len(tensors) != len(made):
        raise UnsupportedError(
            f"a layer hands on {[tuple(t.shape) for t in tensors]} where {[leaf.shape for leaf in parcel.tensors]} was "
            "expected for each window; its layers cannot be streamed one by one"
        )
    return made


def _tensor(leaf: Leaf, numbers: Tensor) -> Tensor:
    """The tensor of (batch, numbers)."""
    shape = (len(numbers), *leaf.shape)
    if leaf.dtype.is_floating_point:
        return numbers.reshape(shape).movedim(0, leaf.batch).to(leaf.dtype)
    return _integers(numbers.reshape(*shape, _DIGITS)).movedim(0, leaf.batch).to(leaf.dtype)


def _digits(integers: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers of 32 bits (…) -> (…, 4), each 0 to 255."""
    shifts = torch.arange(0, 8 * _DIGITS, 8, device=integers.device)
    return ((integers.long().unsqueeze(-1) >> shifts) & 255).to(dtype)


def _integers(digits: Tensor) -> Tensor:
    """What `_digits` was given, int64."""
    places = 256 ** torch.arange(_DIGITS, device=digits.device)
    found = (digits.long() * places).sum(-1)
    return torch.where(found >= 1 << 31, found - (1 << 32), found)
