"""The header of a statistics file, read without importing torch or numpy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from streamprune.disk.header import read_shard
from streamprune.errors import CorruptStateError, StreampruneError, UsageError

FORMAT, VERSION = "streamprune-statistics", "1"


class StatisticsHeader:
    """The checked header: groups, updates, model and calibration as in statistics.py; `refs` locate the tensors."""

    def __init__(self, path: Path) -> None:
        """Raises UsageError when there is no such file, CorruptStateError when it is damaged or of another version."""
        self.path = path
        if not path.is_file():
            raise UsageError(f"{path}: no such statistics file; make one with `calibrate` or --save-stats")
        try:
            shard = read_shard(path)
            self.metadata = _metadata(path)
            self.refs = {t.name: t for t in shard.refs}
        except StreampruneError as e:
            raise CorruptStateError(f"{e}; make the statistics again with `calibrate`") from e
        if self.metadata.get("format") != FORMAT or self.metadata.get("version") != VERSION:
            raise CorruptStateError(
                f"{path} is no statistics file of version {VERSION} "
                f"({self.metadata.get('format')} {self.metadata.get('version')}); make one with `calibrate`"
            )
        if self.metadata.get("digest") != _data_digest(path):
            raise CorruptStateError(
                f"{path} is not what was written; check the disk, and make it again with `calibrate`"
            )
        try:
            self.groups: dict[str, str] = json.loads(self.metadata["groups"])
            self.model: dict[str, str] = json.loads(self.metadata["model"])
            self.calibration: dict[str, Any] = json.loads(self.metadata["calibration"])
            self.updates: dict[str, list[float]] = json.loads(self.metadata.get("updates", "{}"))
            parts = (self.groups, self.model, self.calibration, self.updates)
            if not all(isinstance(part, dict) for part in parts):
                raise ValueError("not objects")
        except (KeyError, ValueError) as e:
            raise CorruptStateError(f"{path}: its metadata is damaged ({e}); make it again with `calibrate`") from e

    def outline(self) -> Any:
        """The outline of the model, JSON values that are not checked yet; None in files that have none.

        Raises CorruptStateError when it is not what was written.
        """
        if "outline" not in self.metadata:
            return None
        try:
            if outline_digest(self.metadata) != self.metadata.get("outline_digest"):
                raise ValueError("it is not what was written")
            return json.loads(self.metadata["outline"])
        except (ValueError, RecursionError) as e:
            raise self.damaged_outline(e) from e

    def damaged_outline(self, why: object) -> CorruptStateError:
        """The error for an outline that does not describe the model."""
        return CorruptStateError(
            f"{self.path}: its outline of the model is damaged ({why}); make it again with `calibrate`"
        )


def outline_digest(metadata: Mapping[str, str]) -> str:
    """xxh3_128 of the outline and of the model that it belongs to, both as they are in the metadata."""
    return xxhash.xxh3_128_hexdigest((metadata["model"] + metadata["outline"]).encode())


def _data_digest(path: Path) -> str:
    """xxh3_128 of everything after the header."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as f:
        f.seek(8 + int.from_bytes(f.read(8), "little"))
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _metadata(path: Path) -> dict[str, str]:
    with path.open("rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    result: dict[str, str] = header.get("__metadata__", {})
    return result
