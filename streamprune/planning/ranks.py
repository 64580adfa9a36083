"""What several ranks make of a planned run: each passes its share of the windows, and rank 0 prunes and writes.

It assumes that each rank is as fast as this process was measured, so that it has a GPU, or as many cores, of its own,
and that all ranks have one disk. Batches are dealt whole (with experts, groups of them), refits in eighths of a linear,
experts that are refitted one at a time, and, where there is no pass, whole shards. Layers are tuned by rank 0. What is
exchanged takes time that depends on the network, and is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from streamprune.errors import UsageError
from streamprune.planning.cost import stage_seconds
from streamprune.planning.work import RunShape, Speeds, Split, StageWork
from streamprune.pruning.refit import PARTS


@dataclass(frozen=True)
class RanksPlan:
    """One of several ranks, the one with the largest share."""

    ranks: int
    tokens: int
    """Tokens that it passes through the model."""
    cache_bytes: int
    """Its activations on disk."""
    seconds: float
    split: Split
    bound: str
    """What most of the time goes to, one of `parts`."""
    parts: Mapping[str, float]
    """Seconds of "windows", "refits" and "experts" (with a refit), which ranks share; of "tuning" and "masks" on rank 0
    (without a pass, masks are shared); and of waiting for the "disk"."""


def with_ranks(
    ranks: int, run: RunShape, works: Sequence[StageWork], split: Split, cache_bytes: int, experts: int, shards: int,
    speeds: Speeds,
) -> RanksPlan:  # fmt: skip
    """The plan of a run for several ranks, given what a single process would take.

    `experts` of a layer are refitted, and there are so many `shards`. Raises UsageError for more ranks than there are
    parts to share out, or for none.
    """
    if ranks < 1:
        raise UsageError("--nproc must be at least 1")
    if not run.tokens:
        return _without_pass(ranks, run, works, shards, speeds)
    if run.groups < ranks:
        raise UsageError(
            f"--nproc {ranks}: there are {run.groups} batches to share out; plan fewer ranks, or more --samples"
        )
    share, rows = _share(run.groups, ranks), _share(PARTS, ranks)
    apart = split.refit * _of_experts(works)
    parts = {
        "windows": share * (split.forward + split.statistics),
        "refits": max(share, rows) * (split.refit - apart), "experts": _share(max(experts, 1), ranks) * apart,
        "tuning": split.tuning, "masks": split.selection, "disk": split.disk,
    }  # fmt: skip
    found = replace(
        split, forward=share * split.forward, statistics=share * split.statistics,
        refit=parts["refits"] + parts["experts"],
    )  # fmt: skip
    on_first = 2 * run.tokens * run.state_bytes if run.tuning else 0  # what layers are tuned on
    cache = share * (cache_bytes - on_first) + on_first
    return _plan(ranks, round(share * run.tokens), round(cache), found, parts)


def _without_pass(
    ranks: int, run: RunShape, works: Sequence[StageWork], shards: int, speeds: Speeds
) -> RanksPlan:  # fmt: skip
    faster = 1 / _share(shards, ranks)
    each = replace(
        speeds, selection=faster * speeds.selection, scanning=faster * speeds.scanning, hashing=faster * speeds.hashing
    )
    found = sum(stage_seconds(works, run, each), Split())
    return _plan(ranks, 0, 0, found, {"masks": found.selection, "disk": found.disk})


def _plan(ranks: int, tokens: int, cache: int, split: Split, parts: Mapping[str, float]) -> RanksPlan:
    bound = max(parts, key=lambda part: parts[part])
    return RanksPlan(ranks, tokens, cache, split.total, split, bound, {k: s for k, s in parts.items() if s > 0})


def _share(parts: int, ranks: int) -> float:
    """Of all parts, those of the rank with the most of them."""
    return -(-parts // ranks) / parts


def _of_experts(works: Sequence[StageWork]) -> float:
    """Of the operations of all refits, the part that is for experts."""
    both = sum(work.refit.float32 + work.refit.native for work in works)
    return sum(work.refit.apart for work in works) / both if both else 0.0
