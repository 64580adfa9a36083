"""The results of a comparison, saved after every cell, and the fields that identify a comparison."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash
from bench_rig import ROOT, BenchError, machine

from streamprune.disk import durable, journal
from streamprune.errors import CorruptStateError

FILES = ("comparison.json", "comparison.md", "comparison.png")
_JOB_OPTIONS = ("samples", "seqlen", "device", "dtype", "max_ram", "max_vram")

Cell = dict[str, Any]


def describe_job(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that the figures depend on: model, texts, settings, program, machine; but not methods and amounts.

    Raises the errors of streamprune.errors when MODEL or a text cannot be read.
    """
    from streamprune.calibration.texts import Text
    from streamprune.disk.checkpoint import open_checkpoint
    from streamprune.disk.hub import resolve_model

    def text(given: str) -> dict[str, str]:
        return {"name": Path(given).name, "xxh3_128": Text(Path(given)).digest()}

    checkpoint = open_checkpoint(resolve_model(arguments.model))
    other = arguments.reference_text
    here = machine()
    return {
        "model": {
            "name": checkpoint.path.resolve().name,
            **checkpoint.identity(),
            "tokenizer": checkpoint.fingerprint()["tokenizer"],
        },
        "calib": text(arguments.calib),
        "text": text(arguments.text),
        "kl": {"text": text(other)} if other is not None else {"windows": arguments.kl_windows},
        **{name: getattr(arguments, name) for name in _JOB_OPTIONS},
        "versions": {name: here[name] for name in ("python", "torch", "numpy", "numba", "transformers")}
        | {"streamprune": version("streamprune"), "source": source_digest()},
        "machine": {name: here[name] for name in ("processor", "gpu")} | {"cores": os.cpu_count()},
    }


def source_digest() -> str:
    """xxh3_128 of the package's Python files, by path: the version alone does not change with each commit."""
    digest = xxhash.xxh3_128()
    for path in sorted((ROOT / "streamprune").rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def amount_name(amount: str) -> str:
    """An amount as part of a folder's name."""
    return amount.replace(":", "of")


class Results:
    """comparison.json and comparison.md in `folder`, replaced in one step by every keep…().

    Raises BenchError when the folder holds another comparison, or anything else.
    """

    def __init__(
        self, folder: Path, job: dict[str, Any], markdown: Callable[[dict[str, Any]], str], *, restart: bool
    ) -> None:
        self.folder, self._markdown = folder, markdown
        self.value: dict[str, Any] = {"job": job, "runs": [], "dense": None, "calibration": {}, "cells": []}
        ours = folder / FILES[0]
        if restart and ours.exists():
            self._clear()
        if ours.exists():
            self._read(ours, job)
        elif others := sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")):
            raise BenchError(f"--out {folder} holds {others[0]} and no comparison; choose another folder")

    def _read(self, path: Path, job: dict[str, Any]) -> None:
        try:
            there = journal.read_json(path, "comparison")
        except CorruptStateError as e:
            raise BenchError(f"{e}; --restart throws the comparison away") from e
        if differing := [name for name in job if there["job"].get(name) != job[name]]:
            raise BenchError(
                f"--out {self.folder} holds a comparison with another {', '.join(differing)}; "
                "choose another folder, or throw it away with --restart"
            )
        self.value = {key: there[key] for key in self.value}

    def _clear(self) -> None:
        """Deletes the results last, because they mark the folder as that of a comparison."""
        for name in ("work", "models"):
            durable.clear(self.folder / name)
        for name in reversed(FILES):
            durable.remove(self.folder / name)

    @property
    def dense(self) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self.value["dense"]
        return found

    @property
    def calibration(self) -> dict[str, Any]:
        """What the shared statistics of each seed took, by the seed as text."""
        found: dict[str, Any] = self.value["calibration"]
        return found

    def is_done(self, method: str, amount: str, seed: int) -> bool:
        """Whether a cell is there and did not fail."""
        return any(_key(cell) == (method, amount, seed) and "error" not in cell for cell in self.value["cells"])

    def begin(self, run: dict[str, Any]) -> None:
        """Records that a command was started."""
        self.value["runs"].append(run)
        self.save()

    def keep_dense(self, found: dict[str, Any]) -> None:
        """Records what eval says of the dense model, places left out."""
        self.value["dense"] = {key: found[key] for key in found if key not in ("model", "text")}
        self.save()

    def keep_calibration(self, seed: int, found: dict[str, Any]) -> None:
        """Records what the shared statistics of a seed took."""
        self.value["calibration"][str(seed)] = found
        self.save()

    def keep(self, cell: Cell) -> None:
        """Records a cell, in the place of a failed one if there is one."""
        cells = self.value["cells"]
        for position, other in enumerate(cells):
            if _key(other) == _key(cell):
                cells[position] = cell
                break
        else:
            cells.append(cell)
        self.save()

    def save(self) -> None:
        """Replaces both files."""
        journal.write_json(self.folder / FILES[0], "comparison", self.value)
        durable.replace_file(self.folder / FILES[1], (self._markdown(self.value) + "\n").encode())


def _key(cell: Cell) -> tuple[str, str, int]:
    return cell["method"], cell["amount"], cell["seed"]
