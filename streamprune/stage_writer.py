"""One stage into one shard: selected linears are pruned row by row, everything else is copied as it is.

Rows are handled in chunks, so no more than a chunk of a tensor is ever held; what has been read is released.
Every weight that passes is looked at: NaN and Inf are found here, with their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamprune.disk.durable import AtomicFile, Buffer
from streamprune.disk.header import TensorRef
from streamprune.disk.shards import fill_shard
from streamprune.errors import UsageError
from streamprune.kernels import Selection
from streamprune.model.feed import Feed
from streamprune.model.lane import Lane, is_out_of_memory
from streamprune.model.passes import finite_rows, refuse_nonfinite, rows_of
from streamprune.model.skeleton import TORCH_DTYPES, Skeleton, Stage
from streamprune.pruning.recipes import Recipe
from streamprune.pruning.scores import SCORES
from streamprune.pruning.selection import Pattern, check_pattern, prune_count, select
from streamprune.pruning.stats import InputStats

CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class Target:
    """How much to prune: `sparsity` of each row, or all but `pattern.n` of every `pattern.m` inputs."""

    recipe: Recipe
    sparsity: float | None
    pattern: Pattern | None
    backend: str | None = None
    """Which kernels: "numba", "torch", or by device."""

    def select(self, weight: Tensor, feature: Tensor, power: int) -> Selection:
        """Prunes rows (n, in); see selection.select."""
        return select(
            weight, feature, power,
            selector=self.recipe.selector, sparsity=self.sparsity, pattern=self.pattern, backend=self.backend,
        )  # fmt: skip


@dataclass
class StageWriter:
    """Writes the shards of one job. `linears` collects a report of each pruned linear of the current stage."""

    skeleton: Skeleton
    feed: Feed
    target: Target
    selected: frozenset[str]
    """Module paths of the linears to prune."""
    linears: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lane = Lane(self.feed.device)

    def fill(self, path: Path, stage: Stage, stats: Callable[[str, int], InputStats]) -> AtomicFile:
        """Fills one shard; the caller commits it. `stats(linear, in_features)` are those of a linear's input."""
        self.linears = []
        chosen = {ref.name: name for name, ref in stage.linears.items() if name in self.selected}
        known = {ref.name for ref in self.skeleton.sources.values()}

        def content(ref: TensorRef) -> Iterator[Buffer]:
            if ref.name in chosen:
                yield from self._pruned(ref, chosen[ref.name], stats)
            elif ref.name in known:
                yield from self._checked(ref)
            else:
                yield from _pieces(self.feed.maps.raw(ref))

        with self._lane.on():
            return fill_shard(path, stage.tensors, content, written=self._release)

    def _release(self, ref: TensorRef, begin: int, end: int) -> None:
        """Lets go of the pages of a tensor whose bytes have been used."""
        self.feed.maps.release([replace(ref, begin=ref.begin + begin, end=ref.begin + end)], drop_cache=True)

    def _checked(self, ref: TensorRef) -> Iterator[Buffer]:
        """The bytes of a tensor that is not pruned."""
        for _, rows in finite_rows(self.feed.maps, ref, CHUNK_BYTES):
            yield _bytes(rows)

    def _pruned(self, ref: TensorRef, name: str, stats: Callable[[str, int], InputStats]) -> Iterator[Buffer]:
        transposed = name in self.skeleton.transposed
        in_features = ref.shape[0] if transposed else ref.shape[1]
        make_feature = SCORES[self.target.recipe.score]
        needs = self.target.recipe.needs_statistics
        given = stats(name, in_features) if needs else InputStats.zeros(in_features)
        feature, power = make_feature(given)
        feature = feature.to(self.feed.device)
        removed = total = 0.0
        parts: list[Tensor] = []
        for begin, rows in rows_of(self.feed, ref, ref.nbytes if transposed else CHUNK_BYTES):
            for result in self._select(rows.t().contiguous() if transposed else rows, feature, power):
                if not result.finite:
                    refuse_nonfinite(ref, begin, rows)
                removed, total = removed + result.removed, total + result.total
                parts.append(result.weight)
            weight = parts[0] if len(parts) == 1 else torch.cat(parts)
            parts.clear()
            yield _bytes(self._lane.fetch(weight.t().contiguous() if transposed else weight, None))
        out_features = ref.shape[1] if transposed else ref.shape[0]
        per_row = prune_per_row(self.target, in_features)
        self.linears.append({
            "name": name, "rows": out_features, "in_features": in_features, "pruned": per_row * out_features,
            "sparsity": per_row / in_features, "removed_score": removed / total if total else 0.0,
        })  # fmt: skip

    def _select(self, rows: Tensor, feature: Tensor, power: int) -> Iterator[Selection]:
        """Prunes rows (n, in); in halves, where a device has no room for the kernels' temporaries."""
        try:
            yield self.target.select(rows, feature, power)
            return
        except RuntimeError as e:
            if len(rows) == 1 or not is_out_of_memory(e):
                raise
        torch.cuda.empty_cache()
        for half in torch.split(rows, -(-len(rows) // 2)):
            yield from self._select(half, feature, power)


def prune_per_row(target: Target, in_features: int) -> int:
    """Weights pruned in each row. Raises UsageError when the pattern does not divide in_features."""
    if target.pattern is not None:
        return in_features // target.pattern.m * (target.pattern.m - target.pattern.n)
    assert target.sparsity is not None
    return prune_count(target.sparsity, in_features)


def check_shapes(target: Target, linears: Mapping[str, TensorRef], transposed: frozenset[str]) -> None:
    """Raises UsageError for a linear whose width the pattern does not divide, before anything runs."""
    if target.pattern is None:
        return
    for name, ref in linears.items():
        try:
            check_pattern(target.pattern, ref.shape[0] if name in transposed else ref.shape[1])
        except UsageError as e:
            raise UsageError(f"{name}: {e}") from e


def _pieces(data: memoryview) -> Iterable[Buffer]:
    for begin in range(0, len(data), CHUNK_BYTES):
        yield data[begin : begin + CHUNK_BYTES]


def _bytes(tensor: Tensor) -> Buffer:
    """A contiguous CPU tensor's bytes, not copied."""
    view: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return view


def selected_linears(stages: Iterable[Stage], only: Any, skip: Any) -> dict[str, TensorRef]:
    """The linears that --only and --skip leave. Raises UsageError when none is left."""
    names = {n: ref for s in stages for n, ref in s.linears.items()}
    chosen = {n: r for n, r in names.items() if (not only or only.search(n)) and not (skip and skip.search(n))}
    if not chosen:
        example = next(iter(names), "none")
        raise UsageError(f"--only and --skip leave no linear to prune; names look like {example}")
    for name, ref in chosen.items():
        if ref.dtype not in TORCH_DTYPES:
            raise UsageError(f"{name} is {ref.dtype} and cannot be pruned; leave it out with --skip")
    return chosen
