"""A text as the user names it: its digest, its characters in pieces of bounded size, and the length of windows.

A text is a file, a folder, a pattern of files, or the built-in one. Each file is plain text or a set of records, of
which one field is read (text_files.py, records.py). Imports neither torch nor numpy.
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

_READERS = {"lines": texts_of_lines, "values": texts_of_values, "rows": texts_of_rows}


class Piece(NamedTuple):
    """Characters of a document, and whether it ends with them. A document is a record or a file of plain text."""

    text: str
    ends: bool


@dataclass(frozen=True)
class Text:
    """A text: `path` is a file, a folder or a pattern; None is the built-in text. Of records, `text_field` is read."""

    path: Path | None
    text_field: str = "text"
    flag: str = "--calib"
    """The option that it was given with, for messages."""
    tally: Tally = field(default_factory=Tally, compare=False)
    """Counts of what has been read so far."""

    @property
    def name(self) -> str:
        """Its name in reports."""
        return self.path.name if self.path else "built-in"

    def files(self) -> list[Path | None]:
        """Its files. Raises UsageError when there are none."""
        return find_files(self.path, self.flag)

    @property
    def ids(self) -> Path | None:
        """The .npy file, if the text is given as token ids, else None. Raises UsageError for ids among other files."""
        files = self.files()
        arrays = [f for f in files if kind_of(f) == "ids"]
        if arrays and len(files) > 1:
            raise UsageError(f"{self.flag} {self.path}: {arrays[0]} holds token ids, others text; name one file")
        return arrays[0] if arrays else None

    def digest(self) -> str:
        """xxh3_128 of all that decides its tokens: decompressed bytes, and the field read of records.

        Raises UsageError when it cannot be read.
        """
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
        """Its characters; `render` turns a record's messages into text. Raises UsageError when it cannot be read."""
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
                    read = _READERS[kind]
                    whole = Tally()  # the field is only a part of the file's characters
                    yield from _in_pieces(read(blocks(f, path, whole), path, self.text_field, self.tally, render))
                    self.tally.replaced += whole.replaced


def _in_pieces(records: Iterator[str]) -> Iterator[Piece]:
    for record in records:
        text = record + "\n"
        for at in range(0, len(text), BLOCK):
            yield Piece(text[at : at + BLOCK], at + BLOCK >= len(text))


def default_seqlen(config: Mapping[str, Any]) -> int:
    """The context length that config.json names, in tokens, at most 2048; 2048 where it names none."""
    return min(2048, longest_context(config) or 2048)


def check_seqlen(seqlen: int, config: Mapping[str, Any]) -> None:
    """Raises UsageError when windows are too short to predict a token, or longer than the model's context."""
    longest = longest_context(config)
    if seqlen < 2:
        raise UsageError(f"--seqlen {seqlen}: a window needs at least 2 tokens, to predict one from the other")
    if longest is not None and seqlen > longest:
        raise UsageError(f"--seqlen {seqlen} is longer than the model's context of {longest} tokens")


def check_bos(mode: str) -> None:
    """Raises UsageError unless `mode` is "auto", "always" or "never"."""
    if mode not in ("auto", "always", "never"):
        raise UsageError(f"--bos {mode}: choose auto, always or never")


def positions(seqlen: int, has_bos: bool, config: Mapping[str, Any]) -> int:
    """Tokens in a window: `seqlen` of the text, and a BOS token in front if `has_bos`.

    Where that would exceed the model's context, the window has one token less of the text.
    """
    return min(seqlen + has_bos, max(longest_context(config) or seqlen + 1, seqlen))


_AFTER_PADDING = frozenset({
    "camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
})  # fmt: skip
"""Model types that count positions from their padding token's number plus 1 on, so that fewer are left for tokens."""


def longest_context(config: Mapping[str, Any]) -> int | None:
    """The smallest context length that config.json names, in tokens; None where it names none.

    RoBERTa and its kin use the first positions for nothing: of 514, with padding token 1, 512 are left.
    """
    names = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "max_seq_len")
    limits = [part.get(name) for part in (config, config.get("text_config") or {}) for name in names]
    found = [n for n in limits if isinstance(n, int) and n > 0]
    if not found:
        return None
    padding = config.get("pad_token_id", 1)
    unused = padding + 1 if config.get("model_type") in _AFTER_PADDING and isinstance(padding, int) else 0
    return max(1, min(found) - unused)
