"""The report of an output, `streamprune.json`: read, and compared with the files that it lists."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from streamprune.disk import journal
from streamprune.errors import CorruptStateError

REPORT = "streamprune.json"

CARD = "README.md"
"""The model card, which people are meant to write in: an output is as it was whatever has become of it."""

Report = dict[str, Any]


def file_digest(path: Path) -> str:
    """xxh3_128 of a file's bytes. Raises OSError."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def report_fields(out: Path, report: Mapping[str, Any], **kinds: type | tuple[type, ...]) -> list[Any]:
    """The fields `kinds` of the report of `out`, in this order.

    Raises CorruptStateError if one is missing or of another type.
    """
    for name, kind in kinds.items():
        if not isinstance(report.get(name), kind):
            raise CorruptStateError(f"{out / REPORT} is damaged ({name}); remove {out} and run again")
    return [report[name] for name in kinds]


def sound_report(folder: Path) -> Report:
    """A report with the fields that every report must have. Raises CorruptStateError."""
    report = journal.read_json(folder / REPORT, "report")
    job, files = report.get("job", {}), report.get("files", [])
    if not (isinstance(job, dict) and isinstance(files, list) and all(map(_is_file, files))):
        raise CorruptStateError(f"{folder / REPORT} is damaged; start again with --restart")
    return report


def _is_file(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("bytes"), int)


def read_report(folder: Path) -> Report:
    """The report of a finished output. Raises CorruptStateError."""
    try:
        return sound_report(folder)
    except CorruptStateError as e:
        what = str(e).removesuffix("; start again with --restart")
        raise CorruptStateError(f"{what}; remove {folder} and run again") from e


def report_of_pruning(folder: Path) -> Report | None:
    """The report that `prune` wrote, also where `pack` has put it into its own; None if there is none.

    Raises CorruptStateError, whose message does not say what mends it.
    """
    path = folder / REPORT
    if not path.is_file():
        return None
    try:
        report = journal.read_json(path, "report")
    except CorruptStateError as e:
        raise CorruptStateError(str(e).removesuffix("; start again with --restart")) from e
    packed = report.get("packed")
    if isinstance(packed, dict):
        report = before_packing(path, packed) or {}
    return report if "linears" in report else None


def before_packing(path: Path, packed: Mapping[str, Any]) -> Report | None:
    """The report of prune, which `pack` keeps as text in its own at `path`; None if what was packed had none.

    Raises CorruptStateError.
    """
    try:
        files = packed["original"]["files"]
        if REPORT not in files:
            return None
        report = json.loads(files[REPORT]["text"])
        if report.get("format") != "streamprune-report" or report.get("version") != 1:
            raise TypeError
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise CorruptStateError(f"{path} is of a packed model, and does not say how that was pruned") from None
    return dict(report)


def check_files(folder: Path, report: Report) -> None:
    """Raises CorruptStateError if a file of a finished output is missing or has another size."""
    for file in report.get("files", []):
        if file["name"] != CARD and not is_whole(folder, file):
            path = folder / file["name"]
            raise CorruptStateError(
                f"{path} is missing or not {file['bytes']} bytes long; remove {folder} and run again"
            )


def is_whole(folder: Path, file: Mapping[str, Any]) -> bool:
    """Whether a file of `folder` is there, as long as its entry in a report or journal says: name and bytes."""
    path = folder / str(file["name"])
    return path.is_file() and path.stat().st_size == file["bytes"]
