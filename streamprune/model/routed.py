"""Computes experts one at a time, each for as many batches as memory allows.

A batch may be routed to all of a layer's experts, so batch by batch their weights would be read once per batch.
Instead, batches go through a layer in groups. A first pass over a group stops where the layer calls its experts, and
collects their inputs. Then each expert computes for all tokens of the group that are routed to it. A second pass goes
through the whole layer, with the experts' outputs at hand.

Experts' inputs may be recorded in files (RoutedInputs), so that a refit can gather Grams from them, expert by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from streamprune.disk.header import TensorRef
from streamprune.errors import UnsupportedError
from streamprune.model.expert_forms import Form, Forward
from streamprune.model.experts import Experts
from streamprune.model.finite import refuse_nonfinite
from streamprune.model.routed_inputs import RoutedInputs
from streamprune.process.memory import give_back_free_memory
from streamprune.process.ranks import Ranks

InputHook = Callable[[str, Tensor], None]
"""Called with a linear and its input (tokens, in)."""

_LEAST_ROWS = 64
"""On the CPU, rows of a bf16 or float16 product are padded to a multiple of this."""


class Enough(Exception):  # noqa: N818 - not an error
    """Raised by an InputHook that needs no further inputs: the rest of the layer is skipped."""


class ReachedExperts(Exception):  # noqa: N818 - not an error
    """Ends a layer's forward at its experts, which wait for the other batches of the group."""


class Weights(Protocol):
    """The weights of a module's experts; they stay in memory from their first use until they are released."""

    device: torch.device
    """Where they compute."""

    def stored(self, name: str) -> tuple[TensorRef, Tensor]:
        """A linear's weight in its stored dtype and shape."""

    def product(self, name: str, x: Tensor) -> Tensor:
        """x (n, in) · Wᵀ: (n, out), in x's dtype."""

    def expect(self, names: Collection[str]) -> None:
        """Starts prefetching weights."""

    def release(self, names: Collection[str]) -> None:
        """Frees weights."""


class Forwards(Protocol):
    """Makes the forwards of modules of experts."""

    def forward_of(self, form: Form, experts: Experts, weights: Weights) -> Forward:
        """A forward of experts that computes with `weights` for as long as they are bound."""


@dataclass
class Mixture:
    """A module of experts with bound weights, and its inputs and outputs for the current group of batches."""

    form: Form
    experts: Experts
    weights: Weights
    given: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """Its arguments, a call for each batch."""
    outputs: Sequence[Tensor] | None = None
    """What it returns for each of these calls."""
    replayed: int = 0
    """Outputs that the second pass has returned."""

    def product(self, name: str, x: Tensor) -> Tensor:
        """x (n, in) · Wᵀ: (n, out), in x's dtype."""
        if x.device.type != "cpu" or x.dtype.itemsize > 2:
            return self.weights.product(name, x)
        # oneDNN caches 0.6 MiB for each distinct number of rows, and experts get a different one each time
        return self.weights.product(name, F.pad(x, (0, 0, 0, padded_rows(len(x)) - len(x))))[: len(x)]

    def intermediate(self, expert: int, x: Tensor) -> Tensor:
        """(n, intermediate), the input of an expert's down projection, of x (n, hidden)."""
        up = torch.cat([self.product(name, x) for name in self.experts.up[expert]], dim=-1)
        bias = self.form.bias(self.form.up[0])
        return self.form.activate(up if bias is None else up + bias[expert])

    def output(self, expert: int, intermediate: Tensor) -> Tensor:
        """(n, hidden), an expert's output, of (n, intermediate)."""
        result = self.product(self.experts.down[expert], intermediate)
        bias = self.form.bias(self.form.down)
        return result if bias is None else result + bias[expert]

    def given_to(self, x: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """What an expert is given of states x (n, hidden), and the weights of its outputs (n, 1)."""
        return (x * share, torch.ones_like(share)) if self.form.scales_inputs else (x, share)

    def in_turn(self, chosen: Tensor) -> Iterator[int]:
        """The experts among those `chosen` that have weights; each one's are prefetched before and freed after it."""
        numbers = [e for e in torch.unique(chosen).tolist() if 0 <= e < len(self.experts.down)]  # others: no expert
        self.weights.expect(self.experts.of(numbers[:1]))
        for e, following in zip(numbers, [*numbers[1:], None], strict=True):
            self.weights.expect(self.experts.of([] if following is None else [following]))
            yield e
            self.weights.release(self.experts.of([e]))

    def compute(
        self, hidden: Tensor, chosen: Tensor, shares: Tensor, watch: InputHook | None, weighted: bool, rows: int,
        check: Callable[[str], None] | None = None,
    ) -> Tensor:  # fmt: skip
        """As Forward, expert after expert, at most `rows` tokens at once. Calls `check(linear)` before its use."""
        out = torch.zeros_like(hidden)
        for e in self.in_turn(chosen):
            if check is not None:
                for name in self.experts.of([e]):
                    check(name)
            tokens, places = torch.where(chosen == e)
            for token, place in zip(torch.split(tokens, rows), torch.split(places, rows), strict=True):
                x, share = self.given_to(hidden[token], shares[token, place, None])
                _show(watch, self.experts.up[e], x, share, weighted)
                intermediate = self.intermediate(e, x)
                _show(watch, (self.experts.down[e],), intermediate, share, weighted)
                out.index_add_(0, token, (self.output(e, intermediate) * share).to(out.dtype))
        if self.form.identities:
            beyond = (shares * (chosen >= len(self.experts.down))).sum(1, keepdim=True)
            out += (hidden * beyond).to(out.dtype)
        return out


def padded_rows(rows: int) -> int:
    """`rows` rounded up to one of few sizes, by less than 64 rows or by at most a quarter."""
    step = max(_LEAST_ROWS, 1 << max(0, (rows - 1).bit_length() - 3))
    return -(-rows // step) * step


def _show(watch: InputHook | None, names: Sequence[str], x: Tensor, share: Tensor, weighted: bool) -> None:
    if watch is not None:
        seen = x * share if weighted else x
        for name in names:
            watch(name, seen)


def immediate_forward(
    form: Form, experts: Experts, weights: Weights, watch: InputHook | None, weighted: bool
) -> Forward:
    """A forward of experts that computes each batch at once.

    `watch` sees the linears' inputs, multiplied by the routing weights if `weighted`.
    """
    mixture = Mixture(form, experts, weights)
    return lambda hidden, chosen, shares: mixture.compute(hidden, chosen, shares, watch, weighted, max(1, len(hidden)))


class Routed:
    """The tokens routed to one layer's experts, for a group of batches. `stored` has the layer's tensors by name.

    For each group: `begin`; for each module of experts a pass over the group, then `compute`; `complete`; a pass
    through the whole layer. With `kept`, inputs are recorded, and `again` is possible afterwards.
    """

    def __init__(self, stored: Mapping[str, TensorRef], weighted: bool, kept: RoutedInputs | None = None) -> None:
        self._stored, self._weighted, self._kept = stored, weighted, kept
        self._mixtures: dict[str, Mixture] = {}
        self._checked: set[str] = set()
        self._calls = 0
        """Calls of the layer in this pass over the group."""
        self.collecting = False
        """Whether passes stop at the experts."""

    def forward_of(self, form: Form, experts: Experts, weights: Weights) -> Forward:
        """A forward of experts for the whole group, while `weights` are bound."""
        mixture = self._mixtures[experts.path] = Mixture(form, experts, weights)

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
        """To be called before each call of the layer."""
        self._calls += 1

    def begin(self) -> None:
        """Starts the next group of batches."""
        self.collecting, self._calls = True, 0
        for mixture in self._mixtures.values():
            mixture.outputs, mixture.given, mixture.replayed = None, [], 0

    def compute(self, watch: InputHook | None) -> None:
        """Computes the experts that the last pass has reached, for the whole group; `watch` sees their linears' inputs.

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
            give_back_free_memory()  # for the outputs: the heap would keep blocks of this size
            if self._kept is not None:
                self._kept.add(mixture.experts.path, hidden, chosen, shares)
            check = lambda name, weights=mixture.weights: self._check(name, weights)  # noqa: E731
            out = mixture.compute(hidden, chosen, shares, watch, self._weighted, max(lengths), check)
            mixture.outputs = torch.split(out, lengths)

    def complete(self) -> None:
        """The next pass goes through the whole layer."""
        self.collecting = False

    def again(self, names: Collection[str], watch: InputHook, rows: int) -> None:
        """Shows `watch` the recorded inputs of these linears, `rows` tokens at a time. Their module must be bound."""
        assert self._kept is not None
        for mixture in self._mixtures.values():
            for e, (up, down) in enumerate(zip(mixture.experts.up, mixture.experts.down, strict=True)):
                wanted = [name for name in up if name in names]
                if not wanted and down not in names:
                    continue
                device = mixture.weights.device
                for x, share in self._kept.inputs(mixture.experts.path, e, rows):
                    x, share = mixture.given_to(x.to(device), share.to(device))
                    _show(watch, wanted, x, share, self._weighted)
                    if down in names:
                        _show(watch, (down,), mixture.intermediate(e, x), share, self._weighted)
                mixture.weights.release(mixture.experts.of([e]))

    def recorded(self, path: str) -> tuple[Mixture, RoutedInputs]:
        """A module of experts, which must be bound, and what was recorded."""
        assert self._kept is not None
        return self._mixtures[path], self._kept

    def gathered(self, ranks: Ranks, tokens: int) -> None:
        """Gives all ranks the inputs recorded on any of them, `tokens` in all."""
        if self._kept is not None and ranks.size > 1:
            self._kept = self._kept.gathered(ranks, tokens)

    def _check(self, name: str, weights: Weights) -> None:
        if name not in self._checked:
            ref, tensor = weights.stored(name)
            refuse_nonfinite(ref, 0, tensor, self._stored.get(ref.name))
            self._checked.add(name)
