"""Gram matrices of the inputs of one layer's linears: gathered in a pass, alive while their linears are refitted.

Linears that are fed the same tensor share one. All of a layer's are gathered in the pass that gathers its statistics if
there is room for them. If not, each comes in a pass of its own, just before its linears are refitted; and one that is
larger than the room by itself comes in panels of rows, a pass each, which are put together in a file (disk/scratch.py).
A pass more costs time and changes no bit; panels are as the room is, and that belongs to the state of a job.

Those of an expert come when its turn has come, from what is routed to it (model/routed.py), not with the others: a
layer's experts are too many.

With asymmetric calibration each Gram comes with its drift (pruning/gram.py), and only when the linears that the layer
uses before have been refitted and are in their place.

A small part of the tokens is kept out, to see on them what a refit has learned: HoldOut.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from streamprune.disk.scratch import ScratchMatrix
from streamprune.errors import CheckpointError, UnsupportedError, UsageError
from streamprune.pruning.gram import Gram, Mapped

MOST_HELD = 2048
"""Inputs that are kept out of a Gram at most."""

_SHARE = 8
"""Every eighth token is kept out at most, where there are so many windows."""

_ROWS = 1024
"""Tokens that are multiplied at once: they are converted to float32 first."""

_BLOCK = 512
"""Columns, at least, of a product that computes one triangle of a Gram."""


class HoldOut(NamedTuple):
    """Which inputs are kept out: of every `every` blocks of `block` neighbouring tokens the last."""

    block: int
    every: int

    @classmethod
    def of(cls, tokens: int, seqlen: int) -> HoldOut:
        """For `tokens` of calibration in windows of `seqlen`.

        At least 8 blocks spread over the text, no longer than a window, 2048 tokens or an eighth in all. Of fewer than
        8 windows the last one, of a single one its second half, of long ones 2048 tokens near the end: neighbours of
        what was learned would be lenient judges.
        """
        windows = tokens // max(seqlen, 1)
        if windows < _SHARE:
            block = max(1, min(seqlen if windows > 1 else min(seqlen, tokens) // 2, MOST_HELD))
            return cls(block, max(2, tokens // block))
        held = min(tokens // _SHARE, MOST_HELD)
        return cls(max(1, min(seqlen, held // 8)), max(_SHARE, tokens // held))

    @classmethod
    def among(cls, tokens: int) -> HoldOut:
        """For `tokens` that are routed to an expert: 8 blocks, 2048 tokens or an eighth in all."""
        held = min(tokens // _SHARE, MOST_HELD)
        return cls(max(1, held // 8), max(_SHARE, tokens // max(held, 1)))

    def kept_out(self, tokens: int) -> int:
        """How many of so many tokens are kept out."""
        return sum(end - begin for begin, end, held in self.cut(0, tokens) if held)

    def cut(self, begin: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Tokens begin to end in stretches that are kept out, or are not."""
        while begin < end:
            number = begin // self.block
            last = number // self.every * self.every + self.every - 1  # the block of these `every` that is kept out
            stop = min(end, (last + (number == last)) * self.block)
            yield begin, stop, number == last
            begin = stop


@dataclass
class _Sum:
    """XᵀX of one input, or rows begin to end of it: (end - begin, in) float32."""

    begin: int
    end: int
    sum: Tensor
    drift: Tensor | None = None
    """(in, in) the sum of (dense − x) xᵀ, where there are two kinds of inputs."""
    held: list[Tensor] = field(default_factory=list)
    held_dense: list[Tensor] = field(default_factory=list)
    seen: int = 0
    tokens: int = 0

    def add(self, rows: Tensor, hold: HoldOut, dense: Tensor | None = None) -> None:
        """Adds inputs (tokens, in), and what the dense model has in their place."""
        for begin, end, kept_out in hold.cut(self.seen, self.seen + len(rows)):
            here = slice(begin - self.seen, end - self.seen)
            if kept_out:
                self.held.append(rows[here].clone())
                if dense is not None:
                    self.held_dense.append(dense[here].clone())
                continue
            self.tokens += end - begin
            for at in range(here.start, here.stop, _ROWS):
                some = slice(at, min(at + _ROWS, here.stop))
                x = rows[some].float()
                self._multiply(x)
                if dense is not None and self.drift is not None:
                    self.drift.addmm_((dense[some].float() - x).T, x)
        self.seen += len(rows)

    def _multiply(self, x: Tensor) -> None:
        width = x.shape[1]
        if self.end - self.begin < width:
            self.sum.addmm_(x[:, self.begin : self.end].T, x)
            return
        for begin, end in _blocks(width):  # the other triangle is its mirror image
            self.sum[begin:end, begin:].addmm_(x[:, begin:end].T, x[:, begin:])

    def finish(self) -> None:
        """Fills the triangle that was not computed."""
        width = self.sum.shape[1]
        if self.end - self.begin == width:
            for begin, end in _blocks(width):
                self.sum[end:, begin:end] = self.sum[begin:end, end:].T


def _blocks(width: int) -> list[tuple[int, int]]:
    step = max(_BLOCK, -(-width // 8))
    return [(begin, min(begin + step, width)) for begin in range(0, width, step)]


class GramCollector:
    """Gathers Grams in one pass; `wants(name, width)` says which rows of the one of a linear's input, or None.

    Either `watch` sees all inputs, or `watch_pair`.
    """

    def __init__(self, wants: Callable[[str, int], tuple[int, int] | None], hold: HoldOut) -> None:
        self.sums: dict[str, _Sum] = {}
        """By the first linear of those that share the input and are refitted."""
        self._wants, self._hold = wants, hold
        self._last: tuple[Tensor, bool] | None = None

    def watch(self, name: str, x: Tensor) -> None:
        """Adds x (…, in), unless it is the tensor that the linear before was fed (as in Collector) and was added."""
        if self._last is not None and self._last[0] is x and self._last[1]:
            return
        rows = None if name in self.sums else self._wants(name, x.shape[-1])
        if rows is not None:
            with torch.inference_mode(False):  # it is changed after the pass, too
                zeros = torch.zeros(rows[1] - rows[0], x.shape[-1], dtype=torch.float32, device=x.device)
            self.sums[name] = _Sum(*rows, zeros)
        self._last = (x, name in self.sums)
        if name in self.sums:
            self.sums[name].add(x.detach().reshape(-1, x.shape[-1]), self._hold)

    def watch_pair(self, name: str, dense: Tensor, x: Tensor) -> None:
        """Adds x (…, in), the input of a linear in the model that is being pruned, and what the dense model has there.

        Raises UnsupportedError where the two have not the same shape.
        """
        width = x.shape[-1]
        if dense.shape != x.shape:
            raise UnsupportedError(
                f"{name} is given {list(x.shape)} where the dense model has {list(dense.shape)}; asymmetric "
                "calibration needs the same tokens in both: pass --propagate pruned"
            )
        if name not in self.sums:
            with torch.inference_mode(False):
                zeros = [torch.zeros(width, width, dtype=torch.float32, device=x.device) for _ in range(2)]
            self.sums[name] = _Sum(0, width, zeros[0], zeros[1])
        rows, wanted = (some.detach().reshape(-1, width) for some in (x, dense))
        self.sums[name].add(rows, self._hold, wanted)

    def end_batch(self) -> None:
        """Lets go of the last input."""
        self._last = None


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
        if self.place is not None or not together or gram_bytes(largest_at_once(self._linears, self._experts)) > self._room:
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
            self._ready[name] = _checked(name, gram)


def _joined(found: _Sum) -> Tensor:
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
