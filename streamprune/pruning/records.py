"""What a job writes down as it goes: what it settled for when it began, and each stage that is done.

`Resolved` is part of `job.json`, a `StageRecord` is a line of the journal. A field that does not apply is left out of
the JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

_OPTIONAL = {"optional": True}


@dataclass(frozen=True)
class Resolved:
    """What a job has settled for, and keeps to when it is resumed, whatever the machine then is like."""

    dtype: str
    """What is computed in."""
    device: str
    batch: int
    """Windows a batch: sums come in its order."""
    tokens: str | None
    """Digest of the calibration windows; None without calibration."""
    bos: bool | None = field(default=None, metadata=_OPTIONAL)
    """Whether windows begin with a BOS token."""
    replaced: int | None = field(default=None, metadata=_OPTIONAL)
    """Bytes of the text that were no characters."""
    text_tokens: int | None = field(default=None, metadata=_OPTIONAL)
    """Tokens of a text that has fewer than the windows take."""
    gram_room: int | None = field(default=None, metadata=_OPTIONAL)
    """Bytes for Gram matrices."""
    group: int | None = field(default=None, metadata=_OPTIONAL)
    """Batches that experts compute for at once."""
    tune_windows: int | None = field(default=None, metadata=_OPTIONAL)
    """Windows that tuning computes at once."""
    shard_bytes: int | None = field(default=None, metadata=_OPTIONAL)
    """How large shards may get; None: each stage has one of its own."""
    allocation: Mapping[str, float] | None = field(default=None, metadata=_OPTIONAL)
    """The sparsity of each linear, where it was shared out."""

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Resolved:
        """From the `resolved` of a job.json."""
        return cls(**{f.name: found[f.name] for f in fields(cls) if f.name in found})

    def to_json(self) -> dict[str, Any]:
        return _json(self)


@dataclass
class StageRecord:
    """One stage: filled in while it is at work, written at its commit."""

    stage: str
    shard: Mapping[str, Any] | None = None
    """Its part of a shard: the file's name, first byte, bytes, and xxh3_128 up to the part's end (see output.py)."""
    statistics: str | None = None
    """xxh3_128 of the file with the layer's statistics."""
    linears: list[dict[str, Any]] = field(default_factory=list)
    """A report of each linear that was pruned."""
    cache: bool = False
    """Whether the activations after this stage are durable."""
    batch: int | None = None
    """Windows a batch, after memory has run out."""
    pooled: list[str] | None = field(default=None, metadata=_OPTIONAL)
    """Linears of experts that fell back to statistics pooled over the layer's experts."""
    gram_passes: int | None = field(default=None, metadata=_OPTIONAL)
    """Further passes that Gram matrices took."""
    tune: dict[str, Any] | None = field(default=None, metadata=_OPTIONAL)
    """What tuning the layer came to."""
    seconds: float = 0.0
    peak: int = 0
    """Highest resident memory of the process so far, bytes."""

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> StageRecord:
        """From a line of the journal."""
        return cls(**{f.name: found[f.name] for f in fields(cls) if f.name in found})

    def to_json(self) -> dict[str, Any]:
        return _json(self)


def _json(record: Resolved | StageRecord) -> dict[str, Any]:
    values = ((f, getattr(record, f.name)) for f in fields(record))
    return {f.name: value for f, value in values if value is not None or not f.metadata.get("optional")}
