"""Statistics of each linear's input: gathered during the forward pass, stored in a small safetensors file.

Linears with the same input tensor (q, k and v; gate and up) share one set of statistics. In the file, each set has
three tensors named after the first linear of its group:

    NAME.tokens  I64 ()      NAME.sum  F64 (in,)      NAME.sumsq  F64 (in,)

The metadata holds `format`, `version`, `digest` (xxh3_128 of the tensors' bytes) and, as JSON:

    groups       linear -> NAME
    updates      layer -> [tokens, Σ ‖h_out − h_in‖² / ‖h_out‖² over them]: how much of the hidden states the layer
                 made. Each token counts the same, so massive activations do not dominate.
    model        the model that the statistics belong to
    calibration  the tokens that they were gathered on
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from streamprune.calibration.statistics_header import FORMAT, VERSION, StatisticsHeader
from streamprune.disk.durable import Buffer
from streamprune.disk.header import TensorRef
from streamprune.disk.shards import write_shard
from streamprune.errors import CheckpointError, CorruptStateError, UsageError
from streamprune.methods.stats import InputStats
from streamprune.process.share import Share

Accumulate = Callable[[Tensor, Tensor, Tensor], None]
"""A kernel: adds x (tokens, in) to its second argument (in,) float64, and x² to its third."""


class _Part:
    """The sums of one batch, or of all."""

    def __init__(self) -> None:
        self.groups: dict[str, str] = {}
        """Linear -> the first one with the same input."""
        self.sums: dict[str, tuple[int, Any, Any]] = {}
        """First linear with an input -> tokens, sums and sums of squares (in,) float64, as tensors or arrays."""
        self.updated = 0
        """Tokens in `relative_updates`."""
        self.relative_updates: Tensor | float = 0.0

    def __bool__(self) -> bool:
        return bool(self.sums or self.updated)

    def add_(self, other: _Part) -> None:
        """Adds the sums of the next batch."""
        for name in other.sums.keys() & self.groups.keys() - self.sums.keys():  # no longer shared
            tokens, total, squares = self.sums[self.groups[name]]
            self.sums[name] = (tokens, total.clone(), squares.clone())
        late = {name: other.sums[other.groups[name]] for name in self.sums if name in other.groups.keys() - other.sums}
        for name, (tokens, *both) in (other.sums | late).items():
            total, squares = (torch.as_tensor(values) for values in both)
            if name in self.sums:
                before, into, into_squares = self.sums[name]
                into += total
                into_squares += squares
                self.sums[name] = (before + tokens, into, into_squares)
            else:
                self.sums[name] = (tokens, total.clone(), squares.clone())  # no tensors of inference mode
        for name, first in other.groups.items():
            self.groups[name] = name if name in self.sums else self.groups.get(name, first)
        self.updated += other.updated
        self.relative_updates = self.relative_updates + other.relative_updates

    def told(self) -> _Part:
        """The same as arrays, which are sent to other ranks faster."""
        found = _Part()
        found.sums = {n: (tokens, a.cpu().numpy(), b.cpu().numpy()) for n, (tokens, a, b) in self.sums.items()}
        found.updated, found.relative_updates = self.updated, float(self.relative_updates)
        found.groups = self.groups
        return found


class Collector:
    """Gathers the statistics of one layer. `watch` must be called with each linear's input, in the order of use.

    Each batch is summed on its own and then added to the sums, in the order of the batches, so that it does not matter
    which rank sees which (`share`).
    """

    def __init__(self, accumulate: Accumulate, share: Share | None = None) -> None:
        self._accumulate, self._share = accumulate, share
        self._all, self._part = _Part(), _Part()
        self._apart: set[str] = set()
        """Linears that have been called with an input of their own after one that they shared."""
        self._own: list[tuple[int, _Part]] = []
        """With several ranks: number of a batch, and its sums."""
        self._batch = 0
        self._complete = False
        self._last: tuple[Tensor, str] | None = None

    def watch(self, name: str, x: Tensor) -> None:
        """Adds x (…, in), unless it is the same tensor as for the linear before.

        A linear that is called once more with an input of its own has sums of its own from then on.
        """
        groups, sums = self._part.groups, self._part.sums
        leader = groups.get(name)
        if self._last is not None and x is self._last[0]:
            if name not in sums and name not in self._apart:
                groups[name] = self._last[1]
                return
        else:
            self._last = (x, name)
        groups[name] = name
        if name not in sums and leader is not None:
            tokens, total, squares = sums[leader]
            sums[name] = (tokens, total.clone(), squares.clone())
            self._apart.add(name)
        rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
        if name not in sums:
            zeros = [torch.zeros(x.shape[-1], dtype=torch.float64, device=x.device) for _ in range(2)]
            sums[name] = (0, zeros[0], zeros[1])
        tokens, total, squares = sums[name]
        self._accumulate(rows, total, squares)
        sums[name] = (tokens + rows.shape[0], total, squares)

    def end_batch(self) -> None:
        """Frees the last input, and adds the batch to the sums."""
        self._last = None
        part, self._part = self._part, _Part()
        if self._share is None or self._share.ranks.size == 1:
            self._all.add_(part)
        else:
            self._own.append((self._share.number(self._batch), part.told()))
        self._batch += 1

    @property
    def groups(self) -> dict[str, str]:
        """Linear -> the first one with the same input, in the order of use."""
        self.gathered()
        return self._all.groups

    def flow(self, before: Tensor, after: Tensor) -> None:
        """Adds the relative size of the layer's update, from states (batch, seqlen, hidden) before and after it."""
        out = after.detach().float()
        norm, change = (torch.linalg.vector_norm(states, dim=-1).double() for states in (out, out - before.to(out)))
        self._part.relative_updates += torch.where(norm > 0, change / norm, 0.0).square().sum()
        self._part.updated += norm.numel()

    def gathered(self) -> None:
        """Adds the batches of all ranks. To be called on each of them, when all batches are done."""
        if self._part:
            self.end_batch()
        if self._share is not None and self._share.ranks.size > 1 and not self._complete:
            self._complete = True
            told = self._share.ranks.gather(self._own)
            self._own = []
            for _, part in sorted(chain(*told), key=lambda pair: pair[0]):
                self._all.add_(part)

    def tokens(self, name: str) -> int:
        """How many tokens a linear saw."""
        return self._all.sums[self.groups[name]][0]

    @property
    def update(self) -> tuple[float, float]:
        """(tokens, sum of relative updates) of the layer; see `updates` in the module's docstring."""
        self.gathered()
        return float(self._all.updated), float(self._all.relative_updates)

    def finish(self) -> dict[str, InputStats]:
        """First linear of a group -> its statistics. Raises CheckpointError when an activation was NaN or infinite."""
        self.gathered()
        result = {}
        for name, (tokens, total, squares) in self._all.sums.items():
            bad = (~torch.isfinite(total + squares)).nonzero()
            if len(bad):
                raise CheckpointError(
                    f"the input of {name} is not finite (feature {int(bad[0])}): the model overflows on this text; "
                    "try --dtype float32"
                )
            result[name] = InputStats(tokens, total.cpu(), squares.cpu())
        return result


def write_statistics(
    path: Path,
    stats: Iterable[tuple[str, InputStats]],
    groups: Mapping[str, str],
    model: Mapping[str, str],
    calibration: Mapping[str, Any],
    updates: Mapping[str, Sequence[float]] | None = None,
) -> str:
    """Writes a statistics file atomically and durably; returns its xxh3_128. For the arguments, see the module."""
    parts: dict[str, Tensor] = {}
    for name, s in stats:
        parts |= {f"{name}.tokens": torch.tensor(s.tokens), f"{name}.sum": s.sum, f"{name}.sumsq": s.sumsq}
    refs = [
        TensorRef(n, path.name, "I64" if t.dtype == torch.int64 else "F64", tuple(t.shape), 0, t.numel() * 8)
        for n, t in parts.items()
    ]

    def content(ref: TensorRef) -> Iterator[Buffer]:
        yield parts[ref.name].contiguous().reshape(-1).view(torch.uint8).numpy().data

    digest = xxhash.xxh3_128()
    for ref in sorted(refs, key=lambda r: r.name):  # the order in which write_shard writes tensors of one item size
        for piece in content(ref):
            digest.update(piece)
    metadata = {"format": FORMAT, "version": VERSION, "digest": digest.hexdigest()} | {
        key: json.dumps(value, sort_keys=True)
        for key, value in (
            ("groups", groups),
            ("model", model),
            ("calibration", calibration),
            ("updates", updates or {}),
        )
    }
    return write_shard(path, refs, content, metadata).digest


class StatisticsFile(StatisticsHeader):
    """A checked statistics file. Tensors are read by `load`, one linear at a time."""

    def load(self, linear: str, in_features: int) -> InputStats:
        """The statistics of one linear's input.

        Raises UsageError when they are missing or of another width, CorruptStateError when they are damaged.
        """
        group = self.groups.get(linear)
        tensors = {k: self.refs.get(f"{group}.{k}") for k in ("tokens", "sum", "sumsq")}
        if group is None or any(t is None for t in tensors.values()):
            raise UsageError(f"{self.path} has no statistics of {linear}; it belongs to another model")
        values = {k: self._read(t) for k, t in tensors.items() if t is not None}
        if values["sum"].shape != (in_features,) or values["sumsq"].shape != (in_features,):
            raise UsageError(
                f"{self.path}: {linear} has {in_features} inputs, the statistics {tuple(values['sum'].shape)}"
            )
        sumsq = values["sumsq"]
        if not bool(torch.isfinite(sumsq).all()) or bool((sumsq < 0).any()) or int(values["tokens"]) < 0:
            raise CorruptStateError(
                f"{self.path}: the statistics of {linear} are damaged; make them again with `calibrate`"
            )
        return InputStats(int(values["tokens"]), values["sum"], values["sumsq"])

    def _read(self, ref: TensorRef) -> Tensor:
        wanted = ("I64", ()) if ref.name.endswith(".tokens") else ("F64", ref.shape[:1])
        if (ref.dtype, ref.shape) != wanted:
            raise CorruptStateError(
                f"{self.path}: {ref.name} is {ref.dtype} {list(ref.shape)}; make it again with `calibrate`"
            )
        with self.path.open("rb") as f:
            f.seek(ref.begin)
            data = bytearray(f.read(ref.nbytes))
        if len(data) != ref.nbytes:
            raise CorruptStateError(f"{self.path} is truncated; make it again with `calibrate`")
        return torch.frombuffer(data, dtype={"I64": torch.int64, "F64": torch.float64}[ref.dtype]).view(ref.shape)


def merge_statistics(
    path: Path, parts: Iterable[Path], model: Mapping[str, str], calibration: Mapping[str, Any]
) -> str:
    """Merges the layers' files into one; returns its xxh3_128. Raises as StatisticsFile does."""
    groups: dict[str, str] = {}
    updates: dict[str, Sequence[float]] = {}
    stats: dict[str, InputStats] = {}
    for part in parts:
        file = StatisticsFile(part)
        groups |= file.groups
        updates |= file.updates
        for linear, leader in file.groups.items():  # not by linear: pooled experts have a leader that is none
            if leader not in stats:
                stats[leader] = file.load(linear, file.refs[f"{leader}.sum"].shape[0])
    return write_statistics(path, stats.items(), groups, model, calibration, updates)
