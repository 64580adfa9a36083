"""A text as the user names it: its digest, and its characters in pieces of bounded size.

A text is a file, a folder or a pattern of files, or the one that is built in. Each file is plain text, or records, of
which one field is read (text_files.py, records.py). Torch and numpy are not needed yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from streamprune.calibration.records import Render, texts_of_lines, texts_of_rows, texts_of_table, texts_of_values
from streamprune.calibration.text_files import BLOCK, Tally, blocks, find_files, kind_of, open_bytes
from streamprune.errors import UsageError

_READ = {"lines": texts_of_lines, "values": texts_of_values, "rows": texts_of_rows}


class Piece(NamedTuple):
    """Some characters of a document, and whether it ends there. A file of plain text is one document, a record too."""

    text: str
    ends: bool


@dataclass(frozen=True)
class Text:
    """A text: `path` is a file, a folder or a pattern, None the built-in one; `text_field` is read of records."""

    path: Path | None
    text_field: str = "text"
    flag: str = "--calib"
    """What the user named it with."""
    tally: Tally = field(default_factory=Tally, compare=False)
    """What has been met in reading so far."""

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.path.name if self.path else "built-in"

    def files(self) -> list[Path | None]:
        """Its files. Raises UsageError where there is none."""
        return find_files(self.path, self.flag)

    @property
    def ids(self) -> Path | None:
        """The file of token ids that it is; None for all else. Raises UsageError for ids beside texts."""
        files = self.files()
        of_ids = [f for f in files if kind_of(f) == "ids"]
        if of_ids and len(files) > 1:
            raise UsageError(f"{self.flag} {self.path}: {of_ids[0]} holds token ids, others text; name one file")
        return of_ids[0] if of_ids else None

    def digest(self) -> str:
        """xxh3_128 of what its tokens come from: unpacked bytes, and what is read of records. Raises UsageError."""
        digest = xxhash.xxh3_128()
        files = self.files()
        for path in files:
            kind = kind_of(path)
            with open_bytes(path) as f:
                while block := f.read(1 << 20):
                    digest.update(block)
            if kind not in ("text", "ids"):
                digest.update(f"\0records\0{self.text_field}".encode())
            if len(files) > 1:
                digest.update(b"\0")
        return digest.hexdigest()

    def pieces(self, render: Render) -> Iterator[Piece]:
        """Its characters; `render` writes out a record's messages. Raises UsageError where it cannot be read."""
        for path in self.files():
            kind = kind_of(path)
            if kind in ("parquet", "arrow") and path is not None:
                yield from _in_pieces(texts_of_table(path, self.text_field, self.tally, render))
                continue
            with open_bytes(path) as f:
                if kind == "text" or path is None:
                    for block in blocks(f, path, self.tally):
                        yield Piece(block, False)
                    yield Piece("", True)
                else:
                    read = _READ[kind]
                    seen = Tally()  # of the whole file, of which the field is a part
                    yield from _in_pieces(read(blocks(f, path, seen), path, self.text_field, self.tally, render))
                    self.tally.replaced += seen.replaced


def _in_pieces(records: Iterator[str]) -> Iterator[Piece]:
    for record in records:
        text = record + "\n"
        for at in range(0, len(text), BLOCK):
            yield Piece(text[at : at + BLOCK], at + BLOCK >= len(text))


def default_seqlen(config: Mapping[str, Any]) -> int:
    """min(2048, the longest context that config.json names), in tokens."""
    return min(2048, longest_context(config) or 2048)


def check_seqlen(seqlen: int, config: Mapping[str, Any]) -> None:
    """Raises UsageError for windows that are too short to predict anything, or longer than the model's context."""
    longest = longest_context(config)
    if seqlen < 2:
        raise UsageError(f"--seqlen {seqlen}: a window needs at least 2 tokens")
    if longest is not None and seqlen > longest:
        raise UsageError(f"--seqlen {seqlen} is longer than the model's context of {longest} tokens")


def check_bos(mode: str) -> None:
    """Raises UsageError unless `mode` says when windows begin with a BOS token: "auto", "always" or "never"."""
    if mode not in ("auto", "always", "never"):
        raise UsageError(f"--bos {mode}: choose auto, always or never")


def positions(seqlen: int, has_bos: bool, config: Mapping[str, Any]) -> int:
    """Tokens of a window: `seqlen`, and a BOS token before them.

    Where that is more than the model's context holds, the window has a token less of the text.
    """
    return min(seqlen + has_bos, max(longest_context(config) or seqlen + 1, seqlen))


def longest_context(config: Mapping[str, Any]) -> int | None:
    """The longest context that config.json names, in tokens; None where it names none."""
    names = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "max_seq_len")
    limits = [part.get(name) for part in (config, config.get("text_config") or {}) for name in names]
    found = [n for n in limits if isinstance(n, int) and n > 0]
    return min(found) if found else None
