"""The shards that a job writes: where each stage lies in them, and what they have come to so far.

A shard holds several stages, one behind the other. Its header is written with the first of them, for names, dtypes and
shapes are known beforehand; a stage is committed by a line of the journal once its bytes are durable, so whatever lies
behind the last committed stage does not count and is overwritten. The xxh3_128 of a record is that of the shard up to
the end of its stage: of the last stage it is the whole file's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.durable import FilePart
from streamprune.disk.shards import Part, arrange
from streamprune.errors import CorruptStateError
from streamprune.model.skeleton import Stage
from streamprune.pruning.records import StageRecord
from streamprune.pruning.target import Target

_READ_BYTES = 8 << 20


class Output:
    """The shards of one job in `folder`, of up to `shard_bytes`; with None each stage has one of its own."""

    def __init__(self, folder: Path, target: Target, shard_bytes: int | None) -> None:
        self._folder = folder
        stages = target.skeleton.stages
        parts = arrange([target.tensors_of(stage) for stage in stages], shard_bytes)
        self._parts = {stage.name: part for stage, part in zip(stages, parts, strict=True)}
        self._before: xxhash.xxh3_128 | None = None
        """Has seen the bytes before the stage at work, unless it begins a shard."""
        self._at_work: tuple[str, FilePart] | None = None

    @property
    def has_index(self) -> bool:
        """Whether there are several shards, so that an index has to say what is where."""
        return next(iter(self._parts.values())).name != "model.safetensors"

    def part(self, stage: Stage) -> Part:
        """Where a stage lies."""
        return self._parts[stage.name]

    def begin(self, stage: Stage) -> FilePart:
        """A stage's place, to be written from its beginning; once more, where it is to be written again."""
        if self._at_work is not None and self._at_work[0] != stage.name:
            self._before = self._at_work[1].hash
        part = self.part(stage)
        file = FilePart(self._folder / part.name, part.begin, self._before if part.begin else None)
        self._at_work = (stage.name, file)
        return file

    def entry(self, stage: Stage, file: FilePart) -> dict[str, Any]:
        """What the journal says of a stage that has been written."""
        return {"name": file.path.name, "begin": file.begin, "bytes": file.size, "xxh3_128": file.digest}

    def written(self, stage: Stage) -> Checkpoint:
        """A stage that has been made durable, to be read again."""
        part = self.part(stage)
        info = (self._folder / part.name).stat()
        return Checkpoint(
            self._folder, {ref.name: ref for ref in part.tensors}, (part.name,), {}, {}, {},
            {part.name: (info.st_size, info.st_mtime_ns)},
        )  # fmt: skip

    def files(self, records: Sequence[StageRecord]) -> list[dict[str, Any]]:
        """Name, bytes and xxh3_128 of each shard, when all stages are recorded."""
        parts = zip(self._parts.values(), records, strict=True)
        return [
            {"name": part.name, "bytes": part.end, "xxh3_128": record.shard["xxh3_128"]}
            for part, record in parts
            if part.is_last and record.shard
        ]

    def resume(self, records: Sequence[StageRecord]) -> None:
        """Goes on behind the recorded stages. Raises CorruptStateError where a shard is not as it was written.

        All are looked at for their sizes; one that is to be continued is read.
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


def _place(shard: Mapping[str, Any]) -> tuple[str, int]:
    return shard["name"], shard.get("begin", 0)


def _damaged(path: Path) -> CorruptStateError:
    return CorruptStateError(f"{path} is missing or damaged; start again with --restart")


def _digest(path: Path, nbytes: int) -> xxhash.xxh3_128:
    """Of the first bytes of a file. Raises CorruptStateError where they cannot be read."""
    found, left = xxhash.xxh3_128(), nbytes
    try:
        with path.open("rb") as f:
            while left and (data := f.read(min(left, _READ_BYTES))):
                found.update(data)
                left -= len(data)
    except OSError as e:
        raise CorruptStateError(f"{path} cannot be read ({e.strerror}); start again with --restart") from e
    return found
