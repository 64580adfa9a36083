"""The texts that calibration and evaluation read, as bytes and as pieces; torch and numpy are not needed yet."""

from __future__ import annotations

import contextlib
import gzip
import importlib.resources
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import xxhash

from streamprune.errors import UsageError

_PIECE_CHARACTERS = 1 << 16


@contextlib.contextmanager
def open_text(path: Path | None) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """The bytes of a text, unpacked when its name ends in .gz; None is the built-in text.

    Raises UsageError when the file cannot be read.
    """
    try:
        if path is None:
            source = importlib.resources.files("streamprune") / "text" / "calibration.txt.gz"
            with source.open("rb") as packed, gzip.open(packed) as f:
                yield f
        elif path.name.endswith(".gz"):
            with gzip.open(path) as f:
                yield f
        else:
            with path.open("rb") as f:
                yield f
    except (OSError, EOFError, zlib.error) as e:
        raise UsageError(f"{path}: cannot be read as text ({e}); name another file") from e


def text_digest(path: Path | None) -> str:
    """xxh3_128 of a text's unpacked bytes. Raises UsageError when it cannot be read."""
    digest = xxhash.xxh3_128()
    with open_text(path) as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def text_pieces(path: Path | None) -> Iterator[str]:
    """The text in pieces: records of a .jsonl, runs of whole lines otherwise."""
    records = path is not None and path.name.removesuffix(".gz").endswith(".jsonl")
    with open_text(path) as f:
        piece: list[str] = []
        size = 0
        for number, raw in enumerate(f, 1):
            try:
                line = raw.decode("utf-8")
                if records:
                    if line.strip():
                        yield json.loads(line)["text"] + "\n"
                    continue
            except UnicodeDecodeError as e:
                raise UsageError(f"{path}: line {number} is not UTF-8 text") from e
            except (ValueError, KeyError, TypeError, RecursionError) as e:
                raise UsageError(f'{path}: line {number} is not a JSON record with a "text" string') from e
            piece.append(line)
            size += len(line)
            if size >= _PIECE_CHARACTERS:
                yield "".join(piece)
                piece, size = [], 0
        if piece:
            yield "".join(piece)


def default_seqlen(config: Mapping[str, Any]) -> int:
    """min(2048, the longest context that config.json names), in tokens."""
    return min(2048, _longest(config) or 2048)


def check_seqlen(seqlen: int, config: Mapping[str, Any]) -> None:
    """Raises UsageError for windows that are too short to predict anything, or longer than the model's context."""
    longest = _longest(config)
    if seqlen < 2:
        raise UsageError(f"--seqlen {seqlen}: a window needs at least 2 tokens")
    if longest is not None and seqlen > longest:
        raise UsageError(f"--seqlen {seqlen} is longer than the model's context of {longest} tokens")


def _longest(config: Mapping[str, Any]) -> int | None:
    names = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "max_seq_len")
    limits = [part.get(name) for part in (config, config.get("text_config") or {}) for name in names]
    found = [n for n in limits if isinstance(n, int) and n > 0]
    return min(found) if found else None
