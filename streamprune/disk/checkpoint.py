"""A safetensors checkpoint: its index, shards, configuration and side files, checked before a tensor is read.

Headers are checked in header.py; here, that shards and index tell the same story: a tensor that the index
puts elsewhere, or does not know, is an error. Tensors are mapped in mapping.py. Imports neither torch nor
numpy, so that a run which finds its work done ends at once.
"""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from streamprune.disk.header import TensorRef, open_file, parse_object, read_bytes, read_shard, show
from streamprune.errors import CheckpointError, UnsupportedError

_INDEX_SUFFIX = ".safetensors.index.json"
_SAMPLES_PER_SHARD, _SAMPLE_BYTES = 16, 4096

WEIGHT_PATTERNS = (
    "*.safetensors", f"*{_INDEX_SUFFIX}", "*pytorch_model*.bin", "model*.bin", "adapter_model*.bin",
    "openvino_model*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.h5.index.json",
    "*.msgpack", "*.msgpack.index.json", "*.gguf", "*.onnx", "*.onnx_data*", "*.tflite", "*.ot", "*.mlmodel",
    "consolidated.*", "consolidated-*",
)  # fmt: skip
_TOKENIZER_PATTERNS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
    "*.tiktoken", "chat_template*", "tokenization_*.py",
)  # fmt: skip
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


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

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(ref.nbytes for ref in self.tensors.values())

    def side_files(self) -> tuple[str, ...]:
        """Everything to carry over beside the weights, as sorted relative POSIX paths.

        Left out: weights of any format (WEIGHT_PATTERNS), hidden files and folders, `streamprune.json`, and
        what is no regular file. Links to files are followed (the hub cache needs it), linked folders are not.

        Raises:
            CheckpointError: a link leads nowhere, or a folder cannot be read.
        """
        return tuple(sorted(_walk(self.path, "")))

    def fingerprint(self) -> dict[str, str]:
        """Hashes that tell whether a resumed job reads the same files, by their mtime too.

        Keys: config (config.json), tokenizer (its files), shards (name, size, mtime and header of each).

        Raises:
            CheckpointError: a file cannot be read any more.
        """
        shards = xxhash.xxh3_128()
        for shard in self.shards:
            shards.update(json.dumps([shard, *self.shard_stats[shard], self.shard_headers[shard]]).encode())
        names = [n for n in self.side_files() if any(fnmatch.fnmatchcase(n, p) for p in _TOKENIZER_PATTERNS)]
        return {
            "config": _hash_files(self.path, ["config.json"]),
            "tokenizer": _hash_files(self.path, names),
            "shards": shards.hexdigest(),
        }

    def identity(self) -> dict[str, str]:
        """Hashes that tell whether a model copied elsewhere is the same model.

        Config, headers and sizes are equal for every fine-tune of a model, so `sample` adds 16 pieces of
        4 KiB, evenly spread over each shard's data. Keys: config, headers (with sizes), sample.

        Raises:
            CheckpointError: a file cannot be read any more.
        """
        headers, sample = xxhash.xxh3_128(), xxhash.xxh3_128()
        for shard in self.shards:
            size = self.shard_stats[shard][0]
            headers.update(json.dumps([shard, size, self.shard_headers[shard]]).encode())
            with open_file(self.path / shard) as f:
                start = 8 + int.from_bytes(read_bytes(f, self.path / shard, 8), "little")
                for i in range(_SAMPLES_PER_SHARD):
                    f.seek(start + (size - start) * i // _SAMPLES_PER_SHARD)
                    sample.update(read_bytes(f, self.path / shard, _SAMPLE_BYTES))
        return {
            "config": _hash_files(self.path, ["config.json"]),
            "headers": headers.hexdigest(),
            "sample": sample.hexdigest(),
        }


def open_checkpoint(path: Path) -> Checkpoint:
    """Read and check the headers of the checkpoint in folder `path`.

    Raises:
        CheckpointError: missing, unreadable, truncated or malformed; the message names the file.
        UnsupportedError: the folder holds weights of another format only.
    """
    path = Path(path)
    names = _list_folder(path)
    index, single = _choose_weights(path, names)
    config = _read_json_object(path / "config.json")
    weight_map: dict[str, str] | None = None
    metadata: Mapping[str, Any] = {}
    if index is not None:
        weight_map, metadata = _read_index(path / index)
        if single is not None and single not in weight_map.values():
            weight_map, metadata = None, {}  # as transformers does: model.safetensors goes first
    shards = tuple(sorted(set(weight_map.values()))) if weight_map is not None else (str(single),)
    tensors: dict[str, TensorRef] = {}
    headers: dict[str, str] = {}
    stats: dict[str, tuple[int, int]] = {}
    for shard in shards:
        found = read_shard(path / shard)
        headers[shard], stats[shard] = found.header, (found.size, found.mtime_ns)
        for ref in found.refs:
            if weight_map is not None:
                _check_indexed(path / str(index), weight_map, ref)
            tensors[ref.name] = ref
    if weight_map is not None:
        for name, shard in weight_map.items():
            if name not in tensors:
                raise CheckpointError(
                    f"{path / str(index)}: tensor {show(name)} should be in {shard}, which does not hold it; "
                    "download the checkpoint again"
                )
    if not tensors:
        raise CheckpointError(f"{path / shards[0]}: holds no tensors; is this the right checkpoint?")
    return Checkpoint(path, tensors, shards, config, metadata, headers, stats)


def open_shard(path: Path) -> Checkpoint:
    """One safetensors file as a checkpoint of its own, without a configuration. Raises CheckpointError."""
    found = read_shard(path)
    name = path.name
    stats = {name: (found.size, found.mtime_ns)}
    return Checkpoint(path.parent, {r.name: r for r in found.refs}, (name,), {}, {}, {name: found.header}, stats)


def quantisation_of(checkpoint: Checkpoint) -> tuple[str, Any] | None:
    """Where config.json says that the weights are quantised (also within a section such as text_config), and what.

    That zeros were counted, with `sparsity_config` of the format "dense", is no quantisation.
    """
    sections = [("", checkpoint.config)]
    sections += [(f"{key}.", value) for key, value in checkpoint.config.items() if isinstance(value, dict)]
    for prefix, section in sections:
        for key in ("quantization_config", "compression_config"):
            found = section.get(key)
            if found and not (isinstance(found, dict) and _is_plain(found)):
                return f"{prefix}{key}", found
    return None


def _is_plain(description: Mapping[str, Any]) -> bool:
    sparsity = description.get("sparsity_config")
    dense = isinstance(sparsity, dict) and sparsity.get("format") == "dense"
    return dense and not description.get("config_groups")


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose config.json says that its weights are quantised already.

    Raises:
        UnsupportedError: it does; the message names the method.
    """
    found = quantisation_of(checkpoint)
    if found is None:
        return
    where, description = found
    sparsity = description.get("sparsity_config") if isinstance(description, dict) else None
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise UnsupportedError(
            f"{checkpoint.path / 'config.json'}: {where} says the weights are packed; make them plain with `unpack`"
        )
    method = description.get("quant_method", "unknown") if isinstance(description, dict) else description
    raise UnsupportedError(
        f"{checkpoint.path / 'config.json'}: {where} says that the weights are quantised ({show(method)}), which "
        "cannot be pruned; pass the unquantised checkpoint"
    )


# ---- choosing files


def _list_folder(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path))  # noqa: PTH208 (names, not paths)
    except FileNotFoundError:
        raise CheckpointError(f"no such folder: {path}; pass a folder with safetensors weights") from None
    except NotADirectoryError:
        raise CheckpointError(f"{path} is not a folder; pass the folder that holds the checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def _choose_weights(path: Path, names: Sequence[str]) -> tuple[str | None, str | None]:
    """The (index file, single file) to use: one of them, or both when it takes the index to decide."""
    single = [n for n in names if n.endswith(".safetensors") and not n.startswith(".")]
    indexes = [n for n in names if n.endswith(_INDEX_SUFFIX) and not n.startswith(".")]
    main = "model.safetensors" if "model.safetensors" in single else None
    if f"model{_INDEX_SUFFIX}" in indexes:
        return f"model{_INDEX_SUFFIX}", main
    if main:
        return None, main
    if len(indexes) == 1:
        return indexes[0], None
    if not indexes and len(single) == 1 and not single[0].startswith("adapter_"):
        return None, single[0]
    if indexes or (single and not single[0].startswith("adapter_")):
        found = ", ".join(show(n) for n in (indexes or single)[:4])
        raise CheckpointError(
            f"{path}: several weights files ({found}, ...) and no model{_INDEX_SUFFIX} to choose between "
            "them; keep one model in the folder, or add its index"
        )
    raise _no_weights(path, names)


def _no_weights(path: Path, names: Sequence[str]) -> CheckpointError | UnsupportedError:
    if any(n.endswith(".gguf") for n in names):
        return UnsupportedError(f"{path}: holds GGUF weights only; pass the original safetensors checkpoint")
    if "adapter_config.json" in names:
        return UnsupportedError(f"{path}: holds an adapter only; merge it into its base model and save that")
    pickled = [n for n in names if any(fnmatch.fnmatchcase(n, p) for p in _PICKLED)]
    if pickled:
        return UnsupportedError(
            f"{path}: holds no safetensors but {show(pickled[0])}; load it with transformers and convert it "
            "with model.save_pretrained(..., safe_serialization=True)"
        )
    return CheckpointError(f"{path}: holds no *.safetensors; pass a folder with safetensors weights")


def _walk(root: Path, prefix: str) -> Iterator[str]:
    try:
        with os.scandir(root / prefix) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith(".") or any(fnmatch.fnmatchcase(name.lower(), p) for p in WEIGHT_PATTERNS):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    if name != "__pycache__":
                        yield from _walk(root, f"{prefix}{name}/")
                elif entry.is_file():
                    if prefix + name != "streamprune.json":
                        yield prefix + name
                elif entry.is_symlink() and not Path(entry.path).exists():
                    raise CheckpointError(
                        f"{entry.path}: the link leads nowhere; download the checkpoint again or remove it"
                    )
    except OSError as error:
        raise CheckpointError(f"{root / prefix}: cannot be read: {error.strerror}") from None


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


def _check_indexed(index: Path, weight_map: Mapping[str, str], ref: TensorRef) -> None:
    shard = weight_map.get(ref.name)
    if shard != ref.shard:
        said = f"is in {shard} by the index" if shard else "is not in the index"
        raise CheckpointError(
            f"{index}: tensor {show(ref.name)} of {ref.shard} {said}; shards and index do not belong "
            "together, download the checkpoint again"
        )
