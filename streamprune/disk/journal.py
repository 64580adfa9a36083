"""The journal of a job: one line a finished stage, the commit point of everything else.

A line is JSON with its own xxh3_64 in front: `<16 hex digits> {...}\\n`. A torn last line (the process died
while writing it) is cut off at the next start: its stage did not happen. Damage anywhere else is an error.

A job's folder of state holds `job.json` (what the job is; it has an xxh3_64 too), `journal`, `tokens.npy` and, per
layer, the statistics; formats carry a version and unknown versions are refused.
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
"""Of JSON documents by kind; all others have 1. 2 has a seal."""

SEALED = {"job"}
"""Documents that no person is meant to read or write: the xxh3_64 of all else in them finds any damage."""

LINE_VERSION = 2
"""Of the journal's lines. 2 says of each stage whether its cache is durable, and which batch memory forced on it."""


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
    if kind in SEALED:
        document["xxh3_64"] = _seal(document)
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
    if kind in SEALED and value.pop("xxh3_64", None) != _seal(value):
        raise CorruptStateError(f"{path} is damaged; start again with --restart")
    return value


def _seal(document: Record) -> str:
    """xxh3_64 of a document, whose fields keep their order on the disk."""
    return xxhash.xxh3_64_hexdigest(json.dumps(document).encode())


def differences(mine: Mapping[str, Any], recorded: Mapping[str, Any]) -> str:
    """Says in words which of a job's fixed fields differ from recorded ones; empty when none does."""
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
    """Whether only the checkpoint's times differ, and its recorded `content` is that of `now`. Adds to `notes`."""
    if now is None or {k for k in mine.keys() | recorded.keys() if mine.get(k) != recorded.get(k)} != {"model shards"}:
        return False
    since = time.perf_counter()
    if content != now():
        return False
    notes.append(
        "MODEL's shards have other times than when this job began; their headers and 4 KiB of each tensor are the same "
        f"({time.perf_counter() - since:.1f} s to look), so they count as the same model"
    )
    return True


def _show(value: object) -> str:
    return "not set" if value is None else str(value)
