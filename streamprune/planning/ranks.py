"""What several ranks make of a planned run: each passes its share of the windows, and rank 0 prunes and writes.

It assumes that each rank is as fast as this process was measured, so that it has a GPU, or as many cores, of its own.
Batches are dealt whole (with experts, groups of them), and rows of refits in eighths of a linear; what is exchanged
takes time that depends on the network, and is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from streamprune.errors import UsageError
from streamprune.planning.cost import RunShape, Split
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
    """What most of the time goes to: "windows" or "refits", which ranks share, or "rank 0", which prunes and writes."""


def with_ranks(ranks: int, run: RunShape, split: Split, cache_bytes: int) -> RanksPlan:
    """The plan of a run for several ranks, given what a single process would take.

    Raises UsageError for more ranks than there are parts to share out, or for none.
    """
    if ranks < 1:
        raise UsageError("--nproc must be at least 1")
    parts = run.groups if run.tokens else ranks
    if parts < ranks:
        raise UsageError(
            f"--nproc {ranks}: there are {parts} batches to share out; plan fewer ranks, or more --samples"
        )
    share = -(-parts // ranks) / parts if run.tokens else 1.0
    rows = -(-PARTS // ranks) / PARTS if run.tokens else 1.0
    found = replace(
        split, forward=share * split.forward, statistics=share * split.statistics, refit=max(share, rows) * split.refit
    )
    kinds = {
        "windows": found.forward + found.statistics, "refits": found.refit, "rank 0": found.selection + found.disk,
    }  # fmt: skip
    bound = max(kinds, key=lambda kind: kinds[kind])
    return RanksPlan(ranks, round(share * run.tokens), round(share * cache_bytes), found.total, found, bound)
