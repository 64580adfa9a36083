"""The journal of a job: one line per finished stage, which commits everything that the stage has written.

A line is JSON preceded by its xxh3_64: `<16 hex digits> {...}\\n`. A torn last line (the process died while writing
it) is cut off at the next start, and its stage is done again. Damage anywhere else is an error.

A job's state folder holds `job.json` (what the job is, with an xxh3_64 of its own), `journal`, `tokens.npy` and the
statistics of each layer; formats carry a version, and unknown versions are refused.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from streamprune.disk import durable
from streamprune.errors import CorruptStateError

Record = dict[str, Any]

VERSIONS = {"job": 2}
"""Version of JSON documents by kind, 1 for all others. Version 2 of job.json has a checksum."""

CHECKSUMMED = {"job"}
"""Kinds of documents with a checksum: an xxh3_64 of all other fields, which detects any change."""

LINE_VERSION = 2
"""Version of journal lines. Version 2 records whether a stage's cache is durable, and a batch size reduced to fit."""


def append(path: Path, record: Record) -> None:
    """Commits one record: when this returns, the record survives a power loss."""
    body = json.dumps({"v": LINE_VERSION, **record}, separators=(",", ":"), allow_nan=False).encode()
    durable.append_line(path, _digest(body) + b" " + body)


def read(path: Path) -> list[Record]:
    """All committed records; a torn last line is removed from the file.

    Raises CorruptStateError for a damaged line that is not the last, or an unknown version.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    records: list[Record] = []
    good = 0
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        body = line[17:-1]
        if not line.endswith(b"\n") or line[16:17] != b" " or line[:16] != _digest(body):
            if good + len(line) < len(data):
                raise CorruptStateError(f"{path}: line {number} is damaged; start again with --restart")
            durable.truncate(path, good)
            break
        record = json.loads(body)
        if record.get("v") != LINE_VERSION:
            raise CorruptStateError(
                f"{path}: line {number} has version {record.get('v')}, this program knows {LINE_VERSION}; "
                "finish with the version that began, or start again with --restart"
            )
        records.append(record)
        good += len(line)
    return records


def _digest(body: bytes) -> bytes:
    return xxhash.xxh3_64_hexdigest(body).encode()


def write_json(path: Path, kind: str, value: Record) -> None:
    """Writes a versioned JSON document, atomically and durably."""
    document = {"format": f"streamprune-{kind}", "version": VERSIONS.get(kind, 1), **value}
    if kind in CHECKSUMMED:
        document["xxh3_64"] = _checksum(document)
    durable.replace_file(path, json.dumps(document, indent=2, allow_nan=False).encode() + b"\n")


def read_json(path: Path, kind: str) -> Record:
    """Reads what `write_json` wrote. Raises CorruptStateError when it is damaged, of another kind or version."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise CorruptStateError(f"{path} cannot be read ({e}); start again with --restart") from e
    if not isinstance(value, dict) or value.get("format") != f"streamprune-{kind}":
        raise CorruptStateError(f"{path} is not a streamprune {kind} file; start again with --restart")
    known = VERSIONS.get(kind, 1)
    if value.get("version") != known:
        raise CorruptStateError(
            f"{path} has version {value.get('version')}, this program knows {known}; start again with --restart"
        )
    if kind in CHECKSUMMED and value.pop("xxh3_64", None) != _checksum(value):
        raise CorruptStateError(f"{path} is damaged; start again with --restart")
    return value


def _checksum(document: Record) -> str:
    """xxh3_64 of a document; the order of fields counts, and is preserved on disk."""
    return xxhash.xxh3_64_hexdigest(json.dumps(document).encode())


def differences(mine: Mapping[str, Any], recorded: Mapping[str, Any]) -> str:
    """Which of a job's fixed fields differ from recorded ones, in words; empty if none does."""
    keys = [*mine, *(k for k in recorded if k not in mine)]
    return ", ".join(
        f"{k} is {_show(recorded.get(k))} there and {_show(mine.get(k))} here"
        for k in keys
        if mine.get(k) != recorded.get(k)
    )


def is_touched(
    mine: Mapping[str, Any], recorded: Mapping[str, Any], content: object, now: Callable[[], str] | None,
    notes: list[str],
) -> bool:  # fmt: skip
    """Whether the jobs differ only in the shards' mtimes, and the recorded `content` equals `now()`.

    If so, adds a remark to `notes`.
    """
    if now is None or {k for k in mine.keys() | recorded.keys() if mine.get(k) != recorded.get(k)} != {"model shards"}:
        return False
    since = time.perf_counter()
    if content != now():
        return False
    notes.append(
        "MODEL's shards have other modification times than when this job began; their headers and 4 KiB of each tensor "
        f"are the same ({time.perf_counter() - since:.1f} s to compare), so they count as the same model"
    )
    return True


def _show(value: object) -> str:
    return "not set" if value is None else str(value)
