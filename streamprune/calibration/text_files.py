"""Finds the files of a text, detects their formats, and reads their characters in blocks of bounded size.

Formats are detected by content, not by name: compressed files (gzip, bzip2, xz, Zstandard) are decompressed; a byte
order mark selects UTF-8, UTF-16 or UTF-32, otherwise a file is UTF-8; CRLF is read as LF. Bytes that cannot be decoded
become U+FFFD and are counted; a file with too many of them is refused. Imports neither torch nor numpy.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import glob
import gzip
import importlib.resources
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from streamprune.errors import UsageError

BLOCK = 1 << 16
"""Most bytes, or characters, that are read at once."""

_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
RECORDS = (".json", ".jsonl", ".ndjson")
_DELIMITED = (".csv", ".tsv")
_TEXTS = (*RECORDS, *_DELIMITED, ".txt", ".text", ".parquet", ".arrow")
_METADATA = ("dataset_info.json", "dataset_infos.json", "state.json")  # which saved datasets keep beside their tables
_MARKS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig"),
          (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip
_KEY = r'\{\s*"(?:[^"\\]|\\.)*"\s*:'
_OBJECT, _ARRAY = re.compile(rf"\s*{_KEY}"), re.compile(rf"\s*\[\s*{_KEY}")
_UNDECODABLE_SHARE = 8  # at most one character in this many may be U+FFFD or NUL


@dataclass
class Tally:
    """Counts made while a text is read."""

    characters: int = 0
    replaced: int = 0
    """Undecodable bytes and unpaired surrogates, which became U+FFFD."""
    tokens: int = 0
    """Tokens read from the text, before windows are drawn from them."""


def find_files(path: Path | None, flag: str) -> list[Path | None]:
    """The files of a text: `path` itself, those of a folder with a known suffix, or those that a pattern matches.

    None stands for the built-in text. Raises UsageError, naming `flag`, when there are none.
    """
    if path is None or path.is_file():
        return [path]
    if path.is_dir():
        named = (p for p in sorted(path.iterdir()) if p.name not in _METADATA and _base_name(p.name).endswith(_TEXTS))
        found = [p for p in named if p.is_file()]
        if not found:
            raise UsageError(
                f"{flag} {path}: the folder holds no texts ({', '.join(_TEXTS)}, compressed or not); for those in its "
                f"subfolders give a pattern, such as '{path}/*/*.parquet'"
            )
        return list(found)
    if path.exists():
        raise UsageError(f"{flag} {path}: is not a regular file; a text is read more than once, so save it to a file")
    matched = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())  # noqa: PTH207
    if not matched:
        raise UsageError(f"{flag} {path}: no such file")
    return list(matched)


def _base_name(name: str) -> str:
    """A file's name in lower case, without the suffix of a compression."""
    name = name.lower()
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    return name


@contextlib.contextmanager
def open_bytes(path: Path | None) -> Iterator[IO[bytes]]:
    """The decompressed bytes of a file; None is the built-in text. Raises UsageError when it cannot be read."""
    try:
        with contextlib.ExitStack() as stack:
            if path is None:
                source = importlib.resources.files("streamprune") / "text" / "calibration.txt.gz"
                raw = stack.enter_context(source.open("rb"))
            else:
                raw = stack.enter_context(path.open("rb"))
            begin = raw.read(6)
            raw.seek(0)
            yield stack.enter_context(_decompressed(raw, begin, path))
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as e:
        raise UsageError(f"{path}: cannot be read as text ({e}); name another file") from e


def _decompressed(raw: IO[bytes], begin: bytes, path: Path | None) -> Any:
    if begin.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=raw)
    if begin.startswith(b"BZh"):
        return bz2.BZ2File(raw)
    if begin.startswith(b"\xfd7zXZ\x00"):
        return lzma.LZMAFile(raw)
    if begin.startswith(b"\x28\xb5\x2f\xfd"):
        try:
            import zstandard
        except ImportError:
            raise UsageError(f"{path}: Zstandard needs one more package: pip install zstandard") from None
        return zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
    return raw


def kind_of(path: Path | None) -> str:
    """The format of a file: "ids", "parquet", "arrow", "rows" (comma- or tab-separated), "lines" (a JSON object on
    each), "values" (any other JSON), or "text".

    Raises UsageError when the file cannot be read, or when its beginning is a mixture of JSON and text.
    """
    if path is None:
        return "text"
    with open_bytes(path) as f:
        begin = f.read(BLOCK)
    if path.suffix.lower() == ".npy" or begin.startswith(b"\x93NUMPY"):
        return "ids"
    if begin.startswith(b"PAR1"):
        return "parquet"
    if begin.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    _refuse_placeholders(path, begin)
    if _base_name(path.name).endswith(_DELIMITED):
        return "rows"
    named = _base_name(path.name).endswith(RECORDS)
    head = next(iter(blocks(io.BytesIO(begin), path, Tally())), "")
    if _ARRAY.match(head) or (named and head.lstrip().startswith("[")):
        return "values"
    lines = [line for line in head.split("\n") if line.strip()]
    if lines and _OBJECT.match(lines[0]):
        return "lines" if len(lines) == 1 or lines[0].rstrip().endswith("}") else "values"
    if named:
        return "values" if head.lstrip().startswith("{") else "lines"
    records = sum(_OBJECT.match(line) is not None for line in lines)
    if records > len(lines) // 2:
        raise UsageError(f"{path}: most lines are JSON records, but line 1 is not; remove it, or name a plain text")
    return "text"


def _refuse_placeholders(path: Path, begin: bytes) -> None:
    """Raises UsageError for what a failed download leaves in place of a text, and for binary files."""
    if begin.startswith(b"version https://git-lfs"):
        raise UsageError(f"{path}: is a Git LFS pointer, not the text; run `git lfs pull`")
    if begin.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")) and not _base_name(path.name).endswith(
        (".html", ".htm")
    ):
        raise UsageError(f"{path}: is an HTML page, not the text; download the file itself")
    if b"\0" in begin[:512] and not begin.startswith(tuple(mark for mark, _ in _MARKS)):
        raise UsageError(f"{path}: is not text: it begins with NUL bytes; name another file")


def blocks(f: IO[bytes], path: Path | None, tally: Tally) -> Iterator[str]:
    """The characters of an open file, in blocks of at most BLOCK.

    Raises UsageError when more than an eighth of the characters so far could not be decoded.
    """
    begin = f.read(BLOCK)
    encoding = next((name for mark, name in _MARKS if begin.startswith(mark)), "utf-8")
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)("replace"), translate=True)
    raw, tail, undecodable = begin, b"", 0
    while True:
        text = decoder.decode(raw, final=not raw)
        # a U+FFFD that stands in the file itself; `tail` is for one that was cut in two
        genuine = (tail + raw).count(b"\xef\xbf\xbd") if encoding.startswith("utf-8") else 0
        replaced = max(text.count("\ufffd") - genuine, 0)
        tail = (tail + raw)[-2:]
        tally.characters += len(text)
        tally.replaced += replaced
        undecodable += replaced + text.count("\0")
        if undecodable * _UNDECODABLE_SHARE > tally.characters:
            raise UsageError(
                f"{path}: is not text: too much of it is not {encoding.removesuffix('-sig').upper()}; name another file"
            )
        if text:
            yield text
        if not raw:
            return
        raw = f.read(BLOCK)
