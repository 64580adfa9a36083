"""Reads the text of records (JSON, CSV, TSV, Parquet, Arrow), one record in memory at a time.

A record's text is one of its fields: a string, or a list of messages ({"role": …, "content": …}) that the tokenizer's
chat template turns into one. Imports neither torch nor numpy.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from streamprune.calibration.text_files import Tally
from streamprune.errors import UsageError

Render = Callable[[list[dict[str, Any]]], str]
"""Turns messages into text."""

MAX_CHARACTERS = 256 << 20
"""Longest record, which is parsed as a whole."""

_BETWEEN = re.compile(r"[\s,\[\]]*")
_SURROGATE = re.compile("[\ud800-\udfff]")


def texts_of_lines(blocks: Iterator[str], path: Path, field: str, tally: Tally, render: Render) -> Iterator[str]:
    """The text of each line, a JSON object; empty lines are skipped. Raises UsageError for any other line."""
    for number, line in enumerate(_lines(blocks, path), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as e:
            why = f'is not a JSON record with a "{field}" string'
            raise UsageError(f"{path}: line {number} {why}; either all lines must be records, or none") from e
        yield text_of(value, f"{path}: line {number}", field, tally, render)


def _lines(blocks: Iterator[str], path: Path) -> Iterator[str]:
    parts: list[str] = []
    size = 0
    for block in blocks:
        first, *rest = block.split("\n")
        parts.append(first)
        size += len(first)
        if size > MAX_CHARACTERS:
            raise UsageError(f"{path}: a record is longer than {MAX_CHARACTERS >> 20} Mi characters; split it")
        for line in rest:
            yield "".join(parts)
            parts, size = [line], len(line)
    yield "".join(parts)


def texts_of_values(blocks: Iterator[str], path: Path, field: str, tally: Tally, render: Render) -> Iterator[str]:
    """The text of each object in a JSON array, or of concatenated objects, however they are spread over lines.

    Raises UsageError for anything else.
    """
    decoder = json.JSONDecoder()
    held, at, number, open_arrays = "", 0, 0, 0  # parsing goes on at `at`: slicing would copy the rest for each record
    wanted = 0  # characters to read before the next attempt; doubled when an object is incomplete
    ended = False
    while True:
        between = _BETWEEN.match(held, at).group()  # type: ignore[union-attr]  # matches the empty string, too
        open_arrays += between.count("[") - between.count("]")
        at += len(between)
        left = len(held) - at
        if left and held[at] != "{":
            raise UsageError(f"{path}: record {number + 1} is not a JSON object")
        if left and (ended or left >= wanted):
            try:
                value, at = decoder.raw_decode(held, at)
            except (ValueError, RecursionError) as e:
                if ended or left > MAX_CHARACTERS:
                    raise UsageError(f"{path}: record {number + 1} is not a JSON object ({e})") from e
                wanted = 2 * left
            else:
                number, wanted = number + 1, 0
                yield text_of(value, f"{path}: record {number}", field, tally, render)
                continue
        elif ended:
            if open_arrays:
                raise UsageError(f"{path}: ends within the array after record {number}; is the file complete?")
            return
        parts, size = [held[at:]], left
        while not ended and size <= max(wanted, left):
            block = next(blocks, None)
            ended = block is None
            parts.append(block or "")
            size += len(parts[-1])
        held, at = "".join(parts), 0


def texts_of_rows(blocks: Iterator[str], path: Path, field: str, tally: Tally, render: Render) -> Iterator[str]:
    """The text of each row of a CSV or TSV file with a header row. Raises UsageError when it lacks the column."""
    csv.field_size_limit(MAX_CHARACTERS)
    lines = (line + "\n" for line in _lines(blocks, path))
    try:
        rows = csv.DictReader(lines, delimiter="\t" if ".tsv" in path.name.lower() else ",")
        names = rows.fieldnames or []
        if field not in names:
            raise UsageError(f"{path}: has no column {field}, only {', '.join(names)}; choose one with --text-field")
        for number, row in enumerate(rows, 1):
            yield text_of({field: row[field] or ""}, f"{path}: row {number}", field, tally, render)
    except csv.Error as e:
        raise UsageError(f"{path}: cannot be read as comma- or tab-separated values ({e}); name another file") from e


def texts_of_table(path: Path, field: str, tally: Tally, render: Render) -> Iterator[str]:
    """The text of each row of a Parquet or Arrow file. Raises UsageError without pyarrow or the column."""
    try:
        from pyarrow import ArrowException
    except ImportError:
        raise UsageError(f"{path}: Parquet and Arrow need one more package: pip install pyarrow") from None
    try:
        number = 0
        for batch in _batches(path, field):
            for value in batch.column(batch.schema.names.index(field)).to_pylist():
                number += 1
                yield text_of({field: value}, f"{path}: row {number}", field, tally, render)
    except (ArrowException, OSError) as e:
        raise UsageError(f"{path}: cannot be read as a Parquet or Arrow file ({e}); name another file") from e


def _batches(path: Path, field: str) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    def check(names: list[str]) -> None:
        if field not in names:
            raise UsageError(f"{path}: has no column {field}, only {', '.join(names)}; choose one with --text-field")

    with path.open("rb") as f:
        begin = f.read(6)
    if begin.startswith(b"PAR1"):
        with parquet.ParquetFile(path) as table:
            check(table.schema_arrow.names)
            yield from table.iter_batches(batch_size=64, columns=[field])
        return
    with pyarrow.memory_map(str(path)) as source:
        if begin == b"ARROW1":
            reader = pyarrow.ipc.open_file(source)
            check(reader.schema.names)
            yield from (part for i in range(reader.num_record_batches) for part in _small(reader.get_batch(i)))
        else:
            with pyarrow.ipc.open_stream(source) as stream:
                check(stream.schema.names)
                yield from (part for batch in stream for part in _small(batch))


def _small(batch: Any) -> Iterator[Any]:
    return (batch.slice(at, 64) for at in range(0, batch.num_rows, 64))


def text_of(record: object, where: str, field: str, tally: Tally, render: Render) -> str:
    """The text of one record. Raises UsageError, with `where` in front, when its `field` holds no text."""
    if not isinstance(record, dict):
        raise UsageError(f'{where} is not a JSON record with a "{field}" string')
    if field not in record:
        names = ", ".join(list(map(str, record))[:8]) or "nothing"
        raise UsageError(f'{where} is not a JSON record with a "{field}" string: it has {names}; see --text-field')
    value = record[field]
    if isinstance(value, list) and value and all(isinstance(m, dict) and "role" in m for m in value):
        value = render(value)
    if not isinstance(value, str):
        raise UsageError(
            f'{where} is not a JSON record with a "{field}" string, or a list of messages with role and content'
        )
    if _SURROGATE.search(value):
        repaired = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        tally.replaced += repaired.count("\ufffd") - value.count("\ufffd")
        value = repaired
    tally.characters += len(value)
    return value
