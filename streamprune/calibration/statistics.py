"""Statistics of each linear's input: gathered during the forward pass, kept in a small safetensors file.

Linears that are fed the very same tensor (q, k and v; gate and up) share one set of statistics, gathered
once. In the file, each set has three tensors named after the first linear of its group:

    NAME.tokens  I64 ()      NAME.sum  F64 (in,)      NAME.sumsq  F64 (in,)

and the metadata holds `format`, `version`, `digest` (xxh3_128 of the tensors' bytes), `groups` (linear -> NAME),
`updates` (layer -> number of tokens, and the sum over them of how much of the state after the layer is what the layer
added: ‖h_out − h_in‖² / ‖h_out‖², token by token, so that no massive activation owns it), `model` (what the
statistics belong to) and `calibration` (which tokens), the last four as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

Accumulate = Callable[[Tensor, Tensor, Tensor], None]


class Collector:
    """Gathers the statistics of one layer; `watch` is called with each linear's input, in the order of use."""

    def __init__(self, accumulate: Accumulate) -> None:
        self.groups: dict[str, str] = {}
        self._accumulate = accumulate
        self._sums: dict[str, tuple[int, Tensor, Tensor]] = {}
        self._last: tuple[Tensor, str] | None = None
        self._update: Tensor | float = 0.0
        self._states = 0

    def watch(self, name: str, x: Tensor) -> None:
        """Adds x (…, in), unless it is the tensor that the linear before was fed."""
        if self._last is not None and x is self._last[0]:
            self.groups[name] = self._last[1]
            return
        self._last = (x, name)
        self.groups[name] = name
        rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
        if name not in self._sums:
            zeros = [torch.zeros(x.shape[-1], dtype=torch.float64, device=x.device) for _ in range(2)]
            self._sums[name] = (0, zeros[0], zeros[1])
        tokens, total, squares = self._sums[name]
        self._accumulate(rows, total, squares)
        self._sums[name] = (tokens + rows.shape[0], total, squares)

    def end_batch(self) -> None:
        """Lets go of the last input."""
        self._last = None

    def flow(self, before: Tensor, after: Tensor) -> None:
        """Adds what the layer made of its states (batch, seqlen, hidden)."""
        now = after.detach().float()
        whole, added = (torch.linalg.vector_norm(states, dim=-1).double() for states in (now, now - before.to(now)))
        self._update += torch.where(whole > 0, added / whole, 0.0).square().sum()
        self._states += whole.numel()

    def tokens(self, name: str) -> int:
        """How many inputs of a linear there were."""
        return self._sums[self.groups[name]][0]

    @property
    def update(self) -> tuple[float, float]:
        """Tokens, and the sum over them of how much of their state the layer made; see the file's docstring."""
        return float(self._states), float(self._update)

    def finish(self) -> dict[str, InputStats]:
        """The statistics of each group. Raises CheckpointError when an activation was NaN or infinite."""
        result = {}
        for name, (tokens, total, squares) in self._sums.items():
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
    """Writes a statistics file, atomically and durably; returns its xxh3_128."""
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
    for ref in sorted(refs, key=lambda r: r.name):  # as write_shard orders tensors of one item size
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
    """A statistics file, checked; `load(linear)` reads one linear's statistics."""

    def load(self, linear: str, in_features: int) -> InputStats:
        """The statistics of one linear's input. Raises UsageError when they are missing or of another width."""
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
    """Joins the layers' files into one; returns its xxh3_128. Raises as StatisticsFile does."""
    groups: dict[str, str] = {}
    updates: dict[str, Sequence[float]] = {}
    stats: dict[str, InputStats] = {}
    for part in parts:
        file = StatisticsFile(part)
        groups |= file.groups
        updates |= file.updates
        for linear, leader in file.groups.items():  # a leader need not be a linear: experts may go by a common sum
            if leader not in stats:
                stats[leader] = file.load(linear, file.refs[f"{leader}.sum"].shape[0])
    return write_statistics(path, stats.items(), groups, model, calibration, updates)
