"""Accumulates the Gram matrices XᵀX of linears' inputs during a pass, and holds some inputs out of them.

The held-out tokens show whether a refit generalises: HoldOut says which they are. With asymmetric calibration a linear
has two inputs, the pruned model's X and the dense model's; then the drift is summed as well and, for linears that write
into the residual stream, the debt (methods/gram.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from streamprune.errors import UnsupportedError

MOST_HELD = 2048
"""At most this many inputs are held out of a Gram."""

_SHARE = 8
"""At most one token in this many is held out, given at least as many windows."""

_ROWS = 1024
"""Tokens in one product; they are converted to float32 first, which takes memory."""

_BLOCK = 512
"""Least width of the column blocks in which the upper triangle of a Gram is computed."""


class HoldOut(NamedTuple):
    """Which tokens are held out: the last of every `every` blocks of `block` consecutive tokens."""

    block: int
    every: int

    @classmethod
    def of(cls, tokens: int, seqlen: int) -> HoldOut:
        """For `tokens` calibration tokens in windows of `seqlen`.

        An eighth of the tokens, at most 2048, in at least 8 blocks spread over the text, none longer than a window.
        Of fewer than 8 windows, the last one; of a single window, its second half; of these at most 2048 consecutive
        tokens. Blocks much shorter than a window would be too easy: their neighbours are in the Gram.
        """
        windows = tokens // max(seqlen, 1)
        if windows < _SHARE:
            block = max(1, min(seqlen if windows > 1 else min(seqlen, tokens) // 2, MOST_HELD))
            return cls(block, max(2, tokens // block))
        held = min(tokens // _SHARE, MOST_HELD)
        return cls(max(1, min(seqlen, held // 8)), max(_SHARE, tokens // held))

    @classmethod
    def among(cls, tokens: int) -> HoldOut:
        """For the `tokens` routed to one expert: an eighth of them, at most 2048, in about 8 blocks."""
        held = min(tokens // _SHARE, MOST_HELD)
        return cls(max(1, held // 8), max(_SHARE, tokens // max(held, 1)))

    def kept_out(self, tokens: int) -> int:
        """How many of the first `tokens` tokens are held out."""
        return sum(end - begin for begin, end, held in self.cut(0, tokens) if held)

    def cut(self, begin: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Splits tokens begin to end into runs (begin, end, whether it is held out)."""
        while begin < end:
            number = begin // self.block
            last = number // self.every * self.every + self.every - 1  # the next block that is held out
            stop = min(end, (last + (number == last)) * self.block)
            yield begin, stop, number == last
            begin = stop


@dataclass
class GramSum:
    """The running sums over one input X (tokens, in): XᵀX, or its rows begin to end, and what is held out."""

    begin: int
    end: int
    sum: Tensor
    """(end - begin, in) float32. Of a whole Gram only the upper triangle is valid until `finish`."""
    drift: Tensor | None = None
    """(in, in) float32, with asymmetric calibration: Σ (dense − x) xᵀ."""
    debt: Tensor | None = None
    """(out, in) float32, of linears that write into the residual stream: Σ r xᵀ, r what the stream lacks."""
    held: list[Tensor] = field(default_factory=list)
    """Held-out x, in pieces (n, in)."""
    held_dense: list[Tensor] = field(default_factory=list)
    """The dense model's inputs for these."""
    held_debt: list[Tensor] = field(default_factory=list)
    """What the residual stream lacks at these, (n, out)."""
    seen: int = 0
    """Tokens so far, including those held out."""
    tokens: int = 0
    """Tokens in the sums."""

    def add(self, rows: Tensor, hold: HoldOut, dense: Tensor | None = None, missing: Tensor | None = None) -> None:
        """Adds inputs (tokens, in), the dense model's (tokens, in), what the residual stream lacks (tokens, out)."""
        for begin, end, held_out in hold.cut(self.seen, self.seen + len(rows)):
            here = slice(begin - self.seen, end - self.seen)
            if held_out:
                self.held.append(rows[here].clone())
                if dense is not None:
                    self.held_dense.append(dense[here].clone())
                if missing is not None:
                    self.held_debt.append(missing[here].clone())
                continue
            self.tokens += end - begin
            for at in range(here.start, here.stop, _ROWS):
                part = slice(at, min(at + _ROWS, here.stop))
                x = rows[part].float()
                self._add_products(x)
                if dense is not None and self.drift is not None:
                    self.drift.addmm_((dense[part].float() - x).T, x)
                if missing is not None and self.debt is not None:
                    self.debt.addmm_(missing[part].T, x)
        self.seen += len(rows)

    def _add_products(self, x: Tensor) -> None:
        width = x.shape[1]
        if self.end - self.begin < width:
            self.sum.addmm_(x[:, self.begin : self.end].T, x)
            return
        for begin, end in _blocks(width):  # the upper triangle; `finish` mirrors it
            self.sum[begin:end, begin:].addmm_(x[:, begin:end].T, x[:, begin:])

    def finish(self) -> None:
        """Copies the upper triangle into the lower one."""
        width = self.sum.shape[1]
        if self.end - self.begin == width:
            for begin, end in _blocks(width):
                self.sum[end:, begin:end] = self.sum[begin:end, end:].T


def _blocks(width: int) -> list[tuple[int, int]]:
    step = max(_BLOCK, -(-width // 8))
    return [(begin, min(begin + step, width)) for begin in range(0, width, step)]


class GramCollector:
    """Accumulates Grams in one pass. `wants(name, width)` says which rows of the Gram of a linear's input, or None.

    Inputs come through `watch` or, with asymmetric calibration, through `watch_pair`.
    """

    def __init__(self, wants: Callable[[str, int], tuple[int, int] | None], hold: HoldOut) -> None:
        self.sums: dict[str, GramSum] = {}
        """Name of the first refitted linear that uses an input -> its sums."""
        self._wants, self._hold = wants, hold
        self._last: tuple[Tensor, bool] | None = None
        """The input seen last, and whether it was added."""

    def watch(self, name: str, x: Tensor) -> None:
        """Adds x (…, in), unless it is the same tensor as for the linear before, and was added then."""
        if self._last is not None and self._last[0] is x and self._last[1]:
            return
        rows = None if name in self.sums else self._wants(name, x.shape[-1])
        if rows is not None:
            with torch.inference_mode(False):  # it is changed outside of inference mode, too
                zeros = torch.zeros(rows[1] - rows[0], x.shape[-1], dtype=torch.float32, device=x.device)
            self.sums[name] = GramSum(*rows, zeros)
        self._last = (x, name in self.sums)
        if name in self.sums:
            self.sums[name].add(x.detach().reshape(-1, x.shape[-1]), self._hold)

    def watch_pair(self, name: str, dense: Tensor, x: Tensor, missing: Tensor | None = None) -> None:
        """Adds x (…, in), a linear's input in the model being pruned, with its input in the `dense` model.

        `missing` (…, out) is the dense residual stream minus the pruned one, before the linear's outputs are added.
        Raises UnsupportedError when the two inputs differ in shape.
        """
        width = x.shape[-1]
        if dense.shape != x.shape:
            raise UnsupportedError(
                f"{name} gets inputs {list(x.shape)}, in the dense model {list(dense.shape)}; asymmetric "
                "calibration needs the same tokens in both: pass --propagate pruned"
            )
        if name not in self.sums:
            with torch.inference_mode(False):
                zeros = [torch.zeros(width, width, dtype=torch.float32, device=x.device) for _ in range(2)]
                debt = None if missing is None else zeros[0].new_zeros(missing.shape[-1], width)
            self.sums[name] = GramSum(0, width, zeros[0], zeros[1], debt)
        rows, dense_rows = (t.detach().reshape(-1, width) for t in (x, dense))
        lacking = None if missing is None else missing.detach().float().reshape(len(rows), -1)
        self.sums[name].add(rows, self._hold, dense_rows, lacking)

    def end_batch(self) -> None:
        """Frees the last input."""
        self._last = None
