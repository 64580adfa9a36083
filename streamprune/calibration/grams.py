"""Gram matrices of the inputs of one layer's linears: gathered in a pass, alive while their linears are refitted.

Linears that are fed the same tensor share one. All of a layer's are gathered in the pass that gathers its statistics if
there is room for them. If not, each comes in a pass of its own, just before its linears are refitted; and one that is
larger than the room by itself comes in panels of rows, a pass each, which are put together in a file (disk/scratch.py).
A pass more costs time and changes no bit; panels are as the room is, and that belongs to the state of a job.

Those of an expert come when its turn has come, from what is routed to it (model/routed.py), not with the others: a
layer's experts are too many.

With asymmetric calibration each Gram comes with its drift (methods/gram.py), and only when the linears that the layer
uses before have been refitted and are in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Set
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

from streamprune.calibration.gram_sums import GramCollector, HoldOut, Sum
from streamprune.disk.scratch import ScratchMatrix
from streamprune.errors import CheckpointError, UsageError
from streamprune.methods.gram import Debt, Gram, Mapped

Rerun = Callable[[Callable[[], GramCollector], Set[str]], GramCollector]


class LayerGrams:
    """The Grams of one layer's inputs, as its linears are refitted one after the other.

    linears  names of those that are refitted, in that order, and their in_features
    room     bytes for Grams
    rerun    runs the layer once more, or of experts those with the inputs that are named, with a collector that it
             makes, anew for each attempt, and returns it
    folder   where a matrix goes that is larger than `room`
    products see Gram
    experts  linear -> the expert that it belongs to
    place    of asymmetric calibration: puts a linear's new weight where the next Grams' pass computes with it
    """

    def __init__(
        self, linears: Mapping[str, int], room: int, hold: HoldOut, folder: Path, rerun: Rerun,
        products: torch.dtype = torch.float32, experts: Mapping[str, str] | None = None,
        place: Callable[[str, Tensor], None] | None = None,
    ) -> None:  # fmt: skip
        self._linears, self._room, self._hold, self.folder = dict(linears), room, hold, folder
        self.place = place
        self._rerun, self._products, self._experts = rerun, products, experts or {}
        self._groups: dict[str, str] = {}
        self._tokens: dict[str, int] = {}
        """How many were routed to an expert, by its linears."""
        self._ready: dict[str, Gram] = {}
        self.passes = 0
        """Passes of the whole layer that were needed besides the one that gathers statistics."""

    @property
    def of_experts(self) -> bool:
        """Whether experts are refitted."""
        return any(name in self._experts for name in self._linears)

    def first_pass(self) -> GramCollector | None:
        """What gathers all but experts' beside the statistics, if there is room even were no input shared."""
        together = [width for name, width in self._linears.items() if name not in self._experts]
        most = gram_bytes(largest_at_once(self._linears, self._experts))
        if self.place is not None or not together or most > self._room:
            return None
        return GramCollector(
            lambda name, width: (0, width) if name in self._linears and name not in self._experts else None, self._hold
        )

    def gathered(
        self, collector: GramCollector | None, groups: Mapping[str, str], tokens: Callable[[str], int] = lambda _: 0
    ) -> None:
        """Takes over what the first pass found; `groups` tells which linears share an input: linear -> the first.

        `tokens` says how many a linear saw.
        """
        leaders: dict[str, str] = {}
        for name, first in groups.items():  # in the order of use
            if name in self._linears:
                self._groups[name] = leaders.setdefault(first, name)
                self._tokens[name] = tokens(name)
        if collector is not None:
            self._keep(collector)

    @property
    def by_use(self) -> list[str]:
        """The linears that are refitted, in the order in which the layer uses them."""
        return [name for name in self._groups if name in self._linears]

    def leave_out(self, names: Collection[str]) -> None:
        """Forgets linears that are not refitted after all."""
        for name in names:
            self._linears.pop(name, None)
            self._groups.pop(name, None)

    def __contains__(self, name: str) -> bool:
        """Whether a linear is refitted."""
        return name in self._linears

    def sharing(self, name: str) -> list[str]:
        """The linears that share the input of `name` and are refitted. Raises UsageError for one that was not used."""
        if name not in self._groups:
            raise UsageError(f"{name} was not used on this text, so nothing is known of its input; --skip it")
        return [other for other in self._linears if self._groups.get(other) == self._groups[name]]

    def take(self, name: str) -> Gram:
        """The Gram of a linear's input. Raises CheckpointError when an activation was NaN or infinite."""
        self.sharing(name)
        leader = self._groups[name]
        if leader not in self._ready:
            self._gather(leader)
        return self._ready[leader]

    def ready(self, name: str) -> bool:
        """Whether `take` has the Gram of a linear's input at hand."""
        return self._groups.get(name) in self._ready

    def holds(self, gram: Gram) -> bool:
        """Whether a Gram is still needed."""
        return any(gram is ready for ready in self._ready.values())

    def done(self, name: str) -> None:
        """The linear has been refitted: what nobody needs any more is let go of."""
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
        if expert is not None:  # those that come next, or the others' would have to wait for long
            others = takewhile(lambda item: self._experts.get(item[0]) == expert, others)
        for name, size in others:
            other = self._groups.get(name, leader)
            if other not in rows and self._experts.get(name) == expert and _nbytes(size) <= left:
                rows[other], left = (0, size), left - _nbytes(size)
        self._keep(self._pass(rows))

    def _in_panels(self, leader: str, width: int) -> Gram:
        """A Gram that is larger than the room."""
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
        routed = first in self._experts
        self.passes += not routed
        hold = HoldOut.among(self._tokens[first]) if routed else self._hold
        return self._rerun(lambda: GramCollector(lambda name, _: rows.get(name), hold), rows.keys())

    def _keep(self, collector: GramCollector) -> None:
        for name in list(collector.sums):
            found = collector.sums.pop(name)
            found.finish()
            gram = Gram(found.sum, _joined(found), found.tokens, products=self._products, drift=found.drift)
            if found.drift is not None:
                gram.held_dense = torch.cat(found.held_dense) if found.held_dense else gram.held
            if found.debt is not None:
                held = torch.cat(found.held_debt) if found.held_debt else found.debt.new_empty(0, len(found.debt))
                gram.debts[name] = Debt(found.debt, held)
            self._ready[name] = _checked(name, gram)


def _joined(found: Sum) -> Tensor:
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
    """Bytes of the Grams of inputs of these widths."""
    return sum(_nbytes(width) for width in widths)


def largest_at_once(linears: Mapping[str, int], experts: Mapping[str, str]) -> list[int]:
    """The widths of a layer's linears (name -> in_features) whose Grams may be there at once.

    All but experts', and those of the expert with the largest; `experts` says whose a linear is.
    """
    apart: dict[str, list[int]] = {}
    for name, width in linears.items():
        if name in experts:
            apart.setdefault(experts[name], []).append(width)
    together = [width for name, width in linears.items() if name not in experts]
    return together + max(apart.values(), key=gram_bytes, default=[])
