"""Accumulates the Gram matrices XᵀX of linears' inputs during a pass, and holds some inputs out of them.

Each batch is multiplied on its own, a few rows of the product at a time, and then added to the sums, in the order of
the batches: so it does not matter which rank sees which batch. Each block of rows has a rank that adds its products; at
the end of the pass, all ranks are given all sums.

The held-out tokens show whether a refit generalises: HoldOut says which they are. With asymmetric calibration a linear
has two inputs, the pruned model's X and the dense model's; then the drift is summed as well and, for linears that write
into the residual stream, the debt (methods/gram.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from streamprune.errors import UnsupportedError
from streamprune.process.share import Share

MOST_HELD = 2048
"""At most this many inputs are held out of a Gram."""

_SHARE = 8
"""At most one token in this many is held out, given at least as many windows."""

_ROWS = 1024
"""Tokens in one product; they are converted to float32 first, which takes memory."""

_MOST_CONVERTED = 32 << 20
"""Bytes of inputs in float32 that are held for all blocks."""

_BLOCK = 256
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
    numbers: list[int] = field(default_factory=list)
    """The batches that the pieces in `held` come from."""
    tokens: int = 0
    """Tokens in the sums."""
    owner: int = 0
    """The rank that adds the first blocks of the sums; the next ranks add the next ones."""

    def add(
        self, rows: Tensor, hold: HoldOut, number: int, at: int, add_: Add,
        dense: Tensor | None = None, missing: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Adds the inputs (tokens, in) of batch `number`, of which the first is token `at` of all.

        With asymmetric calibration also the dense model's (tokens, in), and what the residual stream lacks (tokens,
        out): products of these are in bf16 where the inputs are, as they only say where a refit aims, and nothing is
        inverted. `add_(sum, product, owner)` adds products to sums.
        """
        pieces: list[slice] = []
        for begin, end, held_out in hold.cut(at, at + len(rows)):
            here = slice(begin - at, end - at)
            if held_out:
                self.numbers.append(number)
                self.held.append(rows[here].clone())
                if dense is not None:
                    self.held_dense.append(dense[here].clone())
                if missing is not None:
                    self.held_debt.append(missing[here].clone())
                continue
            self.tokens += end - begin
            pieces += [slice(i, min(i + _ROWS, here.stop)) for i in range(here.start, here.stop, _ROWS)]
        width = rows.shape[1]
        whole = self.end - self.begin == width
        precision = torch.bfloat16 if rows.dtype == torch.bfloat16 else torch.float32
        small = 4 * rows.numel() <= _MOST_CONVERTED
        converted = [rows[piece].float() for piece in pieces] if small else []
        for i, (begin, end) in enumerate(_blocks(self.begin, self.end, width)):
            left = begin if whole else 0  # of the whole, the upper triangle; `finish` mirrors it
            product = rows.new_zeros(end - begin, width - left, dtype=torch.float32)
            for piece, x in zip_longest(pieces, converted):
                x = rows[piece, left:].float() if x is None else x[:, left:]
                product.addmm_(x[:, begin - left : end - left].T, x)
            add_(self.sum[begin - self.begin : end - self.begin, left:], product, self.owner + i)
        for total, rest in ((self.drift, dense), (self.debt, missing)):
            if total is None or rest is None:
                continue
            for i, (begin, end) in enumerate(_blocks(0, len(total), width)):
                product = rows.new_zeros(end - begin, width, dtype=torch.float32)
                for piece in pieces:
                    x, other = (each.to(precision) for each in (rows[piece], rest[piece, begin:end]))
                    product += (other - x[:, begin:end] if total is self.drift else other).T @ x
                add_(total[begin:end], product, self.owner + i)

    def move_to(self, whole: GramSum, add_: Add) -> None:
        """Adds these sums, of a group of batches, to those over all of them, and begins anew."""
        width = self.sum.shape[1]
        all_rows = self.end - self.begin == width
        for i, (begin, end) in enumerate(_blocks(self.begin, self.end, width)):
            here = slice(begin - self.begin, end - self.begin), slice(begin if all_rows else 0, width)
            add_(whole.sum[here], self.sum[here], whole.owner + i)
        whole.held += self.held
        whole.numbers += self.numbers
        whole.tokens += self.tokens
        self.sum = torch.zeros_like(self.sum)  # a new one: this one may be on its way to another rank
        self.held, self.numbers, self.tokens = [], [], 0

    @property
    def seen(self) -> int:
        """Tokens so far, including those held out."""
        return self.tokens + sum(map(len, self.held))

    def held_out(self) -> tuple[int, list[int], list[list[Tensor]]]:
        """Tokens in this rank's sums, and what it holds out: numbers of batches, and tensors on the CPU."""
        return self.tokens, self.numbers, [[t.cpu() for t in held] for held in self._held]

    def join(self, told: Sequence[tuple[int, list[int], list[list[Tensor]]]]) -> None:
        """Takes over what all ranks have `told` with held_out, in the order of the batches."""
        self.tokens = sum(tokens for tokens, _, _ in told)
        for into, each in zip(self._held, zip(*(held for _, _, held in told), strict=True), strict=True):
            pieces = [
                pair
                for (_, numbers, _), held in zip(told, each, strict=True)
                for pair in zip(numbers, held, strict=False)
            ]
            into[:] = [piece.to(self.sum.device) for _, piece in sorted(pieces, key=lambda pair: pair[0])]

    @property
    def _held(self) -> list[list[Tensor]]:
        return [self.held, self.held_dense, self.held_debt]

    def finish(self) -> None:
        """Copies the upper triangle into the lower one."""
        width = self.sum.shape[1]
        if self.end - self.begin == width:
            for begin, end in _blocks(0, width, width):
                self.sum[end:, begin:end] = self.sum[begin:end, end:].T


Add = Callable[[Tensor, Tensor, int], None]
"""Adds a product to a sum of the same shape, which a rank owns."""


def _blocks(first: int, last: int, width: int) -> list[tuple[int, int]]:
    step = max(_BLOCK, -(-width // 8))
    return [(begin, min(begin + step, last)) for begin in range(first, last, step)]


class GramCollector:
    """Accumulates Grams in one pass. `wants(name, width)` says which rows of the Gram of a linear's input, or None.

    Inputs come through `watch` or, with asymmetric calibration, through `watch_pair`, a batch after the other; `share`
    says which batches these are. `gathered` ends the pass.
    """

    def __init__(
        self, wants: Callable[[str, int], tuple[int, int] | None], hold: HoldOut, share: Share | None = None
    ) -> None:
        self.sums: dict[str, GramSum] = {}
        """Name of the first refitted linear that uses an input -> its sums."""
        self._wants, self._hold, self._share = wants, hold, share
        self._own = 0
        """Batches that are done."""
        self._groups: dict[str, GramSum] = {}
        """Where batches are dealt in groups: the sums over the group at work."""
        self._seen: dict[str, int] = {}
        """Without `share`: tokens so far, by name."""
        self._at_work: set[str] = set()
        """The inputs of this batch that have been added."""
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
            self._begin(name, GramSum(*rows, zeros))
        self._last = (x, name in self.sums)
        if name in self.sums:
            self._add(name, x.detach().reshape(-1, x.shape[-1]))

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
            self._begin(name, GramSum(0, width, zeros[0], zeros[1], debt))
        rows, dense_rows = (t.detach().reshape(-1, width) for t in (x, dense))
        lacking = None if missing is None else missing.detach().float().reshape(len(rows), -1)
        self._add(name, rows, dense_rows, lacking)

    def _begin(self, name: str, sums: GramSum) -> None:
        if self._share is not None:
            sums.owner = len(self.sums)
            if self._share.group > 1:
                with torch.inference_mode(False):
                    self._groups[name] = replace(sums, sum=torch.zeros_like(sums.sum), held=[], numbers=[])
        self.sums[name] = sums

    def _add(self, name: str, rows: Tensor, dense: Tensor | None = None, missing: Tensor | None = None) -> None:
        at, sums = self._seen.get(name, 0), self._groups.get(name, self.sums[name])
        self._seen[name] = at + len(rows)
        if self._share is None or self._share.ranks.size == 1:
            sums.add(rows, self._hold, self._own, at, _add, dense, missing)
            return
        if name in self._at_work:
            raise UnsupportedError(f"{name} is called more than once by its layer; refit it without torchrun")
        self._at_work.add(name)
        share, number = self._share, self._share.number(self._own)
        at = number * share.batch * (len(rows) // share.size(number))
        add_ = _add if share.group > 1 else self._in_order(number)
        sums.add(rows, self._hold, number, at, add_, dense, missing)

    def _in_order(self, number: int) -> Add:
        """Adds what ranks have of the round of batch `number`."""
        assert self._share is not None
        ranks, present, owners = self._share.ranks, self._share.present(number), self._share.last_round
        return lambda total, part, owner: ranks.add_in_order_(total, part, owner % owners, present)

    def end_batch(self) -> None:
        """Frees the last input."""
        self._last = None
        self._own += 1
        self._at_work.clear()
        if self._groups and self._share is not None and self._share.ends_group(self._own - 1):
            for name, sums in self._groups.items():
                sums.move_to(self.sums[name], self._in_order(self._share.number(self._own - 1)))

    def gathered(self) -> None:
        """Gives all ranks all sums. To be called on each of them, when all batches are done."""
        if self._share is None or self._share.ranks.size == 1:
            return
        ranks = self._share.ranks
        for sums in self.sums.values():
            for total in (sums.sum, sums.drift, sums.debt):
                if total is not None:
                    first, width = (sums.begin if total is sums.sum else 0), total.shape[1]
                    is_triangle = total is sums.sum and len(total) == width  # `finish` mirrors it
                    for i, (begin, end) in enumerate(_blocks(first, first + len(total), width)):
                        owner = (sums.owner + i) % self._share.last_round
                        block = total[begin - first : end - first, begin if is_triangle else 0 :]
                        sent = block.contiguous()  # a copy of most triangles' blocks
                        ranks.broadcast_(sent, owner)
                        block.copy_(sent)
            sums.join(ranks.gather(sums.held_out()))


def _add(total: Tensor, part: Tensor, owner: int) -> None:
    total += part
