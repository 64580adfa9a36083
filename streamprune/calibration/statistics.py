"""A statistics file: what a calibration has gathered of the inputs of linears (collector.py).

It is a small safetensors file.

Linears with the same input tensor (q, k and v; gate and up) share one set of statistics. In the file, each set has
three tensors named after the first linear of its group:

    NAME.tokens  I64 ()      NAME.sum  F64 (in,)      NAME.sumsq  F64 (in,)

The metadata holds `format`, `version`, `digest` (xxh3_128 of the tensors' bytes) and, as JSON:

    groups       linear -> NAME
    updates      layer -> [tokens, Σ ‖h_out − h_in‖² / ‖h_out‖² over them]: how much of the hidden states the layer
                 made. Each token counts the same, so massive activations do not dominate.
    model        the model that the statistics belong to
    calibration  the tokens that they were gathered on
    outline      the model's stages and linears (model/outline.py), so that a prune needs not build it; there is an
                 `outline_digest` of it. Earlier files have none.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from streamprune.calibration.statistics_header import FORMAT, VERSION, StatisticsHeader, outline_digest
from streamprune.disk.durable import Buffer
from streamprune.disk.header import TensorRef
from streamprune.disk.shards import write_shard
from streamprune.errors import CorruptStateError, UsageError
from streamprune.methods.stats import InputStats

_Array = np.ndarray[Any, np.dtype[Any]]


def write_statistics(
    path: Path,
    stats: Iterable[tuple[str, InputStats]],
    groups: Mapping[str, str],
    model: Mapping[str, str],
    calibration: Mapping[str, Any],
    updates: Mapping[str, Sequence[float]] | None = None,
    outline: Mapping[str, Any] | None = None,
) -> str:
    """Writes a statistics file atomically and durably; returns its xxh3_128. For the arguments, see the module."""
    parts: dict[str, _Array] = {}
    for name, s in stats:
        parts |= {f"{name}.tokens": np.array(s.tokens, np.int64), f"{name}.sum": s.sum, f"{name}.sumsq": s.sumsq}
    refs = [
        TensorRef(n, path.name, "I64" if t.dtype == np.int64 else "F64", t.shape, 0, t.nbytes) for n, t in parts.items()
    ]

    def content(ref: TensorRef) -> Iterator[Buffer]:
        yield np.ascontiguousarray(parts[ref.name]).reshape(-1).view(np.uint8).data

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
    if outline is not None:
        metadata["outline"] = json.dumps(outline, separators=(",", ":"))
        metadata["outline_digest"] = outline_digest(metadata)
    return write_shard(path, refs, content, metadata).digest


class StatisticsFile(StatisticsHeader):
    """A checked statistics file. Tensors are read by `load`, one linear at a time."""

    def load(self, linear: str, in_features: int) -> InputStats:
        """The statistics of one linear's input.

        The file must be of this model. Raises UsageError when they are missing or of another width, CorruptStateError
        when they are damaged.
        """
        group = self.groups.get(linear)
        tensors = {k: self.refs.get(f"{group}.{k}") for k in ("tokens", "sum", "sumsq")}
        if group is None:
            raise UsageError(
                f"{self.path} has no statistics of {linear}, which was not used on the text that it was made from; "
                "--skip it, or make the file again with `calibrate` and another text"
            )
        if missing := [key for key, tensor in tensors.items() if tensor is None]:
            raise CorruptStateError(
                f"{self.path} is damaged: {group}.{missing[0]}, the statistics of {linear}, is missing; make it again "
                "with `calibrate`"
            )
        values = {k: self._read(t) for k, t in tensors.items() if t is not None}
        if values["sum"].shape != (in_features,) or values["sumsq"].shape != (in_features,):
            raise UsageError(
                f"{self.path}: {linear} has {in_features} inputs, the statistics {tuple(values['sum'].shape)}"
            )
        sumsq = values["sumsq"]
        if not np.isfinite(sumsq).all() or (sumsq < 0).any() or int(values["tokens"]) < 0:
            raise CorruptStateError(
                f"{self.path}: the statistics of {linear} are damaged; make them again with `calibrate`"
            )
        return InputStats(int(values["tokens"]), values["sum"], values["sumsq"])

    def _read(self, ref: TensorRef) -> _Array:
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
        return np.frombuffer(data, np.int64 if ref.dtype == "I64" else np.float64).reshape(ref.shape)


def merge_statistics(
    path: Path, parts: Iterable[Path], model: Mapping[str, str], calibration: Mapping[str, Any],
    outline: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
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
    return write_statistics(path, stats.items(), groups, model, calibration, updates, outline)
