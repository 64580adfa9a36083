"""The files beside the shards of a packed checkpoint: its config.json, and what is recorded of the original files.

compressed-tensors up to 0.14 looks for `quantization_config.sparsity_config` in config.json (older versions:
compression_config, or a sparsity_config of its own). The report of `pack`, `streamprune.json`, holds the original text
files, and the size and xxh3_128 of every file, so that `unpack` can restore and verify them. Reports are untrusted
input: the file names in them are checked before anything is written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from streamprune.disk import durable, journal
from streamprune.disk.checkpoint import Checkpoint, open_checkpoint
from streamprune.disk.header import open_file, read_bytes, show
from streamprune.disk.packed import LAYOUTS, TWO_FOUR
from streamprune.disk.report import REPORT, file_digest
from streamprune.errors import CheckpointError, CorruptStateError, UnsupportedError

INDEX_SUFFIX = ".safetensors.index.json"
MAIN_INDEX = f"model{INDEX_SUFFIX}"
PACKED_INDEX = f"packed{INDEX_SUFFIX}"
_PREFIX = "packed-"

Files = dict[str, dict[str, Any]]
"""Relative name -> {bytes, xxh3_128}, and "text" for files whose content is in the report."""


def packed_name(shard: str) -> str:
    """The name of the packed shard of a source shard, chosen so that no loader takes the folder for a model.

    Under the usual names, transformers would find no weights under the names it looks for, and use random ones.
    """
    return _PREFIX + shard


def source_name(shard: str) -> str:
    """The name that the source shard of a packed shard had."""
    return shard.removeprefix(_PREFIX)


def plain_names(shards: Collection[str]) -> dict[str, str]:
    """Packed shard -> name of its unpacked shard, where the original names are not recorded.

    The names stay as they are, except that our prefix is removed, as loaders would not find shards with it.
    """
    ours = all(shard.startswith(_PREFIX) for shard in shards)
    return {shard: source_name(shard) if ours else shard for shard in shards}


def index_name(folder: Path, shards: Collection[str]) -> str | None:
    """The name of the index that a checkpoint of these shards has or needs; None for one shard, which needs none."""
    indexes = sorted(p.name for p in folder.glob(f"*{INDEX_SUFFIX}") if not p.name.startswith("."))
    if len(shards) == 1 and (not indexes or "model.safetensors" in shards):
        return None
    return indexes[0] if len(indexes) == 1 and indexes[0] != PACKED_INDEX else MAIN_INDEX


def original_texts(checkpoint: Checkpoint) -> Files:
    """The text files that packing replaces, with their content: config.json, indexes, streamprune.json."""
    names = ["config.json", REPORT, *(p.name for p in checkpoint.path.glob(f"*{INDEX_SUFFIX}"))]
    found: Files = {}
    for name in sorted(names):
        path = checkpoint.path / name
        if path.is_file() and not name.startswith("."):
            with open_file(path) as f:
                data = read_bytes(f, path, -1)
            found[name] = {**entry(data), "text": data.decode(errors="surrogateescape")}
    return found


def left_out(checkpoint: Checkpoint) -> list[str]:
    """The files that packing does not copy, as sorted relative names: weights that the checkpoint does not use.

    Hidden files and folders, and `__pycache__`, are left out of the list.
    """
    carried = {*checkpoint.shards, *checkpoint.side_files().carried, *original_texts(checkpoint)}
    found = []
    for folder, folders, names in os.walk(checkpoint.path):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        inside = [Path(folder, name).relative_to(checkpoint.path).as_posix() for name in names if name[0] != "."]
        found += [name for name in inside if name not in carried]
    return sorted(found)


def text_bytes(kept: Mapping[str, Any]) -> bytes:
    """The bytes of a file whose content is in the report."""
    return str(kept["text"]).encode(errors="surrogateescape")


def entry(data: bytes) -> dict[str, Any]:
    """Size and hash of a file's bytes."""
    return {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}


def packed_config(checkpoint: Checkpoint, layout: str, packed: Collection[str], sparsity: float) -> bytes:
    """config.json of a packed checkpoint; `packed` are the names of packed tensors, other linears go to "ignore"."""
    before = checkpoint.config.get("quantization_config")
    ignore = sorted(
        name.removesuffix(".weight")
        for name, ref in checkpoint.tensors.items()
        if name.endswith(".weight") and len(ref.shape) == 2 and name not in packed
    )
    described = dict(before) if isinstance(before, dict) else {"quant_method": "compressed-tensors"}
    described["sparsity_config"] = {
        "format": layout,
        "sparsity_structure": "2:4" if layout == TWO_FOUR else "unstructured",
        "targets": ["Linear"],
        "ignore": ignore,
        "global_sparsity": round(sparsity, 6),
    }
    return _text({**checkpoint.config, "quantization_config": described})


def unpacked_config(config: Mapping[str, Any]) -> bytes:
    """config.json without the description of sparsity; a description of quantisation stays."""
    result = {k: v for k, v in config.items() if k != "sparsity_config"}
    for key in ("quantization_config", "compression_config"):
        described = result.get(key)
        if not isinstance(described, dict):
            continue
        if (
            described.get("config_groups")
            or described.get("quant_method", "compressed-tensors") != "compressed-tensors"
        ):
            result[key] = {**described, "sparsity_config": {}}
        else:
            del result[key]
    return _text(result)


def _text(config: Mapping[str, Any]) -> bytes:
    return json.dumps(config, indent=2, ensure_ascii=False).encode(errors="surrogatepass") + b"\n"


@dataclass(frozen=True)
class Originals:
    """What a packed checkpoint was made from: its files, and its Checkpoint.identity()."""

    files: Files
    identity: Mapping[str, str]
    layout: str
    """The layout that it was packed in, one of LAYOUTS."""

    def to_json(self) -> dict[str, Any]:
        return {"files": self.files, "identity": dict(self.identity)}


def read_originals(checkpoint: Checkpoint) -> Originals | None:
    """What a checkpoint packed by `pack` was made from, by its report; None for others, and if there is no report.

    Raises:
        CheckpointError: the report is damaged, has invalid file names, or does not match the shards.
    """
    path = checkpoint.path / REPORT
    try:
        report = journal.read_json(path, "report") if path.is_file() else None
    except (CorruptStateError, RecursionError) as e:
        raise _damaged(path) from e
    if report is None or "packed" not in report:
        if report is not None and any(shard.startswith(_PREFIX) for shard in checkpoint.shards):
            raise _damaged(path)
        return None
    try:
        original = report["packed"]["original"]
        files, identity = original["files"], original["identity"]
        for name, kept in files.items():
            fine = isinstance(kept["bytes"], int) and isinstance(kept["xxh3_128"], str) and 0 <= kept["bytes"] < 2**63
            if not fine or not _is_plain(name) or not isinstance(kept.get("text", ""), str):
                raise ValueError(show(name))
            text_bytes({"text": "", **kept})  # raises ValueError for text that cannot be encoded
        layout = report["packed"]["layout"]
        if not isinstance(identity, dict) or layout not in LAYOUTS:
            raise TypeError
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise _damaged(path) from e
    missing = [s for s in map(source_name, checkpoint.shards) if s not in files or "text" in files[s]]
    if missing:
        raise CheckpointError(f"{path}: shard {show(missing[0])} is not among the original files; download it again")
    return Originals(files, identity, layout)


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: its record of the original files is damaged; download it again, or remove it: weights can be "
        "unpacked without it, but they are not verified, and not in their original files"
    )


def _is_plain(name: str) -> bool:
    """Whether a relative name is safe to write: it stays within its folder, is not too long, and nothing is hidden."""
    parts = PurePosixPath(name).parts
    odd = name.startswith("/") or "\0" in name or (os.name == "nt" and ("\\" in name or ":" in name))
    fits = all(len(os.fsencode(part)) < 256 for part in parts)
    return bool(parts) and "/".join(parts) == name and fits and not odd and not any(p.startswith(".") for p in parts)


def is_restored(folder: Path, originals: Originals, shards: Collection[str]) -> bool:
    """Whether a folder holds exactly the original files, apart from the job's state in .streamprune.

    Shards are compared by name, size, header and samples of their data, all other files by their hash.
    """
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir() or p.is_symlink()}
    if {name for name in there if not name.startswith(".streamprune/")} != originals.files.keys():
        return False
    for name, kept in originals.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != kept["bytes"]:
            return False
        if name not in shards and file_digest(path) != kept["xxh3_128"]:
            return False
    try:
        return open_checkpoint(folder).identity() == originals.identity
    except (CheckpointError, UnsupportedError):
        return False


def restore_file(checkpoint: Checkpoint, folder: Path, name: str, kept: Mapping[str, Any]) -> None:
    """Writes an original file other than a shard, from its recorded text or as a copy.

    Raises CheckpointError if it is missing, or not what was packed.
    """
    if "text" in kept:
        durable.make_folder((folder / name).parent)
        data = text_bytes(kept)
        if entry(data) == {k: kept[k] for k in ("bytes", "xxh3_128")}:
            durable.replace_file(folder / name, data)
            return
        source = checkpoint.path / REPORT
    else:
        source = checkpoint.path / name
        if source.is_file() and durable.copy_file(source, folder / name) == (kept["bytes"], kept["xxh3_128"]):
            return
    raise CheckpointError(f"{source}: {show(name)} is missing or not what was packed; download it again")
