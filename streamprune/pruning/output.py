"""The shards that a job writes: which part of which file each stage is, and how far they have been written.

A shard holds several stages, one after the other. Its header is written with the first stage, as names, dtypes and
shapes are known beforehand. A stage is committed by a line of the journal, once its bytes are durable; bytes behind the
last committed stage do not count and are overwritten. The xxh3_128 in a stage's record covers the shard up to the end
of the stage, so that the last stage's is the hash of the whole file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import xxhash

from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.durable import FilePart
from streamprune.disk.float_quantized import SCALE
from streamprune.disk.header import TensorRef
from streamprune.disk.shards import Part, arrange
from streamprune.errors import CorruptStateError
from streamprune.model.stages import Stage
from streamprune.pruning.codes import coded
from streamprune.pruning.records import StageRecord
from streamprune.pruning.target import Target

_READ_BYTES = 8 << 20


class Output:
    """The shards of one job in `folder`, of up to `shard_bytes` each; with None, each stage has a shard of its own."""

    def __init__(self, folder: Path, target: Target, shard_bytes: int | None) -> None:
        self._folder = folder
        self._apart = {name: [coded(part) for part in parts] for name, parts in target.apart.items()}
        stages = target.skeleton.stages
        parts = arrange([target.tensors_of(stage) for stage in stages], shard_bytes)
        self._parts = {stage.name: part for stage, part in zip(stages, parts, strict=True)}
        self._before: xxhash.xxh3_128 | None = None
        """Hash state of the shard's bytes before the current stage, unless this stage begins a shard."""
        self._at_work: tuple[str, FilePart] | None = None

    @property
    def has_index(self) -> bool:
        """Whether there are several shards, which need an index."""
        return next(iter(self._parts.values())).name != "model.safetensors"

    def part(self, stage: Stage) -> Part:
        """The stage's part of a shard."""
        return self._parts[stage.name]

    def by_shard(self, stages: Sequence[Stage]) -> list[list[Stage]]:
        """Stages that follow each other, grouped by the shard that they are in."""
        return [list(group) for _, group in groupby(stages, lambda stage: self.part(stage).name)]

    def begin(self, stage: Stage) -> FilePart:
        """Opens the stage's part for writing from its beginning. May be called again to write a stage anew."""
        if self._at_work is not None and self._at_work[0] != stage.name:
            self._before = self._at_work[1].hash
        part = self.part(stage)
        file = FilePart(self._folder / part.name, part.begin, self._before if part.begin else None)
        self._at_work = (stage.name, file)
        return file

    def entry(self, stage: Stage, file: FilePart) -> dict[str, Any]:
        """The journal's entry about a stage's part that has been written to `file`."""
        return {"name": file.path.name, "begin": file.begin, "bytes": file.size, "xxh3_128": file.digest}

    def written(self, stage: Stage) -> Checkpoint:
        """A checkpoint with the tensors of a stage that has been written, for reading them again.

        Experts' matrices that are stored in parts, which lie behind one another, are there as a whole, too, as
        `linear.weight`.
        """
        part = self.part(stage)
        tensors = {ref.name: ref for ref in part.tensors}
        for name in stage.linears if self._apart else ():
            if name in self._apart:
                tensors |= _whole(name, [[tensors[each.name] for each in made] for made in self._apart[name]])
        info = (self._folder / part.name).stat()
        return Checkpoint(
            self._folder, tensors, (part.name,), {}, {}, {},
            {part.name: (info.st_size, info.st_mtime_ns)},
        )  # fmt: skip

    def files(self, records: Sequence[StageRecord]) -> list[dict[str, Any]]:
        """Name, bytes and xxh3_128 of each shard. `records` must have all stages."""
        parts = zip(self._parts.values(), records, strict=True)
        return [
            {"name": part.name, "bytes": part.end, "xxh3_128": record.shard["xxh3_128"]}
            for part, record in parts
            if part.is_last and record.shard
        ]

    def resume(self, records: Sequence[StageRecord]) -> None:
        """Continues after the recorded stages. Raises CorruptStateError if a shard is not as it was written.

        The sizes of all shards are checked; an unfinished shard is also read and its hash is checked.
        """
        shards = [record.shard for record in records if record.shard]
        for part, shard in zip(self._parts.values(), shards, strict=False):
            path = self._folder / part.name
            size = path.stat().st_size if path.is_file() else -1
            if (size != part.end if part.is_last else size < part.end) or _place(shard) != (part.name, part.begin):
                raise _damaged(path)
        last = list(self._parts.values())[len(shards) - 1] if shards else None
        if last is not None and not last.is_last:
            self._before = _digest(self._folder / last.name, last.end)
            if self._before.hexdigest() != shards[-1]["xxh3_128"]:
                raise _damaged(self._folder / last.name)


def _whole(name: str, parts: Sequence[Sequence[TensorRef]]) -> dict[str, TensorRef]:
    """Codes and scales of a linear as one tensor each, of its `parts` (codes, scales).

    These lie behind one another: in a shard, FP8 tensors and then their scales are in the order of their names, and no
    name is between those of an expert's gate and up projection.
    """
    found = {}
    for end, refs in zip(("", SCALE), zip(*parts, strict=True), strict=True):
        whole = f"{name}.weight{end}"
        rows = sum(ref.shape[0] for ref in refs)
        found[whole] = replace(refs[0], name=whole, shape=(rows, refs[0].shape[1]), end=refs[-1].end)
    return found


def _place(shard: Mapping[str, Any]) -> tuple[str, int]:
    return shard["name"], shard.get("begin", 0)


def _damaged(path: Path) -> CorruptStateError:
    return CorruptStateError(f"{path} is missing or damaged; start again with --restart")


def _digest(path: Path, nbytes: int) -> xxhash.xxh3_128:
    """Hash state after the first `nbytes` of a file. Raises CorruptStateError if they cannot be read."""
    found, left = xxhash.xxh3_128(), nbytes
    try:
        with path.open("rb") as f:
            while left and (data := f.read(min(left, _READ_BYTES))):
                found.update(data)
                left -= len(data)
    except OSError as e:
        raise CorruptStateError(f"{path} cannot be read ({e.strerror}); start again with --restart") from e
    return found
