"""The three kinds of jobs behind `pack` and `unpack`, shard by shard; job.py runs them.

Packing      packs a dense checkpoint, and records the original files in the report
Restoring    restores the original of an output of `pack` byte for byte, and verifies every file while it is written
Plain        unpacks a checkpoint that another program packed, with a report of its own
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from streamprune.disk import durable
from streamprune.disk.checkpoint import Checkpoint, open_shard
from streamprune.disk.durable import AtomicFile
from streamprune.disk.mapping import ShardMaps
from streamprune.disk.packed import PackedTensor, find_packed
from streamprune.disk.report import REPORT, file_digest
from streamprune.disk.shards import write_index
from streamprune.disk.state import JobState
from streamprune.errors import CheckpointError, CorruptStateError
from streamprune.packing.files import (
    PACKED_INDEX,
    Originals,
    entry,
    index_name,
    left_out,
    original_texts,
    packed_config,
    packed_name,
    plain_names,
    restore_file,
    source_name,
    unpacked_config,
)
from streamprune.packing.shards import Packer, Unpacker
from streamprune.packing.survey import Survey, survey

Record = Mapping[str, Any]


class Work(Protocol):
    """One kind of job. `prepare` or `resume` is called first; then `fill` and `verify` for each shard; then
    `finish`."""

    def prepare(self, state: JobState) -> dict[str, Any]:
        """What must be known before the first shard is written; returns it for `job.json`."""

    def resume(self, state: JobState, resolved: Mapping[str, Any]) -> None:
        """Continues with what `prepare` returned earlier."""

    def nbytes(self) -> int:
        """Bytes of all shards to be written."""

    def name_of(self, shard: str) -> str:
        """The name of the output file for a source shard."""

    def fill(self, path: Path, shard: str) -> AtomicFile | None:
        """Streams one shard to `path`; the caller commits it. None if the shard has no tensors to write."""

    def verify(self, path: Path, shard: str) -> None:
        """Checks a committed shard before it is recorded as done."""

    def finish(self, partial: Path, records: Sequence[Record]) -> dict[str, Any]:
        """Writes all other files; returns the fields of the report, empty if there is none."""


def make_work(checkpoint: Checkpoint, maps: ShardMaps, layout: str | None, originals: Originals | None) -> Work:
    """Packing if a `layout` is given; else Restoring if there are `originals`, else Plain.

    Raises CheckpointError if the parts of packed tensors do not fit together.
    """
    if layout is not None:
        return Packing(checkpoint, maps, layout)
    packed = find_packed(checkpoint, maps)
    return Plain(checkpoint, maps, packed) if originals is None else Restoring(checkpoint, maps, packed, originals)


class Packing:
    """Packs a checkpoint. `layout` is one of disk.packed.LAYOUTS, or "auto"."""

    def __init__(self, checkpoint: Checkpoint, maps: ShardMaps, layout: str) -> None:
        self._checkpoint, self._maps, self._layout = checkpoint, maps, layout

    def prepare(self, state: JobState) -> dict[str, Any]:
        """Runs the survey; raises as it does."""
        durable.make_folder(state.folder)
        self._begin(state, survey(self._checkpoint, self._maps, state.counts, self._layout))
        return {"survey": self._survey.to_json()}

    def resume(self, state: JobState, resolved: Mapping[str, Any]) -> None:
        """See Work. Raises CorruptStateError if the file of counts is damaged."""
        self._begin(state, Survey(**resolved["survey"]))
        if not state.counts.is_file() or file_digest(state.counts) != self._survey.counts:
            raise CorruptStateError(f"{state.counts} is missing or damaged; start again with --restart")

    def _begin(self, state: JobState, found: Survey) -> None:
        self._survey = found
        self._packer = Packer(self._checkpoint, self._maps, found, state.counts)

    def nbytes(self) -> int:
        return sum(
            len(self._packer.header(shard)) + sum(part.nbytes for part in self._packer.parts(shard))
            for shard in self._checkpoint.shards
        )

    def name_of(self, shard: str) -> str:
        return packed_name(shard)

    def fill(self, path: Path, shard: str) -> AtomicFile:
        return self._packer.fill(path, shard)

    def verify(self, path: Path, shard: str) -> None:
        """Unpacks a packed shard again. Raises CorruptStateError if the result is not the source, by its hash."""
        kept = self._survey.shards[shard]
        written = open_shard(path)
        with ShardMaps(written) as maps:
            found = Unpacker(written, maps, find_packed(written, maps)).digest(path.name, kept["bytes"])
        if found != kept["xxh3_128"]:
            raise CorruptStateError(
                f"{path} does not unpack to {self._checkpoint.path / shard}, from which it was made; "
                "start again with --restart, and check memory and disk"
            )

    def finish(self, partial: Path, records: Sequence[Record]) -> dict[str, Any]:
        """Writes config.json, the index, and copies of the side files."""
        checkpoint, found = self._checkpoint, self._survey
        files = [dict(record["shard"]) for record in records]
        originals = {**found.shards, **original_texts(checkpoint)}
        for name, kept in _copy_side_files(checkpoint, partial).items():
            files.append({"name": name, **kept})
            originals[name] = kept
        config = packed_config(checkpoint, found.layout, found.kept.keys(), found.sparsity)
        sizes = {
            packed_name(shard): {part.name: part.nbytes for part in self._packer.parts(shard)}
            for shard in checkpoint.shards
        }
        index = PACKED_INDEX if len(checkpoint.shards) > 1 else None
        files += _write_config_and_index(checkpoint, partial, config, sizes, index)
        return {
            "packed": {
                "layout": found.layout,
                "tensors": len(found.kept),
                "sparsity": found.sparsity,
                "bytes_before": sum(kept["bytes"] for kept in found.shards.values()),
                "bytes_after": sum(record["shard"]["bytes"] for record in records),
                "left_out": left_out(checkpoint),
                "original": Originals(originals, checkpoint.identity(), found.layout).to_json(),
            },
            "files": files,
        }


class Restoring:
    """Restores what `pack` packed."""

    def __init__(
        self, checkpoint: Checkpoint, maps: ShardMaps, packed: Mapping[str, PackedTensor], originals: Originals
    ) -> None:
        self._checkpoint, self._originals = checkpoint, originals
        self._unpacker = Unpacker(checkpoint, maps, packed)

    def prepare(self, state: JobState) -> dict[str, Any]:
        return {}

    def resume(self, state: JobState, resolved: Mapping[str, Any]) -> None:
        """Nothing to do: `prepare` returned nothing."""

    def nbytes(self) -> int:
        return sum(self._originals.files[source_name(shard)]["bytes"] for shard in self._checkpoint.shards)

    def name_of(self, shard: str) -> str:
        return source_name(shard)

    def fill(self, path: Path, shard: str) -> AtomicFile:
        """See Work. Raises CheckpointError if the restored shard is not the original, by its hash."""
        kept = self._originals.files[source_name(shard)]
        file = self._unpacker.restore(path, shard, kept["bytes"])
        if file.digest != kept["xxh3_128"]:
            file.abandon()
            raise CheckpointError(
                f"{self._checkpoint.path / shard}: unpacks to other bytes than were packed (xxh3_128 {file.digest}, "
                f"not {kept['xxh3_128']}); download it again"
            )
        return file

    def verify(self, path: Path, shard: str) -> None:
        """Nothing to do: `fill` compared the hash."""

    def finish(self, partial: Path, records: Sequence[Record]) -> dict[str, Any]:
        """Restores all other files; the original's own streamprune.json, if it had one, comes last."""
        shards = {source_name(shard) for shard in self._checkpoint.shards}
        for name in sorted(self._originals.files.keys() - shards, key=lambda n: (n == REPORT, n)):
            restore_file(self._checkpoint, partial, name, self._originals.files[name])
        return {}


class Plain:
    """Unpacks what another program packed."""

    def __init__(self, checkpoint: Checkpoint, maps: ShardMaps, packed: Mapping[str, PackedTensor]) -> None:
        self._checkpoint, self._packed = checkpoint, packed
        self._names = plain_names(checkpoint.shards)
        self._unpacker = Unpacker(checkpoint, maps, packed)

    def prepare(self, state: JobState) -> dict[str, Any]:
        return {}

    def resume(self, state: JobState, resolved: Mapping[str, Any]) -> None:
        """Nothing to do: `prepare` returned nothing."""

    def nbytes(self) -> int:
        return sum(ref.nbytes for shard in self._checkpoint.shards for ref in self._unpacker.dense(shard))

    def name_of(self, shard: str) -> str:
        return self._names[shard]

    def fill(self, path: Path, shard: str) -> AtomicFile | None:
        return self._unpacker.plain(path, shard)

    def verify(self, path: Path, shard: str) -> None:
        """Nothing to do: the original is not recorded."""

    def finish(self, partial: Path, records: Sequence[Record]) -> dict[str, Any]:
        """Writes config.json without its sparsity_config, the index, and copies of the side files."""
        checkpoint = self._checkpoint
        files = [dict(record["shard"]) for record in records if record["shard"]]
        files += [{"name": name, **kept} for name, kept in _copy_side_files(checkpoint, partial).items()]
        sizes = {
            self._names[shard]: {ref.name: ref.nbytes for ref in refs}
            for shard in checkpoint.shards
            if (refs := self._unpacker.dense(shard))
        }
        index = index_name(checkpoint.path, self._names.values())
        files += _write_config_and_index(checkpoint, partial, unpacked_config(checkpoint.config), sizes, index)
        return {
            "unpacked": {
                "layout": ", ".join(sorted({packed.layout for packed in self._packed.values()})),
                "tensors": len(self._packed),
                "bytes_before": sum(size for size, _ in checkpoint.shard_stats.values()),
                "bytes_after": sum(record["shard"]["bytes"] for record in records if record["shard"]),
            },
            "files": files,
        }


def _copy_side_files(checkpoint: Checkpoint, partial: Path) -> dict[str, dict[str, Any]]:
    """Copies all side files but config.json; returns {bytes, xxh3_128} of each."""
    copied = {}
    for name in checkpoint.side_files().carried:
        if name != "config.json":
            size, digest = durable.copy_file(checkpoint.path / name, partial / name)
            copied[name] = {"bytes": size, "xxh3_128": digest}
    return copied


def _write_config_and_index(
    checkpoint: Checkpoint, partial: Path, config: bytes, sizes: Mapping[str, Mapping[str, int]], index: str | None
) -> list[dict[str, Any]]:
    """Writes config.json and, unless `index` is None, the index; returns their entries for the report.

    `sizes` maps each shard to the bytes of its tensors.
    """
    durable.replace_file(partial / "config.json", config)
    files = [{"name": "config.json", **entry(config)}]
    if index is None:
        return files
    where = {name: shard for shard, tensors in sizes.items() for name in tensors}
    total = sum(size for tensors in sizes.values() for size in tensors.values())
    digest = write_index(partial / index, checkpoint.index_metadata, total, where)
    return [*files, {"name": index, "bytes": (partial / index).stat().st_size, "xxh3_128": digest}]
