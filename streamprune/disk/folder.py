"""The folder of a checkpoint: which files are its weights, which are copied with them, and which are left behind.

Left behind are other copies of the weights in any format, training state, temporary files of downloads and editors, web
pages saved in place of a file, and links that lead out of the checkpoint. A link stays within the checkpoint if its
target lies beside config.json or a shard, links resolved: a folder in the hub's cache consists of links into one other
folder.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from streamprune.disk.header import open_file, page_in_place, pointer_in_place, read_bytes, show
from streamprune.errors import CheckpointError, UnsupportedError

INDEX_SUFFIX = ".safetensors.index.json"

WEIGHT_PATTERNS = (
    "*.safetensors", f"*{INDEX_SUFFIX}", "*pytorch_model*.bin", "model*.bin", "adapter_model*.bin",
    "openvino_model*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.h5.index.json",
    "*.msgpack", "*.msgpack.index.json", "*.gguf", "*.onnx", "*.onnx_data*", "*.tflite", "*.ot", "*.mlmodel",
    "consolidated.*", "consolidated-*",
)  # fmt: skip
TOKENIZER_PATTERNS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
    "*.tiktoken", "chat_template*", "tokenization_*.py",
)  # fmt: skip
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TEMPORARY = (
    "*.incomplete", "*.aria2", "*.part", "*.crdownload", "*.tmp", "*.bak", "*.orig", "*.swp", "*~", "optimizer*.bin",
    "scheduler*.bin", "*.distcp",
)  # fmt: skip
_TRAINING = re.compile(r"(checkpoint-|global_step)\d+")
_HEAD_BYTES = 512


@dataclass(frozen=True)
class SideFiles:
    """Files beside the weights, as sorted relative POSIX paths: those to copy, and those to leave behind."""

    carried: tuple[str, ...]
    left_behind: tuple[str, ...]


def find_side_files(root: Path, weights: Collection[str], follow_links: bool) -> SideFiles:
    """All files in the folder `root` except `weights` (shards and index), hidden files and `streamprune.json`.

    Links to files are followed if they stay within the checkpoint, or with `follow_links`; links to folders never are.

    Raises:
        CheckpointError: a link is dangling, a folder cannot be read, or a file that the model needs is a git-lfs
            pointer.
    """
    homes = {(root / name).resolve().parent for name in ("config.json", *weights)} | {root.resolve()}
    carried: list[str] = []
    left: list[str] = []
    for name, entry in _walk(root, ""):
        if entry.is_dir(follow_symlinks=False):
            left.append(f"{name}/")
        elif name in weights or name == "streamprune.json":
            continue
        elif _matches(entry.name, (*WEIGHT_PATTERNS, *_TEMPORARY)):
            left.append(name)
        elif not entry.is_file():
            if entry.is_symlink() and not Path(entry.path).exists():
                why = "the link leads nowhere; download the checkpoint again or remove it"
                raise CheckpointError(f"{entry.path}: {why}")
        elif entry.is_symlink() and not follow_links and not _stays(Path(entry.path), homes):
            left.append(name)
        else:
            (carried if _is_genuine(Path(entry.path), name) else left).append(name)
    return SideFiles(tuple(sorted(carried)), tuple(sorted(left)))


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in patterns)


def is_tokenizers(name: str) -> bool:
    """Whether a side file belongs to the tokenizer."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in TOKENIZER_PATTERNS)


def _stays(link: Path, homes: Collection[Path]) -> bool:
    target = link.resolve()
    return any(home in target.parents for home in homes)


def _is_genuine(path: Path, name: str) -> bool:
    """False for a web page under another name, and for a git-lfs pointer to a file that the model does not need.

    Raises CheckpointError for a git-lfs pointer in place of a file that it needs.
    """
    with open_file(path) as f:
        head = read_bytes(f, path, _HEAD_BYTES)
    if why := pointer_in_place(head):
        if is_tokenizers(name) or name.endswith((".json", ".py", ".jinja")):
            raise CheckpointError(f"{path}: {why}")
        return False
    return not page_in_place(head) or name.lower().endswith((".html", ".htm", ".md", ".svg", ".xml"))


def _walk(root: Path, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Walks all files below `root`, with relative names; training folders are yielded, not entered. Skips hidden
    names."""
    try:
        with os.scandir(root / prefix) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False) and not _TRAINING.fullmatch(entry.name):
                    if entry.name != "__pycache__":
                        yield from _walk(root, f"{name}/")
                else:
                    yield name, entry
    except OSError as error:
        raise CheckpointError(f"{root / prefix}: cannot be read: {error.strerror}") from None


# ---- choosing weights


def list_folder(path: Path) -> list[str]:
    """The names in a checkpoint's folder, sorted. Raises CheckpointError."""
    try:
        return sorted(os.listdir(path))  # noqa: PTH208 (names, not paths)
    except FileNotFoundError:
        raise CheckpointError(f"no such folder: {path}; pass a folder with safetensors weights") from None
    except NotADirectoryError:
        raise CheckpointError(f"{path} is not a folder; pass the folder that holds the checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def choose_weights(path: Path, names: Sequence[str]) -> tuple[str | None, str | None]:
    """The (index file, single file) to use; both are given if the content of the index must decide between them.

    Raises CheckpointError if there is none, or no way to choose; UnsupportedError for weights of another format.
    """
    single = [n for n in names if n.endswith(".safetensors") and not n.startswith(".")]
    indexes = [n for n in names if n.endswith(INDEX_SUFFIX) and not n.startswith(".")]
    main = "model.safetensors" if "model.safetensors" in single else None
    if f"model{INDEX_SUFFIX}" in indexes:
        return f"model{INDEX_SUFFIX}", main
    if main:
        return None, main
    if len(indexes) == 1:
        return indexes[0], None
    if not indexes and len(single) == 1 and not single[0].startswith("adapter_"):
        return None, single[0]
    if indexes or (single and not single[0].startswith("adapter_")):
        found = ", ".join(show(n) for n in (indexes or single)[:4])
        raise CheckpointError(
            f"{path}: several weights files ({found}, ...) and no model{INDEX_SUFFIX} to choose between "
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
