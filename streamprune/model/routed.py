"""Experts at work: one at a time, for as many batches as there is room for.

A layer's forward calls its experts in the middle, and a batch may be routed to all of them: batch after batch, all of
their weights would be read as often as there are batches. So batches go through a layer in groups. A first pass over a
group leaves the layer where its experts are called, and collects what they are given. Then each expert computes for
all that the group routes to it. A second pass goes through the layer as a whole; what the experts put out is there.

What experts are given may be kept in files (RoutedInputs), for a refit to look at it again, expert by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from streamprune.disk.header import TensorRef
from streamprune.disk.scratch import ScratchMatrix
from streamprune.errors import UnsupportedError
from streamprune.model.experts import DOWN, UP, Experts
from streamprune.model.finite import refuse_nonfinite
from streamprune.process.memory import give_back_free_memory

InputHook = Callable[[str, Tensor], None]
"""(linear, its inputs (tokens, in))."""

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""hidden (tokens, hidden); chosen (tokens, k), numbers of experts; shares (tokens, k) -> (tokens, hidden)."""

_GATHERED = 256
"""Rows that are read from a file at once: where they lie far apart, each maps 64 KiB."""

_SCANNED = 1 << 16
"""Tokens that are looked through at once for those of an expert."""

_LEAST_ROWS = 64
"""Rows of a product in bf16 or float16 on the CPU are a multiple of so many."""


class Enough(Exception):  # noqa: N818 - not an error
    """Raised by what watches a layer: it has seen what it came for, the rest of the layer need not run."""


class ReachedExperts(Exception):  # noqa: N818 - not an error
    """A layer's forward has come to its experts, which wait for the other batches of a group."""


class Weights(Protocol):
    """The weights of a module's experts; what was used stays at hand until it is released."""

    device: torch.device
    """Where they are computed with."""

    def stored(self, name: str) -> tuple[TensorRef, Tensor]:
        """A linear's weight as it is stored."""

    def product(self, name: str, x: Tensor) -> Tensor:
        """x (n, in) · Wᵀ: (n, out), in x's dtype."""

    def expect(self, names: Collection[str]) -> None:
        """Begins to bring weights near."""

    def release(self, names: Collection[str]) -> None:
        """Lets go of weights."""


@dataclass
class _Mixture:
    """A module of experts whose weights are bound, and a group's way through it."""

    module: Any
    experts: Experts
    weights: Weights
    given: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """What it was called with, batch after batch."""
    outputs: Sequence[Tensor] | None = None
    """What it returns for each of these."""
    replayed: int = 0

    def product(self, name: str, x: Tensor) -> Tensor:
        """x (n, in) · Wᵀ: (n, out), in x's dtype."""
        if x.device.type != "cpu" or x.dtype.itemsize > 2:
            return self.weights.product(name, x)
        # oneDNN keeps 0.6 MiB for each number of rows that it has seen, and experts see a different one each time
        return self.weights.product(name, F.pad(x, (0, 0, 0, padded_rows(len(x)) - len(x))))[: len(x)]

    def middle(self, expert: int, x: Tensor) -> Tensor:
        """The input of an expert's last linear, for x (n, hidden)."""
        both = torch.cat([self.product(name, x) for name in self.experts.up[expert]], dim=-1)
        bias = next((b for leaf in UP if (b := self.module._parameters.get(f"{leaf}_bias")) is not None), None)
        if bias is not None:
            both = both + bias[expert]
        gated = getattr(self.module, "has_gate", True)
        found: Tensor = self.module._apply_gate(both) if gated else self.module.act_fn(both)
        return found

    def output(self, expert: int, middle: Tensor) -> Tensor:
        """(n, hidden) of (n, intermediate)."""
        result = self.product(self.experts.down[expert], middle)
        bias = self.module._parameters.get(f"{DOWN}_bias")
        return result if bias is None else result + bias[expert]

    def compute(
        self, hidden: Tensor, chosen: Tensor, shares: Tensor, see: InputHook | None, weighted: bool, rows: int,
        check: Callable[[str], None] | None = None,
    ) -> Tensor:  # fmt: skip
        """As Forward, expert after expert, no more than `rows` tokens at once; `check(linear)` comes before its use."""
        out = torch.zeros_like(hidden)
        numbers = [e for e in torch.unique(chosen).tolist() if 0 <= e < len(self.experts.down)]  # others are nobody's
        self.weights.expect(self.experts.of(numbers[:1]))
        for e, following in zip(numbers, [*numbers[1:], None], strict=True):
            self.weights.expect(self.experts.of([] if following is None else [following]))
            if check is not None:
                for name in self.experts.of([e]):
                    check(name)
            tokens, places = torch.where(chosen == e)
            for token, place in zip(torch.split(tokens, rows), torch.split(places, rows), strict=True):
                x, share = hidden[token], shares[token, place, None]
                _show(see, self.experts.up[e], x, share, weighted)
                middle = self.middle(e, x)
                _show(see, (self.experts.down[e],), middle, share, weighted)
                out.index_add_(0, token, (self.output(e, middle) * share).to(out.dtype))
            self.weights.release(self.experts.of([e]))
        return out


def padded_rows(rows: int) -> int:
    """How many rows are multiplied instead of `rows`: one of few numbers, less than 64 or a quarter more."""
    step = max(_LEAST_ROWS, 1 << max(0, (rows - 1).bit_length() - 3))
    return -(-rows // step) * step


def _show(see: InputHook | None, names: Sequence[str], x: Tensor, share: Tensor, weighted: bool) -> None:
    if see is not None:
        seen = x * share if weighted else x
        for name in names:
            see(name, seen)


def in_place(module: Any, experts: Experts, weights: Weights, see: InputHook | None, weighted: bool) -> Forward:
    """What takes the place of an experts module's forward where each batch is computed at once.

    `see` sees the linears' inputs, times the routing's weights if `weighted`.
    """
    mixture = _Mixture(module, experts, weights)
    return lambda hidden, chosen, shares: mixture.compute(hidden, chosen, shares, see, weighted, max(1, len(hidden)))


class Routed:
    """What is routed to the experts of one layer. `stored` has the layer's tensors, by name.

    For each group of batches `begin`, then as often as the layer has modules of experts a pass over it and `compute`,
    then the pass that goes all the way. With `kept`, `again` is possible afterwards.
    """

    def __init__(self, stored: Mapping[str, TensorRef], weighted: bool, kept: RoutedInputs | None = None) -> None:
        self._stored, self._weighted, self._kept = stored, weighted, kept
        self._mixtures: dict[str, _Mixture] = {}
        self._checked: set[str] = set()
        self._calls = 0
        """Of the layer, in this pass over the group."""
        self.collecting = False
        """Whether the passes end at the experts."""

    def forward_of(self, module: Any, experts: Experts, weights: Weights) -> Forward:
        """What takes the place of an experts module's forward, for as long as `weights` are bound."""
        mixture = self._mixtures[experts.path] = _Mixture(module, experts, weights)

        def forward(hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
            if mixture.outputs is None:
                mixture.given.append((hidden, chosen, shares))
                raise ReachedExperts
            if mixture.replayed == self._calls:
                raise UnsupportedError(f"{experts.path} is called more than once by its layer; only one call can wait")
            mixture.replayed += 1
            return mixture.outputs[mixture.replayed - 1]

        return forward

    def call(self) -> None:
        """The layer is about to be called."""
        self._calls += 1

    def begin(self) -> None:
        """The next group of batches comes."""
        self.collecting, self._calls = True, 0
        for mixture in self._mixtures.values():
            mixture.outputs, mixture.given, mixture.replayed = None, [], 0

    def compute(self, see: InputHook | None) -> None:
        """The experts that the last pass has come to compute, for all of the group; `see` sees their linears' inputs.

        Raises CheckpointError for weights that are NaN or infinite.
        """
        self._calls = 0
        for mixture in self._mixtures.values():
            mixture.replayed = 0
            if not mixture.given:
                continue
            lengths = [len(hidden) for hidden, _, _ in mixture.given]
            hidden, chosen, shares = (torch.cat(parts) for parts in zip(*mixture.given, strict=True))
            mixture.given = []
            give_back_free_memory()  # for the outputs; pieces of this size stay with the process otherwise
            if self._kept is not None:
                self._kept.add(mixture.experts.path, hidden, chosen, shares)
            check = lambda name, weights=mixture.weights: self._check(name, weights)  # noqa: E731
            out = mixture.compute(hidden, chosen, shares, see, self._weighted, max(lengths), check)
            mixture.outputs = torch.split(out, lengths)

    def complete(self) -> None:
        """The next pass goes all the way."""
        self.collecting = False

    def again(self, names: Collection[str], see: InputHook, rows: int) -> None:
        """`see` sees the inputs of these linears, of experts whose module is bound, once more; `rows` at a time."""
        assert self._kept is not None
        for mixture in self._mixtures.values():
            for e, (up, down) in enumerate(zip(mixture.experts.up, mixture.experts.down, strict=True)):
                wanted = [name for name in up if name in names]
                if not wanted and down not in names:
                    continue
                device = mixture.weights.device
                for x, share in self._kept.inputs(mixture.experts.path, e, rows):
                    x, share = x.to(device), share.to(device)
                    _show(see, wanted, x, share, self._weighted)
                    if down in names:
                        _show(see, (down,), mixture.middle(e, x), share, self._weighted)
                mixture.weights.release(mixture.experts.of([e]))

    def _check(self, name: str, weights: Weights) -> None:
        if name not in self._checked:
            ref, tensor = weights.stored(name)
            refuse_nonfinite(ref, 0, tensor, self._stored.get(ref.name))
            self._checked.add(name)


class RoutedInputs:
    """What the experts of a layer are given, for `tokens` in all, in unnamed files in `folder`.

    Raises ResourceError when the disk has no room for it.
    """

    def __init__(self, folder: Path, tokens: int) -> None:
        self._folder, self._tokens = folder, tokens
        self._files: dict[str, tuple[ScratchMatrix, ScratchMatrix, ScratchMatrix]] = {}
        self._used: dict[str, int] = {}

    def add(self, path: str, *parts: Tensor) -> None:
        """Adds hidden (n, hidden), chosen (n, k), shares (n, k) of the module of experts called `path`."""
        hidden, chosen, shares = parts
        parts = (hidden, chosen.to(torch.int32), shares)
        if path not in self._files:
            first, second, third = (ScratchMatrix(self._folder, self._tokens, p.shape[1], p.dtype) for p in parts)
            self._files[path] = (first, second, third)
        begin = self._used.get(path, 0)
        end = self._used[path] = begin + len(hidden)
        if end > self._tokens:
            raise UnsupportedError(f"{path} is given more rows than there are tokens; its experts cannot be refitted")
        for file, part in zip(self._files[path], parts, strict=True):
            file.tensor[begin:end] = part.cpu()
            file.forget(begin, end)

    def inputs(self, path: str, expert: int, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """hidden (≤ rows, hidden) and share (≤ rows, 1) of what is routed to an expert, in the tokens' order."""
        hidden, chosen, shares = self._files[path]
        used = self._used[path]
        found = []
        for begin in range(0, used, _SCANNED):
            token, place = torch.where(chosen.tensor[begin : min(begin + _SCANNED, used)] == expert)
            found.append((token + begin, shares.tensor[token + begin, place, None]))
        for file in (chosen, shares):
            file.forget(0, self._tokens)
        tokens, share = (torch.cat(parts) for parts in zip(*found, strict=True))
        for some, its in zip(torch.split(tokens, rows), torch.split(share, rows), strict=True):
            x = hidden.tensor.new_empty(len(some), hidden.tensor.shape[1])
            for begin in range(0, len(some), _GATHERED):
                x[begin : begin + _GATHERED] = hidden.tensor[some[begin : begin + _GATHERED]]
                hidden.forget(0, self._tokens)
            yield x, its
