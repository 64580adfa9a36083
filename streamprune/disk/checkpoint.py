"""A safetensors checkpoint: its index, shards, configuration and side files, checked before a tensor is read.

Headers are checked in header.py; this module checks that shards and index agree: every tensor of the index must be in
the shard that it names. Tensors of the shards that the index does not name are no part of the model (`beside`). Tensors
are mapped in mapping.py. Imports neither torch nor numpy, so that a run that finds its work done ends at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from streamprune.disk.folder import SideFiles, choose_weights, find_side_files, is_tokenizers, list_folder
from streamprune.disk.header import Shard, TensorRef, open_file, parse_object, read_bytes, read_shard, show
from streamprune.errors import CheckpointError

_SAMPLES_PER_SHARD, _SAMPLE_BYTES = 16, 4096


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint. `tensors` is in shard order, then in order of offset.

    `shard_headers` holds the xxh3_128 of each shard's header, `shard_stats` its (size in bytes, mtime in
    ns), both as they were when the checkpoint was opened.
    """

    path: Path
    tensors: Mapping[str, TensorRef]
    shards: tuple[str, ...]
    config: Mapping[str, Any]
    index_metadata: Mapping[str, Any]
    shard_headers: Mapping[str, str]
    shard_stats: Mapping[str, tuple[int, int]]
    index: str | None = None
    """File name of the index, if one is used."""
    beside: tuple[str, ...] = ()
    """Tensors that the index does not assign to the shard they are in, as "NAME in SHARD"; not part of the model."""
    follow_links: bool = False
    """Whether side files are copied that are links to places outside the checkpoint."""

    @property
    def streamed(self) -> bool:
        """Whether its shards are fetched from the hub when they are needed (disk/remote.py)."""
        return False

    @contextmanager
    def reading(self, shard: str) -> Iterator[Callable[[int, int], bytes]]:
        """A function that reads bytes of a shard: (first, number). Raises CheckpointError."""
        path = self.path / shard
        with open_file(path) as f:

            def read(begin: int, size: int) -> bytes:
                f.seek(begin)
                return read_bytes(f, path, size)

            yield read

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(ref.nbytes for ref in self.tensors.values())

    def side_files(self) -> SideFiles:
        """Which other files are copied with the weights, and which are not. See and raises as
        folder.find_side_files."""
        weights = {*self.shards, self.index} if self.index else {*self.shards}
        return find_side_files(self.path, weights, self.follow_links)

    def fingerprint(self) -> dict[str, str]:
        """Hashes that tell whether a resumed job reads the same files; they include mtimes.

        Keys: config (config.json), tokenizer (its files), shards (name, size, mtime and header of each).

        Raises:
            CheckpointError: a file can no longer be read.
        """
        shards = xxhash.xxh3_128()
        for shard in self.shards:
            shards.update(json.dumps([shard, *self.shard_stats[shard], self.shard_headers[shard]]).encode())
        names = [name for name in self.side_files().carried if is_tokenizers(name)]
        return {
            "config": _hash_files(self.path, ["config.json"]),
            "tokenizer": _hash_files(self.path, names),
            "shards": shards.hexdigest(),
        }

    def content(self) -> str:
        """A hash of headers and 4 KiB from the middle of each tensor, to recognise files whose mtime has changed.

        Training or conversion changes a tensor nearly everywhere, so that a sample of each tensor is enough. Raises
        CheckpointError if a file can no longer be read.
        """
        digest = xxhash.xxh3_128()
        for shard in self.shards:
            digest.update(json.dumps([shard, self.shard_stats[shard][0], self.shard_headers[shard]]).encode())
        for shard in self.shards:
            with self.reading(shard) as read:
                for ref in self.tensors.values():
                    if ref.shard == shard:
                        middle = ref.begin + max(0, ref.nbytes - _SAMPLE_BYTES) // 2
                        digest.update(read(middle, min(_SAMPLE_BYTES, ref.nbytes)))
        return digest.hexdigest()

    def identity(self) -> dict[str, str]:
        """Hashes that tell whether a copy of a model, with other mtimes, is the same model.

        Config, headers and sizes are the same for all fine-tunes of a model, so `sample` adds 16 pieces of
        4 KiB, evenly spaced over each shard's data. Keys: config, headers (with sizes), sample.

        Raises:
            CheckpointError: a file can no longer be read.
        """
        headers, sample = xxhash.xxh3_128(), xxhash.xxh3_128()
        for shard in self.shards:
            size = self.shard_stats[shard][0]
            headers.update(json.dumps([shard, size, self.shard_headers[shard]]).encode())
            with self.reading(shard) as read:
                start = 8 + int.from_bytes(read(0, 8), "little")
                for i in range(_SAMPLES_PER_SHARD):
                    begin = start + (size - start) * i // _SAMPLES_PER_SHARD
                    sample.update(read(begin, min(_SAMPLE_BYTES, size - begin)))
        return {
            "config": _hash_files(self.path, ["config.json"]),
            "headers": headers.hexdigest(),
            "sample": sample.hexdigest(),
        }


def open_checkpoint(
    path: Path, *, follow_links: bool = False, names: Sequence[str] | None = None,
    read: Callable[[str], Shard] | None = None,
) -> Checkpoint:  # fmt: skip
    """Read and check the headers of the checkpoint in folder `path`.

    `names` are the files that count as being in the folder (default: those that are), and `read` reads the header of a
    shard (default: from the folder).

    Raises:
        CheckpointError: missing, unreadable, truncated or malformed; the message names the file.
        UnsupportedError: the folder holds weights of another format only.
    """
    path = Path(path)
    names = list_folder(path) if names is None else names
    index, single = choose_weights(path, names)
    config = _read_json_object(path / "config.json")
    weight_map: dict[str, str] | None = None
    metadata: Mapping[str, Any] = {}
    if index is not None:
        weight_map, metadata = _read_index(path / index)
        if single is not None and single not in weight_map.values():
            weight_map, metadata = None, {}  # as in transformers, model.safetensors takes precedence
    shards = tuple(sorted(set(weight_map.values()))) if weight_map is not None else (str(single),)
    tensors: dict[str, TensorRef] = {}
    headers: dict[str, str] = {}
    stats: dict[str, tuple[int, int]] = {}
    beside: list[str] = []
    for shard in shards:
        found = read(shard) if read is not None else read_shard(path / shard)
        headers[shard], stats[shard] = found.header, (found.size, found.mtime_ns)
        for ref in found.refs:
            if weight_map is None or weight_map.get(ref.name) == shard:
                tensors[ref.name] = ref
            else:
                beside.append(f"{show(ref.name)} in {shard}")
    for name, shard in (weight_map or {}).items():
        if name not in tensors:
            elsewhere = next((b.rpartition(" in ")[2] for b in beside if b.rpartition(" in ")[0] == show(name)), None)
            mend = f"{elsewhere} holds it: mend the index" if elsewhere else "download the checkpoint again"
            raise CheckpointError(
                f"{path / str(index)}: tensor {show(name)} should be in {shard}, which does not hold it; {mend}"
            )
    if not tensors:
        raise CheckpointError(f"{path / shards[0]}: holds no tensors; is this the right checkpoint?")
    used = index if weight_map is not None else None
    return Checkpoint(path, tensors, shards, config, metadata, headers, stats, used, tuple(beside), follow_links)


def open_shard(path: Path) -> Checkpoint:
    """One safetensors file as a checkpoint of its own, without a configuration. Raises CheckpointError."""
    found = read_shard(path)
    name = path.name
    stats = {name: (found.size, found.mtime_ns)}
    return Checkpoint(path.parent, {r.name: r for r in found.refs}, (name,), {}, {}, {name: found.header}, stats)


def quantisation_of(checkpoint: Checkpoint) -> tuple[str, Any] | None:
    """(key, value) of the quantisation in config.json, also within a section such as text_config; None without one.

    A description that only counts zeros (a `sparsity_config` of format "dense") is no quantisation. Raises
    CheckpointError if there are several that contradict each other.
    """
    sections = [("", checkpoint.config)]
    sections += [(f"{key}.", value) for key, value in checkpoint.config.items() if isinstance(value, dict)]
    found: list[tuple[str, Any]] = []
    for prefix, section in sections:
        for key in ("quantization_config", "compression_config"):
            said = section.get(key)
            if said and not (isinstance(said, dict) and _is_plain(said)):
                found.append((f"{prefix}{key}", said))
    for where, other in found[1:]:
        if (what := _contradiction(found[0][1], other)) is not None:
            raise CheckpointError(
                f"{checkpoint.path / 'config.json'}: {found[0][0]} and {where} contradict each other ({show(what)}); "
                "remove the one that does not describe these weights"
            )
    return found[0] if found else None


def _contradiction(one: Any, other: Any) -> str | None:
    """In what two descriptions of a quantisation contradict each other; what only one of them says does not count."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return None if one == other else f"{one}, {other}"
    for key in ("quant_method", "format", "bits", "weight_block_size"):
        if key in one and key in other and one[key] != other[key]:
            return f"{key} {one[key]}, {other[key]}"
    return None


def _is_plain(description: Mapping[str, Any]) -> bool:
    sparsity = description.get("sparsity_config")
    dense = isinstance(sparsity, dict) and sparsity.get("format") == "dense"
    return dense and not description.get("config_groups")


# ---- configuration and index


def _hash_files(root: Path, names: Sequence[str]) -> str:
    digest = xxhash.xxh3_128()
    for name in names:
        with open_file(root / name) as f:
            data = read_bytes(f, root / name, -1)
        digest.update(json.dumps([name, len(data)]).encode())
        digest.update(data)
    return digest.hexdigest()


def _read_json_object(path: Path) -> dict[str, Any]:
    with open_file(path) as f:
        data = read_bytes(f, path, -1)
    return parse_object(path, data, "the file", repeats=True)


def _read_index(path: Path) -> tuple[dict[str, str], Mapping[str, Any]]:
    with open_file(path) as f:
        index = parse_object(path, read_bytes(f, path, -1), "the index")
    weight_map, metadata = index.get("weight_map"), index.get("metadata") or {}
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is missing, empty or not an object; download it again")
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: metadata is not an object; download it again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{path}: the shard of {show(name)} is not a string; download it again")
        if shard in ("", ".", "..") or not shard.isprintable() or any(c in shard for c in "/\\:"):
            raise CheckpointError(
                f"{path}: the shard of {show(name)} is {show(repr(shard))}, which is no plain file name; "
                "shards must lie beside the index"
            )
    return weight_map, metadata
