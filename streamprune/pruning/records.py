"""Records of a job: the choices made when it began, and each finished stage.

`Resolved` is part of `job.json`, a `StageRecord` is a line of the journal. Optional fields that are None are left out
of the JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

_OPTIONAL = {"optional": True}


@dataclass(frozen=True)
class Resolved:
    """Choices that a job makes when it begins, and keeps when it is resumed, even on another machine."""

    dtype: str
    """dtype of the computation, such as "bfloat16"."""
    device: str
    batch: int
    """Windows per batch; the order of sums depends on it."""
    tokens: str | None
    """Digest of the calibration windows; None without calibration."""
    bos: bool | None = field(default=None, metadata=_OPTIONAL)
    """Whether windows begin with a BOS token."""
    replaced: int | None = field(default=None, metadata=_OPTIONAL)
    """Invalid bytes of the text, which were replaced by U+FFFD."""
    text_tokens: int | None = field(default=None, metadata=_OPTIONAL)
    """Tokens of the text, if it has fewer than the windows."""
    gram_room: int | None = field(default=None, metadata=_OPTIONAL)
    """Memory for Gram matrices, bytes."""
    group: int | None = field(default=None, metadata=_OPTIONAL)
    """Batches that experts process together."""
    tune_windows: int | None = field(default=None, metadata=_OPTIONAL)
    """Windows that tuning processes at once."""
    shard_bytes: int | None = field(default=None, metadata=_OPTIONAL)
    """Largest size of a shard; None: each stage has a shard of its own."""
    allocation: Mapping[str, float] | None = field(default=None, metadata=_OPTIONAL)
    """The sparsity of each linear, with --allocate."""

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Resolved:
        """From the `resolved` of a job.json."""
        return cls(**{f.name: found[f.name] for f in fields(cls) if f.name in found})

    def to_json(self) -> dict[str, Any]:
        return _json(self)


@dataclass
class StageRecord:
    """One stage: filled in while it runs, and written to the journal as its commit."""

    stage: str
    shard: Mapping[str, Any] | None = None
    """Its part of a shard: the file's name, first byte, bytes, and xxh3_128 up to the part's end (see output.py)."""
    statistics: str | None = None
    """xxh3_128 of the layer's statistics file."""
    linears: list[dict[str, Any]] = field(default_factory=list)
    """A report on each linear that was pruned."""
    cache: bool = False
    """Whether the activations after this stage are durable."""
    batch: int | None = None
    """Windows per batch, if it was reduced when memory ran out."""
    pooled: list[str] | None = field(default=None, metadata=_OPTIONAL)
    """Linears of experts that fell back to statistics pooled over the layer's experts."""
    gram_passes: int | None = field(default=None, metadata=_OPTIONAL)
    """Extra passes for Gram matrices that did not fit into memory during the first."""
    ranks: int | None = field(default=None, metadata=_OPTIONAL)
    """Of several ranks, how many: each has a cache of its own."""
    tune: dict[str, Any] | None = field(default=None, metadata=_OPTIONAL)
    """Errors before and after tuning the layer (methods/tuning.py)."""
    seconds: float = 0.0
    peak: int = 0
    """Peak resident memory of the process so far, bytes."""

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> StageRecord:
        """From a line of the journal."""
        return cls(**{f.name: found[f.name] for f in fields(cls) if f.name in found})

    def to_json(self) -> dict[str, Any]:
        return _json(self)


def _json(record: Resolved | StageRecord) -> dict[str, Any]:
    values = ((f, getattr(record, f.name)) for f in fields(record))
    return {f.name: value for f, value in values if value is not None or not f.metadata.get("optional")}
