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
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from streamprune.disk.header import TensorRef
from streamprune.disk.scratch import ScratchMatrix
from streamprune.errors import UnsupportedError
from streamprune.model.expert_forms import Form, Forward
from streamprune.model.experts import Experts
from streamprune.model.finite import refuse_nonfinite
from streamprune.process.memory import give_back_free_memory
from streamprune.process.ranks import Ranks

InputHook = Callable[[str, Tensor], None]
"""Called with a linear and its input (tokens, in)."""

_GATHERED_ROWS = 256
"""Rows that are read from a file at once: if they are far apart, each maps 64 KiB."""

_SCANNED_TOKENS = 1 << 16
"""Tokens that are searched at once for those of an expert."""

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


@dataclass
class _Mixture:
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

    def compute(
        self, hidden: Tensor, chosen: Tensor, shares: Tensor, watch: InputHook | None, weighted: bool, rows: int,
        check: Callable[[str], None] | None = None,
    ) -> Tensor:  # fmt: skip
        """As Forward, expert after expert, at most `rows` tokens at once. Calls `check(linear)` before its use."""
        out = torch.zeros_like(hidden)
        numbers = [e for e in torch.unique(chosen).tolist() if 0 <= e < len(self.experts.down)]  # others: no expert
        self.weights.expect(self.experts.of(numbers[:1]))
        for e, following in zip(numbers, [*numbers[1:], None], strict=True):
            self.weights.expect(self.experts.of([] if following is None else [following]))
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
            self.weights.release(self.experts.of([e]))
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
    mixture = _Mixture(form, experts, weights)
    return lambda hidden, chosen, shares: mixture.compute(hidden, chosen, shares, watch, weighted, max(1, len(hidden)))


class Routed:
    """The tokens routed to one layer's experts, for a group of batches. `stored` has the layer's tensors by name.

    For each group: `begin`; for each module of experts a pass over the group, then `compute`; `complete`; a pass
    through the whole layer. With `kept`, inputs are recorded, and `again` is possible afterwards.
    """

    def __init__(self, stored: Mapping[str, TensorRef], weighted: bool, kept: RoutedInputs | None = None) -> None:
        self._stored, self._weighted, self._kept = stored, weighted, kept
        self._mixtures: dict[str, _Mixture] = {}
        self._checked: set[str] = set()
        self._calls = 0
        """Calls of the layer in this pass over the group."""
        self.collecting = False
        """Whether passes stop at the experts."""

    def forward_of(self, form: Form, experts: Experts, weights: Weights) -> Forward:
        """A forward of experts for the whole group, while `weights` are bound."""
        mixture = self._mixtures[experts.path] = _Mixture(form, experts, weights)

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

    def gathered(self, ranks: Ranks, tokens: int) -> None:
        """Gives all ranks the inputs recorded on any of them, `tokens` in all."""
        if self._kept is not None and ranks.size > 1:
            self._kept = self._kept.gathered(ranks, tokens)

    def _check(self, name: str, weights: Weights) -> None:
        if name not in self._checked:
            ref, tensor = weights.stored(name)
            refuse_nonfinite(ref, 0, tensor, self._stored.get(ref.name))
            self._checked.add(name)


class RoutedInputs:
    """Records the inputs of a layer's experts, for `tokens` tokens in all, in unnamed temporary files in `folder`.

    Raises ResourceError when the disk is too small for them.
    """

    def __init__(self, folder: Path, tokens: int) -> None:
        self._folder, self._tokens = folder, tokens
        self._files: dict[str, tuple[ScratchMatrix, ScratchMatrix, ScratchMatrix]] = {}
        self._used: dict[str, int] = {}
        self._groups: dict[str, list[int]] = {}
        """Where each group of batches that was added ends."""

    def add(self, path: str, *parts: Tensor) -> None:
        """Adds the inputs (states, chosen, shares) of the module of experts `path`; shapes as for Forward."""
        hidden, chosen, shares = parts
        parts = (hidden, chosen.to(torch.int32), shares)
        if path not in self._files:
            first, second, third = (ScratchMatrix(self._folder, self._tokens, p.shape[1], p.dtype) for p in parts)
            self._files[path] = (first, second, third)
        begin = self._used.get(path, 0)
        end = self._used[path] = begin + len(hidden)
        self._groups.setdefault(path, []).append(end)
        if end > self._tokens:
            raise UnsupportedError(f"{path} is given more rows than there are tokens; its experts cannot be refitted")
        for file, part in zip(self._files[path], parts, strict=True):
            file.tensor[begin:end] = part.cpu()
            file.forget(begin, end)

    def gathered(self, ranks: Ranks, tokens: int) -> RoutedInputs:
        """The inputs recorded on all ranks, `tokens` in all, in the order of the groups, which ranks take in turn."""
        whole = RoutedInputs(self._folder, tokens)
        for path, files in self._files.items():
            told = ranks.gather([0, *self._groups[path]])
            for group in range(max(map(len, told)) - 1):
                for source, ends in enumerate(told):
                    if group + 1 == len(ends):
                        continue
                    here = slice(ends[group], ends[group + 1])
                    parts = []
                    for file in files:
                        own = source == ranks.rank
                        shape = here.stop - here.start, file.tensor.shape[1]
                        part = file.tensor[here].clone() if own else file.tensor.new_empty(shape)
                        ranks.broadcast_(part.view(-1).view(torch.uint8), source)
                        parts.append(part)
                    whole.add(path, *parts)
        return whole

    def inputs(self, path: str, expert: int, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """States (≤ rows, hidden) and routing weights (≤ rows, 1) of the tokens routed to an expert, in order."""
        hidden, chosen, shares = self._files[path]
        used = self._used[path]
        found = []
        for begin in range(0, used, _SCANNED_TOKENS):
            token, place = torch.where(chosen.tensor[begin : min(begin + _SCANNED_TOKENS, used)] == expert)
            found.append((token + begin, shares.tensor[token + begin, place, None]))
        for file in (chosen, shares):
            file.forget(0, self._tokens)
        tokens, share = (torch.cat(parts) for parts in zip(*found, strict=True))
        for part, weights in zip(torch.split(tokens, rows), torch.split(share, rows), strict=True):
            x = hidden.tensor.new_empty(len(part), hidden.tensor.shape[1])
            for begin in range(0, len(part), _GATHERED_ROWS):
                x[begin : begin + _GATHERED_ROWS] = hidden.tensor[part[begin : begin + _GATHERED_ROWS]]
                hidden.forget(0, self._tokens)
            yield x, weights
