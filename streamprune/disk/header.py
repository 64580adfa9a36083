"""The header of one safetensors file, checked down to the last byte.

A file is `8 bytes n (little-endian) | n bytes JSON header | data`. The header maps each tensor to its dtype,
shape and byte range in data; the ranges must cover the data without overlap or gap
(https://github.com/huggingface/safetensors#format). Enforces rules of the format that the safetensors library does
not check: the header begins with `{`, no key occurs twice, `__metadata__` maps strings to strings. Imports neither
torch nor numpy.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from streamprune.errors import CheckpointError

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip

MAX_HEADER_BYTES = 100_000_000
_MAX_RANK = 64  # as numpy and torch


@dataclass(frozen=True)
class TensorRef:
    """Where one tensor lies: bytes begin to end (absolute, end exclusive) of the file `shard`."""

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    def within(self, before: TensorRef, now: TensorRef) -> TensorRef:
        """Where this tensor, which is `before` or a part of it, lies when that has been written to `now`."""
        if self.shape == now.shape:
            return now
        begin = now.begin + self.begin - before.begin
        return replace(now, shape=self.shape, begin=begin, end=begin + self.nbytes)


@dataclass(frozen=True)
class Shard:
    """A checked shard: tensors by offset, xxh3_128 of the header, size in bytes, mtime in ns."""

    refs: tuple[TensorRef, ...]
    header: str
    size: int
    mtime_ns: int


def read_shard(path: Path) -> Shard:
    """Read and check the header of the safetensors file `path`.

    Raises:
        CheckpointError: missing, unreadable, truncated or malformed.
    """
    with open_file(path) as f:
        info = os.fstat(f.fileno())
        return shard_in(f, path, info.st_size, info.st_mtime_ns)


def shard_in(f: BinaryIO, path: Path, size: int, mtime_ns: int) -> Shard:
    """As read_shard, of a file that is open, or of its beginning."""
    header = _read_header(f, path, size)
    refs, _ = check_header(path, header, size)
    digest = xxhash.xxh3_128_hexdigest(header_prefix(header) + header)
    return Shard(tuple(refs), digest, size, mtime_ns)


def read_header(path: Path) -> bytes:
    """The JSON text of a safetensors file's header, with its padding. Raises CheckpointError as read_shard."""
    with open_file(path) as f:
        return _read_header(f, path, os.fstat(f.fileno()).st_size)


def header_prefix(header: bytes) -> bytes:
    """The 8 bytes that come before a header."""
    return len(header).to_bytes(8, "little")


def _read_header(f: BinaryIO, path: Path, size: int) -> bytes:
    prefix = read_bytes(f, path, 8)
    _refuse_stand_in(path, prefix + read_bytes(f, path, 120))
    f.seek(8)
    if len(prefix) < 8:
        raise CheckpointError(
            f"{path}: truncated: ends at byte {len(prefix)}, the header length takes 8; download it again"
        )
    start = 8 + int.from_bytes(prefix, "little")
    if start - 8 > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: the header claims {start - 8} bytes, the format allows {MAX_HEADER_BYTES}; this is "
            "no safetensors file, download it again"
        )
    header = read_bytes(f, path, start - 8)
    if start > size or len(header) < start - 8:
        raise CheckpointError(
            f"{path}: truncated: the header should end at byte {start}, the file ends at {size}; download it again"
        )
    return header


def check_header(path: Path, header: bytes, size: int) -> tuple[list[TensorRef], dict[str, str]]:
    """Checks the JSON text of a header; `path` and `size` are those of the file that it is (or was) part of.

    Returns its tensors in order of offset, and its metadata.

    Raises:
        CheckpointError: it is malformed, or its tensors do not cover the file.
    """
    start = 8 + len(header)
    if header[:1] != b"{":
        raise CheckpointError(
            f"{path}: byte 8 does not begin a JSON object; this is no safetensors file, download it again"
        )
    entries = parse_object(path, header, "the header")
    metadata = {} if entries.get("__metadata__", {}) is None else entries.get("__metadata__", {})
    entries.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ does not map text to text; save the file again")
    refs = [_tensor_ref(path, name, entry, start) for name, entry in entries.items()]
    refs.sort(key=lambda ref: (ref.begin, ref.end))
    _check_cover(path, refs, start, size)
    return refs, metadata


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_text(name: str) -> bool:
    """False for an unpaired surrogate, which JSON can express but UTF-8 cannot."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _tensor_ref(path: Path, name: str, entry: Any, start: int) -> TensorRef:
    """Check one header entry; `start` is where the shard's data begins."""

    def bad(why: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {show(name)}: {why}; download the file again")

    if not name or not _is_text(name):
        raise bad("the name is empty or no valid text")
    if not isinstance(entry, dict):
        raise bad("the entry is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise bad(f"the dtype {show(dtype)} is unknown")
    if not isinstance(shape, list) or len(shape) > _MAX_RANK or not all(_is_size(n) for n in shape):
        raise bad(f"the shape {show(shape)} is not a list of at most {_MAX_RANK} sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        raise bad(f"the data_offsets {show(offsets)} are not two byte positions")
    begin, end = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (end - begin):
        raise bad(f"{dtype} {show(shape)} takes {show(-(-bits // 8))} bytes, but its data_offsets are {begin} to {end}")
    return TensorRef(name, path.name, dtype, tuple(shape), start + begin, start + end)


def _check_cover(path: Path, refs: Sequence[TensorRef], start: int, size: int) -> None:
    """`refs` by offset must cover the bytes from start to size exactly."""
    at = start
    for ref in refs:
        if ref.begin != at:
            kind = "a gap" if ref.begin > at else "an overlap"
            raise CheckpointError(
                f"{path}: tensor {show(ref.name)} begins at byte {ref.begin} instead of {at}: {kind}; "
                "save the file again"
            )
        at = ref.end
    if at != size:
        kind = "truncated" if at > size else "bytes after the last tensor"
        raise CheckpointError(
            f"{path}: {kind}: the data should end at byte {at}, the file ends at {size}; download it again"
        )


# ---- files and texts


def open_file(path: Path) -> BinaryIO:
    """Open the regular file `path` for reading.

    Raises:
        CheckpointError: it is missing, a dangling link, a folder or a device, or may not be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before open: opening a pipe would wait for its writer
            raise CheckpointError(f"{path}: is not a regular file; download the checkpoint again")
        return path.open("rb", buffering=0)
    except FileNotFoundError:
        why = "the link leads nowhere" if path.is_symlink() else "is missing"
        raise CheckpointError(f"{path}: {why}; download the checkpoint again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def read_bytes(file: BinaryIO, path: Path, size: int) -> bytes:
    """Up to `size` bytes from the current position of `file`, -1 for all. Raises CheckpointError."""
    try:
        parts = []
        while size and (part := file.read(size)):
            parts.append(part)
            size -= len(part) if size > 0 else 0
        return b"".join(parts)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def pointer_in_place(head: bytes) -> str | None:
    """If a file that begins with `head` is a git-lfs pointer, the end of an error message about it; else None."""
    if not head.startswith(b"version https://git-lfs.github.com/"):
        return None
    return "is a git-lfs pointer, not the file itself; run `git lfs pull` in its folder"


def page_in_place(head: bytes) -> str | None:
    """If a file that begins with `head` is a web page, the end of an error message about it; else None."""
    if not head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html")):
        return None
    return "is a web page that was saved in place of the file; download it again, logged in if the model asks for it"


def _refuse_stand_in(path: Path, head: bytes) -> None:
    if why := pointer_in_place(head) or page_in_place(head):
        raise CheckpointError(f"{path}: {why}")


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {show(key)} occurs twice")
        found[key] = value
    return found


def parse_object(path: Path, data: bytes, what: str, *, repeats: bool = False) -> dict[str, Any]:
    """The JSON object in `data`; `repeats` allows repeated keys (the last one counts).

    Raises:
        CheckpointError: no UTF-8, no JSON or no object; `what` names it in the message.
    """
    _refuse_stand_in(path, data[:512])
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=None if repeats else _no_repeats)
    except UnicodeDecodeError as error:
        why = f"byte {error.start} is not UTF-8"
    except RecursionError:
        why = "it is nested too deeply"
    except ValueError as error:
        why = str(error)
    else:
        if isinstance(value, dict):
            return value
        why = "it is not a JSON object"
    raise CheckpointError(f"{path}: {what} is malformed: {show(why)}; download the checkpoint again")


def show(value: object) -> str:
    """`value` for an error message: one line of at most 200 characters, escaped if not all of them are printable."""
    try:
        text = str(value)
    except (RecursionError, ValueError):  # nested too deeply, an integer of thousands of digits
        text = "..."
    short = text if len(text) <= 200 else text[:197] + "..."
    return short if short.isprintable() else ascii(short)
