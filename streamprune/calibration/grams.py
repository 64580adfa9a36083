"""The Gram matrices of one layer's inputs: accumulated in a pass, and freed once their linears are refitted.

Linears with the same input tensor share a Gram. If memory allows, all of a layer's Grams are accumulated in the pass
that gathers its statistics. If not, each gets a pass of its own, just before its linears are refitted. A Gram larger
than the memory for Grams is computed in panels of rows, a pass for each, and assembled in a file (disk/scratch.py).
Extra passes cost time and change no bit of the result. The size of the panels may change bits; it follows from the
memory for Grams, which is part of a job's state.

Experts' Grams are computed one expert at a time, from the inputs recorded for it (model/routed.py): a layer has too
many experts to hold all of theirs.

With asymmetric calibration each Gram comes with its drift (methods/gram.py), and is accumulated only after all linears
that the layer uses earlier are refitted and in place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Set
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

from streamprune.calibration.gram_sums import GramCollector, GramSum, HoldOut
from streamprune.disk.scratch import ScratchMatrix
from streamprune.errors import CheckpointError, UsageError
from streamprune.methods.gram import Debt, Gram, Mapped
from streamprune.process.ranks import ALONE
from streamprune.process.share import Share

Rerun = Callable[[Callable[[], GramCollector], Set[str]], GramCollector]
"""(a function that makes a collector, the inputs it wants by their first linear) -> the collector after a pass."""


class LayerGrams:
    """The Grams of one layer's inputs, as its linears are refitted one after the other.

    linears   refitted linears -> in_features, in the order in which they are refitted
    room      bytes for Grams
    hold      which tokens are held out
    folder    where a Gram larger than `room` is stored
    rerun     runs the layer again, or only the experts that the given inputs belong to; it makes a new collector for
              each attempt, because one that ran out of memory has seen some batches already
    products  see Gram
    experts   linear -> the expert that it belongs to
    place     with asymmetric calibration: replaces a linear's weight by its refitted one for later passes
    share     the batches that this rank passes through the layer
    """

    def __init__(
        self, linears: Mapping[str, int], room: int, hold: HoldOut, folder: Path, rerun: Rerun,
        products: torch.dtype = torch.float32, experts: Mapping[str, str] | None = None,
        place: Callable[[str, Tensor], None] | None = None, share: Share | None = None,
    ) -> None:  # fmt: skip
        self._linears, self._room, self._hold, self.folder = dict(linears), room, hold, folder
        self.place, self._share = place, share
        self._rerun, self._products, self._experts = rerun, products, experts or {}
        self._groups: dict[str, str] = {}
        """Refitted linear, in the order of use -> the first one with the same input, its leader."""
        self._tokens: dict[str, int] = {}
        """Linear -> tokens that it saw."""
        self._ready: dict[str, Gram] = {}
        """Leader -> Gram."""
        self.passes = 0
        """Passes through the whole layer, beyond the one that gathers statistics."""

    @property
    def of_experts(self) -> bool:
        """Whether any of the linears belongs to an expert."""
        return any(name in self._experts for name in self._linears)

    def first_pass(self) -> GramCollector | None:
        """Collects all Grams but experts' in the pass that gathers statistics; None where memory does not allow it.

        Which linears share an input is not known yet, so memory for one Gram per linear is required.
        """
        resident = any(name not in self._experts for name in self._linears)
        needed = gram_bytes(largest_at_once(self._linears, self._experts))
        if self.place is not None or not resident or needed > self._room:
            return None
        return GramCollector(
            lambda name, width: (0, width) if name in self._linears and name not in self._experts else None,
            self._hold, self._share,
        )  # fmt: skip

    def gathered(
        self, collector: GramCollector | None, groups: Mapping[str, str], tokens: Callable[[str], int] = lambda _: 0
    ) -> None:
        """Takes over what the first pass collected.

        `groups` maps each linear, in the order of use, to the first one with the same input; `tokens` says how many
        tokens a linear saw.
        """
        leaders: dict[str, str] = {}
        for name, first in groups.items():  # in the order of use
            if name in self._linears:
                self._groups[name] = leaders.setdefault(first, name)
                self._tokens[name] = tokens(name)
        if collector is not None:
            collector.gathered()  # one called with several inputs, the first of them another's, lacks that one
            lacking = [name for name, made in collector.sums.items() if made.seen < self._tokens.get(name, 0)]
            for name in lacking:
                del collector.sums[name]
            self._keep(collector)

    @property
    def by_use(self) -> list[str]:
        """The refitted linears, in the order in which the layer uses them."""
        return [name for name in self._groups if name in self._linears]

    def leave_out(self, names: Collection[str]) -> None:
        """Removes linears that are not refitted after all."""
        for name in names:
            self._linears.pop(name, None)
            self._groups.pop(name, None)

    def __contains__(self, name: str) -> bool:
        """Whether a linear is refitted."""
        return name in self._linears

    def sharing(self, name: str) -> list[str]:
        """The refitted linears with the same input as `name`. Raises UsageError when the text never used it."""
        if name not in self._groups:
            raise UsageError(f"{name} was not used on this text, so there are no inputs to refit it to; --skip it")
        return [other for other in self._linears if self._groups.get(other) == self._groups[name]]

    def take(self, name: str) -> Gram:
        """The Gram of a linear's input, gathered now if it is not ready. Raises CheckpointError for NaN or Inf."""
        self.sharing(name)
        leader = self._groups[name]
        if leader not in self._ready:
            self._gather(leader)
        return self._ready[leader]

    def ready(self, name: str) -> bool:
        """Whether the Gram of a linear's input is in memory."""
        return self._groups.get(name) in self._ready

    def holds(self, gram: Gram) -> bool:
        """Whether a Gram is still needed."""
        return any(gram is ready for ready in self._ready.values())

    def done(self, name: str) -> None:
        """Marks a linear as refitted; frees its Gram if no other linear needs it."""
        leader = self._groups.pop(name)
        self._linears.pop(name)
        if leader not in self._groups.values():
            self._ready.pop(leader, None)

    def _gather(self, leader: str) -> None:
        width = self._linears[next(n for n in self._linears if self._groups.get(n) == leader)]
        if self.place is not None:
            self._ready.clear()
            self._keep(self._pass({leader: (0, width)}))
            return
        expert = self._experts.get(leader)
        left = self._room - gram_bytes([len(gram.matrix) for gram in self._ready.values()]) - _nbytes(width)
        if expert is None or left < 0:
            self._ready.clear()
            left = self._room - _nbytes(width)
        if left < 0:
            self._ready[leader] = self._in_panels(leader, width)
            return
        rows = {leader: (0, width)}
        others: Iterable[tuple[str, int]] = self._linears.items()
        if expert is not None:  # only the linears that come next: they are of the same expert
            others = takewhile(lambda item: self._experts.get(item[0]) == expert, others)
        for name, size in others:
            other = self._groups.get(name, leader)
            if other not in rows and self._experts.get(name) == expert and _nbytes(size) <= left:
                rows[other], left = (0, size), left - _nbytes(size)
        self._keep(self._pass(rows))

    def _in_panels(self, leader: str, width: int) -> Gram:
        """A Gram larger than the memory for Grams, a panel of rows per pass."""
        whole = ScratchMatrix(self.folder, width, width)
        step = max(1, self._room // (4 * width))
        held: Tensor | None = None
        tokens = 0
        for begin in range(0, width, step):
            end = min(begin + step, width)
            found = self._pass({leader: (begin, end)}).sums[leader]
            whole.tensor[begin:end] = found.sum.cpu()
            whole.forget(begin, end)
            tokens = found.tokens
            held = _joined(found) if held is None else held
        if held is None:
            raise ValueError(f"{leader} has no inputs")
        return _checked(leader, Gram(whole.tensor, held, tokens, Mapped(whole.forget), self._products))

    def _pass(self, rows: Mapping[str, tuple[int, int]]) -> GramCollector:
        first = next(iter(rows))
        of_expert = first in self._experts
        self.passes += not of_expert
        hold = HoldOut.among(self._tokens[first]) if of_expert else self._hold
        share = None if of_expert else self._share
        collector = self._rerun(lambda: GramCollector(lambda name, _: rows.get(name), hold, share), rows.keys())
        collector.gathered()
        return collector

    def _keep(self, collector: GramCollector) -> None:
        for name in list(collector.sums):
            found = collector.sums.pop(name)
            found.finish()
            ranks = self._share.ranks if self._share is not None and name not in self._experts else ALONE
            gram = Gram(found.sum, _joined(found), found.tokens, None, self._products, found.drift, ranks=ranks)
            if found.drift is not None:
                gram.held_dense = torch.cat(found.held_dense) if found.held_dense else gram.held
            if found.debt is not None:
                held = torch.cat(found.held_debt) if found.held_debt else found.debt.new_empty(0, len(found.debt))
                gram.debts[name] = Debt(found.debt, held)
            self._ready[name] = _checked(name, gram)


def _joined(found: GramSum) -> Tensor:
    return torch.cat(found.held) if found.held else found.sum.new_empty(0, found.sum.shape[1])


def _checked(name: str, gram: Gram) -> Gram:
    if not bool(torch.isfinite(gram.diagonal).all()):
        raise CheckpointError(
            f"the squares of the input of {name} are not finite: the model overflows on this text; try --dtype float32"
        )
    return gram


def _nbytes(width: int) -> int:
    return 4 * width * width


def gram_bytes(widths: Iterable[int]) -> int:
    """Bytes of the float32 Grams of inputs of these widths."""
    return sum(_nbytes(width) for width in widths)


def largest_at_once(linears: Mapping[str, int], experts: Mapping[str, str]) -> list[int]:
    """The widths of the Grams that may be in memory at once: all but experts', and those of the largest expert.

    `linears` maps a layer's linears to their in_features, `experts` those of experts to the expert.
    """
    by_expert: dict[str, list[int]] = {}
    for name, width in linears.items():
        if name in experts:
            by_expert.setdefault(experts[name], []).append(width)
    outside = [width for name, width in linears.items() if name not in experts]
    return outside + max(by_expert.values(), key=gram_bytes, default=[])
