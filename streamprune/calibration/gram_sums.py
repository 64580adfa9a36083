"""Sums over tokens of products of features, as a pass brings the inputs; and which inputs are kept out of them.

A small part of the tokens is kept out, to see on them what a refit has learned: HoldOut. With asymmetric calibration
a linear has two inputs, that of the model which is being pruned and the dense model's, and beside XᵀX the drift and, of
linears that write into the residual stream, the debt are summed (methods/gram.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from streamprune.errors import UnsupportedError

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
class Sum:
    """XᵀX of one input, or rows begin to end of it: (end - begin, in) float32."""

    begin: int
    end: int
    sum: Tensor
    drift: Tensor | None = None
    """(in, in) the sum of (dense − x) xᵀ, where there are two kinds of inputs."""
    debt: Tensor | None = None
    """(out, in) the sum of r xᵀ, where there is a residual stream to make up for."""
    held: list[Tensor] = field(default_factory=list)
    held_dense: list[Tensor] = field(default_factory=list)
    held_debt: list[Tensor] = field(default_factory=list)
    seen: int = 0
    tokens: int = 0

    def add(self, rows: Tensor, hold: HoldOut, dense: Tensor | None = None, missing: Tensor | None = None) -> None:
        """Adds inputs (tokens, in), what the dense model has instead, and what the stream misses (tokens, out)."""
        for begin, end, kept_out in hold.cut(self.seen, self.seen + len(rows)):
            here = slice(begin - self.seen, end - self.seen)
            if kept_out:
                self.held.append(rows[here].clone())
                if dense is not None:
                    self.held_dense.append(dense[here].clone())
                if missing is not None:
                    self.held_debt.append(missing[here].clone())
                continue
            self.tokens += end - begin
            for at in range(here.start, here.stop, _ROWS):
                some = slice(at, min(at + _ROWS, here.stop))
                x = rows[some].float()
                self._multiply(x)
                if dense is not None and self.drift is not None:
                    self.drift.addmm_((dense[some].float() - x).T, x)
                if missing is not None and self.debt is not None:
                    self.debt.addmm_(missing[some].T, x)
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
        self.sums: dict[str, Sum] = {}
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
            self.sums[name] = Sum(*rows, zeros)
        self._last = (x, name in self.sums)
        if name in self.sums:
            self.sums[name].add(x.detach().reshape(-1, x.shape[-1]), self._hold)

    def watch_pair(self, name: str, dense: Tensor, x: Tensor, missing: Tensor | None = None) -> None:
        """Adds x (…, in), the input of a linear in the model that is being pruned, and what the dense model has there.

        `missing` (…, out) is what the dense residual stream has more than the pruned one before the linear's outputs
        are added to it. Raises UnsupportedError where the two inputs have not the same shape.
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
                debt = None if missing is None else zeros[0].new_zeros(missing.shape[-1], width)
            self.sums[name] = Sum(0, width, zeros[0], zeros[1], debt)
        rows, wanted = (some.detach().reshape(-1, width) for some in (x, dense))
        owed = None if missing is None else missing.detach().float().reshape(len(rows), -1)
        self.sums[name].add(rows, self._hold, wanted, owed)

    def end_batch(self) -> None:
        """Lets go of the last input."""
        self._last = None
