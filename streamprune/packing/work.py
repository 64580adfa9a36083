"""The three kinds of work behind `pack` and `unpack`, shard by shard; packing.py runs them.

Packing      a dense checkpoint is packed; its report keeps what the files were
Restoring    what `pack` made becomes what it was, byte for byte, and every file is verified while it is written
Plain        a packed checkpoint of another program becomes a plain one, with a report of its own
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
from streamprune.disk.shards import write_index
from streamprune.disk.state import REPORT, JobState, file_digest
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
    """One kind of work. `prepare` or `resume` comes first, then `fill` for each shard, then `finish`."""

    def prepare(self, state: JobState) -> dict[str, Any]:
        """What is found out before anything is written, for `job.json`."""

    def resume(self, state: JobState, resolved: Mapping[str, Any]) -> None:
        """Takes up what was found out before."""

    def nbytes(self) -> int:
        """Bytes of all shards that will be written."""

    def name_of(self, shard: str) -> str:
        """What the file made of a shard is called."""

    def fill(self, path: Path, shard: str) -> AtomicFile | None:
        """Streams one shard; the caller commits it. None where it comes to nothing."""

    def verify(self, path: Path, shard: str) -> None:
        """Looks at a shard that was committed, before it counts as done."""

    def finish(self, partial: Path, records: Sequence[Record]) -> dict[str, Any]:
        """Writes all other files. Returns what the report says, if there is to be one."""


def make_work(checkpoint: Checkpoint, maps: ShardMaps, layout: str | None, originals: Originals | None) -> Work:
    """Packing if there is a layout to pack in; else Restoring what `originals` says, or Plain without it.

    Raises CheckpointError when packed tensors do not fit together.
    """
    if layout is not None:
        return Packing(checkpoint, maps, layout)
    packed = find_packed(checkpoint, maps)
    return Plain(checkpoint, maps, packed) if originals is None else Restoring(checkpoint, maps, packed, originals)


class Packing:
    """See the top. `layout` is one of disk.packed.LAYOUTS, or "auto"."""

    def __init__(self, checkpoint: Checkpoint, maps: ShardMaps, layout: str) -> None:
        self._checkpoint, self._maps, self._layout = checkpoint, maps, layout

    def prepare(self, state: JobState) -> dict[str, Any]:
        """The survey; see Work and survey."""
        durable.make_folder(state.folder)
        self._begin(state, survey(self._checkpoint, self._maps, state.counts, self._layout))
        return {"survey": self._survey.to_json()}

    def resume(self, state: JobState, resolved: Mapping[str, Any]) -> None:
        """See Work. Raises CorruptStateError when the counts of rows are damaged."""
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
        """Reads a packed shard back. Raises CorruptStateError when it does not unpack to the source's bytes."""
        kept = self._survey.shards[shard]
        written = open_shard(path)
        with ShardMaps(written) as maps:
            found = Unpacker(written, maps, find_packed(written, maps)).digest(path.name, kept["bytes"])
        if found != kept["xxh3_128"]:
            raise CorruptStateError(
                f"{path} does not unpack to {self._checkpoint.path / shard}, which it was made of; "
                "start again with --restart, and check memory and disk"
            )

    def finish(self, partial: Path, records: Sequence[Record]) -> dict[str, Any]:
        """See Work: config.json, index, and side files as they are."""
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
    """See the top."""

    def __init__(
        self, checkpoint: Checkpoint, maps: ShardMaps, packed: Mapping[str, PackedTensor], originals: Originals
    ) -> None:
        self._checkpoint, self._originals = checkpoint, originals
        self._unpacker = Unpacker(checkpoint, maps, packed)

    def prepare(self, state: JobState) -> dict[str, Any]:
        return {}

    def resume(self, state: JobState, resolved: Mapping[str, Any]) -> None:
        """Nothing was found out."""

    def nbytes(self) -> int:
        return sum(self._originals.files[source_name(shard)]["bytes"] for shard in self._checkpoint.shards)

    def name_of(self, shard: str) -> str:
        return source_name(shard)

    def fill(self, path: Path, shard: str) -> AtomicFile:
        """See Work. Raises CheckpointError when the shard does not come out as it was."""
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
        """Its hash was compared before it was committed."""

    def finish(self, partial: Path, records: Sequence[Record]) -> dict[str, Any]:
        """See Work; the original's own streamprune.json comes last, if it had one."""
        shards = {source_name(shard) for shard in self._checkpoint.shards}
        for name in sorted(self._originals.files.keys() - shards, key=lambda n: (n == REPORT, n)):
            restore_file(self._checkpoint, partial, name, self._originals.files[name])
        return {}


class Plain:
    """See the top."""

    def __init__(self, checkpoint: Checkpoint, maps: ShardMaps, packed: Mapping[str, PackedTensor]) -> None:
        self._checkpoint, self._packed = checkpoint, packed
        self._names = plain_names(checkpoint.shards)
        self._unpacker = Unpacker(checkpoint, maps, packed)

    def prepare(self, state: JobState) -> dict[str, Any]:
        return {}

    def resume(self, state: JobState, resolved: Mapping[str, Any]) -> None:
        """Nothing was found out."""

    def nbytes(self) -> int:
        return sum(ref.nbytes for shard in self._checkpoint.shards for ref in self._unpacker.dense(shard))

    def name_of(self, shard: str) -> str:
        return self._names[shard]

    def fill(self, path: Path, shard: str) -> AtomicFile | None:
        return self._unpacker.plain(path, shard)

    def verify(self, path: Path, shard: str) -> None:
        """Nobody knows what it was."""

    def finish(self, partial: Path, records: Sequence[Record]) -> dict[str, Any]:
        """See Work: config.json without what it says of sparsity, index, and side files as they are."""
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
    """Copies all but config.json; returns bytes and hash of each."""
    copied = {}
    for name in checkpoint.side_files().carried:
        if name != "config.json":
            size, digest = durable.copy_file(checkpoint.path / name, partial / name)
            copied[name] = {"bytes": size, "xxh3_128": digest}
    return copied


def _write_config_and_index(
    checkpoint: Checkpoint, partial: Path, config: bytes, sizes: Mapping[str, Mapping[str, int]], index: str | None
) -> list[dict[str, Any]]:
    """`sizes` maps each shard to its tensors and their bytes; `index` is None where one shard needs none."""
    durable.replace_file(partial / "config.json", config)
    files = [{"name": "config.json", **entry(config)}]
    if index is None:
        return files
    where = {name: shard for shard, tensors in sizes.items() for name in tensors}
    total = sum(size for tensors in sizes.values() for size in tensors.values())
    digest = write_index(partial / index, checkpoint.index_metadata, total, where)
    return [*files, {"name": index, "bytes": (partial / index).stat().st_size, "xxh3_128": digest}]
